"""The report page: what leads it, what stands beside what, and what a reader is told about it."""

import json

import pytest
import torch
import yaml
from planted_pairs import results

from orpo.errors import DataError
from orpo.evaluation.per_pair import write_results
from orpo.evaluation.verdict import compare
from orpo.report.page import write_report
from orpo.run.directory import RunDirectory
from orpo.run.log import figures_to_json
from orpo.settings.config import Objective

SETTINGS = {"model_name_or_path": "base", "dataset_name": "pairs.jsonl", "beta": 0.1, "lora_r": 16}


def planted(number, gain, first=0):
    """Pairs before and after, which gained so much; two sources."""
    draw = torch.Generator().manual_seed(number)
    chosen, rejected = (-3 + torch.randn(number, generator=draw).double() / 2 for _ in range(2))
    sources = [f"held.jsonl:{line}" for line in range(first, first + number)]
    groups = ["web" if line % 3 else "books" for line in range(number)]
    known = {"sources": sources, "groups": groups}
    return results(chosen, rejected, **known), results(chosen + gain, rejected, **known)


def make_run(folder, sets, *, steps=20, finished=True, **settings):
    """A run directory with evaluations before and after, by set name."""
    folder.mkdir(parents=True)
    objective = Objective()
    lines = [
        {
            "step": step, "kind": "train", "epoch": 1, "seconds": 3.0 * step,
            "metrics": {"loss": 2.0, "tokens": 1500, "tokens_per_second": 100.0, "peak_memory": 1.25,
                        "odds_share": 0.09, "prompt_share": 0.8},
        }
        for step in (steps // 2, steps)
    ]  # fmt: skip
    for index, step in enumerate((0, steps)):
        for name, pair in sets.items():
            figures = figures_to_json(pair[index].figures(objective))
            lines.append(
                {"step": step, "kind": "eval", "set": name, "num_pairs": len(pair[index]), "metrics": figures}
            )
        write_results(
            RunDirectory(folder).step_results(step), {name: pair[index] for name, pair in sets.items()}
        )
    if finished:
        lines.append({"step": steps, "kind": "saved", "model_step": steps})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(SETTINGS | settings))
    (folder / "environment.json").write_text(
        json.dumps({"device": "cpu", "steps": 40, "libraries": {"torch": "2"}})
    )
    return folder


def page_of(folder, *arguments, **options):
    return write_report(folder, *arguments, **options).read_text()


CHOOSES = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}


def test_the_largest_set_that_did_not_choose_the_checkpoint_leads(tmp_path):
    sets = {"": planted(90, 0.0)}
    run = make_run(tmp_path / "run", sets, **CHOOSES)
    before, after = planted(60, 0.5, first=500)
    found = {
        "data": "new.jsonl", "num_pairs": 60, "metrics": figures_to_json(after.figures(Objective())),
        "compared_with": {"model": "base", "change": compare(before, after, Objective()).to_json()},
    }  # fmt: skip
    alone = page_of(run)
    assert "It learned nothing that matters" in alone and "flatters it a little" in alone
    (run / "eval-new.json").write_text(json.dumps(found))
    page = page_of(run)
    assert "It learned the preference: the log odds ratio of 60 held-out pairs changed by +0.5" in page
    assert page.index("Evaluation: new") < page.index("Held-out pairs")
    assert 'class="n">60 pairs</span></div>' in page, "beside every figure of the headline"
    (run / "eval-new.json").write_text(json.dumps(found | {"compared_with": {"model": "base", "change": {}}}))
    with pytest.raises(DataError, match=r"eval-new.json: damaged"):
        page_of(run)


def test_a_change_has_its_own_error_and_a_colour_only_where_it_is_measurable(tmp_path):
    run = make_run(tmp_path / "run", {"": planted(60, 0.5)})
    page = page_of(run)
    before, after = planted(60, 0.5)
    error = compare(before, after, Objective()).change["accuracy"].se
    assert f"± {100 * error:.1f} points" in page
    assert '<span class="up">+0.5' in page
    still = page_of(make_run(tmp_path / "still", {"": planted(60, 0.0)}))
    assert 'class="up"' not in still and 'class="down"' not in still and 'class="flat"' in still


