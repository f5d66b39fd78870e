"""A whole set of tokenized pairs: made in batches and in parallel, kept in flat arrays, cached on disk.

Tokens lie in one int32 array with offsets, memory-mapped when they come from the cache, so that a data set
larger than memory costs nothing to open. The cache is keyed by everything that can change a token: the pairs,
the tokenizer, the template and the settings.
"""

from __future__ import annotations

import gc
import hashlib
import json
import marshal
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from orpo.console import say
from orpo.data.counts import RowCounts
from orpo.data.forked import forked
from orpo.data.preferences import PreferenceSet
from orpo.data.stages import report
from orpo.data.tokenize import BATCH, PairArrays, PairTokenizer
from orpo.errors import OrpoError, first_line
from orpo.pairs import PreferencePair, TokenizedPair
from orpo.run.directory import read_json, write_json
from orpo.run.disk import describe, difference, files_in, flush_folder

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
_ARRAYS = ("tokens", "offsets", "contexts", "spans", "span_offsets", "pair_index")
TOKENIZING = "tokenizing"
_MANIFEST = "manifest.json"
_VERSION = 5
_NO_TOKENS: Int32 = np.zeros(0, dtype=np.int32)


@dataclass(frozen=True, eq=False)
class TokenizedDataset:
    """Tokenized pairs, by index.

    Attributes:
        tokens: All token ids, pair after pair: prompt, chosen, rejected.
        offsets: `[3n + 1]`, where each of these parts starts.
        contexts: `[n, 2]`, tokens of `chosen` and of `rejected` that belong to earlier turns.
        spans: `[m, 2]`, all assistant spans.
        span_offsets: `[n + 1]`, where each pair's spans start.
        pair_index: `[n]`, index of each pair among those given to `tokenize_pairs`.
        sources: Where each pair came from.
        groups: Value of each pair's `source` column.
        counts: What became of the rows, reading included.
        notices: Lines to print.
        chat_template: The template to save with the model, or all of them by name; None where all pairs were
            plain text.
        end_token: The end-of-turn token of that template.
        folder: Where the arrays are mapped from.
    """

    tokens: Int32
    offsets: Int64
    contexts: Int32
    spans: Int32
    span_offsets: Int64
    pair_index: Int64
    sources: list[str]
    groups: list[str | None]
    counts: RowCounts
    notices: list[str] = field(default_factory=list)
    chat_template: str | dict[str, str] | None = None
    end_token: str | None = None
    folder: Path | None = None

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: int) -> TokenizedPair:
        index = range(len(self))[index]
        a, b, c, d = (int(offset) for offset in self.offsets[3 * index : 3 * index + 4])
        first, last = self.span_offsets[index : index + 2]
        chosen_context, rejected_context = self.contexts[index].tolist()
        return TokenizedPair(
            prompt=self.tokens[a:b].tolist(),
            chosen=self.tokens[b:c].tolist(),
            rejected=self.tokens[c:d].tolist(),
            chosen_context=chosen_context,
            rejected_context=rejected_context,
            assistant_spans=tuple((int(start), int(stop)) for start, stop in self.spans[first:last]),
            source=self.sources[index],
        )

    @property
    def column_names(self) -> list[str]:
        """By which the pairs can be read as TRL's rows."""
        return list(self[0].keys()) if len(self) else []

    @property
    def lengths(self) -> Int64:
        """Stored tokens of prompt, chosen and rejected, `[n, 3]`."""
        return np.diff(self.offsets).reshape(-1, 3)

    @property
    def longest(self) -> int:
        """Tokens of the longest side, prompt included; 0 where there is no pair."""
        lengths = self.lengths
        return int((lengths[:, 0] + lengths[:, 1:].max(1)).max()) if len(lengths) else 0

    def __reduce__(self) -> Any:
        if self.folder is not None:  # another process maps the same files
            return load, (self.folder,)
        return super().__reduce__()

    @classmethod
    def from_pairs(cls, pairs: Sequence[TokenizedPair], **known: Any) -> TokenizedDataset:
        """Lay pairs out in arrays; `known` are further fields."""
        known.setdefault("pair_index", np.arange(len(pairs), dtype=np.int64))
        known.setdefault("sources", [pair.source for pair in pairs])
        known.setdefault("groups", [None] * len(pairs))
        known.setdefault("counts", RowCounts(total=len(pairs)))
        return cls(**_arrays(pairs), **known)

    def save(self, folder: Path) -> None:
        """Write to a folder that must not exist, all or nothing.

        Raises:
            OSError: The disk is full or the folder cannot be written.
        """
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = folder.with_name(f".writing-{folder.name}-{os.getpid()}")
        try:
            scratch.mkdir()
            for name in _ARRAYS:
                np.save(scratch / f"{name}.npy", getattr(self, name))
            words = {
                "sources": self.sources,
                "groups": self.groups,
                "counts": self.counts.to_dict(),
                "notices": self.notices,
                "chat_template": self.chat_template,
                "end_token": self.end_token,
            }
            (scratch / "words.json").write_text(json.dumps(words), encoding="utf-8")
            write_json(scratch / _MANIFEST, {path.name: describe(path) for path in files_in(scratch)})
            flush_folder(scratch)
            os.rename(scratch, folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def prompt_index(pairs: TokenizedDataset) -> Int64:
    """The same number for pairs whose prompts have the same tokens, shape [n], from 0 on."""
    numbers: dict[bytes, int] = {}
    starts, stops = pairs.offsets[:-1:3], pairs.offsets[1::3]
    keys = [pairs.tokens[start:stop].tobytes() for start, stop in zip(starts, stops, strict=True)]
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)


