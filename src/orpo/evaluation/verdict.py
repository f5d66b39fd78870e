"""Whether training worked: one plain sentence from what the same held-out pairs say before and after.

The rule (docs/metrics.md has it in words): a change counts if it is measurable, by its own error over
prompts, and not smaller than `SMALLEST`. The log odds ratio carries the verdict, since training pushes it and
every pair moves it; but a model that is merely surer of what it was right and wrong about raises it too, so
the odds-ratio loss has to fall with it. Accuracy decides where these say nothing, and can contradict. A loss
that rises can only be made up for by pairs that are told apart better while the chosen answers stay as
likely.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from orpo.engine.metrics import write_change, write_figure
from orpo.errors import DataError
from orpo.evaluation.per_pair import PairResults, matched, read_results, with_one_reference
from orpo.evaluation.statistics import critical, pairs_needed, visible
from orpo.run.directory import Run, RunDirectory, read_run
from orpo.run.log import Figure, Figures, figures_from_json, figures_to_json, flat_name
from orpo.settings.config import Objective, OrpoSettings, resolve_objective
from orpo.settings.schema import known_settings

Kind = Literal["learned", "nothing", "worse", "unknown"]
"""What became of a run; `unknown` where no held-out pairs were scored before and after."""

SMALLEST = {
    "log_odds_ratio": 0.05,
    "odds_ratio_loss": 0.02,
    "accuracy": 0.01,
    "loss": 0.05,
    "chosen_logprob": 0.05,
    "rejected_logprob": 0.05,
}
"""The smallest change that matters, by metric: with enough pairs a change of any size can be measured."""

FEW_PROMPTS = 10
"""With fewer prompts than this an accuracy is too coarse to have an error."""
LOW_ODDS_SHARE, LOW_ANSWER_SHARE = 0.25, 0.5
"""Share of the odds-ratio term in the gradient, and of answers in the NLL, below which a setting is named."""
USUAL_ADAPTER_RATE = 2e-4
"""Learning rate that LoRA is usually trained with; the default is one for all weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What the same pairs say of two models.

    Attributes:
        num_pairs: Pairs scored by both.
        num_preferences: Those of them with both sides.
        num_prompts: Their different prompts.
        before: Means of the first model.
        after: Means of the second one.
        change: Mean changes by pair, with errors of their own.
        groups: The same for each group of pairs, where the data names groups.
    """

    num_pairs: int
    num_preferences: int
    num_prompts: int
    before: Figures
    after: Figures
    change: Figures
    groups: Mapping[str, Change] = field(default_factory=dict)

    def direction(self, name: str) -> int:
        """+1 where a metric rose, -1 where it fell, 0 where its change is not measurable or too small."""
        change = self.change.get(name)
        if change is None or change.se is None or abs(change.mean) < SMALLEST[name]:
            return 0
        if name == "accuracy" and self.num_prompts < FEW_PROMPTS:
            return 0
        measurable = abs(change.mean) > critical(self.num_prompts) * change.se
        return int(measurable) * (1 if change.mean > 0 else -1)

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        counts = {name: getattr(self, name) for name in _COUNTS}
        figures = {name: figures_to_json(getattr(self, name)) for name in _FIGURES}
        return counts | figures | {"groups": {name: one.to_json() for name, one in self.groups.items()}}

    @classmethod
    def from_json(cls, value: Any, where: object) -> Change:
        """Inverse of `to_json`.

        Raises:
            DataError: It is damaged; `where` is named.
        """
        try:
            counts = {name: int(value[name]) for name in _COUNTS}
            groups = {name: cls.from_json(one, where) for name, one in value["groups"].items()}
        except (KeyError, TypeError, ValueError, AttributeError):
            raise DataError(f"{where}: damaged; delete the file and evaluate again") from None
        before, after, change = (figures_from_json(value.get(name), where) for name in _FIGURES)
        return cls(**counts, before=before, after=after, change=change, groups=groups)

    @property
    def pairs_needed(self) -> int | None:
        """Pairs that would show the change of the log odds ratio, or the smallest one that matters."""
        change = self.change.get("log_odds_ratio")
        if change is None or not change.se:
            return None
        return pairs_needed(self.effect, change.se * self.num_preferences**0.5)

    @property
    def effect(self) -> float:
        """The size of the change of the log odds ratio, at least the smallest one that matters."""
        return max(abs(self.change["log_odds_ratio"].mean), SMALLEST["log_odds_ratio"])

    def pairs_text(self, word: str) -> str:
        """`60 held-out pairs` for the word `held-out pair`; with their prompts where some share one."""
        number = self.num_preferences or self.num_pairs
        shared = f" of {self.num_prompts:,} prompts" if 0 < self.num_prompts < number else ""
        return f"{number:,} {word}{'' if number == 1 else 's'}{shared}"


_COUNTS, _FIGURES = ("num_pairs", "num_preferences", "num_prompts"), ("before", "after", "change")


def compare(before: PairResults, after: PairResults, objective: Objective) -> Change:
    """What the pairs that both evaluations have in common say; there is at least one.

    An objective with a reference has the same one on both sides (`with_one_reference`).
    """
    first, second = matched(before, after)
    if objective.needs_reference:
        first, second = with_one_reference(first, second)
    others = second.by_group()
    groups = {name: _change(one, others[name], objective, {}) for name, one in first.by_group().items()}
    return _change(first, second, objective, groups)


def _change(
    first: PairResults, second: PairResults, objective: Objective, groups: Mapping[str, Change]
) -> Change:
    return Change(
        num_pairs=len(first),
        num_preferences=first.num_preferences,
        num_prompts=first.num_prompts or int(first.prompt_P.unique().numel()),
        before=first.figures(objective),
        after=second.figures(objective),
        change=first.change_to(second, objective),
        groups=groups,
    )


# ---------------------------------------------------------------------------------------- the rule


@dataclass(frozen=True, slots=True)
class Words:
    """How a verdict begins, by its kind, and what its pairs are called."""

    learned: str
    worse: str
    nothing: str
    pairs: str = "held-out pair"


OF_A_RUN = Words("It learned the preference", "Worse than its base", "It learned nothing that matters")
OF_SFT = Words("It learned the chosen answers", "Worse than its base", "It learned nothing measurable")


def judge(change: Change, *, by_preference: bool) -> Kind:
    """What a change comes to.

    Args:
        change: Of the same pairs.
        by_preference: Whether preferences count; of supervised fine-tuning the loss alone decides.
    """
    loss = change.direction("loss")
    if not by_preference:
        return "worse" if loss > 0 else "learned" if loss < 0 else "nothing"
    odds, accuracy = change.direction("log_odds_ratio"), change.direction("accuracy")
    if loss > 0 and (odds <= 0 or change.direction("chosen_logprob") < 0):
        return "worse"
    if odds * accuracy < 0:
        return "nothing"
    if _is_only_surer(change):
        odds = 0
    preference = odds or accuracy
    return "learned" if preference > 0 else "worse" if preference < 0 else "nothing"


def _is_only_surer(change: Change) -> bool:
    """Whether the log odds ratio rose because right and wrong orders both became more marked."""
    return change.direction("log_odds_ratio") > 0 and change.direction("odds_ratio_loss") >= 0


def is_by_preference(change: Change, objective: Objective) -> bool:
    """Whether a run with this objective is to be judged by the preferences of these pairs."""
    return objective.preference_weight > 0 and change.num_preferences > 0


def sentence(kind: Kind, change: Change, words: Words, *, by_preference: bool) -> str:
    """The verdict in plain words, with its figures."""
    opening = {"learned": words.learned, "worse": words.worse}.get(kind, words.nothing)
    pairs = change.pairs_text(words.pairs)
    accuracy = write_figure("accuracy", change.after.get("accuracy")).value
    if not by_preference:
        return f"{opening}: on {pairs} the loss changed by {_by('loss', change)}."
    figures = (
        f"the log odds ratio of {pairs} changed by {_by('log_odds_ratio', change)} and the accuracy by"
        f" {_by('accuracy', change)}, to {accuracy}"
    )
    if kind == "nothing":
        return _nothing(change, opening, pairs, figures) + (_style(change) if words is OF_A_RUN else "")
    loss = f"; the loss changed by {_by('loss', change)}" if change.direction("loss") > 0 else ""
    return f"{opening}: {figures}{loss}."


def _nothing(change: Change, opening: str, pairs: str, figures: str) -> str:
    odds = change.change["log_odds_ratio"]
    if change.direction("log_odds_ratio") * change.direction("accuracy") < 0:
        return f"No verdict: the figures contradict each other; {figures}."
    if _is_only_surer(change):
        loss = _by("odds_ratio_loss", change)
        return f"Surer, but no better: {figures}; the preference loss changed by {loss}."
    seen = visible(odds, change.num_prompts)
    if seen is None:
        return f"No verdict: {pairs} cannot tell; {figures}."
    smallest = SMALLEST["log_odds_ratio"]
    if abs(odds.mean) < smallest and seen <= smallest:
        return f"{opening}: {figures}; a change of {smallest} would have shown."
    return (
        f"Nothing measurable with {pairs}: {figures}; to see a change of {change.effect:.2g} takes about"
        f" {_round(change.pairs_needed)} pairs."
    )


def _style(change: Change) -> str:
    """What to say where the rejected answers became likelier together with the chosen ones."""
    if change.direction("rejected_logprob") <= 0:
        return ""
    return (
        f" The rejected answers became likelier too, by {_by('rejected_logprob', change)} a token (the"
        f" chosen ones by {_by('chosen_logprob', change)}): it learned the style of the answers, not which is"
        " better."
    )


def _by(name: str, change: Change) -> str:
    return str(write_change(name, change.change.get(name)))


def _round(number: int | None) -> str:
    """Two digits are more than such an estimate has."""
    return "more" if number is None else f"{float(f'{number:.2g}'):,.0f}"


# ---------------------------------------------------------------------------------------- of a run


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What became of a run.

    Attributes:
        kind: In one word.
        sentence: In one plain sentence or two.
        advice: What to try next, a line each.
        sets: What changed on each evaluation set, by name; the verdict is from the first, the largest that
            did not choose the checkpoint. Empty where there are no figures.
        chose: Whether that set also chose the checkpoint, and so flatters it a little.
        step: The step whose weights were compared with those before training.
    """

    kind: Kind
    sentence: str
    advice: tuple[str, ...] = ()
    sets: Mapping[str, Change] = field(default_factory=dict)
    chose: bool = False
    step: int = 0

    @property
    def change(self) -> Change | None:
        """The figures that it is from."""
        return next(iter(self.sets.values()), None)