def test_sources_have_rows_and_a_run_its_costs(tmp_path):
    page = page_of(make_run(tmp_path / "run", {"": planted(60, 0.5)}))
    for expected in (
        "By source", '<th scope="row">books</th><td>20</td>', '<th scope="row">web</th><td>40</td>',
        "1 min 0 s", "30.0 s", "3,000, 100 a second", "1.25 GiB on cpu", "9.0 %", "80.0 %",
        "beta: 0.34 (with 0.1 the odds-ratio term has 9% of the gradient", "nll_on: response (80% of",
    ):  # fmt: skip
        assert expected in page, expected


def test_a_run_that_has_not_ended_says_so(tmp_path):
    page = page_of(make_run(tmp_path / "run", {"": planted(20, 0.5)}, finished=False))
    assert "Unfinished: step 20 of 40." in page
    assert "Unfinished" not in page_of(make_run(tmp_path / "whole", {"": planted(20, 0.5)}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_name_or_path": "/models/other"}, "another base (other, not base)"),
        ({"dataset_name": "more.jsonl"}, "other training data (more.jsonl, not pairs.jsonl)"),
        ({"steps": 60}, "60 steps, not 20"),
        ({"sets": {"": planted(90, 0.31)}}, "other held-out pairs"),
        ({"sets": {"": planted(60, 0.31, first=7)}}, "other held-out pairs"),
    ],
)
def test_runs_that_are_not_comparable_are_named_with_the_reason(tmp_path, capsys, changes, words):
    run = make_run(tmp_path / "run", {"": planted(60, 0.5)})
    other = make_run(tmp_path / "other", **({"sets": {"": planted(60, 0.31)}, "beta": 0.0} | changes))
    page = page_of(run, {"SFT": other})
    assert f"SFT is not comparable: {words}" in page
    assert f"SFT is not comparable: {words}" in capsys.readouterr().out
    assert ("<th>SFT</th>" in page) == ("sets" not in changes), "figures of other pairs stand in no table"
    assert "SFT has beta 0.0, not 0.1" in page


def test_comparable_runs_stand_side_by_side_with_what_differs(tmp_path, capsys):
    run = make_run(tmp_path / "run", {"": planted(60, 0.5)})
    other = make_run(tmp_path / "other", {"": planted(60, 0.31)}, beta=0.0)
    page = page_of(run, {"SFT": other})
    assert "<th>SFT</th>" in page and "SFT has beta 0.0, not 0.1" in page and "not comparable" not in page
    assert capsys.readouterr().out == ""


def test_data_and_settings_are_for_readers(tmp_path):
    run = make_run(tmp_path / "run", {"": planted(20, 0.5)})
    rows = {"total": 9, "kept": 8, "skipped": {}, "dropped": {"empty answer": 1}, "changed": {}, "lost": {},
            "examples": {"empty answer": "pairs.jsonl:4"}}  # fmt: skip
    found = {"pairs": 8, "duplicates": 0, "near_duplicates": 0, "contradictions": 0, "shared_prompts": 0,
             "length_bias": {"mean_difference": -2.15625, "standard_error": 1.2, "chosen_longer": 0.15},
             "examples": {}}  # fmt: skip
    report = {"train": {"formats": {"/x/pairs.jsonl": "hh"}, "rows": rows, "findings": found}}
    (run / "data_report.json").write_text(json.dumps(report))
    page = page_of(run)
    for expected in (
        "using 8 of 9 rows", "dropped 1: empty answer (first: pairs.jsonl:4)",
        "chosen answers are 2.2 tokens shorter on average", "pairs.jsonl: format hh",
        "1 setting at its default",
    ):  # fmt: skip
        assert expected in page, expected
    for dumped in ("mean_difference", "findings /", "2.15625", "show style, not knowledge"):
        assert dumped not in page


def test_answers_are_counted_and_marked_where_they_were_cut(tmp_path):
    run = make_run(tmp_path / "run", {"": planted(20, 0.5)})
    samples = [
        {"prompt": "Hi", "answers": {"chosen": "a", "step 0": "b", "step 20": "c"}, "longest": 64,
         "tokens": {"step 0": 10 + n, "step 20": 64}}
        for n in (0, 2)
    ]  # fmt: skip
    (run / "samples.json").write_text(json.dumps(samples))
    page = page_of(run)
    assert "Mean length 11 tokens before and 64 after (2 answers)." in page
    assert page.count("step 20 (cut at 64 tokens)") == 2 and "step 0 (cut" not in page
