"""Which tokens of a micro-batch may go through the model together, where the length of a pass changes it.

Some models look at the length of the whole pass: longrope and dynamic NTK choose one table of frequencies for
all its positions, and a temperature may be counted from its first token. There a micro-batch goes through in
several passes, and a pair whose sides belong in different ones takes its prompt along with each. The head
sees the hidden states of all passes together, so the loss and its slopes stay what they were.

Shape suffixes: B = sequences, N = tokens in a sequence, M = tokens of a pass, T = scored tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from orpo.engine.packing import PackedBatch, Role, Segment, pair_segments
from orpo.errors import ModelError

_SHARED = (
    "pairs of a batch share tokens, and the model counts the length of a pass; pass share_from=None to pack()"
)


@dataclass(frozen=True, slots=True)
class PassLimits:
    """What a model asks of the tokens of one pass.

    Attributes:
        switch: Sides longer than this never share a pass with others; None: all may.
        alone: Whether such a side has a pass to itself, because its own length counts.
        tokens: Most tokens of a pass with several sides; None: any number.
    """

    switch: int | None = None
    alone: bool = False
    tokens: int | None = None


class Pass(NamedTuple):
    """One pass through the model.

    Attributes:
        input_ids_BN: Token ids; one sequence unless padded.
        position_ids_BN: Their positions.
        attention_mask_BN: 1 for tokens, 0 for padding; None where nothing is padded.
        tree: Its segments; empty for the padded layout.
    """

    input_ids_BN: Tensor
    position_ids_BN: Tensor
    attention_mask_BN: Tensor | None
    tree: tuple[Segment, ...]

    @property
    def side_lengths_BN(self) -> Tensor:
        """Tokens of the side that each token is of; of the first one, where several share it. float32."""
        if self.attention_mask_BN is not None:
            return self.attention_mask_BN.sum(1, keepdim=True).float().expand_as(self.input_ids_BN)
        tokens = torch.tensor([segment.tokens for segment in self.tree], device=self.input_ids_BN.device)
        ends = self.position_ids_BN.flatten()[tokens.cumsum(0) - 1] + 1
        return ends.float().repeat_interleave(tokens).view_as(self.input_ids_BN)


def split_passes(batch: PackedBatch, limits: PassLimits) -> tuple[list[Pass], PackedBatch]:
    """Cut a micro-batch into passes that a model with these limits follows exactly.

    Returns:
        The passes, and the micro-batch with `source_T` indexing the hidden states of all passes, one after
        the other and flattened. A micro-batch that may stay whole is returned as it is.
    """
    whole = Pass(batch.input_ids_BN, batch.position_ids_BN, batch.attention_mask_BN, batch.tree)
    if limits == PassLimits():
        return [whole], batch
    if batch.distinct is not None:
        raise ModelError(_SHARED)
    groups = list(_groups(batch, limits))
    if len(groups) == 1 and all(part.copied is None for part in groups[0]):
        return [whole], batch
    passes: list[Pass] = []
    placed: list[tuple[_Part, Tensor]] = []
    start = 0
    for parts in groups:
        width = 0 if batch.tree else max(len(part.tokens) for part in parts)
        for part in parts:
            placed.append((part, torch.arange(start, start + len(part.tokens))))
            start += width or len(part.tokens)
        passes.append(_take(batch, parts, width))
    return passes, replace(batch, source_T=_sources(batch, placed))


def _sources(batch: PackedBatch, placed: Sequence[tuple["_Part", Tensor]]) -> Tensor:
    """Where the hidden state that predicts each scored token lies, over all passes. [T]."""
    of_chosen = torch.zeros(batch.num_tokens, dtype=torch.long)
    for part, at in placed:
        if part.copied is None:
            of_chosen[part.tokens] = at
    of_rejected = of_chosen.clone()
    for part, at in placed:
        if part.copied is not None:  # the last token of its own copy of the prompt predicts its first token
            of_rejected[part.tokens[part.copied - 1 :]] = at[part.copied - 1 :]
    device = batch.source_T.device
    of_chosen, of_rejected = of_chosen.to(device), of_rejected.to(device)
    is_rejected_T = batch.role_T == Role.REJECTED
    return torch.where(is_rejected_T, of_rejected[batch.source_T], of_chosen[batch.source_T])


class _Part(NamedTuple):
    """Tokens that stay together: a pair, one side of a pair, or a line of the padded layout.

    Attributes:
        tokens: Their indices in the flattened micro-batch.
        lengths: Tokens of prompt, chosen and rejected, as the pass sees them, or None for a line.
        longest: Tokens of its longest side.
        copied: For a rejected side that brings a copy of its prompt, the length of that prompt.
    """

    tokens: Tensor
    lengths: tuple[int, int, int] | None
    longest: int
    copied: int | None = None


def _groups(batch: PackedBatch, limits: PassLimits) -> Iterator[list[_Part]]:
    """The parts of each pass."""
    parts = list(_parts(batch, limits) if batch.tree else _lines(batch))
    switch = limits.switch or max(part.longest for part in parts)
    most = limits.tokens if batch.tree else None  # every line counts from its own first token
    beyond = [part for part in parts if part.longest > switch]
    yield from _fill([part for part in parts if part.longest <= switch], most)
    yield from ([part] for part in beyond) if limits.alone else _fill(beyond, most)


def _fill(parts: Sequence[_Part], most: int | None) -> Iterator[list[_Part]]:
    group: list[_Part] = []
    size = 0
    for part in parts:
        if group and most is not None and size + len(part.tokens) > most:
            yield group
            group, size = [], 0
        group.append(part)
        size += len(part.tokens)
    if group:
        yield group


def _parts(batch: PackedBatch, limits: PassLimits) -> Iterator[_Part]:
    """The pairs of a micro-batch, those in two whose sides do not belong in one pass."""
    offset = 0
    for prompt, chosen, rejected in pair_lengths(batch.tree):
        end = prompt + chosen + rejected
        tokens = torch.arange(offset, offset + end)
        sides = (prompt + chosen, prompt + rejected if rejected else 0)
        beyond = [limits.switch is not None and side > limits.switch for side in sides]
        splits = beyond[0] != beyond[1] or (limits.alone and beyond[0])
        splits |= limits.tokens is not None and end > limits.tokens
        if rejected and splits:
            yield _Part(tokens[: prompt + chosen], (prompt, chosen, 0), sides[0])
            own = torch.cat([tokens[:prompt], tokens[prompt + chosen :]])
            yield _Part(own, (prompt, rejected, 0), sides[1], copied=prompt)
        else:
            yield _Part(tokens, (prompt, chosen, rejected), max(sides))
        offset += end


def pair_lengths(tree: Sequence[Segment]) -> Iterator[tuple[int, int, int]]:
    """Tokens of prompt, chosen and rejected; of a side alone, its length and two zeros.

    Raises:
        ModelError: Pairs share something: what one pass does to a token may not be what another's would.
    """
    for number, (tokens, trunk, _) in enumerate(tree):
        follower = tree[number + 1] if number + 1 < len(tree) else None
        if trunk < 0:
            if follower is not None and follower.trunk == number:
                yield follower.shared, tokens - follower.shared, follower.tokens
            else:
                yield tokens, 0, 0
        elif trunk != number - 1 or tree[trunk].trunk >= 0:
            raise ModelError(_SHARED)


def _lines(batch: PackedBatch) -> Iterator[_Part]:
    """The lines of a padded micro-batch, without their padding."""
    assert batch.attention_mask_BN is not None
    width = batch.input_ids_BN.shape[1]
    for line, length in enumerate(batch.attention_mask_BN.sum(1).tolist()):
        yield _Part(torch.arange(line * width, line * width + length), None, length)


def _take(batch: PackedBatch, parts: Sequence[_Part], width: int) -> Pass:
    """What the model reads in a pass; lines are padded to `width`."""
    device = batch.input_ids_BN.device
    ids, positions = batch.input_ids_BN.flatten(), batch.position_ids_BN.flatten()
    if not width:
        tokens = torch.cat([part.tokens for part in parts]).to(device)
        tree = pair_segments(part.lengths for part in parts if part.lengths is not None)
        return Pass(ids[tokens][None], positions[tokens][None], None, tree)
    first = torch.stack([part.tokens[0] for part in parts]).to(device)
    length = torch.tensor([len(part.tokens) for part in parts], device=device)
    column = torch.arange(width, device=device)
    mask = (column < length[:, None]).long()
    lines = ids.view(batch.input_ids_BN.shape)[first // batch.input_ids_BN.shape[1], :width]
    return Pass(lines, column.expand(len(parts), width), mask, ())