def _run_changes(folder: Path, run: Run) -> tuple[dict[str, Change], int]:
    """What changed on each evaluation set until the best or last weights trained, and their step."""
    files = RunDirectory(folder)
    steps = files.steps_with_results()
    if len(steps) < 2 or steps[0] != 0:
        return {}, 0
    after = run.model_step if run.model_step in steps[1:] else steps[-1]
    objective = run_objective(run.recipe)
    before_sets, after_sets = (read_results(files.step_results(step)) for step in (0, after))
    changes = {
        name: compare(results, after_sets[name], objective)
        for name, results in before_sets.items()
        if name in after_sets
    }
    order = sorted(changes, key=lambda name: (chooses(run, name), -changes[name].num_pairs))
    return {name: changes[name] for name in order}, after


def run_objective(recipe: Mapping[str, Any]) -> Objective:
    """What a run minimises."""
    return resolve_objective(OrpoSettings.from_recipe(recipe))[0]


def chooses(run: Run, set_name: str) -> bool:
    """Whether an evaluation set decided which checkpoint a run ends with, or when it stops."""
    recipe = run.recipe
    if not (recipe.get("load_best_model_at_end") or recipe.get("early_stopping_patience")):
        return False
    chooser = str(recipe.get("metric_for_best_model") or "loss")
    first = run.first_evaluation(set_name)
    names = [] if first is None else [flat_name(metric, set_name) for metric in first.metrics]
    return chooser in names or flat_name(chooser) in names


