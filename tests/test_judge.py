"""Win rates: AlpacaEval's arithmetic, intervals by prompt, rewards as one by one, verdicts read strictly."""

import contextlib
import io
import json
import math
import random
import shutil
import statistics
import urllib.request

import numpy as np
import pytest
import torch
import transformers
from answer_server import answer_server
from tiny_tokenizer import tiny_tokenizer

import orpo
from orpo import cli
from orpo.errors import ConfigError, DataError, ModelError, RunError
from orpo.evaluation.statistics import bootstrap_interval, clustered_mean
from orpo.judging.alpaca_eval import read_annotations, read_control
from orpo.judging.job import judge
from orpo.judging.length_control import Control, length_controlled
from orpo.judging.llm_judge import verdict_of
from orpo.judging.win_rate import Ruling, win_rate
from orpo.settings.config import OrpoSettings


@pytest.fixture(autouse=True)
def _home(tmp_path, monkeypatch):
    monkeypatch.setattr("orpo.evaluation.kept_values.HF_HOME", str(tmp_path / "home"))


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def answers(path, name, texts):
    rows = [{"instruction": question, "output": text, "generator": name} for question, text in texts]
    return write(path, rows)


def orpo_main(*words: object) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cli.main([str(word) for word in words])
    return status, out.getvalue(), err.getvalue()


# ------------------------------------------------------------------------------------------- counting


def made_annotations():
    """Rows of annotations and their preferences; draws are exactly 1.5, or 0."""
    draw = random.Random(1)
    preferences = [1.5, 0.0, 2.0, 1.0] + [1 + draw.random() for _ in range(200)]
    texts = [("x" * draw.randrange(50), "y" * draw.randrange(50)) for _ in preferences]
    rows = [
        {"instruction": str(n % 7), "preference": preference, "output_1": one, "output_2": two,
         "generator_1": "base", "generator_2": "mine"}
        for n, (preference, (one, two)) in enumerate(zip(preferences, texts, strict=True))
    ]  # fmt: skip
    return rows, preferences


def test_annotations_give_the_leaderboards_figures(tmp_path):
    rows, preferences = made_annotations()
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps([*rows, rows[0] | {"preference": None}, rows[0] | {"preference": 3.0}]))
    read = read_annotations(path)
    assert (read.first, read.second) == ("base", "mine")
    assert [source for source, _ in read.failures] == ["annotations.json:205", "annotations.json:206"]
    found = win_rate(read.verdicts)
    scores = [0.5 if one in (0, 1.5) else one - 1 for one in preferences]
    assert found.rate.mean == pytest.approx(statistics.mean(scores), abs=1e-12)
    assert found.rate.se == pytest.approx(statistics.stdev(scores) / math.sqrt(len(scores)), rel=1e-12)
    wins, draws = sum(one > 0.5 for one in scores), sum(one == 0.5 for one in scores)
    assert (found.wins, found.ties, found.losses) == (wins, draws, 204 - wins - draws)
    assert draws == 2 and found.discrete == pytest.approx((wins + 1) / 204)
    assert found.mean_lengths[0] == pytest.approx(statistics.mean(len(row["output_1"]) for row in rows))
    low, high = found.interval
    assert (low, high) == pytest.approx(
        (found.rate.mean - 1.96 * found.rate.se, found.rate.mean + 1.96 * found.rate.se), abs=0.004
    )


