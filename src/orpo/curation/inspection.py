"""A data set before it is trained on: what it is, what is wrong with it, what it costs, what it could teach.

`inspect_data` reads everything once and looks at it part by part; nothing is changed or dropped. Looks that
would take too long on all rows are at rows drawn with a seed, and say at how many.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from orpo.curation.beside import Start, second_process
from orpo.curation.bias import Audit, audit
from orpo.curation.lengths import Spread, Tokens, count_tokens, spread, spread_json
from orpo.curation.repeats import (
    Overlap,
    SharedSplits,
    evaluation_questions,
    nearly_identical,
    overlap,
    shared_between_splits,
)
from orpo.curation.texts import PairTexts, drawn, pair_texts
from orpo.curation.wording import (
    LANGUAGE_SAMPLE,
    Found,
    Languages,
    Refusals,
    broken_encoding,
    languages,
    refusals,
)
from orpo.data.counts import RowCounts
from orpo.data.findings import Findings, find
from orpo.data.named_templates import tokens_to_add
from orpo.data.near_duplicates import near_duplicates
from orpo.data.preferences import PreferenceSet
from orpo.data.rows import splits_of
from orpo.data.source import pair_tokenizer, read_texts
from orpo.data.splits import parse_split
from orpo.data.words import text_of
from orpo.errors import DataError
from orpo.pairs import PreferencePair
from orpo.run.checkpoints import model_folder, run_recipe
from orpo.settings.config import OrpoSettings, check_recipe, inherited_by_evaluation
from orpo.settings.schema import known_settings

TOKENS_OF_ALL, TOKEN_SAMPLE = 20_000, 5_000
"""Most pairs that all become tokens, and how many do of a larger set."""
AUDIT_SAMPLE = 10_000
"""Most pairs that the audit looks at."""
SEED = 0
EXTRA = "pip install 'orpo[data]'"
IDENTICAL = "chosen and rejected are identical"

Progress = Callable[[str, int, int | None], None]
"""What is being done, how much of it is done, and how much there is; None where nobody knows."""


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What a data set is, and what is odd about it.

    Attributes:
        data: Its name.
        split: The split that was inspected; empty for all of a file.
        formats: By data set, how its rows are read and why.
        unused_columns: By data set, columns that nothing was read from.
        notices: Further lines about the reading.
        rows: What became of the rows.
        pairs: Pairs that can train.
        prompts: Distinct prompts among them, system turns aside.
        turns: Number of turns of a prompt -> pairs.
        with_system: Pairs whose prompt begins with a system turn.
        sources: Value of the `source` column -> pairs, the largest first; empty without such a column.
        characters: Lengths in characters: `prompt`, `chosen`, `rejected`.
        chosen_longer: Share of pairs whose chosen answer has more characters; equal lengths count half.
        tokens: Lengths, costs and limits in tokens; None without a model.
        findings: Duplicates, near-duplicates and contradictions.
        nearly_identical: Pairs whose answers are nearly identical.
        splits: All splits there are.
        shared: Splits with prompts in common.
        overlaps: With each evaluation set that was named.
        encoding: Kind of broken text -> pairs.
        refusals: Answers that refuse.
        languages: Of a sample of the chosen answers; None without py3langid.
        audit: What trivial features predict; None without scikit-learn.
        left_out: What could not be looked at, a line each.
    """

    data: str
    split: str
    formats: Mapping[str, str]
    unused_columns: Mapping[str, Sequence[str]]
    notices: Sequence[str]
    rows: RowCounts
    pairs: int
    prompts: int
    turns: Mapping[int, int]
    with_system: int
    sources: Mapping[str, int]
    characters: Mapping[str, Spread | None]
    chosen_longer: float | None
    tokens: Tokens | None
    findings: Findings
    nearly_identical: Found
    splits: Sequence[str]
    shared: Sequence[SharedSplits]
    overlaps: Sequence[Overlap]
    encoding: Mapping[str, Found]
    refusals: Refusals
    languages: Languages | None
    audit: Audit | None
    left_out: Sequence[str] = field(default=())

    @property
    def identical(self) -> int:
        """Rows that were dropped because both answers are the same."""
        return self.rows.dropped.get(IDENTICAL, 0)

    def first(self, kind: str) -> list[str]:
        """Where the first pairs of one of the `findings` are."""
        return self.findings.examples.get(kind, [])

    def lines(self, width: int = 80) -> list[str]:
        """Everything in short, for a terminal of this width."""
        from orpo.curation.lines import lines

        return lines(self, width)

    def page(self) -> str:
        """Everything as one HTML page that loads nothing."""
        from orpo.curation.page import draw_page

        return draw_page(self)

    def to_json(self) -> dict[str, Any]:
        """As plain values. Shares are in [0, 1]; rows are named by file and line."""
        from orpo.curation.advice import advice

        return {
            "data": self.data,
            "split": self.split,
            "advice": [{"level": one.level, "sentence": one.sentence} for one in advice(self)],
            "formats": dict(self.formats),
            "unused_columns": {name: list(columns) for name, columns in self.unused_columns.items()},
            "notices": list(self.notices),
            "rows": {
                **self.rows.to_dict(),
                "examples": {reason: self.rows.first_rows(reason) for reason in self.rows.examples},
            },
            "pairs": self.pairs,
            "prompts": self.prompts,
            "turns": {str(number): pairs for number, pairs in self.turns.items()},
            "with_system": self.with_system,
            "sources": dict(self.sources),
            "characters": {name: spread_json(one) for name, one in self.characters.items()},
            "chosen_longer": self.chosen_longer,
            "tokens": None if self.tokens is None else self.tokens.to_json(),
            "repeats": {
                "identical_sides": self.identical,
                "nearly_identical_sides": self.nearly_identical.to_json(),
                **{
                    kind: {"number": getattr(self.findings, kind), "first": self.first(kind)}
                    for kind in ("duplicates", "near_duplicates", "contradictions")
                },
            },
            "splits": {"names": list(self.splits), "shared": [one.to_json() for one in self.shared]},
            "against": [one.to_json() for one in self.overlaps],
            "encoding": {name: one.to_json() for name, one in self.encoding.items()},
            "refusals": self.refusals.to_json(),
            "languages": None if self.languages is None else self.languages.to_json(),
            "audit": None if self.audit is None else self.audit.to_json(),
            "left_out": list(self.left_out),
        }  # fmt: skip