def judge_run(folder: Path, run: Run | None = None) -> Verdict:
    """The verdict on a run.

    Args:
        folder: Its directory.
        run: What it holds, where that is read already.

    Raises:
        DataError: As `read_run`.
    """
    run = run or read_run(folder)
    sets, step = _run_changes(folder, run)
    if not sets:
        return _unknown(run)
    set_name, change = next(iter(sets.items()))
    objective = run_objective(run.recipe)
    kind, said = said_of(change, objective)
    if run.model_step == 0:
        said += " No checkpoint was better than the base on the pairs that choose, so the base was kept."
    return Verdict(
        kind=kind,
        sentence=said,
        advice=tuple(_advice(kind, change, objective, run)),
        sets=sets,
        chose=chooses(run, set_name),
        step=step,
    )


def said_of(change: Change, objective: Objective) -> tuple[Kind, str]:
    """The verdict on what training with this objective has changed, and its sentence."""
    by_preference = is_by_preference(change, objective)
    kind = judge(change, by_preference=by_preference)
    words = OF_A_RUN if by_preference else OF_SFT
    return kind, sentence(kind, change, words, by_preference=by_preference)


def _unknown(run: Run) -> Verdict:
    if run.first_evaluation(run.evaluation_sets()[0]) is None:
        said = "Nothing can be said of what it learned: no pairs were held out."
        advice = (
            "eval_split: 0.05 holds out a share of the prompts; eval_dataset_name: FILE names other pairs"
        )
    else:
        said = "Nothing can be said of what it learned: the pairs were not scored before and after training."
        advice = "eval_on_start: true scores them before the first step; `orpo eval BASE RUN --data FILE` now"
    return Verdict(kind="unknown", sentence=said, advice=(advice,))


