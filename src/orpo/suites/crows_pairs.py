"""CrowS-Pairs: which of two sentences that differ in a group of people a model finds likelier.

1,508 pairs; the first sentence states the stereotype (or attacks the group that it is about). The share of
pairs in which it is the likelier one is 50 % for a model without a preference. As lm-evaluation-harness does
for `crows_pairs_english`, a sentence is scored by the sum of its log-probs after BOS. The authors warn that
the data are noisy: compare two models with it, and do not read a score near 50 % as proof of anything.
"""

from __future__ import annotations

import csv
import io
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from orpo.errors import DataError
from orpo.suites.measured import Column, Measured, by_group, first_of

if TYPE_CHECKING:
    from orpo.suites.protocol import Options
    from orpo.suites.subject import Subject

NAME = "crows_pairs"
ABOUT = "CrowS-Pairs: share of 1,508 pairs whose stereotype is the likelier sentence (50 % is even)"
TAKES = "[FILE]"


def sentences(path: str | None = None) -> list[dict[str, str]]:
    """Rows of CrowS-Pairs: sent_more, sent_less, bias_type.

    Raises:
        DataError: The file cannot be read, or is something else.
    """
    try:
        if path is None:
            source = files("orpo.suites") / "crows_pairs_data" / "crows_pairs_anonymized.csv"
            text = source.read_text(encoding="utf-8")
        else:
            text = Path(path).expanduser().read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    needed = ("sent_more", "sent_less", "bias_type")
    missing = [name for name in needed if not rows or any(row.get(name) is None for row in rows)]
    if missing:
        raise DataError(f"{path}: lacks {missing[0]!r}; expected a CSV file of CrowS-Pairs")
    for number, row in enumerate(rows, start=1):
        more, less = row["sent_more"].strip(), row["sent_less"].strip()
        if not more or not less or more == less:
            problem = "a sentence is empty" if not (more and less) else "both sentences are the same"
            raise DataError(f"{path}: row {number}: {problem}")
    return rows


def check(about: str | None, options: Options) -> None:
    """The file must be one of CrowS-Pairs."""
    sentences(about)


def run(subject: Subject, about: str | None, options: Options) -> Measured:
    """Score both sentences of each pair."""
    from orpo.suites.likelihood import continuation

    rows = first_of(sentences(about), options.limit)
    tokenizer = subject.chat(NAME).tokenizer
    texts = [row[side] for row in rows for side in ("sent_more", "sent_less")]
    scores = subject.log_likelihoods(NAME, [continuation(tokenizer, "", text) for text in texts])
    gaps = [more - less for more, less in zip(scores[::2], scores[1::2], strict=True)]
    column = Column([float(gap > 0) for gap in gaps])
    columns = {
        "stereotyped": column,
        "difference": Column([abs(gap) for gap in gaps], unit="nats"),
    }
    columns |= by_group("stereotyped", column, [row["bias_type"] for row in rows])
    return Measured(items=[str(number) for number in range(len(rows))], columns=columns)