def load(folder: Path) -> TokenizedDataset:
    """Map a saved data set into memory."""
    words = json.loads((folder / "words.json").read_text(encoding="utf-8"))
    words["counts"] = RowCounts.from_dict(words["counts"])
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in _ARRAYS}
    return TokenizedDataset(**arrays, **words, folder=folder)


def open_cached(folder: Path) -> TokenizedDataset | None:
    """A cached data set; None where there is none, or it is damaged, which is said and put out of the way."""
    if not folder.exists():
        return None
    try:
        manifest = read_json(folder / _MANIFEST, {})
        names = {"words.json", *(f"{name}.npy" for name in _ARRAYS)}
        lacking = next((f"{name} is missing" for name in sorted(names - manifest.keys())), None)
        problem = lacking or next(
            (what for name, one in manifest.items() if (what := difference(folder / name, one))), None
        )
    except (OSError, ValueError) as error:
        problem = first_line(error)
    if problem is None:
        return load(folder)
    say(f"{folder}: the cached tokens are damaged ({problem}) and are made again")
    shutil.rmtree(folder, ignore_errors=True)
    return None


def tokenize_pairs(
    pairs: PreferenceSet | Sequence[PreferencePair],
    tokenizer: Any,
    *,
    max_length: int | None,
    chat_template: str | None = None,
    num_proc: int | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    drop_rejected: bool = False,
    meanwhile: Callable[[], object] | None = None,
    **template_options: Any,
) -> TokenizedDataset:
    """Tokenize preference pairs.

    Args:
        pairs: As read; the counts of a `PreferenceSet` are continued.
        tokenizer: Of the model to train; it is not changed.
        max_length: Longest prompt + response, in tokens; None: no limit.
        chat_template: Jinja text, file or name of a template; None: the tokenizer's own, else the default.
        num_proc: Processes (Linux); one already uses all cores for tokenizing, not for rendering templates.
        cache_dir: Where results are kept; None: not kept.
        drop_rejected: Leave the rejected sides out, once they have had their say about the length: SFT on the
            same rows.
        meanwhile: Work for this process to do once, while others tokenize; not called where none do.
        template_options: `chat_template_kwargs`, `stop_tokens` and `date`, as for `prepare_template`.

    Raises:
        DataError: No row is left.
        ConfigError: The chat template cannot be used.
    """
    known, pairs = (pairs.counts, pairs.pairs) if isinstance(pairs, PreferenceSet) else (None, pairs)
    encoder = PairTokenizer(tokenizer, max_length=max_length, chat_template=chat_template, **template_options)
    # A template that cannot be used is said before any work.
    is_chat = any(not pair.is_text for pair in pairs)
    template = encoder.renderer.template.identity() if is_chat else None
    folder = None
    if cache_dir is not None:
        key = _key(pairs, tokenizer, known, (template, max_length, drop_rejected))
        folder = Path(cache_dir) / key
        cached = open_cached(folder)
        if cached is not None:
            cached.counts.check(1.0)
            return cached
    parts = _encode_all(encoder, pairs, drop_rejected, num_proc or 1, meanwhile)
    dataset = _join(parts, pairs, encoder, known)
    dataset.counts.check(1.0)
    if folder is None:
        return dataset
    try:
        dataset.save(folder)
    except (OSError, OrpoError) as error:
        cached = open_cached(folder)  # another process may have been faster
        if cached is None:
            dataset.notices.append(f"the tokenized data could not be cached ({first_line(error)})")
        return dataset if cached is None else cached
    return load(folder)


@dataclass
class _Part:
    """What one batch of the pairs became."""

    arrays: dict[str, Any]
    kept: list[int]
    counts: RowCounts


def _encode_batch(
    encoder: PairTokenizer, pairs: Sequence[PreferencePair], drop_rejected: bool, start: int, stop: int
) -> _Part:
    encoder.counts = RowCounts()
    tokenized = encoder.encode_arrays(pairs[start:stop])
    kept = [index for index, tokens in enumerate(tokenized, start=start) if tokens is not None]
    arrays = _arrays([tokens for tokens in tokenized if tokens is not None], drop_rejected)
    return _Part(arrays, kept, encoder.counts)


