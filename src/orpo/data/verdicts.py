"""What further columns say of the answers: of one without a counterpart, and of a pair.

A single answer with a verdict, as in KTO, must not train as a good one where it is bad. Scores of chosen and
rejected that say the opposite are counted and printed, and so are turns that are marked as not to be trained
and answers that repeat their prompt.
"""

from __future__ import annotations

import functools
import json
import re
from typing import NamedTuple

from orpo.data.columns import NamedRow, writes_conversation
from orpo.data.messages import number_of
from orpo.data.number_names import direction, words_of
from orpo.data.rows import list_of_texts
from orpo.data.sides import goes_on
from orpo.pairs import PreferencePair

VERDICTS = (
    "label", "labels", "kto_tag", "desirable", "is_desirable", "reward", "rewards", "score", "scores",
    "rating", "overall_score", "preference", "feedback", "thumbs", "vote", "votes", "upvoted", "liked",
    "good", "is_good", "accepted", "is_accepted", "correct", "is_correct", "quality", "helpfulness",
)  # fmt: skip
"""Columns that say how good a single answer is."""
# Those of them in which 0 and 1 mean no and yes; in the others they are scores.
_YES_OR_NO = {
    "label", "labels", "kto_tag", "desirable", "preference", "feedback", "thumbs", "upvoted", "liked", "good",
    "accepted", "correct",
}  # fmt: skip
_GOOD = {
    "true", "1", "desirable", "chosen", "good", "positive", "preferred", "accepted", "yes", "up", "thumbs_up",
}  # fmt: skip
_BAD = {"false", "0", "undesirable", "rejected", "bad", "negative", "no", "down", "thumbs_down"}


def unpaired_reason(row: NamedRow, *, uses: bool) -> str | None:
    """Why an answer without a counterpart must not train; None where nothing says it is bad.

    Args:
        row: Without a rejected answer.
        uses: `sft_rows: use`: rows without a rejected answer train as good ones.
    """
    verdicts = {name: _verdict(name, row[name]) for name in VERDICTS if _says_how_good(row, name)}
    if not verdicts:
        return None
    if not uses:
        column = row.theirs(next(iter(verdicts)))
        return f"one answer with a verdict ({column}) is no pair: put the good and the bad one in one row"
    bad = next((name for name, good in verdicts.items() if good is False), None)
    if bad is not None:
        return f"an answer without a counterpart that {row.theirs(bad)} says is bad"
    if not any(verdicts.values()):
        column = row.theirs(next(iter(verdicts)))
        return f"an answer without a counterpart, and whether {column} says it is good is not known"
    return None


def _says_how_good(row: NamedRow, name: str) -> bool:
    """Whether a column holds a verdict; a text of another kind is a topic or a language."""
    value = dict.get(row, name)
    if value is None or isinstance(value, list | dict):
        return False
    return not isinstance(value, str) or number_of(value) is not None or _verdict(name, value) is not None


def _verdict(name: str, value: object) -> bool | None:
    """Whether the answer is good, where the value can only mean yes or no."""
    word = "_".join(str(value).strip().lower().split())
    if isinstance(value, bool | str) or name.removeprefix("is_") in _YES_OR_NO:
        return True if word in _GOOD else False if word in _BAD else None
    return None


_SIDE_MEASURES: dict[tuple[str, ...], int] = {
    ("quality",): 1,
    ("helpfulness",): 1,
    ("like",): 1,
    ("likes",): 1,
    ("ranking",): -1,
}
"""Further words for a number of one side, beside those of any number."""
_ANSWER_WORDS = ("response", "answer", "completion")


class _SideNumber(NamedTuple):
    """A column that says how good one side is."""

    side: str
    measure: tuple[str, ...]
    """The words of its name beside that of the side; equal for the other one's."""
    sign: int
    """1 where more is better, -1 where less is."""


def _side_number(name: str) -> _SideNumber | None:
    """What `chosen_score`, `rmScoreRejected` or `rank-chosen` is; None of any other column."""
    words = words_of(name)
    sides = [word for word in words if word in ("chosen", "rejected")]
    measure = tuple(word for word in words if word not in (*sides, *_ANSWER_WORDS))
    sign = _SIDE_MEASURES.get(measure) or direction(measure, overall=True)
    return None if len(sides) != 1 or sign is None else _SideNumber(sides[0], measure, sign)


