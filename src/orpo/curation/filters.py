"""Which pairs are wanted: by source, language, length, and how far apart the scores of the sides are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

from orpo.curation.fingerprints import written
from orpo.curation.measuring import Lengths
from orpo.curation.steps import Sieve, Step
from orpo.curation.texts import asked
from orpo.data.stages import report
from orpo.data.verdicts import SCORE_COLUMNS
from orpo.errors import ConfigError, DataError
from orpo.pairs import PreferencePair

_LETTERS = 24
"""Texts with fewer letters are too short to tell their language."""
_LOOKED_AT = 240
"""Characters of a text that its language is told from."""


def by_source(pairs: Sequence[PreferencePair], sources: Collection[str]) -> tuple[list[int], Step]:
    """Keep the pairs of some sources.

    Raises:
        ConfigError: None is from one of them.
    """
    known = Counter(pair.group for pair in pairs if pair.group is not None)
    if missing := [name for name in sources if name not in known]:
        there = ", ".join(name for name, _ in known.most_common(20)) or "no source column"
        raise ConfigError(f"source: no pair is from {', '.join(missing)}; the data has {there}")
    sieve = Sieve("source", pairs)
    for index, pair in enumerate(pairs):
        if pair.group is None:
            sieve.remove(index, "no source is named")
        elif pair.group not in sources:
            sieve.remove(index, "of another source")
    return sieve.kept, sieve.step()


def by_language(pairs: Sequence[PreferencePair], languages: Collection[str]) -> tuple[list[int], Step]:
    """Keep the pairs whose answers, and question, are in one of some languages, as far as can be told.

    Args:
        pairs: To look at.
        languages: Codes: en, de, zh, ...

    Raises:
        ConfigError: A code is not known.
    """
    import py3langid

    codes = sorted(code for code, _ in py3langid.rank("known languages"))
    if missing := [code for code in languages if code not in codes]:
        known = ", ".join(codes)
        raise ConfigError(f"language: {', '.join(missing)} is not known; use codes of {known}")
    sieve = Sieve("language", pairs)
    for index, pair in enumerate(pairs):
        if index % 1000 == 0:
            report("telling languages", index, len(pairs))
        texts = [text[:_LOOKED_AT] for text in (asked(pair), written(pair.chosen), written(pair.rejected))]
        long_enough = [text for text in texts if sum(map(str.isalpha, text[:200])) >= _LETTERS]
        found = [py3langid.classify(text)[0] for text in long_enough]
        others = [code for code in found if code not in languages]
        if others:
            sieve.remove(index, f"in {others[0]}")
        elif not found:
            sieve.change(index, "too short to tell the language")
    report("telling languages", len(pairs), len(pairs))
    return sieve.kept, sieve.step()


def by_margin(pairs: Sequence[PreferencePair], least: float) -> tuple[list[int], Step]:
    """Keep the pairs whose chosen answer has a score at least `least` above that of the rejected one.

    Raises:
        DataError: No pair has scores.
    """
    check_scores(pairs, "min_margin")
    sieve = Sieve("margin", pairs)
    for index, pair in enumerate(pairs):
        if pair.margin is None:
            sieve.remove(index, "no scores")
        elif pair.margin < least:
            sieve.remove(index, f"the scores differ by less than {least:g}")
    return sieve.kept, sieve.step()


def check_scores(pairs: Sequence[PreferencePair], what: str) -> None:
    """Stop where no pair has scores.

    Raises:
        DataError: It names the columns that are looked for.
    """
    if all(pair.scores is None for pair in pairs):
        raise DataError(
            f"{what} needs scores, and no row has any; looked for ranked answers, two answers with "
            f"numbers, and the columns {SCORE_COLUMNS}"
        )


def by_length(
    pairs: Sequence[PreferencePair], lengths: Lengths, shortest: int | None, longest: int | None
) -> tuple[list[int], Step]:
    """Keep pairs of some length.

    Args:
        pairs: To look at.
        lengths: Theirs.
        shortest: Least length of each answer.
        longest: Most of prompt and answer together.
    """
    sieve = Sieve("length", pairs)
    for index, pair in enumerate(pairs):
        answers = [lengths.chosen[index]] + ([] if pair.rejected is None else [lengths.rejected[index]])
        if longest is not None and lengths.whole[index] > longest:
            sieve.remove(index, f"prompt and answer are longer than {longest:,} {lengths.unit}")
        elif shortest is not None and min(answers) < shortest:
            sieve.remove(index, f"an answer is shorter than {shortest:,} {lengths.unit}")
    return sieve.kept, sieve.step()