_inherited: Any = None  # what forked workers work on, so that the pairs are not sent to them


def _encode_inherited(bounds: tuple[int, int]) -> _Part:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    encoder, pairs, drop_rejected = _inherited
    return _encode_batch(encoder, pairs, drop_rejected, *bounds)


def _encode_all(
    encoder: PairTokenizer,
    pairs: Sequence[PreferencePair],
    drop_rejected: bool,
    num_proc: int,
    meanwhile: Callable[[], object] | None,
) -> list[_Part]:
    global _inherited
    bounds = [(start, min(start + BATCH, len(pairs))) for start in range(0, len(pairs), BATCH)]
    if num_proc < 2 or len(bounds) < 2 or sys.platform != "linux":  # elsewhere a fork is not safe
        one_by_one = (_encode_batch(encoder, pairs, drop_rejected, *one) for one in bounds)
        return list(_reported(one_by_one, len(pairs)))
    _inherited = (encoder, pairs, drop_rejected)
    thaws = gc.get_freeze_count() == 0
    gc.freeze()  # a collection in a worker would write to, and so copy, every page that it inherits
    try:
        with forked(num_proc) as pool:
            parts = pool.imap(_encode_inherited, bounds)
            if meanwhile is not None:
                meanwhile()
            return list(_reported(parts, len(pairs)))
    finally:
        if thaws:
            gc.unfreeze()
        _inherited = None


def _reported(parts: Iterable[_Part], total: int) -> Iterator[_Part]:
    report(TOKENIZING, 0, total)
    for number, part in enumerate(parts, start=1):
        report(TOKENIZING, min(number * BATCH, total), total)
        yield part


def _arrays(pairs: Sequence[TokenizedPair | PairArrays], drop_rejected: bool = False) -> dict[str, Any]:
    parts = [part for p in pairs for part in (p.prompt, p.chosen, [] if drop_rejected else p.rejected)]
    flat = np.concatenate([_NO_TOKENS, *(np.asarray(part, dtype=np.int32) for part in parts)])
    spans = [span for pair in pairs for span in pair.assistant_spans]
    contexts = [(p.chosen_context, 0 if drop_rejected else p.rejected_context) for p in pairs]
    return {
        "tokens": flat,
        "offsets": _offsets([len(part) for part in parts]),
        "contexts": np.array(contexts, dtype=np.int32).reshape(-1, 2),
        "spans": np.array(spans, dtype=np.int32).reshape(-1, 2),
        "span_offsets": _offsets([len(pair.assistant_spans) for pair in pairs]),
    }


def _offsets(lengths: Sequence[int]) -> Int64:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def _join(
    parts: list[_Part], pairs: Sequence[PreferencePair], encoder: PairTokenizer, known: RowCounts | None
) -> TokenizedDataset:
    counts = RowCounts(total=len(pairs))
    if known is not None:
        counts = RowCounts.from_dict(known.to_dict())
    for part in parts:
        counts.add_reasons(part.counts)
    joined: dict[str, Any] = {}
    parts = parts or [_Part(_arrays([]), [], RowCounts())]
    for name in ("tokens", "contexts", "spans"):
        joined[name] = np.concatenate([part.arrays[name] for part in parts])
    for name in ("offsets", "span_offsets"):
        joined[name] = _offsets(np.concatenate([np.diff(part.arrays[name]) for part in parts]).tolist())
    kept = [index for part in parts for index in part.kept]
    template = encoder.renderer.template if any(not pair.is_text for pair in pairs) else None
    return TokenizedDataset(
        **joined,
        pair_index=np.array(kept, dtype=np.int64),
        sources=[pairs[index].source for index in kept],
        groups=[pairs[index].group for index in kept],
        counts=counts,
        notices=list(template.notices) if template else [],
        chat_template=template.saved if template else None,
        end_token=template.end_token if template else None,
    )


def _key(pairs: Sequence[PreferencePair], tokenizer: Any, known: RowCounts | None, settings: Any) -> str:
    """A name for everything the result depends on."""
    digest = hashlib.blake2b(digest_size=16)
    counts = None if known is None else known.to_dict()
    digest.update(json.dumps([_VERSION, settings, counts, tokenizer_identity(tokenizer)]).encode())
    for pair in pairs:
        # Version 2 of the format writes no references, so that equal pairs give equal bytes.
        parts = (
            pair.prompt, pair.chosen, pair.rejected, pair.tools, pair.source, pair.group,
            pair.chat_template_kwargs,
        )  # fmt: skip
        digest.update(marshal.dumps(parts, 2))
    return digest.hexdigest()


def tokenizer_identity(tokenizer: Any) -> list[str]:
    """Equal for tokenizers that make the same tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = (
        backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    )
    return [type(tokenizer).__name__, str(tokenizer.special_tokens_map), vocabulary]
