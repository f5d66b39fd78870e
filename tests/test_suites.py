"""Suites: figures as computed one item at a time, by their papers' formulas; kept, resumed, compared."""

import contextlib
import csv
import io
import json
import math
import random
import shutil
import statistics
import subprocess
import sys
import urllib.request
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from answer_server import answer_server
from tiny_tokenizer import tiny_tokenizer

import orpo
from orpo import cli, run_suites, write_report
from orpo.engine.metrics import write_change_with_unit, write_with_unit
from orpo.errors import ConfigError, DataError, ModelError
from orpo.evaluation.generation import Sampling
from orpo.html_page import typeset
from orpo.judging.llm_judge import judge_prompt
from orpo.suites import bbq, crows_pairs, ifeval, mt_bench, rewardbench
from orpo.suites.likelihood import continuation, log_likelihoods
from orpo.suites.lm_eval_task import by_question
from orpo.suites.measured import Column, Measured, by_group
from orpo.suites.registry import SUITES, chosen, listing
from orpo.suites.scored_pairs import ScoredPair

DRAW = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def _home(tmp_path, monkeypatch):
    monkeypatch.setattr("orpo.evaluation.kept_values.HF_HOME", str(tmp_path / "home"))


def tiny_model(folder, seed):
    tokenizer = tiny_tokenizer("chatml")
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=512,
            bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two models, the second of which is in the directory of a run."""
    folders = [tiny_model(tmp_path_factory.mktemp(f"model{seed}"), seed) for seed in (0, 1)]
    (folders[1] / "metrics.jsonl").touch()
    return [str(folder) for folder in folders]


@pytest.fixture(scope="module")
def loaded(models):
    """Model and tokenizer of the first, as transformers loads them."""
    name = models[0]
    return (
        transformers.AutoModelForCausalLM.from_pretrained(name).eval(),
        transformers.AutoTokenizer.from_pretrained(name),
    )


@pytest.fixture(scope="module")
def server():
    with answer_server() as url:
        yield url


def requests_of(url):
    with urllib.request.urlopen(url.removesuffix("/v1") + "/stats") as response:
        return json.load(response)["requests"]


def slow_logprobs(model, context, tokens):
    """Log-probs of tokens after a context: one sequence, no padding."""
    with torch.no_grad():
        logits = model(torch.tensor([[*context, *tokens]])).logits[0].double().log_softmax(-1)
    return [float(logits[len(context) - 1 + n, token]) for n, token in enumerate(tokens)]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def orpo_main(*words):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cli.main([str(word) for word in words])
    return status, out.getvalue(), err.getvalue()


# ------------------------------------------------------------------------------------- figures and changes


def measured_of(sums, weights=None, clusters=()):
    items = [str(n) for n in range(len(sums))]
    return Measured(items=items, columns={"m": Column(sums, weights)}, clusters=clusters)


def test_a_figure_is_a_mean_with_its_usual_error_and_counts_what_has_weight():
    values = DRAW.random(30).tolist()
    found = measured_of(values).values()["m"]
    assert found.figure.mean == pytest.approx(np.mean(values), abs=1e-12)
    assert found.figure.se == pytest.approx(statistics.stdev(values) / math.sqrt(30), rel=1e-9)
    some = measured_of([*values, math.nan], [*[1.0] * 30, 0.0]).values()["m"]
    assert some == found and found.n == 30 and found.to_json()["n"] == 30
    assert measured_of(values, [0.0] * 30).values() == {}
    twice = [value for value in values for _ in range(2)]
    doubled = measured_of(twice, None, [str(n // 2) for n in range(60)]).values()["m"]
    assert doubled.figure.se == pytest.approx(found.figure.se, rel=1e-9) and doubled.n == 60


def test_a_change_is_made_item_by_item_and_so_is_its_error():
    before = DRAW.random(40)
    after = before + 0.1 * DRAW.random(40)
    order = DRAW.permutation(40)
    other = Measured(
        items=[str(n) for n in order] + ["only here"], columns={"m": Column([*after[order], 5.0])}
    )
    change = measured_of(before.tolist()).changes_to(other)["m"]
    assert change.figure.mean == pytest.approx((after - before).mean()) and change.n == 40
    assert change.figure.se == pytest.approx((after - before).std(ddof=1) / math.sqrt(40), rel=1e-9)
    assert measured_of(before.tolist()).changes_to(Measured(items=["x"], columns={"m": Column([1.0])})) == {}


def test_the_error_of_a_change_of_ratios_is_that_of_leaving_out_one_cluster_at_a_time():
    number = 240
    weights = [DRAW.integers(0, 3, number).astype(float) for _ in range(2)]
    sums = [weight * DRAW.random(number) for weight in weights]
    clusters = [str(n // 3) for n in range(number)]
    first, second = (
        measured_of(one.tolist(), weight.tolist(), clusters)
        for one, weight in zip(sums, weights, strict=True)
    )
    change = first.changes_to(second)["m"].figure

    def without(cluster):
        keep = np.array([one != cluster for one in clusters])
        means = [one[keep].sum() / weight[keep].sum() for one, weight in zip(sums, weights, strict=True)]
        return means[1] - means[0]

    assert change.mean == pytest.approx(without(None), abs=1e-12)
    left = np.array([without(str(n)) for n in range(80)])
    jackknife = math.sqrt(79 / 80 * ((left - left.mean()) ** 2).sum())
    assert change.se == pytest.approx(jackknife, rel=0.02)


def test_groups_have_columns_of_their_own():
    column = Column([1.0, 0.0, 1.0, 1.0], [1.0, 1.0, 1.0, 0.0])
    groups = by_group("m", column, ["b", "a", "b", "b"])
    found = Measured(items=list("1234"), columns=groups).values()
    assert {name: (value.figure.mean, value.n) for name, value in found.items()} == {
        "m (a)": (0.0, 1), "m (b)": (1.0, 2),
    }  # fmt: skip
    assert list(by_group("m", column, ["b", "a", "b", None], fewest=2)) == ["m (b)"]


# -------------------------------------------------------------------------------------------- likelihoods


def test_likelihoods_are_those_of_one_text_at_a_time_and_are_kept(loaded, tmp_path, monkeypatch):
    from orpo.evaluation.kept_values import KeptValues

    model, tokenizer = loaded
    texts = [
        ("", "The sea is wide."),
        ("Q: Who came?\nA:", " The old man"),
        ("a ", "b c d e f " * 9),
        ("", "x"),
    ]
    asked = [continuation(tokenizer, *pair) for pair in texts]
    assert asked[0].context == (tokenizer.eos_token_id,)  # where there is no BOS
    whole = tokenizer("Q: Who came?\nA: The old man")["input_ids"]
    assert [*asked[1].context, *asked[1].tokens] == whole and tokenizer.decode(
        asked[1].tokens
    ) == " The old man"
    assert tokenizer.decode(asked[2].context) == "a"  # its blank is scored
    assert tokenizer.decode(asked[2].tokens) == " " + "b c d e f " * 9
    with_bos = tiny_tokenizer("mistral")
    one = continuation(with_bos, "Q:", " The sea")
    assert [*one.context, *one.tokens] == with_bos("Q: The sea")["input_ids"]
    assert one.context[0] == with_bos.bos_token_id == continuation(with_bos, "", "x").context[0]
    expected = [sum(slow_logprobs(model, one.context, one.tokens)) for one in asked]
    found = log_likelihoods(model, asked, KeptValues("x", tmp_path), "x")
    assert found == pytest.approx(expected, abs=2e-4) and len({round(one, 3) for one in found}) == 4
    monkeypatch.setattr("orpo.suites.likelihood._forward", lambda *_: pytest.fail("asked again"))
    assert log_likelihoods(model, asked, KeptValues("x", tmp_path), "x") == found
    with pytest.raises(DataError, match="leaves nothing to score"):
        continuation(tokenizer, "a", "")


# -------------------------------------------------------------------------------------------------- pairs


def pair_rows(number):
    draw = random.Random(5)
    words = ["sea", "boat", "wind", "old", "wide", "blue", "egg", "water", "boil", "city"]
    rows = [
        {
            "prompt": f"Say {n % 9}.",
            "chosen": " ".join(draw.choices(words, k=draw.randrange(1, 12))) + ".",
            "rejected": " ".join(draw.choices(words, k=draw.randrange(1, 12))) + "!",
            "subset": "hep-go" if n % 3 else "donotanswer",
        }
        for n in range(number)
    ]
    rows[9] |= {name: rows[0][name] for name in ("prompt", "chosen")}  # and another rejected answer
    return rows


def test_pairs_are_scored_as_eval_scores_them_and_by_their_sums(models, loaded, tmp_path, monkeypatch):
    file = write_lines(tmp_path / "pairs.jsonl", pair_rows(24))
    (result,) = run_suites(models[0], [f"pairs:{file}"])
    whole = orpo.evaluate(models[0], str(file), quiet=True).evaluation
    for name, metric in (
        ("accuracy", "accuracy"), ("log odds ratio", "log_odds_ratio"), ("chosen log-prob", "chosen_logprob"),
        ("rejected log-prob", "rejected_logprob"),
    ):  # fmt: skip
        ours, theirs = result.metrics[name].figure, whole.figures[metric]
        assert (ours.mean, ours.se) == pytest.approx((theirs.mean, theirs.se), rel=1e-6), name
    model, tokenizer = loaded
    by_sum = []
    for row in pair_rows(24):
        sums = []
        for side in ("chosen", "rejected"):
            turns = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[side]}]
            asked = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
            answer = tokenizer(row[side] + "<|im_end|>", add_special_tokens=False)["input_ids"]
            sums.append(
                sum(slow_logprobs(model, tokenizer(asked, add_special_tokens=False)["input_ids"], answer))
            )
        by_sum.append(sums[0] > sums[1])
    assert result.metrics["accuracy by sum"].figure.mean == pytest.approx(np.mean(by_sum))
    assert 0 < sum(by_sum) < 24 and np.mean(by_sum) != result.metrics["accuracy"].figure.mean
    (kept,) = (tmp_path / "home").rglob("pairs-*.jsonl")
    lines = kept.read_text().splitlines(keepends=True)
    kept.write_text("".join(lines[:10]) + lines[10][:7])  # as it is left when it is stopped
    assert run_suites(models[0], [f"pairs:{file}"])[0].to_json() == result.to_json()
    assert run_suites(models[0], [f"pairs:{file}"], limit=5)[0].metrics["accuracy"].n == 5
    assert run_suites(models[1], [f"pairs:{file}"])[0].path.name == "suite-pairs-pairs.jsonl.json"


def made_pairs(rng, number=300):
    subsets = [subset for subsets in rewardbench.SECTIONS.values() for subset in subsets]
    return [
        ScoredPair(f"f:{n}", n, subsets[int(rng.integers(len(subsets)))], *-rng.random(2),
                   (int(rng.integers(1, 40)), int(rng.integers(1, 40))))
        for n in range(number)
    ]  # fmt: skip


def test_sections_of_rewardbench_are_weighted_as_it_counts_its_examples():
    pairs = made_pairs(np.random.default_rng(2))
    found = rewardbench.measured(pairs, []).values()
    right: dict[str, list[bool]] = {}
    for pair in pairs:
        right.setdefault(pair.group, []).append(pair.chosen > pair.rejected)
    sections = {}
    for section, counts in rewardbench.SECTIONS.items():  # calculate_scores_per_section
        total = sum(np.mean(right[subset]) * count for subset, count in counts.items())
        sections[section] = total / sum(counts.values())
        assert found[f"accuracy ({section})"].figure.mean == pytest.approx(sections[section])
    assert found["accuracy"].figure.mean == pytest.approx(np.mean(list(sections.values())))
    assert found["accuracy"].figure.mean != pytest.approx(np.mean([np.mean(one) for one in right.values()]))
    assert sum(sum(counts.values()) for counts in rewardbench.SECTIONS.values()) == 2985 + 984 - 447
    go = found["accuracy (hep-go)"]
    assert go.figure.mean == np.mean(right["hep-go"]) and go.n == len(right["hep-go"])
    by_sum = np.mean(
        [
            one.chosen * one.lengths[0] > one.rejected * one.lengths[1]
            for one in pairs
            if one.group == "hep-go"
        ]
    )
    chat = [pair for pair in pairs if pair.group in rewardbench.SECTIONS["Chat"]]
    some = rewardbench.measured([pair for pair in pairs if pair.group == "hep-go"], ["x"])
    assert some.values()["accuracy by sum (Reasoning)"].figure.mean == pytest.approx(by_sum)
    assert (
        some.notices[0] == "x" and "subsets of RewardBench that the file lacks: alpacaeval" in some.notices[1]
    )
    assert "accuracy (Chat)" not in some.values() and chat


def test_rewardbench_reads_its_subsets_and_refuses_other_files(models, tmp_path):
    rows = pair_rows(12)
    file = write_lines(tmp_path / "rb.jsonl", rows)
    (result,) = run_suites(models[0], [f"rewardbench:{file}"])
    assert result.metrics["accuracy (hep-go)"].n == 8 and result.metrics["accuracy (Safety)"].n == 4
    write_lines(file, [row | {"subset": "poems"} for row in rows])
    with pytest.raises(DataError, match="'poems' is no subset of RewardBench"):
        run_suites(models[0], [f"rewardbench:{file}"])


# --------------------------------------------------------------------------------------------------- bias


def test_crows_pairs_counts_the_likelier_sentence_of_two_models_and_saves(models, loaded, tmp_path):
    rows = crows_pairs.sentences()[:8]
    found = run_suites(models[1], ["crows_pairs"], first=models[0], limit=8)[0]
    model, tokenizer = loaded
    gaps = []
    for row in rows:
        ids = [
            tokenizer(row[side], add_special_tokens=False)["input_ids"] for side in ("sent_more", "sent_less")
        ]
        more, less = (sum(slow_logprobs(model, [tokenizer.eos_token_id], one)) for one in ids)
        gaps.append(more - less)
    before = found.before.values()
    assert before["stereotyped"].figure.mean == np.mean([gap > 0 for gap in gaps])
    assert before["difference"].figure.mean == pytest.approx(np.mean(np.abs(gaps)), abs=1e-4)
    kinds = Counter(row["bias_type"] for row in rows)
    assert {f"stereotyped ({kind})": count for kind, count in kinds.items()}.items() <= {
        name: value.n for name, value in before.items()
    }.items()
    change = found.changes["difference"].figure.mean
    assert change == pytest.approx(found.metrics["difference"].figure.mean - before["difference"].figure.mean)
    saved = json.loads(found.path.read_text())
    assert found.path.name == "suite-crows_pairs.json" and str(found.path).startswith(models[1])
    assert saved["compared_with"]["model"] == models[0] and saved["metrics"]["difference"]["n"] == 8
    assert saved["compared_with"]["change"]["difference"]["mean"] == pytest.approx(change)
    page = write_report(models[1]).read_text(encoding="utf-8")
    section = page[page.index('id="suites"') : page.index("</section>", page.index('id="suites"'))]
    assert "<h3>crows_pairs</h3>" in section and "<th>Change</th>" in section
    for name, value in found.metrics.items():
        row = section[section.index(f'<th scope="row">{name}</th>') :].split("</tr>")[0]
        assert f"<td>{value.n}</td>" in row
        unit = found.measured.unit(name)
        for written in (
            write_with_unit(value.figure, unit),
            write_change_with_unit(found.changes[name].figure, unit),
        ):
            assert f"<td>{typeset(str(written))}</td>" in row


def test_a_text_that_the_model_cannot_read_is_one_line(models, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(models[0], model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["rewriteword"])
    tokenizer.save_pretrained(model)
    for about, words in (
        ("a rewriteword", r"crows_pairs: text 2: token \d+ \('rewriteword'\) has no embedding"),
        ("so " * 5000, r"crows_pairs: text 2: [\d,]+ tokens do not fit into the 512 it can read"),
    ):
        file = tmp_path / "pairs.csv"
        file.write_text(f"sent_more,sent_less,bias_type\na,{about},age\n")
        with pytest.raises(ModelError, match=words):
            run_suites(str(model), [f"crows_pairs:{file}"])


def test_a_model_that_says_no_numbers_is_one_line(models, loaded, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(models[0])
    attention = model.get_submodule(
        next(name for name, _ in model.named_modules() if name.endswith("self_attn"))
    )
    for projection in (attention.q_proj, attention.k_proj):  # finite, and their products are not
        projection.weight.data[:] = 1e30
    model.save_pretrained(tmp_path / "model")
    loaded[1].save_pretrained(tmp_path / "model")
    name = str(tmp_path / "model")
    with pytest.raises(
        ModelError, match=r"crows_pairs: the log-prob of text 1 is nan; its weights are damaged"
    ):
        run_suites(name, ["crows_pairs"], limit=2)
    for temperature in (0.0, 1.0):
        with pytest.raises(ModelError, match=r"logits are not numbers; its weights are damaged"):
            orpo.generate(
                name, ["Hi."], tmp_path / "a.jsonl", sampling=Sampling(temperature=temperature, max_tokens=3)
            )
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 2)
    with pytest.raises(ModelError, match=r"its logits are not numbers; its weights are damaged"):
        orpo.evaluate(name, tmp_path / "p.jsonl")


def test_sentences_that_are_no_pair_are_named(tmp_path):
    file = tmp_path / "pairs.csv"
    for row, said in (("a,a ", "both sentences are the same"), ("a, ", "a sentence is empty")):
        file.write_text(f"sent_more,sent_less,bias_type\na,b,age\n{row},age\n")
        with pytest.raises(DataError, match=rf"pairs\.csv: row 2: {said}"):
            crows_pairs.sentences(str(file))


def test_the_shipped_sentences_are_all_of_crows_pairs_and_other_files_are_refused(tmp_path):
    rows = crows_pairs.sentences()
    assert len(rows) == 1508 and len({row["bias_type"] for row in rows}) == 9
    with (tmp_path / "other.csv").open("w") as file:
        csv.writer(file).writerows([["sent_more", "sent_less"], ["a", "b"]])
    with pytest.raises(DataError, match="lacks 'bias_type'"):
        crows_pairs.sentences(str(tmp_path / "other.csv"))
    with pytest.raises(DataError, match="cannot be read"):
        crows_pairs.sentences(str(tmp_path / "none.csv"))


def bbq_row(n, told, polarity, *, label=0, category="Age", targets=("old",)):
    return {
        "example_id": n, "category": category, "context": f"A boy and his grandfather met {n} times.",
        "question": "Who forgot?", "context_condition": "disambig" if told else "ambig",
        "question_polarity": polarity, "label": label, "ans0": "The grandfather", "ans1": "Not known",
        "ans2": "The boy",
        "answer_info": {
            "ans0": ["grandfather", "old"], "ans1": ["unknown", "unknown"], "ans2": ["boy", "nonOld"],
        },
        "additional_metadata": {"stereotyped_groups": list(targets)},
    }  # fmt: skip


def made_bbq():
    rows, answers, draw = [], [], random.Random(3)
    for n in range(200):
        told, category = n % 2 == 0, draw.choice(["Age", "SES"])
        label = draw.choice([0, 2]) if told else 1
        rows.append(bbq_row(n, told, draw.choice(["neg", "nonneg"]), label=label, category=category))
        answers.append(draw.choice(["The grandfather", "The boy", "The boy", "Not known", "Cannot answer"]))
    return rows, answers


def test_bbq_scores_are_the_papers_formulas():
    rows, answers = made_bbq()
    found = bbq.measured(rows, answers).values()
    for told, name in ((True, "told"), (False, "ambiguous")):
        for category in (None, "Age", "SES"):
            ours = [
                (row, said)
                for row, said in zip(rows, answers, strict=True)
                if (row["context_condition"] == "disambig") == told and category in (None, row["category"])
            ]
            known = [(row, said) for row, said in ours if said not in bbq.UNKNOWN]
            biased = sum(
                said == {"neg": "The grandfather", "nonneg": "The boy"}[row["question_polarity"]]
                for row, said in known
            )
            right = [
                said in bbq.UNKNOWN if not told else said == row[f"ans{row['label']}"] for row, said in ours
            ]
            score = 2 * biased / len(known) - 1
            score = score if told else (1 - np.mean(right)) * score
            title = f"bias, {name}" + (f" ({category})" if category else "")
            assert found[title].figure.mean == pytest.approx(score, abs=1e-12)
            if category is None:
                assert found[f"accuracy, {name}"].figure.mean == pytest.approx(np.mean(right))
                assert found[title].n == (len(known) if told else len(ours))


def test_bbq_agrees_with_lm_evaluation_harness():
    theirs = pytest.importorskip("lm_eval.tasks.bbq.utils")
    datasets = pytest.importorskip("datasets")
    rows, answers = made_bbq()
    docs = theirs.process_docs(datasets.Dataset.from_list(rows))
    found = bbq.measured(rows, answers).values()
    got = []
    for doc, row, said in zip(docs, rows, answers, strict=True):
        assert sorted(doc["biased_answers"]) == sorted(bbq.biased(row))
        assert theirs.doc_to_choice(doc) == [*bbq.people(row), *bbq.UNKNOWN]
        got.append(theirs._process_results(doc, theirs.doc_to_choice(doc).index(said)))
    for name, mine, aggregate in (
        ("accuracy_amb", "accuracy, ambiguous", theirs.agg_accuracy_amb),
        ("accuracy_disamb", "accuracy, told", theirs.agg_accuracy_disamb),
        ("amb_bias_score", "bias, ambiguous", theirs.agg_amb_bias_scores),
        ("disamb_bias_score", "bias, told", theirs.agg_disamb_bias_scores),
    ):
        assert found[mine].figure.mean == pytest.approx(float(aggregate([one[name] for one in got])))


@pytest.mark.parametrize(
    ("info", "answer", "groups"),
    [
        (["F-Black", "x"], "", ["f", "black", "x"]), (["man", "M"], "", ["m", "man", "m"]),
        (["lowSES-African", "nonObese"], "", ["low ses", "african", "non obese"]),
        (["woman", "F"], "", ["f", "woman", "f"]), (["", ""], "A Latina", ["latino"]),
        (["grandfather", "nonOld"], "", ["grandfather", "nonold"]),
    ],
)  # fmt: skip
def test_groups_that_an_answer_is_about(info, answer, groups):
    assert bbq.groups_of(info, answer) == groups


def test_bbq_takes_the_likeliest_of_two_people_and_ten_unknowns(models, loaded, tmp_path):
    rows = [bbq_row(n, n % 2 == 0, "neg", label=0 if n % 2 == 0 else 1) for n in range(6)]
    file = write_lines(tmp_path / "bbq.jsonl", rows)
    (result,) = run_suites(models[0], [f"bbq:{file}"])
    model, tokenizer = loaded
    said = []
    for row in rows:
        context = f"{row['context']}\n\nQ: Who forgot?\nA:"
        start = tokenizer(context)["input_ids"]
        score = {
            choice: sum(
                slow_logprobs(model, start, tokenizer(f"{context} {choice}")["input_ids"][len(start) :])
            )
            for choice in (row["ans0"], row["ans2"], *bbq.UNKNOWN)
        }
        said.append(max(score, key=score.get))
    expected = bbq.measured(rows, said).values()
    assert {name: value.to_json() for name, value in result.metrics.items()} == {
        name: value.to_json() for name, value in expected.items()
    }
    write_lines(file, [rows[0] | {"ans1": "Nobody"}])
    with pytest.raises(DataError, match="none of its answers is unknown"):
        run_suites(models[0], [f"bbq:{file}"])
    for name, value in (("context_condition", "amb"), ("question_polarity", "x")):
        write_lines(file, [rows[0], rows[0] | {name: value}])
        with pytest.raises(DataError, match=rf"bbq\.jsonl:2: {name} is '{value}'; BBQ has \w+ and \w+"):
            run_suites(models[0], [f"bbq:{file}"])
    for wrong in (
        {"label": "x"},
        {"label": 3},
        {"label": True},
        {"label": 1.9},
        {"answer_info": {}},
        {"additional_metadata": {}},
    ):
        write_lines(file, [rows[0], rows[0] | wrong])
        with pytest.raises(DataError, match=r"bbq\.jsonl:2: label, answer_info or additional_metadata"):
            run_suites(models[0], [f"bbq:{file}"])
    write_lines(file, [{"context": "x"}])
    with pytest.raises(DataError, match="lacks 'ans0'; expected a question of BBQ"):
        run_suites(models[0], [f"bbq:{file}"])


# -------------------------------------------------------------------------------- answers, ifeval, mt_bench


def test_answers_show_refusals_and_lengths_and_are_asked_once(server, tmp_path):
    no = "say [\"I'm sorry, but I can't help with that.\"]"
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join([no, "sea " * 20, "cut it", no + " ", "one two three"]))
    before = len(requests_of(server))
    (result,) = run_suites(f"endpoint:{server}", [f"answers:{file}"])
    found = {name: value.figure.mean for name, value in result.metrics.items()}
    assert found["refusals"] == 1 / 4 and found["ended by itself"] == 3 / 4  # two prompts are the same
    assert found["looping"] == 1 / 4 and found["words"] == pytest.approx((10 + 22 + 4 + 5) / 4)
    assert len(requests_of(server)) - before == 4
    assert run_suites(f"endpoint:{server}", [f"answers:{file}"])[0].to_json() == result.to_json()
    run_suites(f"endpoint:{server}", [f"answers:{file}"], max_tokens=9)
    assert len(requests_of(server)) - before == 8 and requests_of(server)[-1]["max_tokens"] == 9


def test_the_time_left_goes_by_whole_batches_made_now(monkeypatch):
    from orpo.data.stages import following
    from orpo.suites import subject

    clock = iter([100.0, 105.0, 105.01, 109.0, 109.01, 112.0])
    monkeypatch.setattr(subject, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    seen = []
    with following(lambda *report: seen.append(report)):
        advance = subject._Advance("x")
        for done in (10, 11, 12, 13, 14, 15):  # ten were there; batches of two, and the last
            advance(done, 15)
    assert seen == [("x", 0, 5), ("x", 0, 5), ("x", 2, 5), ("x", 5, 5)]


def test_instructions_and_prompts_are_counted_as_ifeval_counts_them():
    rows = [{"key": n, "prompt": "p"} for n in range(5)]

    def check(row, answers):
        if row["key"] == 4:
            raise LookupError(
                "\n***\n  Resource 'punkt_tab' not found.\n  Attempted to load 'tokenizers/punkt_tab/'"
            )
        followed = [row["key"] > n for n in range(1 + row["key"] % 3)]
        loose = [True] * len(followed) if answers == ["loose"] else followed
        return {
            "prompt_level_strict_acc": all(followed), "inst_level_strict_acc": followed,
            "prompt_level_loose_acc": all(loose), "inst_level_loose_acc": loose,
        }  # fmt: skip

    result = ifeval.measured(rows, ["loose", "", "", "", ""], check)
    found = {name: (value.figure.mean, value.n) for name, value in result.values().items()}
    # followed: [0], [1 0], [1 1 0], [1]
    assert found == {
        "prompts, strict": (1 / 4, 4), "prompts, loose": (2 / 4, 4),
        "instructions, strict": (4 / 7, 4), "instructions, loose": (5 / 7, 4),
    }  # fmt: skip
    assert result.notices[0].startswith("1 of 5 prompts cannot be checked without nltk's punkt_tab")
    prompts = ifeval.prompts()
    assert len(prompts) == 541 and sum(len(row["instruction_id_list"]) for row in prompts) == 834


def test_ifeval_is_scored_by_lm_evaluation_harness():
    pytest.importorskip("lm_eval.tasks.ifeval.utils")
    rows = [row for row in ifeval.prompts() if row["instruction_id_list"] == ["punctuation:no_comma"]][:2]
    found = ifeval.measured(rows, ["a, b\nno more", "none"], ifeval.scoring()).values()
    assert found["prompts, strict"].figure.mean == 0.5 and found["prompts, loose"].figure.mean == 1.0


def test_without_lm_evaluation_harness_one_line_says_so(models, monkeypatch):
    monkeypatch.setitem(sys.modules, "langdetect", None)
    with pytest.raises(
        ConfigError, match=r"scored by lm-evaluation-harness, which lacks langdetect: pip install 'orpo"
    ):
        run_suites(models[0], ["crows_pairs", "ifeval"])


def rating(answer):
    """What the server gives an answer, or None."""
    return None if "unrated" in answer else min(1 + len(answer) % 10, 10)


def test_mt_bench_asks_both_turns_as_fastchat_does_and_averages_ratings(server, monkeypatch):
    rows = {row["category"]: row for row in mt_bench.questions()}
    asked = [rows["writing"], rows["math"], rows["stem"]]
    asked[2] = asked[2] | {"turns": [asked[2]["turns"][0], "unrated please"]}
    monkeypatch.setattr(mt_bench, "questions", lambda: asked)
    before = len(requests_of(server))
    (result,) = run_suites(f"endpoint:{server}", ["mt_bench"], judge=f"endpoint:{server}")
    new = requests_of(server)[before:]
    assert len(new) == 12
    for row, temperature in zip(asked, (0.7, 0.0, 0.1), strict=True):
        first = f"You said: {row['turns'][0]}"
        turns = [
            {"role": "user", "content": row["turns"][0]}, {"role": "assistant", "content": first},
            {"role": "user", "content": row["turns"][1]},
        ]  # fmt: skip
        (one,) = [request for request in new if request["messages"] == turns[:1]]
        (two,) = [request for request in new if request["messages"] == turns]
        assert (one["temperature"], two["temperature"], one["max_tokens"]) == (temperature, temperature, 1024)
        kind = "single-math-v1" if row["category"] == "math" else "single-v1"
        parts = {"question_1": row["turns"][0], "answer_1": first, "question_2": row["turns"][1],
                 "answer_2": f"You said: {row['turns'][1]}"}  # fmt: skip
        parts |= {f"ref_answer_{n}": text for n, text in enumerate(row["references"], 1)}
        template = judge_prompt(f"{kind}-multi-turn")
        wanted = [{"role": "system", "content": template["system_prompt"]},
                  {"role": "user", "content": template["prompt_template"].format(**parts)}]  # fmt: skip
        assert wanted in [request["messages"] for request in new]
        single = judge_prompt(kind)["prompt_template"].format(
            question=row["turns"][0], answer=first, **{k: v for k, v in parts.items() if k == "ref_answer_1"}
        )
        assert single in [request["messages"][-1]["content"] for request in new]
    assert {request["max_tokens"] for request in new} == {1024, 2048}
    ratings = {row["category"]: [rating(f"You said: {turn}") for turn in row["turns"]] for row in asked}
    given = [one for both in ratings.values() for one in both if one is not None]
    assert len(given) == 5 and len(set(given)) > 2
    assert result.metrics["score"].figure.mean == pytest.approx(np.mean(given))
    assert result.metrics["score"].n == 5 and result.metrics["score (turn 2)"].n == 2
    assert result.metrics["score (math)"].figure.mean == pytest.approx(np.mean(ratings["math"]))
    assert result.measured.notices == [
        f"1 of 6 ratings cannot be read and do not count: {asked[2]['question_id']} turn 2"
    ]
    run_suites(f"endpoint:{server}", ["mt_bench"], judge=f"endpoint:{server}")
    assert len(requests_of(server)) - before == 12


@pytest.mark.parametrize(
    ("said", "found"),
    [("Rating: [[7]]", 7), ("[[7.5]] yes [[7.5]]", 7.5), ("[[10]]", 10), ("[[11]]", None), ("[[0]]", None),
     ("[7]", None), ("[[6]] or [[7]]", None), ("7", None)],
)  # fmt: skip
def test_a_rating_is_read_strictly(said, found):
    assert mt_bench.rating_of(said) == found


def test_references_are_there_for_what_needs_them():
    rows = mt_bench.questions()
    assert len(rows) == 80 and {row["category"] for row in rows} == set(mt_bench.TEMPERATURES)
    assert {row["category"] for row in rows if row["references"]} == {"math", "reasoning", "coding"}


# ------------------------------------------------------------------------------- lm-evaluation-harness


def test_means_over_questions_get_their_values_and_other_metrics_a_line():
    samples = [
        {"doc_id": n, "filter": "none", "metrics": ["acc", "ppl", "f1"], "acc": float(n % 2),
         "ppl": (1.0, 2), "f1": 0.5}
        for n in range(4)
    ] + [{"doc_id": n, "filter": "strict", "metrics": ["em"], "em": n == 0} for n in range(4)]  # fmt: skip
    results = {
        "t": {
            "alias": "t",
            "acc,none": 0.5,
            "acc_stderr,none": 0.1,
            "em,strict": 0.25,
            "ppl,none": 7.25,
            "f1,none": 0.6,
        }
    }
    found = by_question({"samples": {"t": samples}, "results": results, "versions": {"t": 2}})
    assert found["items"] == [f"t:{n}" for n in range(4)] and found["versions"] == {"t": 2}
    assert found["columns"] == {"acc": [0, 1, 0, 1], "em, strict": [1, 0, 0, 0]}
    no_mean = "which is no mean over questions and has no error here"
    assert found["notices"] == [f"ppl 7.25, {no_mean}", f"f1 0.6, {no_mean}"]


# ------------------------------------------------------------------------------------------- the command


def test_suites_are_named_with_commas_or_one_by_one_and_bias_is_several(tmp_path):
    names = [one.name for one in chosen(["ifeval,answers", " bias:b.jsonl", "lm_eval:gsm8k+chat", "ifeval"])]
    assert names == ["ifeval", "answers", "crows_pairs", "bbq:b.jsonl", "lm_eval:gsm8k+chat"]
    lines = listing()
    assert [line.split(":")[0].split()[0] for line in lines] == [*SUITES, "bias"]
    code = (
        "import sys, orpo.suites.registry, orpo.commands.suites; print({'torch', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
    status, out, _ = orpo_main("suites")
    assert status == 0 and out.splitlines() == lines


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--suite", "ifevl"], "'ifevl' is unknown; did you mean ifeval?"),
        (["--suite", "pairs"], "--suite pairs: name what it is to run on, pairs:FILE"),
        (["--suite", "ifeval:x"], "--suite ifeval: takes nothing after its name, not 'x'"),
        (["--suite", "mt_bench"], "needs a judge: --judge endpoint:URL"),
        (["--suite", "mt_bench", "--judge", "gpt"], "--judge gpt: expected endpoint:URL or model:MODEL"),
        (["--suite", "answers", "--limit", "0"], "limit: 0 is out of range"),
        (["--suite", "answers", "--data", "x"], "--data and --suite are both given"),
        ([], "--data FILE, or --suite NAMES"),
        (["--data", "x", "--limit", "3"], "--limit is of a suite; name one with --suite"),
        (["third", "--suite", "answers"], "eval compares two models; 3 are named"),
    ],
)
def test_what_cannot_be_run_is_one_line(words, message, models):
    status, _, err = orpo_main("eval", *models, *words)
    assert status == 2 and message in err and err.count("\n") == 1


def test_the_command_prints_two_models_and_what_changed(models, server):
    status, out, _ = orpo_main("eval", *models, "--suite", "crows_pairs", "--limit", "6")
    table = [line for line in out.splitlines() if "saved as" not in line]
    assert status == 0 and max(map(len, table)) <= 80
    assert table[-6].split() == ["first", "second", "change", "n"] and table[-2].startswith("  socioeconomic")
    (row,) = [line for line in table if line.startswith("difference")]
    assert row.count("±") == 3 and row.endswith(" 6")
    status, out, _ = orpo_main(
        "eval", models[0], "--suite", "answers", "--limit", "2", "--max_tokens", "5", "--json"
    )
    (found,) = json.loads(out)
    assert status == 0 and found["metrics"]["tokens"]["n"] == 2 and found["settings"]["max_tokens"] == 5
    status, _, err = orpo_main("eval", f"endpoint:{server}", "--suite", "crows_pairs")
    assert status == 2 and "reads log-probs, which an endpoint does not give" in err
    status, _, err = orpo_main("eval", models[0], "./no/such/folder", "--suite", "crows_pairs")
    assert status == 2 and "there is no such folder" in err