def inspect_data(
    data: Any,
    model: str | None = None,
    *,
    split: str | None = None,
    against: Sequence[str] = (),
    progress: Progress | None = None,
    **settings: Any,
) -> Inspection:
    """Look at a data set before it is trained on; malformed rows are counted.

    Args:
        data: File, folder, hub name, `Dataset` or rows.
        model: Run directory, model or adapter folder, or hub name, for lengths in tokens; None: the one the
            settings name, if they do.
        split: Split of the data; None: all of a file, else `dataset_train_split`.
        against: Evaluation sets whose questions are looked for in the data.
        progress: Called as the work goes on.
        settings: Of a recipe (`max_length=1024`, ...); they beat those a run of `model` was trained with.

    Raises:
        OrpoError: Data, model or settings cannot be used, or no row can be read.
    """
    progress = progress or (lambda stage, done, total: None)
    model = model or settings.get("model_name_or_path")
    recipe = (inherited_by_evaluation(run_recipe(str(model)), settings) if model else {}) | settings
    check_recipe(recipe)
    lenient = replace(OrpoSettings.from_recipe(recipe), on_bad_row="skip", max_dropped=1.0)
    is_file = isinstance(data, str | Path) and Path(data).expanduser().is_file()
    split = split or (None if is_file else lenient.dataset_train_split)
    name = str(data) if isinstance(data, str | Path) else "data"
    tokenizer = _tokenizer(model, lenient, of_settings=model == settings.get("model_name_or_path"))
    progress("reading", 0, None)
    questions = {one: evaluation_questions(one) for one in against}
    with second_process() as start:
        read = read_texts(data, lenient, tokenizer, split=split, name=name)
        pairs, texts = read.pairs, pair_texts(read.pairs)
        preferences = texts.take([place for place, pair in enumerate(pairs) if pair.rejected is not None])
        near = start(near_duplicates, [text_of(pair.prompt) for pair in pairs])
        with_the_extra = _start_with_the_extra(texts, preferences, start)
        splits, others = _other_splits(data, split, lenient, progress)
        overlaps = [_overlap(texts, asks, one, progress) for one, asks in questions.items()]
        encoding, refused = _encoding(texts, progress), refusals(preferences)
        progress("looking for repeats", 0, None)
        close, findings = nearly_identical(preferences), find(pairs, near=near())
        progress("bias audit", 0, None)
        told, looked, left_out = with_the_extra()
    return Inspection(
        data=name,
        split=split or "",
        formats={key: f"{found.name} ({found.reason})" for key, found in read.formats.items()},
        unused_columns={key: names for key, names in read.unused_columns.items() if names},
        notices=_further_notices(read),
        rows=_grouped(read.counts),
        pairs=len(pairs),
        prompts=len(set(texts.prompts)),
        turns=dict(sorted(Counter(1 if pair.is_text else len(pair.prompt) for pair in pairs).items())),
        with_system=sum(not pair.is_text and pair.prompt[0]["role"] == "system" for pair in pairs),  # type: ignore[index]
        sources=dict(Counter(pair.group for pair in pairs if pair.group is not None).most_common()),
        characters={
            side: spread(list(map(len, column)))
            for side, column in zip(
                ("prompt", "chosen", "rejected"),
                (texts.prompts, preferences.chosen, preferences.rejected),
                strict=True,
            )
        },
        chosen_longer=_chosen_longer(preferences),
        findings=findings,
        nearly_identical=close,
        splits=splits,
        shared=shared_between_splits({split or "": _prompts(texts), **others}),
        overlaps=overlaps,
        encoding=encoding,
        refusals=refused,
        languages=told,
        audit=looked,
        tokens=_tokens(pairs, str(model), tokenizer, lenient, recipe, progress) if model else None,
        left_out=left_out,
    )


