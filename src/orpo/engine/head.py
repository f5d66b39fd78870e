"""From hidden states to the loss of an objective and its gradients, without ever holding all the logits.

Only scored tokens meet the vocabulary matrix, a chunk at a time. Once the step's denominators are known, the
slope of the loss in each log-probability is known as soon as a chunk that holds whole pairs has its
log-softmax, so the gradients of hidden states and vocabulary matrix are made in the same sweep: three matrix
products per chunk, nothing recomputed. Of pairs that do not fit a chunk, what goes beyond it is made twice,
context tokens fit anywhere, and evaluation stops at the log-probabilities. Where pairs share answers or
prompts, each distinct prediction is made once: its slope is the sum of those of the scored tokens that it
stands for.

Shape suffixes: N = hidden states of a micro-batch, T = scored tokens, U = distinct ones, P = pairs,
D = hidden size, V = vocabulary size, S = sides (chosen, rejected).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from orpo.engine.logits import logprob_slopes, product, softmax_minus_target, token_logprobs
from orpo.engine.objective import Side, preference_loss, preference_slopes
from orpo.engine.packing import PackedBatch, Role
from orpo.engine.precision import compute_dtype
from orpo.errors import ModelError

CPU_BLOCK, CPU_BLOCK_TOKENS = 2**18, 8
"""Logits a CPU takes through the softmax together, so that they stay in its second-level cache, and the
fewest tokens, so that calls do not cost more than numbers."""
_ALL = slice(None)
_TINY = 1e-12


class Denominators(NamedTuple):
    """What the sums of an optimizer step are divided by, over all its micro-batches and ranks.

    Attributes:
        nll: Sum of the step's NLL weights: its NLL tokens, or its pairs under `nll_reduction: pair`.
        pairs: Pairs with both sides.
        examples: Pairs with or without a rejected side; only a mixture of experts asks.
    """

    nll: float
    pairs: float
    examples: float = 1.0


@dataclass(frozen=True, slots=True)
class Head:
    """The vocabulary projection as the model applies it: softcap * tanh(scale * (h W^T + b) / softcap).

    Attributes:
        weight_VD: Vocabulary matrix.
        bias_V: Its bias, or None.
        scale: Factor on the logits.
        softcap: Bound of the logits, or None.
        chunk_tokens: Scored tokens whose logits are made together; at least 1. On a CPU, few enough for its
            caches.
        max_chunk_tokens: Most of them, for the sake of a pair longer than `chunk_tokens`; what a pair has
            beyond that is made twice. At least `chunk_tokens`.
    """

    weight_VD: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    chunk_tokens: int = 256
    max_chunk_tokens: int = 1024


class PairScores(NamedTuple):
    """What a model says of some pairs; detached from the graph.

    Attributes:
        chosen_logprob_P: Mean log-probability of the chosen response's tokens, in nats.
        rejected_logprob_P: The same of the rejected response; 0 where there is none.
        nll_sum_P: Weighted sum of the negative log-probabilities of the pair's NLL tokens.
        nll_weight_P: Sum of the weights of these tokens.
        nll_tokens_P: How many they are.
        has_rejected_P: Whether the pair has both sides.
        chosen_doubt_P: Mean of 1 - p over the chosen response's tokens, p being the probability of the token:
            half the sum of |d log p / d logit| over the vocabulary, so what a slope in log p comes to there.
        rejected_doubt_P: The same of the rejected response; 0 where there is none.
        nll_doubt_P: Weighted sum of 1 - p over the pair's NLL tokens.
        chosen_tokens_P: Tokens of the chosen response.
        rejected_tokens_P: Those of the rejected response; 0 where there is none.
        chosen_reference_P: Mean log-probability of the chosen response by the reference model; not a number
            where none was asked.
        rejected_reference_P: The same of the rejected response.
    """

    chosen_logprob_P: Tensor
    rejected_logprob_P: Tensor
    nll_sum_P: Tensor
    nll_weight_P: Tensor
    nll_tokens_P: Tensor
    has_rejected_P: Tensor
    chosen_doubt_P: Tensor
    rejected_doubt_P: Tensor
    nll_doubt_P: Tensor
    chosen_tokens_P: Tensor
    rejected_tokens_P: Tensor
    chosen_reference_P: Tensor
    rejected_reference_P: Tensor

    @property
    def sides(self) -> tuple[Side, Side]:
        """What the term that compares reads of the two responses."""
        return (
            Side(self.chosen_logprob_P, self.chosen_tokens_P, self.chosen_reference_P),
            Side(self.rejected_logprob_P, self.rejected_tokens_P, self.rejected_reference_P),
        )


def score_batch(
    hidden_ND: Tensor, head: Head, batch: PackedBatch, denominators: Denominators
) -> tuple[Tensor, PairScores]:
    """Return a micro-batch's share of the step's loss, and the scores of its pairs.

    Args:
        hidden_ND: Final hidden states of the micro-batch, flattened over its sequences.
        head: The vocabulary projection.
        batch: The micro-batch, packed for what is minimised.
        denominators: Counts of the whole optimizer step.

    Returns:
        The loss, a float32 scalar that carries gradients to `hidden_ND`, `head.weight_VD` and `head.bias_V`
        where gradients are enabled, and the pairs' scores. The losses of a step's micro-batches add up to
        the loss of the step.

    Raises:
        ModelError: The objective needs a reference model's word, and the micro-batch does not have it.
    """
    if torch.is_grad_enabled():
        if batch.objective.needs_reference and batch.reference_PS is None:
            raise ModelError("the micro-batch has no log-probs of a reference model to train with")
        loss, logprob_T = _FusedLoss.apply(hidden_ND, head.weight_VD, head.bias_V, head, batch, denominators)
    else:
        sweep = _Sweep(hidden_ND, head, batch)
        for piece in _pieces(slice(0, len(sweep.target_U)), head.chunk_tokens):
            sweep.forward(piece)
        logprob_T = sweep.of_scored(sweep.logprob_U)
        loss = _loss(logprob_T, batch, denominators)
    return loss, pair_scores(logprob_T, batch)


def pair_scores(logprob_T: Tensor, batch: PackedBatch) -> PairScores:
    """Reduce the log-probabilities of a micro-batch's scored tokens to its pairs."""
    mean_PS, count_PS = _response_means(logprob_T, batch)
    reference_PS = _reference(batch, mean_PS)
    doubt_T = -torch.expm1(logprob_T)
    doubt_PS, _ = _response_means(doubt_T, batch)
    zero_P = logprob_T.new_zeros(len(batch.response_lengths))
    return PairScores(
        chosen_logprob_P=mean_PS[:, 0],
        rejected_logprob_P=mean_PS[:, 1],
        nll_sum_P=zero_P.index_add(0, batch.pair_T, -logprob_T * batch.nll_weight_T),
        nll_weight_P=zero_P.index_add(0, batch.pair_T, batch.nll_weight_T.to(logprob_T.dtype)),
        nll_tokens_P=zero_P.index_add(0, batch.pair_T, (batch.nll_weight_T > 0).to(logprob_T.dtype)),
        has_rejected_P=count_PS[:, 1] > 0,
        chosen_doubt_P=doubt_PS[:, 0],
        rejected_doubt_P=doubt_PS[:, 1],
        nll_doubt_P=zero_P.index_add(0, batch.pair_T, doubt_T * batch.nll_weight_T),
        chosen_tokens_P=count_PS[:, 0],
        rejected_tokens_P=count_PS[:, 1],
        chosen_reference_P=reference_PS[:, 0],
        rejected_reference_P=reference_PS[:, 1],
    )