def test_an_interval_treats_prompts_as_what_was_drawn():
    draw = np.random.default_rng(0)
    prompt = torch.arange(40).repeat_interleave(5)
    score = torch.from_numpy(np.repeat(draw.random(40), 5))  # five samples that all say the same
    one = torch.ones(200)
    low, high = bootstrap_interval(score, one, prompt)
    figure = clustered_mean(score, one, prompt)
    assert high - low == pytest.approx(2 * 1.96 * figure.se, rel=0.05)
    naive_low, naive_high = bootstrap_interval(score, one, torch.arange(200))
    assert (high - low) / (naive_high - naive_low) == pytest.approx(math.sqrt(5), rel=0.06)
    weight = torch.arange(200) % 3
    slow = []
    for _ in range(2000):
        taken = draw.integers(40, size=40)
        rows = np.concatenate([np.flatnonzero(prompt.numpy() == one) for one in taken])
        slow.append(float((score[rows] * weight[rows]).sum() / weight[rows].sum()))
    assert bootstrap_interval(score * weight, weight, prompt) == pytest.approx(
        tuple(np.quantile(slow, [0.025, 0.975])), abs=0.012
    )
    assert bootstrap_interval(score[:5], one[:5], prompt[:5]) is None
    assert bootstrap_interval(score, one, prompt) == (low, high)  # the same numbers each time


def test_no_verdict_is_no_win_rate():
    with pytest.raises(DataError, match="no verdict"):
        win_rate([])
    single = win_rate([Ruling("p", 1.0, (1, 2))])
    assert single.rate.mean == 1 and single.rate.se is None and single.interval is None


# -------------------------------------------------------------------------------------- length control


def made_verdicts(bias: float, number: int = 400):
    """A judge who likes length, and a second model that writes more: what it is worth at equal length."""
    draw = np.random.default_rng(3)
    first, second = draw.integers(50, 400, number), draw.integers(150, 700, number)
    longer = (first - second) / (first - second).std(ddof=1)
    logit = -bias * np.tanh(longer) - 0.4
    scores = (draw.random(number) < 1 / (1 + np.exp(-logit))).astype(float)
    return scores.tolist(), list(zip(first.tolist(), second.tolist(), strict=True))


def slow_fit(x, y, weight, penalty):
    """Minimise sum |w| + C * loss (without a penalty: the loss) by brute force, in steps that shrink."""
    best, step = np.zeros(x.shape[1]), 2.0

    def cost(w):
        z = x @ w
        loss = weight * (y * np.logaddexp(0, -z) + (1 - y) * np.logaddexp(0, z))
        return loss.sum() if penalty is None else np.abs(w).sum() + penalty * loss.sum()

    while step > 1e-5:
        around = [best + step * np.array(move) for move in np.ndindex(*[3] * x.shape[1])]
        moved = min((one - step for one in around), key=cost)
        best, step = (moved, step) if cost(moved) < cost(best) else (best, step / 2)
    return best


def test_the_length_controlled_rate_takes_the_length_out():
    scores, lengths = made_verdicts(bias=1.5, number=2000)
    found = length_controlled(scores, lengths, draws=30)
    assert np.mean(scores) > 0.55
    assert found.rate == pytest.approx(1 / (1 + math.exp(0.4)), abs=0.05)  # three of its standard errors
    assert found.length < -0.8 and found.interval[0] < found.rate < found.interval[1]
    assert not found.comparable and found.difficulty is None and found.penalty is None
    assert found.spread == pytest.approx(0)
    longer = np.array([one - two for one, two in lengths], dtype=float)
    x = np.stack([np.tanh(longer / longer.std(ddof=1)), np.ones(len(scores))], axis=1)
    expected = slow_fit(x, np.array(scores), np.ones(len(scores)), found.penalty)
    assert (found.length, found.model) == pytest.approx(tuple(expected), abs=2e-3)
    low, high = length_controlled(scores[:500], lengths[:500], draws=30).interval
    assert (high - low) / (found.interval[1] - found.interval[0]) == pytest.approx(2, rel=0.5)
    fair_scores, fair_lengths = made_verdicts(bias=0.0, number=2000)
    fair = length_controlled(fair_scores, fair_lengths, draws=2)
    assert abs(fair.length) < 0.2 and fair.rate == pytest.approx(np.mean(fair_scores), abs=0.03)
    assert length_controlled(scores[:19], lengths[:19]) is None
    assert length_controlled(scores, [(5, 9)] * 2000) is None


