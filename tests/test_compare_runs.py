"""`orpo compare` and `orpo probe` from a recipe to a page, with a tiny model, in this process."""

import json
import os
import shutil
import signal

import pytest
import tiny_models
import yaml
from tiny_tokenizer import tiny_tokenizer

from orpo.cli import main
from orpo.comparing.job import compare
from orpo.comparing.pool import Watcher
from orpo.comparing.splits import SplitOptions
from orpo.engine.metrics import metric_named
from orpo.errors import ConfigError, DataError, RunError
from orpo.evaluation.preferences import evaluate
from orpo.run.directory import RunDirectory, read_run
from orpo.training.trainer import ORPOTrainer

pytestmark = pytest.mark.usefixtures("lazy_disk")

CLOCKS = ("seconds", "cpu_seconds", "step_seconds", "peak_gib", "sessions")
PLAN = {"methods": ["orpo", "sft+dpo"], "seeds": 1, "trials": 1, "jobs": 0}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """Sixty pairs that a model of two layers can tell apart, in eight steps."""
    folder = tmp_path_factory.mktemp("world")
    tokenizer = tiny_tokenizer("chatml")
    model = tiny_models.build("Llama", vocab_size=len(tokenizer), max_position_embeddings=256)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    rows = [
        {
            "prompt": f"What is {n // 2} and one?",
            "chosen": f"It is {n}.",
            "rejected": "No, no, " + "no" * (n % 3),
        }
        for n in range(60)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model_name_or_path": str(folder / "base"),
        "dataset_name": str(folder / "pairs.jsonl"),
        "learning_rate": 1e-2,
        "beta": 0.5,
        "max_steps": 8,
        "per_device_train_batch_size": 8,
        "eval_strategy": "steps",
        "eval_steps": 4,
        "save_steps": 4,
        "use_cpu": True,
    }


class Counter(Watcher):
    """What was to be made each time, and what was there."""

    def __init__(self):
        self.begun, self.ended = [], []

    def begin(self, to_make, there):
        self.begun.append((to_make, there))

    def end(self, job):
        self.ended.append(job.folder.name)


@pytest.fixture(scope="module")
def made(recipe, tmp_path_factory):
    """A finished comparison, and what its trainings were."""
    counter = Counter()
    return compare(
        recipe, tmp_path_factory.mktemp("made") / "out", watcher=counter, **PLAN, answers=3, answer_tokens=6
    ), counter


def quality(result):
    """Everything in the result but clocks."""
    found = json.loads(result.json_path.read_text())
    del found["seconds"]
    for entry in found["entries"]:
        for cost in [entry["cost"], *entry["cost_by_seed"]]:
            for name in CLOCKS:
                cost.pop(name, None)
    found["sentences"] = [
        line for line in found["sentences"] if "CPU time" not in line and "Interr" not in line
    ]
    return found


def test_methods_have_one_base_one_split_and_equally_many_steps(made, recipe):
    result, _ = made
    found = quality(result)
    assert [entry["cost"]["steps"] for entry in found["entries"]] == [8, 8]
    assert [entry["models_held"] for entry in found["entries"]] == [1, 1]
    runs = [read_run(path) for path in sorted((result.folder / "runs").iterdir())]
    assert {run.recipe["model_name_or_path"] for run in runs} == {recipe["model_name_or_path"]}
    assert len({(run.recipe["dataset_name"], run.recipe["eval_dataset_name"]) for run in runs}) == 1
    orpo, both = (entry["cost"]["answers"] for entry in found["entries"])
    pairs = found["pairs"]["train"]
    assert both == pytest.approx(orpo * 3 / 4 + 2 * pairs), "SFT reads one side; a reference is asked"


def test_figures_are_those_of_the_runs_and_differences_those_of_their_pairs(made):
    result, _ = made
    for entry in result.entries:
        found = evaluate(
            str(entry.folders[0]), result.folder / "data" / "test.parquet", quiet=True, save=False
        )
        for name in ("accuracy", "log_odds_ratio", "chosen_logprob"):
            slow = found.evaluation.figures[name]
            assert entry.quality.means[name].mean == pytest.approx(slow.mean, abs=1e-5)
            assert entry.quality.means[name].se == pytest.approx(slow.se, abs=1e-5)
    one, other = (entry.quality for entry in result.entries)
    for name, change in other.change.items():
        assert change.mean == pytest.approx(other.means[name].mean - one.means[name].mean, abs=1e-5)


def test_test_pairs_are_scored_when_all_settings_are_chosen_and_only_for_the_arms(made):
    result, counter = made
    scored = [path.parent for path in (result.folder / "runs").glob("*/eval-comparison-test.jsonl")]
    assert sorted(scored) == sorted(folder for entry in result.entries for folder in entry.folders)
    last_training = max(
        RunDirectory(result.folder / "runs" / name).finished.stat().st_mtime_ns for name in counter.ended
    )
    assert all(
        RunDirectory(path).evaluated_pairs("comparison-test").stat().st_mtime_ns >= last_training
        for path in scored
    )


