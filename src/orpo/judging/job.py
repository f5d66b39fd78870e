"""Two files of answers and a judge -> the second model's win rate: what `orpo judge` does, for Python too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from orpo.console import say
from orpo.errors import ConfigError, RunError
from orpo.evaluation.answering import Progress, load_answerer
from orpo.evaluation.answers import Failure
from orpo.evaluation.endpoint import Endpoint
from orpo.evaluation.generation import Sampling
from orpo.judging.alpaca_eval import read_annotations, read_control
from orpo.judging.contests import Contest, read_contests
from orpo.judging.length_control import Control, length_controlled
from orpo.judging.llm_judge import BOTH, CAREFUL, Shown, show
from orpo.judging.reward_model import RewardModel
from orpo.judging.win_rate import Ruling, WinRate, win_rate
from orpo.run.directory import write_json_lines
from orpo.settings.config import OrpoSettings, check_recipe

KINDS = {"reward": "MODEL", "endpoint": "URL", "model": "MODEL", "alpaca_eval": "ANNOTATIONS"}
"""What judges: a reward model, a model behind a server, a model here, or verdicts that are there already."""
_NO_VERDICT = "the judge gave no verdict that can be read"


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """What a judge says of two models.

    Attributes:
        first: Name of the first model.
        second: Name of the second.
        by: The judge.
        win: How often the second model's answer is the better one.
        failures: Source of each pair without a verdict, and why.
        consistent: Share of the pairs shown in both orders with two verdicts in which these agree; None
            where no pair was shown twice.
        first_shown: Share of verdicts for the answer that was shown first, ties half; None where none was.
        path: The file that the verdicts were written to.
    """

    first: str
    second: str
    by: str
    win: WinRate
    failures: Sequence[tuple[str, str]] = ()
    consistent: float | None = None
    first_shown: float | None = None
    path: Path | None = None

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        about = {"first": self.first, "second": self.second, "by": self.by}
        order = {"consistent": self.consistent, "first_shown": self.first_shown}
        return about | self.win.to_json() | {"failures": len(self.failures)} | order

    def check(self) -> None:
        """Stop where pairs have no verdict.

        Raises:
            RunError: It names the first of them.
        """
        if self.failures:
            source, reason = self.failures[0]
            raise RunError(
                f"{len(self.failures)} pairs have no verdict and are not counted (first: {source}: {reason})"
            )


def judge(  # noqa: PLR0913 - one argument for each option of the command
    first: str | Path | None,
    second: str | Path | None,
    by: str,
    *,
    endpoint: Endpoint | None = None,
    orders: str = BOTH,
    sampling: Sampling = CAREFUL,
    difficulty: str | Path | None = None,
    gamed: str | Path | None = None,
    out: str | Path | None = None,
    batch_size: int | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> Judgement:
    """Say which of two models answers better. Verdicts are kept, so the same call again is done at once.

    Args:
        first: Answers of the first model, as `orpo generate` writes them; None by `alpaca_eval`.
        second: Those of the second, whose win rate is counted.
        by: `reward:MODEL`, `endpoint:URL`, `model:MODEL` or `alpaca_eval:ANNOTATIONS`.
        endpoint: How a server is asked; None: as its defaults say.
        orders: Of the two answers, for a model that judges: `both`, or one that is `drawn`.
        sampling: How a model that judges answers.
        difficulty: AlpacaEval's `instruction_difficulty.csv`, for annotations.
        gamed: AlpacaEval's `df_gamed.csv`.
        out: File to write the verdicts to, a line each.
        batch_size: Prompts that a model here judges at once; None: as many as fit.
        progress: Called as a model that judges answers.
        settings: Of a recipe (`dtype`, `trust_remote_code`, ...), for a judge on this machine.

    Raises:
        OrpoError: Files, judge or settings cannot be used.
    """
    check_recipe(settings)
    resolved = OrpoSettings.from_recipe(settings)
    kind, _, name = by.partition(":")
    if kind not in KINDS or not name:
        ways = ", ".join(f"{one}:{what}" for one, what in KINDS.items())
        raise ConfigError(f"--by {by}: expected one of {ways}")
    if (kind == "alpaca_eval") != (first is None and second is None):
        needs = (
            "takes no files of answers: they stand in the annotations"
            if first
            else "needs two files of answers"
        )
        raise ConfigError(f"--by {kind} {needs}")
    if kind == "alpaca_eval":
        return _by_annotations(name, difficulty, gamed)
    if difficulty or gamed:
        raise ConfigError("--difficulty and --gamed are of AlpacaEval's instructions; use --by alpaca_eval")
    read = read_contests(str(first), str(second))
    for notice in read.notices:
        say(notice)
    if kind == "reward":
        shown, failures = _by_reward(RewardModel(name, resolved), read.contests)
        by, first_shown = f"reward model {name}", None
    else:
        here = name if kind == "model" else None
        server = None if here else endpoint or Endpoint(url=name)
        judging = load_answerer(here, resolved, endpoint=server, batch_size=batch_size)
        shown = show(
            judging,
            read.contests,
            orders=orders,
            sampling=sampling,
            seed=sampling.seed or 0,
            progress=progress,
        )
        failures, by, first_shown = [], f"{judging.name} as a judge", _first_shown(shown)
    found = _counted(read.contests, shown, failures)
    path = None if out is None else _write(Path(out).expanduser(), read.contests, shown)
    return replace(found, first=read.first, second=read.second, by=by, first_shown=first_shown, path=path)


def _first_shown(shown: Sequence[Shown]) -> float | None:
    scores = [one.first_shown_won for one in shown if one.first_shown_won is not None]
    return sum(scores) / len(scores) if scores else None


def _by_annotations(path: str, difficulty: Any, gamed: Any) -> Judgement:
    read = read_annotations(path)
    control = read_control(difficulty, gamed, read.index)
    win = win_rate(read.verdicts, _controlled(read.verdicts, control))
    by = f"annotations in {Path(path).name}"
    return Judgement(first=read.first, second=read.second, by=by, win=win, failures=read.failures)


def _controlled(verdicts: Sequence[Ruling], control: Control | None = None) -> Any:
    """The length-controlled rate; None without scikit-learn."""
    try:
        return length_controlled(
            [one.score for one in verdicts], [one.lengths for one in verdicts], control,
            [one.prompt for one in verdicts],
        )  # fmt: skip
    except ImportError:
        say("no length-controlled rate without scikit-learn: pip install 'orpo[data]'")
        return None


def _by_reward(model: RewardModel, contests: Sequence[Contest]) -> tuple[list[Shown], list[tuple[str, str]]]:
    answers = [(one.turns, text) for one in contests for text in (one.first, one.second)]
    scores = model.scores(answers)
    shown, failures = [], []
    for number, contest in enumerate(contests):
        first, second = scores[2 * number : 2 * number + 2]
        reason = next((one.reason for one in (first, second) if isinstance(one, Failure)), None)
        if isinstance(first, Failure) or isinstance(second, Failure):
            failures.append((contest.source, str(reason)))
            continue
        score = (second > first) + (second == first) / 2
        shown.append(Shown(number, False, score, f"rewards {first:.6g} and {second:.6g}"))
    return shown, failures


def _counted(
    contests: Sequence[Contest], shown: Sequence[Shown], failures: Sequence[tuple[str, str]]
) -> Judgement:
    """A pair's score is the mean over its orders."""
    by_contest: dict[int, list[Shown]] = {}
    for one in shown:
        by_contest.setdefault(one.contest, []).append(one)
    verdicts, failed, agreed = [], list(failures), []
    for number, ours in by_contest.items():
        contest = contests[number]
        scores = [one.score for one in ours]
        if None in scores:
            failed.append((contest.source, _NO_VERDICT))
            continue
        given = [score for score in scores if score is not None]
        if len(given) > 1:
            agreed.append(len(set(given)) == 1)
        verdicts.append(
            Ruling(contest.prompt, sum(given) / len(given), (len(contest.first), len(contest.second)))
        )
    if not verdicts:
        source, reason = failed[0]
        raise RunError(f"none of {len(contests)} pairs has a verdict (first: {source}: {reason})")
    return Judgement(
        first="",
        second="",
        by="",
        win=win_rate(verdicts, _controlled(verdicts)),
        failures=failed,
        consistent=sum(agreed) / len(agreed) if agreed else None,
    )


def _write(path: Path, contests: Sequence[Contest], shown: Sequence[Shown]) -> Path:
    """One line for each verdict."""
    rows = [
        {
            "source": contests[one.contest].source,
            "instruction": contests[one.contest].turns[-1]["content"],
            "swapped": one.swapped,
            "score": one.score,
            "said": one.said,
        }
        for one in shown
    ]
    write_json_lines(path, rows)
    return path