def _response_means(logprob_T: Tensor, batch: PackedBatch, at: slice = _ALL) -> tuple[Tensor, Tensor]:
    """Mean log-probability and number of tokens of each pair's (chosen, rejected) response. Both [P, S].

    `logprob_T` holds the scored tokens `at`; pairs with none of theirs among them come out as 0.
    """
    num_pairs = len(batch.response_lengths)
    response_T = (batch.role_T[at] != Role.CONTEXT).to(logprob_T.dtype)
    zero = logprob_T.new_zeros(2 * num_pairs)
    count = zero.index_add(0, _side(batch, at), response_T)
    mean = zero.index_add(0, _side(batch, at), logprob_T * response_T) / count.clamp_min(1)
    return mean.view(num_pairs, 2), count.view(num_pairs, 2)


def _side(batch: PackedBatch, at: slice) -> Tensor:
    """Index of each scored token's (pair, side) in a flattened [P, S]."""
    return 2 * batch.pair_T[at] + (batch.role_T[at] == Role.REJECTED)


def _reference(batch: PackedBatch, like_PS: Tensor) -> Tensor:
    """What the reference model says of the responses; not a number where it was not asked. [P, S]."""
    if batch.reference_PS is None:
        return torch.full_like(like_PS, torch.nan)
    return batch.reference_PS.to(like_PS.dtype)