def _tokenizer(model: str | None, settings: OrpoSettings, *, of_settings: bool) -> Any:
    """The tokenizer of the model, with what `resize_embeddings` adds to it; None without a model."""
    if not model:
        return None
    from orpo.engine.loading import load_tokenizer  # heavy: only where there is a model

    folder, revision = model_folder(str(model)), settings.model_revision if of_settings else None
    tokenizer = load_tokenizer(folder, revision=revision, trust_remote_code=settings.trust_remote_code)
    if settings.resize_embeddings:
        tokenizer.add_tokens(tokens_to_add(tokenizer, settings.chat_template), special_tokens=True)
    return tokenizer


def _grouped(counts: RowCounts) -> RowCounts:
    """Counts whose reasons leave out where in its row each is: `is not JSON (... column 12 (char 11))`."""
    grouped = RowCounts(total=counts.total)
    tables = ((counts.skipped, grouped.skipped), (counts.dropped, grouped.dropped))
    for table, target in tables:
        for reason, number in table.items():
            short = re.sub(r" \([^()]*\d.*\)$", "", reason)
            target[short] = target.get(short, 0) + number
            for source in counts.first_rows(reason):
                grouped.name(short, source)
    return grouped


def _further_notices(read: PreferenceSet) -> list[str]:
    """What reading said besides the formats and the columns that are not used."""
    stated = [f"{name}: {word}" for name in read.formats for word in ("format ", "columns not used: ")]
    return [line for line in read.notices if not line.startswith(tuple(stated))]


