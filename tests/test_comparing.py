"""Methods side by side: the choice of settings, intervals over prompts and seeds, what is said of them."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orpo.comparing.arms import Maker
from orpo.comparing.asking import compared
from orpo.comparing.budget import FEWEST_PAIRS, FEWEST_STEPS, divided
from orpo.comparing.choosing import ALLOWED, choose
from orpo.comparing.cost import Cost
from orpo.comparing.methods import (
    OBJECTIVES,
    answers_read,
    candidates,
    method_of,
    method_settings,
    recipe_choice,
    stages_of,
)
from orpo.comparing.options import Options
from orpo.comparing.plan import settle_plan, usable
from orpo.comparing.quality import estimates, quality_of
from orpo.comparing.result import Comparison, Entry
from orpo.comparing.sentences import answering, rules, sentences
from orpo.comparing.splits import Splits, nested
from orpo.engine.head import PairScores
from orpo.errors import ConfigError
from orpo.evaluation.answers import Reply
from orpo.evaluation.per_pair import PairResults
from orpo.evaluation.statistics import clustered_mean, critical, mean_over_runs
from orpo.pairs import PreferencePair
from orpo.settings.config import PRESETS, OrpoSettings, resolve_stages

RECIPE = {"model_name_or_path": "base", "dataset_name": "pairs", "learning_rate": 1e-3, "beta": 0.5}


def results(chosen, rejected, prompts=None):
    """What a model says of pairs, from the mean log-probs of their answers; ten tokens each."""
    chosen, rejected = torch.tensor(chosen), torch.tensor(rejected)
    number = len(chosen)
    columns = {
        "chosen_logprob_P": chosen,
        "rejected_logprob_P": rejected,
        "has_rejected_P": torch.ones(number, dtype=torch.bool),
    }
    scores = PairScores(*(columns.get(name, torch.full((number,), 10.0)) for name in PairScores._fields))
    prompt = torch.arange(number) if prompts is None else torch.tensor(prompts)
    return PairResults(scores, prompt, [f"pairs:{n}" for n in range(number)], [None] * number)


# ------------------------------------------------------------------------------ methods and settings


def test_the_recipe_comes_first_and_what_is_tried_moves_away_from_it_step_by_step():
    tried = candidates({"learning_rate": 1e-3, "beta": 0.5}, 6, 2.0)
    assert tried == [
        {"learning_rate": 1e-3, "beta": 0.5},
        {"learning_rate": 2e-3, "beta": 0.5},
        {"learning_rate": 5e-4, "beta": 0.5},
        {"learning_rate": 1e-3, "beta": 1.0},
        {"learning_rate": 1e-3, "beta": 0.25},
        {"learning_rate": 4e-3, "beta": 0.5},
    ]
    assert candidates({"learning_rate": 3e-4}, 4) == [
        {"learning_rate": rate} for rate in (3e-4, 9e-4, 1e-4, 2.7e-3)
    ]


@given(st.integers(1, 40), st.sampled_from([1.5, 2.0, 3.0]), st.booleans())
def test_no_setting_is_tried_twice_and_all_methods_try_equally_many(number, factor, both):
    start = {"learning_rate": 5e-6} | ({"beta": 0.1} if both else {})
    tried = candidates(start, number, factor)
    assert len({tuple(one.items()) for one in tried}) == len(tried) == number


@pytest.mark.parametrize("method", ["foo", "sft+foo", "sft+sft", "", "sft+"])
def test_a_method_that_is_not_known_is_named(method):
    with pytest.raises(ConfigError, match="methods"):
        stages_of(method)


CHOICE = {"learning_rate": 1e-4, "beta": 2.0}


def test_methods_of_a_recipe_share_what_the_nll_is_over_and_little_else():
    recipe = RECIPE | {"nll_weight": 0.7, "objective": "response"}
    same = {"model_name_or_path": "base", "dataset_name": "pairs", "learning_rate": 1e-4}
    over = {"nll_on": "response", "nll_reduction": "token"}
    assert method_settings(recipe, "sft", {"learning_rate": 1e-4}) == same | over | {"objective": "sft"}
    orpo = method_settings(recipe, "orpo", CHOICE)
    assert orpo == same | {"objective": "response", "nll_weight": 0.7, "beta": 2.0}
    assert method_settings(recipe, "simpo", CHOICE) == same | over | {"objective": "simpo", "beta": 2.0}
    plain = method_settings(RECIPE | {"simpo_gamma": 3.0, "nll_on": "response"}, "dpo", CHOICE)
    assert plain == same | {"objective": "dpo", "nll_on": "response", "beta": 2.0}


@pytest.mark.parametrize("method", [*OBJECTIVES, "sft+dpo", "sft+tempered_odds", "sft+simpo+dpo"])
@pytest.mark.parametrize("own", ["orpo", "response", "llamafactory", "simpo", "dpo", "cpo"])
def test_every_method_can_be_trained_with_every_recipe(method, own):
    choice = recipe_choice({"objective": own, "beta": 0.3}, method, rate=1e-5)
    settings = method_settings({"objective": own, "beta": 0.3}, method, choice)
    settings.pop("learning_rate")
    stages = resolve_stages(OrpoSettings(**settings))
    assert len(stages) == len(stages_of(method))
    assert sum(stage.share for stage in stages) == pytest.approx(1)
    for stage, name in zip(stages, stages_of(method), strict=True):
        assert stage.objective.compares == PRESETS[name].compares
        assert (stage.objective.preference_weight > 0) == (PRESETS[name].preference_weight > 0)


def test_beta_is_that_of_the_last_stage():
    settings = method_settings(RECIPE, "orpo+dpo", CHOICE)
    first, last = settings["stages"]
    assert first == {"objective": "orpo", "beta": 0.5, "share": 0.5}
    assert last == {"objective": "dpo", "beta": 2.0}
    assert "beta" not in settings


def test_a_recipe_of_another_objective_says_nothing_about_orpo():
    recipe = RECIPE | {"objective": "simpo", "beta": 7.0}
    assert recipe_choice(recipe, "simpo", rate=1.0) == {"learning_rate": 1e-3, "beta": 7.0}
    assert recipe_choice({"beta": 0}, "orpo", rate=1.0) == {"learning_rate": 1.0, "beta": 0.1}
    assert recipe_choice(recipe, "sft", rate=1.0) == {"learning_rate": 1e-3}
    assert recipe_choice(recipe, "orpo", rate=1.0) == {"learning_rate": 1e-3, "beta": 0.1}


def test_a_probe_knows_the_method_of_its_recipe():
    recipes = [{}, {"beta": 0}, {"objective": "response"}, {"objective": "dpo"}]
    assert [method_of(one) for one in recipes] == ["orpo", "sft", "orpo", "dpo"]
    with pytest.raises(ConfigError, match="stages"):
        method_of({"stages": [{"objective": "sft"}]})


@pytest.mark.parametrize("wrong", [{"seeds": 0}, {"trials": 0}, {"jobs": -1}, {"methods": []},
                                   {"methods": ["sft", "sft"]}, {"baseline": "orpo", "methods": ["sft"]},
                                   {"answers": -1}, {"methods": ["dog"]}])  # fmt: skip
def test_options_out_of_range_are_named(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Options(**wrong).check()


def maker(recipe=RECIPE):
    splits = Splits(Path("data"), {"train": 100, "validation": 10, "test": 20}, (50, 100))
    return Maker(recipe, splits, {}, Path("runs"))


def test_every_training_has_a_folder_of_its_own_and_differs_in_nothing_else():
    make = maker(RECIPE | {"eval_dataset_name": "other", "seed": 7, "use_peft": True})
    rate = {"learning_rate": 1e-3}
    arms = [
        make.arm("sft", rate, 100, 0),
        make.arm("sft", rate, 100, 1),
        make.arm("sft", rate, 50, 0),
        make.arm("sft", {"learning_rate": 2e-3}, 100, 0),
        make.arm("orpo", rate | {"beta": 0.5}, 100, 0),
        make.arm("orpo", rate | {"beta": 1.0}, 100, 0),
        make.arm("sft+orpo", rate | {"beta": 0.5}, 100, 0),
    ]
    assert len({arm.folder for arm in arms}) == 7
    assert {str(arm.folder) for arm in arms} == {arm.settings["output_dir"] for arm in arms}
    assert len({arm.settings["dataset_name"] for arm in arms}) == 2
    assert arms[2].settings["dataset_name"] != arms[0].settings["dataset_name"]
    assert {arm.settings["eval_dataset_name"] for arm in arms} == {str(Path("data") / "validation.parquet")}
    assert [arm.settings["seed"] for arm in arms] == [0, 1, 0, 0, 0, 0, 0]
    assert all(arm.settings["use_peft"] for arm in arms)


def test_answers_read_are_one_two_or_three_passes():
    read = [answers_read(method, 30, 10) for method in ("sft", "orpo", "dpo", "sft+dpo", "sft+orpo")]
    assert read == [30, 60, 60 + 20, 15 + 30 + 20, 45]


# ------------------------------------------------------------------------------ intervals


def test_of_one_run_the_error_is_that_over_prompts():
    torch.manual_seed(0)
    value, weight, prompt = torch.randn(40), torch.rand(40), torch.arange(40) // 2
    plain = clustered_mean(value * weight, weight, prompt)
    one = mean_over_runs(value[None], weight, prompt)
    assert (one.mean, one.se) == pytest.approx((plain.mean, plain.se), rel=1e-5)
    assert one.df == 19


def test_intervals_over_prompts_and_seeds_cover_the_truth():
    """400 draws: three seeds that differ, 60 prompts that differ, and noise of each; 95 % were asked for."""
    torch.manual_seed(0)
    covered = 0
    for _ in range(400):
        values = torch.randn(60) + 0.15 * torch.randn(3, 1) + 0.5 * torch.randn(3, 60)
        low, high = mean_over_runs(values, torch.ones(60), torch.arange(60)).interval()
        covered += low < 0 < high
    assert 0.93 <= covered / 400 <= 1.0


def test_seeds_that_differ_widen_the_interval_as_satterthwaite_has_it():
    values = torch.tensor([[0.0, 2.0, 4.0], [3.0, 5.0, 7.0]])
    one = mean_over_runs(values, torch.ones(3), torch.arange(3))
    of_prompts, of_runs = 4.0 / 3, (1.5**2 * 2) / 2
    assert one.se == pytest.approx(math.sqrt(of_prompts + of_runs))
    assert one.df == pytest.approx((of_prompts + of_runs) ** 2 / (of_prompts**2 / 2 + of_runs**2))


@pytest.mark.parametrize(
    ("df", "looks", "exact"), [(9, 1, 2.262), (9, 5, 3.250), (30, 2, 2.360), (1000, 3, 2.398)]
)
def test_intervals_that_hold_together_are_wider(df, looks, exact):
    assert critical(df + 1, looks=looks) == pytest.approx(exact, rel=5e-3)


def test_a_difference_is_taken_pair_by_pair_and_seed_by_seed():
    """Prompts vary by whole nats and methods differ by 0.1: only the paired interval can tell."""
    torch.manual_seed(0)
    chosen = torch.randn(50) * 3 - 4
    seeds = [results((chosen + 0.01 * s).tolist(), [-4.0] * 50) for s in (0, 1)]
    better = [results((chosen + 0.1 + 0.01 * s).tolist(), [-4.0] * 50) for s in (0, 1)]
    quality = quality_of(better, seeds, looks=1)
    assert quality.change["chosen_logprob"].mean == pytest.approx(0.1)
    assert quality.kind("chosen_logprob") == "better"
    assert quality.means["chosen_logprob"].se > 20 * quality.change["chosen_logprob"].se
    assert quality_of(seeds, better, looks=1).kind("chosen_logprob") == "worse"
    assert quality_of(seeds, [], looks=1).kind("chosen_logprob") == "unknown"


# ------------------------------------------------------------------------------ the choice


BEFORE = results([-3.0] * 6, [-3.1] * 6)


def spread(chosen, rejected):
    """Six pairs around the given log-probs."""
    steps = [0.02 * n for n in range(6)]
    return results([chosen - step for step in steps], [rejected - step / 2 for step in steps])


def chosen_of(*tried):
    choices = [{"learning_rate": 1e-3 * 2**n} for n in range(len(tried))]
    return choose(choices, list(tried), BEFORE, ["" if one is not None else "it failed" for one in tried])


def test_the_setting_that_tells_answers_apart_best_is_chosen():
    found = chosen_of(spread(-2.0, -2.5), spread(-2.0, -4.0), spread(-2.0, -3.0))
    assert found.number == 1
    assert found.choice == {"learning_rate": 2e-3}
    assert found.trials[0].is_told_apart
    assert found.indistinct == 0


def test_a_setting_that_makes_the_chosen_answers_unlikely_cannot_win():
    limit = -3.0 - ALLOWED
    found = chosen_of(spread(limit - 0.2, -9.0), spread(limit + 0.2, -4.0))
    assert (found.number, found.trials[0].keeps) == (1, False)
    both = chosen_of(spread(limit - 0.9, -9.0), spread(limit - 0.5, -9.0))
    assert (both.number, both.trials[1].keeps) == (1, False)


def test_a_setting_that_failed_is_passed_over_and_where_all_did_there_is_no_choice():
    found = chosen_of(None, spread(-2.0, -2.5))
    assert (found.number, found.trials[0].failure) == (1, "it failed")
    assert chosen_of(None, None) is None


def test_settings_that_say_the_same_are_not_told_apart():
    found = chosen_of(results([-2.0, -2.4] * 3, [-3.0] * 6), results([-2.4, -2.0] * 3, [-3.0] * 6))
    assert found.indistinct == 1


def test_the_edge_of_what_was_tried_is_named():
    assert chosen_of(spread(-2.0, -2.5), spread(-2.0, -3.0)).at_the_edge == ["learning_rate"]
    assert chosen_of(spread(-2.0, -3.5), spread(-2.0, -3.0)).at_the_edge == []


# ------------------------------------------------------------------------------ pairs


@given(st.lists(st.integers(0, 8), min_size=1, max_size=30), st.data())
def test_smaller_training_sets_are_nested_and_hold_whole_prompts(prompts, data):
    pairs = [PreferencePair([{"role": "user", "content": str(p)}], [], []) for p in prompts]
    small, large = sorted(data.draw(st.lists(st.integers(1, len(pairs)), min_size=2, max_size=2)))
    few, more = (nested(pairs, size, seed=1) for size in (small, large))
    ids = [list(map(id, some)) for some in (few, more)]
    assert set(ids[0]) <= set(ids[1])
    for some in ids:
        assert some == [one for one in map(id, pairs) if one in some], "the order of the pairs is kept"
    keys = {pair.prompt_key() for pair in few}
    assert len(few) == sum(pair.prompt_key() in keys for pair in pairs)
    assert len(few) <= small or len(keys) == 1


# ------------------------------------------------------------------------------ a probe's budget


@given(st.floats(0.005, 1), st.integers(500, 500_000), st.integers(2, 12), st.integers(1, 64))
def test_a_probe_stays_within_its_share_or_names_one_that_suffices(share, pairs, trials, batch):
    try:
        budget = divided(share, pairs, 50.0, trials, batch)
    except ConfigError as error:
        words = str(error).split()
        if "--share" in words:
            enough = float(words[words.index("--share") + 1])
            assert enough > share
            divided(min(enough, 1.0), pairs, 50.0, trials, batch)
        return
    read = trials * budget.steps * batch + (trials + 1) * budget.held_out
    assert read <= share * pairs
    assert budget.steps >= FEWEST_STEPS
    assert budget.held_out >= FEWEST_PAIRS
    assert (trials * (budget.steps + 1) * batch + (trials + 1) * (budget.held_out + 1)) > share * pairs * 0.99


# ------------------------------------------------------------------------------ words


def comparison(quality, *, answers=None, seeds=2, sessions=1):
    cost = Cost(seconds=10, cpu_seconds=20, step_seconds=8, peak_gib=1, steps=9, tokens=100, answers=50)
    dear = Cost(seconds=20, cpu_seconds=30, step_seconds=8, peak_gib=2, steps=9, tokens=150, answers=100,
                sessions=sessions)  # fmt: skip
    base = quality_of([BEFORE], [], looks=1)
    chosen = chosen_of(spread(-2.0, -2.5))
    entries = [
        Entry("sft", 100, base, [cost], [Path("a")]),
        Entry("orpo", 100, quality, [dear], [Path("b")]),
    ]
    return Comparison(
        folder=Path("out"), recipe=RECIPE, baseline="sft", counts={"train": 100, "validation": 6, "test": 6},
        sizes=(100,), seeds=seeds, trials=1, chosen={"sft": chosen, "orpo": chosen}, base=base, num_prompts=6,
        entries=entries, answers=answers or {}, failures=(), seconds=1.0,
    )  # fmt: skip


def test_a_difference_within_noise_is_called_so_and_a_real_one_by_its_name():
    noise = results([-2.9, -3.1, -2.9, -3.1, -2.9, -3.1], [-3.1, -3.0, -3.2, -3.1, -3.1, -3.1])
    said = sentences(comparison(quality_of([noise], [BEFORE], looks=1)))[0]
    assert "chosen log-prob" in said
    assert "a difference within noise, where" in said
    assert "better" not in said
    clear = sentences(comparison(quality_of([spread(-2.0, -5.0)], [BEFORE], looks=1)))[0]
    assert "log odds ratio" in clear
    assert "better" in clear
    assert "worse" in sentences(comparison(quality_of([spread(-6.0, -5.0)], [BEFORE], looks=1)))[0]


def test_cost_is_told_in_multiples_of_the_baseline_and_cautions_follow():
    said = sentences(comparison(quality_of([BEFORE], [BEFORE], looks=1), seeds=1, sessions=2))
    assert (
        "orpo took 1.50 times the CPU time of sft, 1.50 times its tokens and 2.00 times its peak memory."
        in said
    )
    assert any("One seed" in line for line in said)
    assert any("Interrupted" in line and line.endswith("orpo.") for line in said)
    assert (
        "100 pairs train, 6 choose, 6 of 6 prompts judge"
        in rules(comparison(quality_of([BEFORE], [], looks=1)))[0]
    )


def test_a_method_that_repeats_itself_more_is_said_to():
    loops = [Reply("warm, " * 9 + f"{n % 3}", ended=False) for n in range(12)]
    plain = [Reply(f"this is a plain answer number {n}", ended=True) for n in range(12)]
    mixed = [*loops[:6], *plain[6:]]
    assert "repeat themselves more" in answering("orpo", "sft", compared([*loops[:11], plain[0]], plain))
    assert "repeat themselves less" in answering("orpo", "sft", compared([*plain[:11], loops[0]], loops))
    assert "end less often" in answering("orpo", "sft", compared([*loops[:11], plain[0]], plain))
    assert "end more often" in answering("orpo", "sft", compared([*plain[:11], loops[0]], loops))
    alternating = [one if n % 2 else two for n, (one, two) in enumerate(zip(plain, loops, strict=True))]
    assert "repetition: a difference within noise" in answering("orpo", "sft", compared(mixed, alternating))


def test_estimates_leave_nothing_to_the_order_of_the_pairs():
    one = results([-1.0, -2.0, -3.0], [-2.0, -2.5, -2.0])
    assert estimates([one, one.at([2, 0, 1])]) == estimates([one, one])


# ------------------------------------------------------------------------------ the folder


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(ConfigError, match="something else"):
        usable(tmp_path)
    with pytest.raises(ConfigError, match="no folder"):
        usable(tmp_path / "letter.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_a_changed_recipe_is_refused_once_training_has_begun_and_named(tmp_path):
    settle_plan(tmp_path, RECIPE, trials=4)
    settle_plan(tmp_path, RECIPE | {"beta": 0.9}, trials=4)  # nothing has been trained
    (tmp_path / "runs").mkdir()
    settle_plan(tmp_path, RECIPE | {"beta": 0.9, "output_dir": "elsewhere"}, trials=4)
    with pytest.raises(ConfigError, match=r"\(beta\)"):
        settle_plan(tmp_path, RECIPE, trials=4)
    with pytest.raises(ConfigError, match=r"\(trials\)"):
        settle_plan(tmp_path, RECIPE | {"beta": 0.9}, trials=5)