def _sides(mean_PS: Tensor, count_PS: Tensor, batch: PackedBatch) -> tuple[Side, Side]:
    reference_PS = _reference(batch, mean_PS)
    return (
        Side(mean_PS[:, 0], count_PS[:, 0], reference_PS[:, 0]),
        Side(mean_PS[:, 1], count_PS[:, 1], reference_PS[:, 1]),
    )


def _loss(logprob_T: Tensor, batch: PackedBatch, denominators: Denominators) -> Tensor:
    objective = batch.objective
    mean_PS, count_PS = _response_means(logprob_T, batch)
    nll = -(logprob_T * batch.nll_weight_T).sum()
    loss = objective.nll_weight / max(denominators.nll, _TINY) * nll
    if objective.preference_weight == 0:
        return loss
    loss_P = preference_loss(*_sides(mean_PS, count_PS, batch), objective)
    compared = torch.where(count_PS[:, 1] > 0, loss_P, 0).sum()
    return loss + objective.preference_weight / max(denominators.pairs, 1) * compared


def _loss_slopes(sweep: "_Sweep", batch: PackedBatch, denominators: Denominators, at: "Group") -> Tensor:
    """Derivative of `_loss` in the log-probabilities of the distinct tokens of a group. [U]."""
    objective = batch.objective
    slope_U = -objective.nll_weight / max(denominators.nll, _TINY) * sweep.nll_weight_U[at.distinct]
    if objective.preference_weight == 0 or at.scored.start == at.scored.stop:
        return slope_U
    logprob_T = sweep.of_scored(sweep.logprob_U, at.scored)
    mean_PS, count_PS = _response_means(logprob_T, batch, at.scored)
    slope_PS = torch.stack(preference_slopes(*_sides(mean_PS, count_PS, batch), objective), 1)
    share_PS = (count_PS[:, 1:] > 0) / count_PS.clamp_min(1)
    slope_PS = objective.preference_weight / max(denominators.pairs, 1) * slope_PS * share_PS
    slope_T = slope_PS.flatten()[_side(batch, at.scored)]
    if batch.distinct is None:
        return slope_U + slope_T
    return slope_U.index_add(0, batch.distinct.of_T[at.scored] - at.distinct.start, slope_T)