@functools.lru_cache(maxsize=256)
def _side_numbers(columns: tuple[str, ...]) -> tuple[tuple[str, str, int], ...]:
    """Columns of chosen and of rejected with the same measure, and its sign; plain scores first."""
    found: dict[_SideNumber, str] = {}
    for name in columns:
        if (number := _side_number(name)) is not None:
            found.setdefault(number, name)
    order = sorted(found, key=lambda one: (len(one.measure), one.measure[0] != "score"))
    return tuple(
        (found[one], found[other], one.sign)
        for one in order
        if one.side == "chosen" and (other := one._replace(side="rejected")) in found
    )


_MARGINS = ("margin", "score_margin", "score_diff", "reward_margin")
"""How much better chosen is than rejected."""


_BOTH = ("score", "scores", "rating", "ratings", "reward", "rewards")
"""Columns that may hold an object with a number of each side, as {chosen: 9, rejected: 1}."""
_BETTER = ("preference", "preferred", "winner", "better", "label")
"""Columns that may name the better side, beside chosen and rejected."""


def side_scores(row: NamedRow) -> tuple[float, float] | None:
    """Scores of chosen and rejected that stand next to them, if any; a margin counts against 0."""
    for chosen, rejected, sign in _side_numbers(tuple(row)):
        high, low = number_of(dict.get(row, chosen)), number_of(dict.get(row, rejected))
        if sign > 0 and high is not None and low is not None:
            return high, low
    for name in _BOTH:
        both = dict.get(row, name)
        if isinstance(both, dict):
            high, low = number_of(both.get("chosen")), number_of(both.get("rejected"))
            if high is not None and low is not None:
                return high, low
    margins = (number_of(dict.get(row, name)) for name in _MARGINS if name in row)
    margin = next((value for value in margins if value is not None), None)
    return None if margin is None else (margin, 0.0)


SCORE_COLUMNS = "score_chosen and score_rejected, chosen_rating and rejected_rating and the like, or margin"
"""For people: which columns hold scores of chosen and rejected."""


def is_score_column(name: str) -> bool:
    """Whether a column of this name holds scores of chosen or rejected, or their difference."""
    number = _side_number(name)
    return name in _MARGINS or (number is not None and number.sign > 0)


def looks_at(name: str) -> bool:
    """Whether a column of this name is looked at beside the answers, though not every row is asked for it."""
    sides = {"chosen", "rejected"}.intersection(words_of(name))
    return bool(sides) or name in {*VERDICTS, *_MARGINS, *_BOTH, *_BETTER}


def contradiction(row: NamedRow, pair: PreferencePair) -> str | None:
    """What says of a pair of this row that chosen is not better than rejected; None where nothing does."""
    if (said := _by_columns(row)) is not None:
        return said
    if pair.scores is not None and pair.scores[0] < pair.scores[1]:
        return "their numbers say that the rejected answer is the better one"
    if pair.scores is not None and pair.scores[0] == pair.scores[1]:
        return "their numbers say that neither answer is the better one"
    high, low = (_own_score(side) for side in (pair.chosen, pair.rejected))
    if high is not None and low is not None and high < low:
        return "the scores in their turns say that the rejected answer is the better one"
    return None


def _by_columns(row: NamedRow) -> str | None:
    """Which columns say that chosen is not better than rejected."""
    for chosen, rejected, sign in _side_numbers(tuple(row)):
        better, worse = (chosen, rejected) if sign > 0 else (rejected, chosen)
        high, low = number_of(dict.get(row, better)), number_of(dict.get(row, worse))
        if high is not None and low is not None and high <= low:
            return f"{better} is not above {worse}"
    if (name := _pair_of_numbers(row)) is not None:
        return f"{row.theirs(name)} has a smaller number for chosen than for rejected"
    if "rejected" in row:
        for name in _BETTER:
            if str(dict.get(row, name)).strip().lower() == "rejected":
                return f"{row.theirs(name)} is rejected"
    if str(dict.get(row, "status")).lower() in ("tie", "tied"):
        return f"status is {dict.get(row, 'status')}"
    return None


def _pair_of_numbers(row: NamedRow) -> str | None:
    """A column with two numbers beside chosen and rejected of which the first is not the larger one."""
    if not {"chosen", "rejected"} <= row.keys() or "answers" in row:
        return None
    for name in _BOTH:
        both = dict.get(row, name)
        numbers = [number_of(one) for one in both] if isinstance(both, list) and len(both) == 2 else []
        if numbers and None not in numbers and numbers[0] < numbers[1]:  # type: ignore[operator]
            return name
    return None


