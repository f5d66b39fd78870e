"""What each method answers to test prompts: whether its answers end, and how much they repeat themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from orpo.console import say
from orpo.evaluation.answer_summary import answer_figures
from orpo.evaluation.answering import ask, load_answerer, tokenizer_of
from orpo.evaluation.answers import Answer, AnswerFile, Reply
from orpo.evaluation.generation import Sampling
from orpo.evaluation.prompts import read_prompts
from orpo.evaluation.statistics import critical
from orpo.run.log import Figures, figures_to_json
from orpo.settings.config import OrpoSettings


@dataclass(frozen=True, slots=True)
class Answers:
    """What answers of a model look like.

    Attributes:
        number: Of the prompts.
        figures: How many ended, and how much they repeat.
        change: From the baseline's answers, prompt by prompt; empty where that has none.
    """

    number: int
    figures: Figures
    change: Figures

    def differs(self, name: str) -> int:
        """+1 or -1 where a figure is measurably above or below the baseline's, else 0."""
        change = self.change.get(name)
        if change is None or not change.se or self.number < 2:
            return 0
        return int(abs(change.mean) > critical(self.number) * change.se) * (1 if change.mean > 0 else -1)

    def to_json(self) -> dict[str, object]:
        """As plain values."""
        return {
            "number": self.number,
            "figures": figures_to_json(self.figures),
            "change": figures_to_json(self.change),
        }


def ask_models(
    models: Mapping[str, str],
    prompts: Path,
    settings: OrpoSettings,
    folder: Path,
    *,
    baseline: str,
    number: int,
    longest: int,
) -> dict[str, Answers]:
    """Have models answer the same prompts; answers are kept, and not asked again.

    Args:
        models: Name -> run directory or model.
        prompts: File of the pairs whose prompts are asked.
        settings: How the pairs are read.
        folder: Where answers go.
        baseline: The model that the others are compared with.
        number: Prompts, the first so many.
        longest: Tokens of an answer.
    """
    sampling = Sampling(temperature=0, max_tokens=longest)
    given: dict[str, dict[str, Answer]] = {}
    folder.mkdir(exist_ok=True)
    for name, model in models.items():
        say(f"asking {name}: {number} test prompts")
        answerer = load_answerer(model, settings)
        asked = read_prompts(str(prompts), settings, tokenizer_of(answerer), limit=number).prompts
        found = ask(answerer, asked, AnswerFile(folder / f"{name}-{number}.jsonl"), sampling=sampling)
        given[name] = {answer.key: answer for answer in found.answers}
    everywhere = [key for key in next(iter(given.values())) if all(key in ours for ours in given.values())]
    if len(everywhere) < number:
        say(f"{len(everywhere)} test prompts were answered by every model; {number} were wanted")
    if not everywhere:
        return {}
    before = [given[baseline][key] for key in everywhere] if baseline in given else []
    return {name: compared([ours[key] for key in everywhere], before) for name, ours in given.items()}


def compared(ours: Sequence[Answer | Reply], before: Sequence[Answer | Reply]) -> Answers:
    """What answers look like, and how they differ from others to the same prompts, where there are any."""
    return Answers(len(ours), answer_figures(ours), answer_figures(ours, before) if before else {})