def test_difficulties_and_gamed_verdicts_enter_the_fit_with_their_weights(tmp_path):
    draw = np.random.default_rng(4)
    scores, lengths = made_verdicts(bias=1.0, number=60)
    hard = draw.normal(size=60)
    table = [["preference", "index", "std_delta_len", "instruction_difficulty", "not_gamed_baseline"]]
    table += [[draw.random(), n, draw.normal(), hard[n], own] for own in (False, True) for n in range(60)]
    gamed, difficulty = tmp_path / "df_gamed.csv", tmp_path / "instruction_difficulty.csv"
    gamed.write_text("\n".join(",".join(map(str, row)) for row in table))
    order = draw.permutation(60)
    difficulty.write_text(",instruction_difficulty\n" + "\n".join(f"{n},{hard[n]}" for n in order))
    control = read_control(difficulty, gamed)
    assert control.difficulty == pytest.approx(hard.tolist())
    found = length_controlled(scores, lengths, control, draws=10)
    assert found.comparable and found.penalty > 0
    longer = np.array([one - two for one, two in lengths], dtype=float)
    own = np.stack([np.tanh(longer / longer.std(ddof=1)), hard, np.ones(60)], axis=1)
    rows = np.array([[float(cell) for cell in row] for row in table[1:]])
    other = np.stack([np.tanh(rows[:, 2]), rows[:, 3], rows[:, 4]], axis=1)
    weight = np.concatenate([np.where(rows[:, 4] > 0, 1, 0.1), np.ones(60)])
    y = np.concatenate([rows[:, 0], scores])
    expected = slow_fit(np.concatenate([other, own]), y, weight, found.penalty)
    assert (found.length, found.difficulty, found.model) == pytest.approx(tuple(expected), abs=2e-3)
    own[:, 0] = 0
    said = 1 / (1 + np.exp(-own @ expected))
    assert found.rate == pytest.approx(said.mean(), abs=1e-3)
    assert found.spread == pytest.approx(said.std(ddof=1) / math.sqrt(60), abs=1e-3)
    assert read_control(difficulty, None, [3, 1]).difficulty == pytest.approx([hard[3], hard[1]])
    with pytest.raises(DataError, match="knows no difficulty of instruction 60"):
        read_control(difficulty, None, [0, 60])
    with pytest.raises(ConfigError, match="--gamed needs --difficulty"):
        read_control(None, gamed)
    with pytest.raises(DataError, match="lacks the column 'preference'"):
        read_control(difficulty, difficulty)
    with pytest.raises(DataError, match="2 difficulties for 60 verdicts"):
        length_controlled(scores, lengths, Control(difficulty=[0.0, 1.0]))


# ------------------------------------------------------------------------------------ a model that judges

QUESTIONS = ("long one", "long two", "first three", "even four", "mumble five", "both six", "same seven")


@pytest.fixture(scope="module")
def server():
    with answer_server() as url:
        yield url


def two_files(tmp_path):
    first = answers(
        tmp_path / "a.jsonl", "one", [(q, "short" if "same" not in q else "equal") for q in QUESTIONS]
    )
    longer = [(q, "a longer answer" if "same" not in q else "equal") for q in QUESTIONS]
    second = answers(tmp_path / "b.jsonl", "two", [*longer[::-1], ("only here", "x")])
    return first, second


def num_requests(url):
    with urllib.request.urlopen(url.removesuffix("/v1") + "/stats") as response:
        return len(json.load(response)["requests"])