UNREAD_LIST = "their rejected answer is a text that writes a list, and is read as one"


def unread_list(row: NamedRow) -> str | None:
    """What to say of a rejected answer that may be several, written as one text; None where it is one."""
    chosen, rejected = dict.get(row, "chosen"), dict.get(row, "rejected")
    if not isinstance(rejected, str) or len(list_of_texts(rejected) or ()) < 2:
        return None
    if isinstance(chosen, str) and _is_json(chosen) and _is_json(rejected):  # what is asked for may be JSON
        return None
    return UNREAD_LIST


def _is_json(text: str) -> bool:
    """Whether a text is a list or an object in JSON, and not in Python, as pandas writes lists."""
    if not text.lstrip().startswith(("[", "{")):
        return False
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def unread_conversation(row: NamedRow) -> str | None:
    """What to say of a side that writes turns and is read as text; None where none does."""
    sides = (dict.get(row, name) for name in ("prompt", "chosen", "rejected"))
    if any(writes_conversation(side) for side in sides):
        return "a side is a text that writes a chat message, and is read as text"
    return None


OWN_SCORES = ("score", "rating", "reward")
"""Keys by which an answer says how good it is."""


def _own_score(side: object) -> float | None:
    """The number that an answer carries in its last turn."""
    if not isinstance(side, list) or not side:
        return None
    return next((number_of(side[-1][key]) for key in OWN_SCORES if key in side[-1]), None)


_WEIGHTS = (
    "weight", "loss_weight", "train", "training", "loss", "train_on_turn", "trainable", "learnable",
    "is_trainable", "calculate_loss", "compute_loss", "loss_mask",
)  # fmt: skip
"""Keys by which other trainers weigh a turn in the loss, or leave it out."""
_MASKS = ("mask", "masked", "train_detail", "training_detail", "ignore", "skip")
"""Keys by which they leave out a turn, or parts of it."""
MARKS = (*_WEIGHTS, *_MASKS)
"""Keys of a turn that say how it is to be trained, and are no part of what it says."""


def marked_turn(pair: PreferencePair) -> str | None:
    """Which key of a turn weighs it in the loss; None where all count as they are."""
    sides = (side for side in (pair.prompt, pair.chosen, pair.rejected) if isinstance(side, list))
    for turn in (turn for side in sides for turn in side):
        if len(turn) > 2:
            for key in MARKS:
                if key in turn and _weighs(key, turn[key]):
                    return f"a turn says {key}: {_shown(turn[key])}, which is not read"
    return None


_PICTURE = r"<\|?(?:image|video|audio)(?:_?(?:\d+|pad|url|placeholder))?\|?>"
_AT_AN_EDGE = re.compile(rf"\s*{_PICTURE}\s*\S|(?:[\s\S]*\n)?\s*{_PICTURE}\s*\Z")
"""In front of a question, or in a last line of its own: HTML has tags of such names."""


def picture(pair: PreferencePair) -> str | None:
    """Whether a question begins or ends with the place of a picture, which is not there."""
    turns = [pair.prompt] if isinstance(pair.prompt, str) else [turn["content"] for turn in pair.prompt]
    if any("<" in text and _AT_AN_EDGE.match(text) for text in turns):
        return "a question has the place of a picture, video or sound (as <image>), and only text is trained"
    return None


def _shown(value: object) -> str:
    """A value for a line; of what holds others, only that it does."""
    return "[...]" if isinstance(value, list | dict) else str(value).lower()


def _weighs(key: str, value: object) -> bool:
    word, number = str(value).strip().lower(), number_of(value)
    if key in _MASKS:
        return bool(value) and word not in _BAD
    return word in _BAD if number is None else number != 1


REPEATED = "both sides begin with their prompt, which is then read twice"
_HALF_REPEATED = "one side begins with the prompt and the other does not"


def repeated_prompt(pair: PreferencePair) -> str | None:
    """What to say of a pair whose answers repeat what was asked; None where none does."""
    asked = _said_at(pair.prompt, -1).strip()
    if not asked:
        return None
    sides = [pair.chosen] if pair.rejected is None else [pair.chosen, pair.rejected]
    repeat = [goes_on(asked, _said_at(side, 0).lstrip()) for side in sides]
    if all(repeat):
        return REPEATED
    return _HALF_REPEATED if any(repeat) else None


def _said_at(side: object, index: int) -> str:
    """The text of a side; of messages, of the one at an index."""
    return side if isinstance(side, str) else str(side[index]["content"]) if side else ""  # type: ignore[index]