def _prompts(texts: PairTexts) -> list[tuple[str, str]]:
    """Prompt and source of each pair."""
    return list(zip(texts.prompts, texts.sources, strict=True))


def _chosen_longer(texts: PairTexts) -> float | None:
    if not len(texts):
        return None
    lengths = [(len(one), len(other)) for one, other in zip(texts.chosen, texts.rejected, strict=True)]
    return sum((one > other) + (one == other) / 2 for one, other in lengths) / len(lengths)


def _other_splits(
    data: Any, split: str | None, settings: OrpoSettings, progress: Progress
) -> tuple[list[str], dict[str, list[tuple[str, str]]]]:
    """All splits of the data, and (prompt, source) of the pairs of those that are not inspected."""
    names = list(splits_of(data, settings.dataset_config))
    others = {}
    for name in names:
        if name not in {part.name for part in parse_split(split)} and len(names) > 1:
            progress(f"reading the split {name}", 0, None)
            with suppress(DataError):  # a split without a pair shares none
                others[name] = _prompts(pair_texts(read_texts(data, settings, split=name).pairs))
    return names, others


def _start_with_the_extra(
    texts: PairTexts, preferences: PairTexts, start: Start
) -> Callable[[], tuple[Languages | None, Audit | None, list[str]]]:
    """Start what the extra `data` looks at; what is returned waits for it, and says in a line what lacks."""
    told = start(languages, texts.take(drawn(len(texts), LANGUAGE_SAMPLE, SEED)).chosen)
    looked = start(audit, preferences.take(drawn(len(preferences), AUDIT_SAMPLE, SEED)))

    def results() -> tuple[Languages | None, Audit | None, list[str]]:
        found: dict[str, Any] = {}
        for name, result in (("languages", told), ("the bias audit", looked)):
            with suppress(ImportError):
                found[name] = result()
        missing = [name for name in ("languages", "the bias audit") if name not in found]
        missing += [] if find_spec("ftfy") else ["mojibake"]
        left_out = [f"left out: {', '.join(missing)}; {EXTRA} adds it"] if missing else []
        return found.get("languages"), found.get("the bias audit"), left_out

    return results


class _Counting:
    """Turns the numbers of pairs that are done into calls of `progress`."""

    def __init__(self, progress: Progress, stage: str, total: int) -> None:
        self._progress, self._stage, self._total, self._done = progress, stage, total, 0
        progress(stage, 0, total)

    def __call__(self, number: int) -> None:
        self._done += number
        self._progress(self._stage, self._done, self._total)


def _overlap(texts: PairTexts, questions: Sequence[str], name: str, progress: Progress) -> Overlap:
    return overlap(
        texts, questions, name, _Counting(progress, f"comparing with {Path(name).name}", len(texts))
    )


def _encoding(texts: PairTexts, progress: Progress) -> dict[str, Found]:
    return broken_encoding(texts, _Counting(progress, "checking the encoding", len(texts)))


def _tokens(
    pairs: Sequence[PreferencePair],
    model: str,
    tokenizer: Any,
    settings: OrpoSettings,
    recipe: Mapping[str, Any],
    progress: Progress,
) -> Tokens:
    from orpo.engine.stop_tokens import saved_stop_token_ids

    def of_recipe(name: str) -> Any:
        return recipe.get(name, known_settings()[name].default)

    index = drawn(len(pairs), TOKENS_OF_ALL if len(pairs) <= TOKENS_OF_ALL else TOKEN_SAMPLE, SEED)
    return count_tokens(
        [pairs[place] for place in index],
        pair_tokenizer(settings, tokenizer, saved_stop_token_ids(model_folder(model))),
        of_pairs=len(pairs),
        model=model,
        batch_size=int(of_recipe("per_device_train_batch_size")),
        epochs=float(of_recipe("num_train_epochs")),
        progress=_Counting(progress, "counting tokens", len(index)),
    )