def test_the_page_is_one_file_with_curves_tables_and_the_sentences(made):
    result, _ = made
    page = result.page_path.read_text()
    assert "<svg" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    for word in ("orpo", "sft+dpo", "Models held", "Forward passes", "Settings that were tried"):
        assert word in page
    assert metric_named("repetition").caption in page


def test_an_interrupted_comparison_ends_as_one_that_was_not(made, recipe, tmp_path, monkeypatch):
    """The signal comes in the sixth step of the first training, two steps after its checkpoint."""
    result, _ = made
    steps, whole = [], ORPOTrainer.training_step

    def interrupted(trainer, *arguments, **named):
        steps.append(trainer.state.global_step)
        if len(steps) == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return whole(trainer, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(ORPOTrainer, "training_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            compare(recipe, tmp_path / "out", **PLAN, answers=0)
    assert len(steps) == 6
    found = quality(compare(recipe, tmp_path / "out", **PLAN, answers=0))
    whole = quality(result)
    assert found["entries"] == whole["entries"]
    assert (found["chosen"], found["base"]) == (whole["chosen"], whole["base"])
    weights = [
        next((one / "runs").glob("orpo*")) / "model.safetensors" for one in (tmp_path / "out", result.folder)
    ]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    costs = json.loads((weights[0].parent / "cost.json").read_text())
    assert len(costs) == 2


def test_a_changed_recipe_and_other_pairs_are_refused(made, recipe, tmp_path):
    result, _ = made
    with pytest.raises(ConfigError, match=r"other settings \(beta\)"):
        compare(recipe | {"beta": 0.7}, result.folder, **PLAN)
    with pytest.raises(ConfigError, match="another split"):
        compare(recipe, result.folder, **PLAN, split=SplitOptions(seed=9))


def test_sizes_beyond_the_pairs_and_pairs_that_cannot_be_split_are_one_line(recipe, tmp_path):
    with pytest.raises(ConfigError, match="sizes: 900 is out of range"):
        compare(recipe, tmp_path / "a", **PLAN, sizes=[900])
    pairs = tmp_path / "one.jsonl"
    pairs.write_text(json.dumps({"prompt": "Hi", "chosen": "Hello.", "rejected": "Go."}) + "\n")
    with pytest.raises((ConfigError, DataError), match=r"prompt|pairs"):
        compare(recipe | {"dataset_name": str(pairs)}, tmp_path / "b", **PLAN)


def test_a_probe_reads_its_share_and_keeps_the_recipe_where_nothing_is_told_apart(recipe, tmp_path, capsys):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe | {"max_steps": 400, "warmup_steps": 100}))
    out = tmp_path / "probe"
    command = ["probe", str(file), "--out", str(out), "--trials", "2", "--share", "0.06", "--jobs", "0"]
    assert main(command) == 0
    found = json.loads((out / "probe.json").read_text())
    assert found["tokens"] <= 0.06 * found["run_tokens"]
    assert len(found["trials"]) == 2
    assert found["suggestion"] in [trial["settings"] for trial in found["trials"]]
    assert "suggested" in capsys.readouterr().out
    best = min(found["trials"], key=lambda trial: trial["means"]["odds_ratio_loss"]["mean"])
    assert found["chosen"] == best["settings"]
    assert main([*command, "--share", "0.0001"]) == 2


def test_a_worker_that_cannot_begin_says_why(recipe, tmp_path):
    with pytest.raises((ConfigError, RunError), match="learning_rate"):
        compare(recipe | {"learning_rate": -1.0}, tmp_path / "out", **PLAN)
    shutil.rmtree(tmp_path)


def test_the_command_trains_nothing_again_and_prints_tables_of_eighty_columns(
    made, recipe, tmp_path, capsys, monkeypatch
):
    result, _ = made
    monkeypatch.setenv("COLUMNS", "80")
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    options = ["--methods", "orpo,sft+dpo", "--seeds", "1", "--trials", "1", "--answers", "0", "--jobs", "0"]
    before = quality(result)
    made_at = [path.stat().st_mtime_ns for path in (result.folder / "runs").glob("*/*")]
    assert main(["compare", str(file), "--out", str(result.folder), *options]) == 0
    printed = capsys.readouterr().out
    assert "to make" not in printed
    assert made_at == [path.stat().st_mtime_ns for path in (result.folder / "runs").glob("*/*")]
    after = quality(result)
    assert (before["entries"], before["chosen"]) == (after["entries"], after["chosen"])
    assert "against orpo" in printed
    assert all(len(line) <= 80 for line in printed.splitlines() if not line.startswith(("result", "page")))
    assert main(["compare", str(file), "--out", str(tmp_path / "new"), "--methods", "orpo,dog"]) == 2
    assert "'dog'" in capsys.readouterr().err