def test_a_judge_sees_both_orders_and_its_verdicts_are_read_strictly(tmp_path, server, capsys):
    first, second = two_files(tmp_path)
    before = num_requests(server)
    found = judge(first, second, f"endpoint:{server}", out=tmp_path / "verdicts.jsonl")
    assert num_requests(server) - before == 2 * 6  # the equal answers are not asked about
    # long: the second wins twice; first: a tie of two orders; even: a tie; same: a tie
    assert (found.win.wins, found.win.ties, found.win.losses) == (2, 3, 0)
    assert found.win.rate.mean == pytest.approx(3.5 / 5)
    assert [source for source, _ in found.failures] == ["a.jsonl:5", "a.jsonl:6"]
    assert found.consistent == pytest.approx(4 / 5)
    assert found.first_shown == pytest.approx((4 * 0.5 + 2 * 1 + 4 * 0.5) / 10)
    assert (found.first, found.second) == ("one", "two")
    said = capsys.readouterr().out
    assert "1 answers of" in said and "b.jsonl have no partner in the other file" in said
    rows = [json.loads(line) for line in (tmp_path / "verdicts.jsonl").read_text().splitlines()]
    assert len(rows) == 14 and sum(row["score"] is None for row in rows) == 4
    again = judge(first, second, f"endpoint:{server}")
    assert num_requests(server) - before == 12 and again.to_json() == found.to_json()
    swapped = judge(second, first, f"endpoint:{server}")
    assert swapped.win.rate.mean == pytest.approx(1 - found.win.rate.mean)


def test_orders_can_be_drawn_and_are_the_same_each_time(tmp_path, server):
    texts = [f"first number {n}" for n in range(60)]
    first = answers(tmp_path / "a.jsonl", "one", [(q, f"one {n}") for n, q in enumerate(texts)])
    second = answers(tmp_path / "b.jsonl", "two", [(q, f"two {n}") for n, q in enumerate(texts)])
    found = judge(first, second, f"endpoint:{server}", orders="drawn")
    assert found.win.number == 60 and found.first_shown == 1 and found.consistent is None
    assert 0.25 < found.win.rate.mean < 0.75  # the order decides, and it is drawn
    assert judge(first, second, f"endpoint:{server}", orders="drawn").win.rate.mean == found.win.rate.mean
    with pytest.raises(ConfigError, match="orders: 'one' is not one of both, drawn"):
        judge(first, second, f"endpoint:{server}", orders="one")


@pytest.mark.parametrize(
    ("said", "verdict"),
    [
        ("[[A]]", "A"), ("so: [[B]].", "B"), ("[[C]] tie [[C]]", "C"), ("[[A]] or [[B]]", None),
        ("[A]", None), ("[[a]]", None), ("", None), ("[[AB]]", None),
    ],
)  # fmt: skip
def test_a_verdict_is_read_strictly(said, verdict):
    assert verdict_of(said) == verdict


# --------------------------------------------------------------------------------------- a reward model


@pytest.fixture(scope="module")
def reward_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward")
    tokenizer = tiny_tokenizer("mistral", pad_is_eos=True)  # answers end with what others pad with
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=256, num_labels=1,
    )  # fmt: skip
    model = transformers.LlamaForSequenceClassification(config)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def slow_reward(tokenizer, model, question, answer):
    """The classifier on the last token of one conversation, without padding."""
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        return float(model.score(model.model(ids).last_hidden_state)[0, -1, 0])


def test_rewards_are_those_of_one_answer_at_a_time_and_decide(tmp_path, reward_folder):
    words = ["the", "sea", "is", "wide", "and", "blue", "the", "wind", "is", "never", "still"]
    draw = random.Random(0)
    texts = [[" ".join(draw.choices(words, k=draw.randrange(1, 20))) for _ in range(2)] for _ in range(24)]
    texts[3][1] = texts[3][0]
    texts[5][1] = "sea " * 400
    first = answers(tmp_path / "a.jsonl", "one", [(f"q{n}", pair[0]) for n, pair in enumerate(texts)])
    second = answers(tmp_path / "b.jsonl", "two", [(f"q{n}", pair[1]) for n, pair in enumerate(texts)])
    found = judge(first, second, f"reward:{reward_folder}", out=tmp_path / "v.jsonl")
    slow = (
        transformers.AutoTokenizer.from_pretrained(reward_folder),
        transformers.AutoModelForSequenceClassification.from_pretrained(reward_folder),
    )
    expected = []
    for number, (one, two) in enumerate(texts):
        if number != 5:
            gap = slow_reward(*slow, f"q{number}", two) - slow_reward(*slow, f"q{number}", one)
            expected.append(0.5 if number == 3 else float(gap > 0))
            assert number == 3 or abs(gap) > 1e-4
    assert [json.loads(line)["score"] for line in (tmp_path / "v.jsonl").read_text().splitlines()] == expected
    assert found.win.rate.mean == pytest.approx(sum(expected) / 23) and 0 < found.win.wins < 22
    (failure,) = found.failures
    assert failure[0] == "a.jsonl:6" and "tokens do not fit into the 256" in failure[1]
    kept = list((tmp_path / "home").rglob("rewards-*.jsonl"))
    assert len(kept) == 1 and len(kept[0].read_text().splitlines()) == 46  # each answer once
    whole = kept[0].read_text()
    kept[0].write_text(whole[:-9])  # as a machine that lost its power leaves it
    assert judge(first, second, f"reward:{reward_folder}").to_json() == found.to_json()
    assert len(kept[0].read_text().splitlines()) == 47
    json.loads(kept[0].read_text().splitlines()[-1])


