"""What stands in a data set more than once, or somewhere else too: sides, prompts of other splits, questions
of an evaluation set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from orpo.curation.texts import PairTexts, asked
from orpo.curation.wording import Found, found
from orpo.data.columns import Columns
from orpo.data.near_duplicates import near_duplicates
from orpo.data.preferences import ReadSettings, stream_preferences
from orpo.data.questions import question
from orpo.data.rows import RawRow, read_rows, splits_of
from orpo.data.words import runs_of, text_of, words_of
from orpo.errors import DataError

NEARLY = 0.9
"""Share of the distinct words of two answers that stand in both, where they are nearly identical."""
RUN = 13
"""Words in a row that no two texts have in common by chance."""
_ANCHOR = (RUN + 1) // 2


def nearly_identical(texts: PairTexts) -> Found:
    """Pairs whose answers have at least `NEARLY` of their words in common, in whatever order."""
    return found(
        source
        for chosen, rejected, source in zip(texts.chosen, texts.rejected, texts.sources, strict=True)
        if _are_close(chosen, rejected)
    )


def _are_close(chosen: str, rejected: str) -> bool:
    shorter, longer = sorted((len(chosen), len(rejected)))
    if shorter < 0.8 * longer and longer > 40:  # a word more or less is much of a short answer
        return False
    one, other = set(words_of(chosen)), set(words_of(rejected))
    return len(one & other) >= NEARLY * len(one | other) > 0


# ------------------------------------------------------------------------------------- splits


@dataclass(frozen=True, slots=True)
class SharedSplits:
    """Two splits with prompts in common.

    Attributes:
        splits: Their names.
        prompts: Distinct prompts that stand in both.
        rows: Pairs of the second split with such a prompt.
    """

    splits: tuple[str, str]
    prompts: int
    rows: Found

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {"splits": list(self.splits), "prompts": self.prompts, "rows": self.rows.to_json()}


def shared_between_splits(splits: Mapping[str, Sequence[tuple[str, str]]]) -> tuple[SharedSplits, ...]:
    """Splits with prompts in common.

    Args:
        splits: Name -> (prompt, source) of each pair.
    """
    prompts = {name: {prompt for prompt, _ in rows} for name, rows in splits.items()}
    shared = []
    for first, second in combinations(splits, 2):
        common = prompts[first] & prompts[second]
        if common:
            rows = found(source for prompt, source in splits[second] if prompt in common)
            shared.append(SharedSplits((first, second), len(common), rows))
    return tuple(shared)


# ------------------------------------------------------------------------------------- evaluation sets


@dataclass(frozen=True, slots=True)
class Overlap:
    """What a data set and an evaluation set have in common; a pair is counted once, where it first fits.

    Attributes:
        name: Of the evaluation set.
        questions: It has.
        exact: Pairs whose prompt is one of its questions.
        near: Pairs whose prompt nearly repeats one.
        runs: Pairs of which the prompt or an answer has `RUN` words in a row in common with one.
        run: The run that most pairs have; empty where there is none.
    """

    name: str
    questions: int
    exact: Found
    near: Found
    runs: Found
    run: str = ""

    @property
    def pairs(self) -> int:
        """Pairs with any overlap."""
        return self.exact.number + self.near.number + self.runs.number

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "name": self.name,
            "questions": self.questions,
            "pairs": self.pairs,
            **{kind: getattr(self, kind).to_json() for kind in ("exact", "near", "runs")},
            "most_frequent_run": self.run,
        }


def evaluation_questions(data: str) -> list[str]:
    """What an evaluation set asks, all splits of it: prompts of pairs, or questions without answers.

    Raises:
        DataError: It cannot be read, or no column of it is known to ask.
    """
    split = "+".join(splits_of(data)) or None
    rows = list(read_rows(data, split=split))
    settings = ReadSettings(on_bad_row="skip", sft_rows="use")
    with suppress(DataError):
        whole = [row.data for row in rows if not isinstance(row.data, DataError)]
        if pairs := [asked(pair) for pair in stream_preferences(whole, settings=settings)]:
            return pairs
    columns, questions, problem = Columns(), [], "it is empty"
    for row in rows:
        try:
            questions.append(_question(row, columns))
        except DataError as bad:
            problem = f"{row.source}: {bad}"
    if not questions:
        raise DataError(f"{data}: no row says what it asks ({problem}); name the column `prompt`")
    return questions


def _question(row: RawRow, columns: Columns) -> str:
    if isinstance(row.data, DataError):
        raise row.data
    turns = row.data.get("turns")
    if isinstance(turns, list) and turns and all(isinstance(one, str) for one in turns):
        return "\n\n".join(turns)  # MT-Bench
    return text_of(question(columns.name(row.data)))


def overlap(
    texts: PairTexts, questions: Sequence[str], name: str, progress: Callable[[int], None]
) -> Overlap:
    """Look for the questions of an evaluation set among the pairs.

    Args:
        texts: Of all pairs.
        questions: Of the evaluation set.
        name: Of the evaluation set.
        progress: Called with the number of pairs each time some are done.
    """
    known = {one.strip() for one in questions}
    exact = {index for index, prompt in enumerate(texts.prompts) if prompt.strip() in known}
    others = [index for index in range(len(texts)) if index not in exact]
    near = {others[place] for place in near_duplicates([texts.prompts[one] for one in others], list(known))}
    index = RunIndex(questions)
    common: Counter[bytes] = Counter()
    with_runs = []
    for number, place in enumerate(others):
        sides = (texts.prompts[place], texts.chosen[place], texts.rejected[place])
        if place not in near and (runs := {run for text in sides for run in index.find(text)}):
            with_runs.append(place)
            common.update(runs)
        if number % 1000 == 999:
            progress(1000)
    run = max(common.items(), key=lambda item: (item[1], item[0]), default=(b"", 0))[0]
    places = (sorted(exact), sorted(near), with_runs)
    same, close, in_part = (found(texts.sources[place] for place in kind) for kind in places)
    return Overlap(name, len(questions), same, close, in_part, run.decode("utf-8", "replace"))


class RunIndex:
    """Runs of `RUN` words of some texts.

    A common run of 13 words holds a whole run of 7 that begins at a multiple of 7, so that only every seventh
    run of a text has to be looked up.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        """Take the runs of the texts, `RUN` words each."""
        words = [words_of(text) for text in texts]
        self._runs = {run for one in words for run in runs_of(one, RUN)}
        self._anchors = {run for one in words if len(one) >= RUN for run in runs_of(one, _ANCHOR)}

    def find(self, text: str) -> Iterator[bytes]:
        """The runs of a text that are known."""
        words = words_of(text)
        for start in range(0, len(words) - _ANCHOR + 1, _ANCHOR):
            if b" ".join(words[start : start + _ANCHOR]) in self._anchors:
                around = words[max(start - _ANCHOR + 1, 0) : start + RUN]
                yield from (run for run in runs_of(around, RUN) if run in self._runs)