class _FusedLoss(torch.autograd.Function):
    """Loss and log-probabilities forward, with the gradients already made; backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        head: Head,
        batch: PackedBatch,
        denominators: Denominators,
    ) -> tuple[Tensor, Tensor]:
        sweep = _Sweep(hidden_ND, head, batch)
        grads = _Gradients.for_inputs(hidden_ND, weight_VD, bias_V, ctx.needs_input_grad)
        for group in _groups(batch, len(sweep.target_U), head.chunk_tokens):
            pieces = _last_full(group.distinct, head.max_chunk_tokens)
            chunk: _Chunk | None = None
            for piece in pieces:
                chunk = None  # before the next is made
                chunk = sweep.forward(piece)
            slope_U = _loss_slopes(sweep, batch, denominators, group)
            for piece in reversed(pieces):
                if chunk is None:  # of pairs longer than a chunk: its logits are made again
                    chunk = sweep.forward(piece)
                at = slice(piece.start - group.distinct.start, piece.stop - group.distinct.start)
                sweep.backward(piece, chunk, slope_U[at], grads)
                chunk = None
        ctx.grads = grads
        logprob_T = sweep.of_scored(sweep.logprob_U)
        ctx.mark_non_differentiable(logprob_T)
        return _loss(logprob_T, batch, denominators), logprob_T

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grads: _Gradients = ctx.grads
        ctx.grads = None
        return (*grads.scaled(grad_outputs[0]), None, None, None)


class Group(NamedTuple):
    """Tokens whose slopes are known as soon as their log-probabilities are.

    Attributes:
        scored: Scored tokens of answers, of whole pairs.
        distinct: The distinct tokens behind these, or others that only the NLL is over.
    """

    scored: slice
    distinct: slice


_NONE = slice(0, 0)


def _groups(batch: PackedBatch, distinct: int, chunk_tokens: int) -> Iterator[Group]:
    """Cut the distinct tokens of a micro-batch into groups."""
    if batch.objective.preference_weight == 0:
        return (Group(_NONE, piece) for piece in _pieces(slice(0, distinct), chunk_tokens))
    return whole_pairs(batch, distinct, chunk_tokens)


def whole_pairs(batch: PackedBatch, distinct: int, chunk_tokens: int) -> Iterator[Group]:
    """Cut the distinct tokens into groups of whole pairs that fit a chunk, a longer pair alone in its group.

    Pairs that share predictions stay together. Context tokens come last and count as complete by themselves.
    """
    sums = [sum(lengths) for lengths in batch.response_lengths]
    clusters = zip(sums, sums, strict=True) if batch.distinct is None else batch.distinct.clusters
    scored, tokens = (0, 0), (0, 0)
    for more_scored, more in clusters:
        if tokens[1] > tokens[0] and tokens[1] - tokens[0] + more > chunk_tokens:
            yield Group(slice(*scored), slice(*tokens))
            scored, tokens = (scored[1], scored[1]), (tokens[1], tokens[1])
        scored, tokens = (scored[0], scored[1] + more_scored), (tokens[0], tokens[1] + more)
    yield Group(slice(*scored), slice(*tokens))
    for piece in _pieces(slice(tokens[1], distinct), chunk_tokens):
        yield Group(_NONE, piece)


def _pieces(at: slice, chunk_tokens: int) -> Iterator[slice]:
    """Cut a slice into as few as possible of at most `chunk_tokens`, equally long but for one token.

    A product of few tokens takes as long to read the vocabulary matrix as one of many.
    """
    tokens = at.stop - at.start
    count = -(-tokens // chunk_tokens)
    for index in range(count):
        yield slice(at.start + tokens * index // count, at.start + tokens * (index + 1) // count)


def _last_full(at: slice, chunk_tokens: int) -> list[slice]:
    """Cut a slice into pieces of at most `chunk_tokens`, the last of them full: it need not be made again."""
    last = max(at.start, at.stop - chunk_tokens)
    return [*_pieces(slice(at.start, last), chunk_tokens), slice(last, at.stop)]


@dataclass(slots=True)
class _Gradients:
    """Gradients of the loss in the head's inputs, float32 while they add up; None where not needed.

    That of the vocabulary matrix is as large as the matrix: its memory is first written by the first product.
    """

    hidden_ND: Tensor | None
    weight_VD: Tensor | None
    bias_V: Tensor | None
    dtypes: tuple[torch.dtype | None, ...]
    is_weight_blank: bool = True

    @classmethod
    def for_inputs(
        cls, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, needed: tuple[bool, ...]
    ) -> "_Gradients":
        inputs = (hidden_ND, weight_VD, bias_V)
        grads = [
            make(t, dtype=torch.promote_types(t.dtype, torch.float32)) if t is not None and need else None
            for t, need, make in zip(
                inputs, needed[:3], (torch.zeros_like, torch.empty_like, torch.zeros_like), strict=True
            )
        ]
        return cls(grads[0], grads[1], grads[2], tuple(None if t is None else t.dtype for t in inputs))

    def add_to_weight(self, slope_VT: Tensor, hidden_TD: Tensor) -> None:
        """Add slope_VT @ hidden_TD to the gradient of the vocabulary matrix, which is needed."""
        assert self.weight_VD is not None
        if slope_VT.dtype == self.weight_VD.dtype:
            # with a beta of 0, what lies in the memory is not read
            self.weight_VD.addmm_(slope_VT, hidden_TD, beta=0 if self.is_weight_blank else 1)
        else:
            if self.is_weight_blank:
                self.weight_VD.zero_()
            self.weight_VD += product(slope_VT, hidden_TD, self.weight_VD.dtype)
        self.is_weight_blank = False

    def scaled(self, factor: Tensor) -> Iterator[Tensor | None]:
        """The gradients times a factor, in the dtypes of what they belong to; they are used up."""
        if self.weight_VD is not None and self.is_weight_blank:
            self.weight_VD.zero_()
        is_one = factor.device.type == "cpu" and factor.item() == 1  # elsewhere, asking costs a wait
        for grad, dtype in zip((self.hidden_ND, self.weight_VD, self.bias_V), self.dtypes, strict=True):
            if grad is not None and not is_one:
                grad.mul_(factor.to(grad.dtype))
            yield None if grad is None else grad.to(dtype)


class _Sweep:
    """Carries hidden states through the vocabulary matrix chunk by chunk, and gradients back."""

    def __init__(self, hidden_ND: Tensor, head: Head, batch: PackedBatch) -> None:
        self.dtype = compute_dtype(hidden_ND.device, head.weight_VD.dtype)
        self.precise = torch.promote_types(self.dtype, torch.float32)
        self.hidden_ND = hidden_ND.detach().to(self.dtype)
        self.weight_VD = head.weight_VD.detach().to(self.dtype)
        self.bias_V = None if head.bias_V is None else head.bias_V.detach().to(self.precise)
        self.head = head
        self.batch = batch
        self.compiled = hidden_ND.is_cuda and self.precise == torch.float32
        self.source_U, self.target_U = batch.source_T, batch.target_T
        self.nll_weight_U = batch.nll_weight_T.to(self.precise)
        if batch.distinct is not None:
            first_U, of_T = batch.distinct.first_U, batch.distinct.of_T
            self.source_U, self.target_U = batch.source_T[first_U], batch.target_T[first_U]
            zero_U = self.nll_weight_U.new_zeros(len(first_U))
            self.nll_weight_U = zero_U.index_add(0, of_T, self.nll_weight_U)
        self.logprob_U = torch.empty(len(self.target_U), dtype=self.precise, device=hidden_ND.device)
        self.workspace_TV: Tensor | None = None

    def of_scored(self, value_U: Tensor, at: slice = _ALL) -> Tensor:
        """What distinct tokens have, for the scored tokens `at`. [U] -> [T]."""
        distinct = self.batch.distinct
        return value_U[at] if distinct is None else value_U[distinct.of_T[at]]

    def _logits(self, at: slice) -> Tensor:
        """Logits of the distinct tokens `at`, on a CPU in the memory of the chunk before."""
        hidden_TD, weight_DV = self.hidden_ND[self.source_U[at]], self.weight_VD.T
        with torch.autocast(self.hidden_ND.device.type, enabled=False):
            if self.hidden_ND.device.type != "cpu" or self.dtype != self.precise:
                return product(hidden_TD, weight_DV, self.precise).to(self.precise)
            if self.workspace_TV is None or len(self.workspace_TV) < len(hidden_TD):
                self.workspace_TV = None  # before the next is made
                most = max(len(hidden_TD), min(self.head.chunk_tokens, len(self.target_U)))
                self.workspace_TV = hidden_TD.new_empty(most, weight_DV.shape[1])
            return torch.mm(hidden_TD, weight_DV, out=self.workspace_TV[: len(hidden_TD)])

    def forward(self, at: slice) -> "_Chunk":
        """Fill in the log-probabilities of the distinct tokens `at`; return what their gradients need.

        The chunk before must not be used any more.
        """
        logits_TV = self._logits(at)
        if self.bias_V is not None:
            logits_TV += self.bias_V
        if self.head.scale != 1:
            logits_TV *= self.head.scale
        damping_TV = None
        if self.head.softcap is not None:
            logits_TV.div_(self.head.softcap).tanh_()
            damping_TV = None if self.compiled else 1 - logits_TV.square()
            logits_TV.mul_(self.head.softcap)
        target_T = self.target_U[at]
        if self.compiled:
            found = token_logprobs(logits_TV, target_T)
            self.logprob_U[at] = found[0]
            return _Chunk(logits_TV, found=found)
        on_cpu = logits_TV.device.type == "cpu"
        block = max(CPU_BLOCK_TOKENS, CPU_BLOCK // logits_TV.shape[1]) if on_cpu else len(logits_TV)
        blocks = zip(logits_TV.split(block), target_T[:, None].split(block), strict=True)
        logprobs, totals = zip(*(softmax_minus_target(*each) for each in blocks), strict=True)
        self.logprob_U[at] = torch.cat(logprobs)
        return _Chunk(logits_TV, damping_TV=damping_TV, total_T=torch.cat(totals))

    def backward(self, at: slice, chunk: "_Chunk", slope_T: Tensor, grads: _Gradients) -> None:
        """Add the gradients that the distinct tokens `at` cause; `chunk` is used up."""
        source_T, target_T = self.source_U[at], self.target_U[at]
        slope_T1 = (slope_T * self.head.scale)[:, None]
        if chunk.total_T is not None:
            slope_T1 = slope_T1 / chunk.total_T[:, None]
        # d logp / d logits = onehot - p; the sign and the slope go onto the smaller matrices below.
        if chunk.found is not None:
            dtype = self.dtype if grads.bias_V is None else self.precise
            grad_TV = logprob_slopes(chunk.values_TV, *chunk.found, target_T, self.head.softcap, dtype)
        else:
            grad_TV = chunk.values_TV
            if chunk.damping_TV is not None:
                grad_TV *= chunk.damping_TV
        if grads.bias_V is not None:
            grads.bias_V.addmv_(grad_TV.T, slope_T1[:, 0].to(grads.bias_V.dtype), alpha=-1)
        grad_TV = grad_TV.to(self.dtype)
        with torch.autocast(self.hidden_ND.device.type, enabled=False):
            if grads.hidden_ND is not None:
                grad_TD = product(grad_TV, self.weight_VD, self.precise).to(self.precise) * -slope_T1
                grads.hidden_ND.index_add_(0, source_T, grad_TD.to(grads.hidden_ND.dtype))
            if grads.weight_VD is not None:
                hidden_TD = (self.hidden_ND[source_T].to(self.precise) * -slope_T1).to(self.dtype)
                grads.add_to_weight(grad_TV.T, hidden_TD)


class _Chunk(NamedTuple):
    """A chunk between its log-probabilities and its gradients.

    Attributes:
        values_TV: Softmax of the logits minus 1 at the target; with `found` the logits, which compiled code
            reads again.
        damping_TV: Slope of the soft-cap where there is one.
        total_T: What the softmax of a line adds up to; not with `found`.
        found: What `token_logprobs` returned.
    """

    values_TV: Tensor
    damping_TV: Tensor | None = None
    total_T: Tensor | None = None
    found: tuple[Tensor, Tensor, Tensor] | None = None