def test_what_is_no_reward_model_is_refused(tmp_path, reward_folder):
    from orpo.judging.reward_model import RewardModel

    several = tmp_path / "several"
    transformers.LlamaForSequenceClassification(
        transformers.LlamaConfig(
            vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
            num_labels=3,
        )
    ).save_pretrained(several)  # fmt: skip
    tiny_tokenizer("chatml").save_pretrained(several)
    for name, words in (
        (several, "has 3 outputs; a reward model has one"),
        ("orpo/demo/model", "is no reward model|cannot be loaded"),
        (tmp_path / "nothing", "cannot be loaded"),
    ):
        with pytest.raises(ModelError, match=words):
            RewardModel(str(name), OrpoSettings())


def test_a_reward_model_without_an_embedding_for_a_token_is_one_line(tmp_path, reward_folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(reward_folder)
    tokenizer.add_tokens(["rewriteword"])
    other = tmp_path / "other"
    shutil.copytree(reward_folder, other)
    tokenizer.save_pretrained(other)
    first = answers(tmp_path / "a.jsonl", "one", [("q", "the sea")])
    second = answers(tmp_path / "b.jsonl", "two", [("q", "the rewriteword")])
    with pytest.raises(ModelError, match=r"reward model .*: token \d+ \('rewriteword'\) has no embedding"):
        judge(first, second, f"reward:{other}")


def test_a_reward_that_is_no_number_is_no_verdict(tmp_path, reward_folder):
    model = transformers.AutoModelForSequenceClassification.from_pretrained(reward_folder)
    model.score.weight.data[:] = float("nan")
    other = tmp_path / "other"
    shutil.copytree(reward_folder, other)
    model.save_pretrained(other)
    first, second = (answers(tmp_path / f"{name}.jsonl", name, [("q", "the sea")]) for name in "ab")
    with pytest.raises(RunError, match=r"none of 1 pairs has a verdict .* gives nan, which is no reward"):
        judge(first, second, f"reward:{other}")


# ------------------------------------------------------------------------------------------- the command


def test_the_command_prints_a_table_of_80_columns_and_its_status_says_what_failed(tmp_path, server):
    first, second = two_files(tmp_path)
    status, out, err = orpo_main(
        "judge", first, second, "--by", f"endpoint:{server}", "--endpoint_model", "parrot"
    )
    assert status == 2 and "2 pairs have no verdict and are not counted (first: a.jsonl:5" in err
    assert "two against one, by parrot as a judge" in out
    rows = dict(line.split(maxsplit=2)[::2] if line.startswith("win") else line.rsplit(maxsplit=1)
                for line in out.splitlines() if line.startswith(("win rate", "no verdict")))  # fmt: skip
    assert rows["win"].startswith("70.0 % ± 12.2   95 %: 50.0 to ") and rows["no verdict"] == "2"
    table = out[out.index("two against one") :].splitlines()
    assert len(table) == 9 and max(map(len, table)) <= 80
    status, out, _ = orpo_main("judge", first, second, "--by", f"endpoint:{server}", "--json")
    result = json.loads(out)
    assert status == 2 and result["win_rate"]["n"] == 5 and result["failures"] == 2


def test_annotations_print_both_rates(tmp_path, monkeypatch):
    monkeypatch.setattr("orpo.judging.length_control.DRAWS", 5)
    rows, _ = made_annotations()
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(rows))
    status, out, _ = orpo_main("judge", "--by", f"alpaca_eval:{path}")
    assert status == 0 and "mine against base, by annotations in annotations.json" in out
    assert "at equal length" in out and "it compares with no leaderboard" in out
    difficulty = tmp_path / "d.csv"
    difficulty.write_text("instruction_difficulty\n" + "\n".join(str(n % 5) for n in range(204)))
    status, out, _ = orpo_main("judge", "--by", f"alpaca_eval:{path}", "--json", "--difficulty", difficulty)
    assert status == 0 and json.loads(out)["length_controlled"]["coefficients"]["difficulty"] is not None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a.jsonl", "--by", "reward:m"], "judge compares two files of answers; 1 are named"),
        (["a.jsonl", "b.jsonl", "--by", "vote"], "--by vote: expected one of reward:MODEL, endpoint:URL"),
        (["--by", "reward:m"], "--by reward needs two files of answers"),
        (["a.jsonl", "b.jsonl", "--by", "alpaca_eval:x"], "takes no files of answers"),
        (["a.jsonl", "b.jsonl", "--by", "reward:m"], "a.jsonl: cannot be read as answers"),
        (["a.jsonl", "b.jsonl", "--by", "reward:m", "--gamed", "g"], "use --by alpaca_eval"),
        (["a.jsonl", "b.jsonl", "--by", "reward:m", "--endpoint_model", "m"], "options of a server without"),
        (["--by", "alpaca_eval:none.json"], "none.json: cannot be read as annotations of AlpacaEval"),
    ],
)
def test_what_cannot_be_judged_is_one_line(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, _, err = orpo_main("judge", *words)
    assert status == 2 and message in err and err.count("\n") == 1


def test_files_without_a_common_prompt_or_of_something_else_are_named(tmp_path):
    one = answers(tmp_path / "a.jsonl", "m", [("p", "x")])
    other = answers(tmp_path / "b.jsonl", "n", [("q", "y")])
    with pytest.raises(DataError, match="answer no prompt in common"):
        judge(one, other, "reward:m")
    write(other, [{"prompt": "q"}])
    with pytest.raises(DataError, match=r"b\.jsonl:1: expected texts in 'instruction' and 'output'"):
        judge(one, other, "reward:m")
    other.write_text("[]")
    with pytest.raises(DataError, match="expected answers: a JSON object a line"):
        judge(one, other, "reward:m")
    assert orpo.judge is judge
    broken = tmp_path / "x.json"
    for rows, words in (
        ([{"preference": 1}], "lacks 'output_1'"),
        ([], "expected a list of annotations"),
    ):
        broken.write_text(json.dumps(rows))
        with pytest.raises(DataError, match=words):
            read_annotations(broken)


def test_two_files_of_one_model_are_told_apart_by_their_names(tmp_path, server):
    one = answers(tmp_path / "a.jsonl", "m", [("long", "x")])
    other = answers(tmp_path / "b.jsonl", "m", [("long", "yy")])
    found = judge(one, other, f"endpoint:{server}")
    assert (found.first, found.second) == ("m (a.jsonl)", "m (b.jsonl)")


def test_a_judge_without_any_verdict_is_an_error(tmp_path, server):
    one = answers(tmp_path / "a.jsonl", "m", [("mumble", "x")])
    other = answers(tmp_path / "b.jsonl", "n", [("mumble", "yy")])
    with pytest.raises(RunError, match="none of 1 pairs has a verdict"):
        judge(one, other, f"endpoint:{server}")