def _advice(kind: Kind, change: Change, objective: Objective, run: Run) -> list[str]:
    """What to try, the likeliest first."""
    rate = run.recipe.get("learning_rate")
    lines = []
    if kind == "worse" and rate:
        factor = 10 if change.change["loss"].mean > 1 else 3
        lines.append(f"learning_rate: {rate / factor:.1g} (it was {rate:g}), or fewer steps")
    if kind != "nothing":
        return lines
    if _hardly_moved(change):
        if not rate:
            return []
        higher = max(10 * rate, _usual_rate(run.recipe))
        return [f"learning_rate: {higher:.1g} (at {rate:g} the model hardly moved)"]
    lines += share_advice(objective, run.training_means())
    if change.pairs_needed is not None and change.direction("log_odds_ratio") == 0:
        lines.append(f"more held-out pairs (about {_round(change.pairs_needed)}), or more pairs to train on")
    return lines


def _usual_rate(recipe: Mapping[str, Any]) -> float:
    """A learning rate to begin with: an adapter's is higher than that of all weights."""
    if recipe.get("use_peft"):
        return USUAL_ADAPTER_RATE
    return float(known_settings()["learning_rate"].default)


def share_advice(objective: Objective, training: Figures) -> list[str]:
    """Settings to change where the odds-ratio term, or the answers in the NLL, weigh little in training."""
    odds, prompt = training.get("odds_share"), training.get("prompt_share")
    lines = []
    if odds is not None and 0 < odds.mean < LOW_ODDS_SHARE and objective.nll_weight > 0:
        factor = LOW_ODDS_SHARE / (1 - LOW_ODDS_SHARE) * (1 - odds.mean) / odds.mean
        key, term, now, then = "beta", "odds-ratio term", objective.preference_weight, factor
        if objective.compares != "odds":  # there beta is the scale, and the NLL has a weight
            key, term, now, then = "nll_weight", "term that compares", objective.nll_weight, 1 / factor
        lines.append(
            f"{key}: {now * then:.2g} (with {now:g} the {term} has {odds.mean:.0%} of the gradient; so it"
            f" would have {LOW_ODDS_SHARE:.0%})"
        )
    if prompt is not None and prompt.mean > 1 - LOW_ANSWER_SHARE and objective.nll_on == "full":
        lines.append(f"nll_on: response ({prompt.mean:.0%} of the NLL's tokens are prompt)")
    return lines


def _hardly_moved(change: Change) -> bool:
    names = ("log_odds_ratio", "chosen_logprob", "rejected_logprob")
    figures: list[Figure] = [change.change[name] for name in names if name in change.change]
    return all(abs(figure.mean) < SMALLEST["chosen_logprob"] for figure in figures)
