"""Attention of a micro-batch: one kernel call where a GPU has a kernel for it, else segment by segment.

The kernel is torch's own (varlen.py). Before a layer may use it, it solves a small known problem and is
compared with segments in float64: GPUs and builds differ in what they support, versions in their arguments,
and kernels of this kind have differed in how they align queries with keys. What it does not serve goes by
segments (segments.py): everything without a GPU, float32, soft-capped scores, sinks, dropout, heads over 256
or of two sizes.

Shape suffixes: H = heads, N = tokens of a micro-batch, D = size of a head.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from orpo.console import say
from orpo.engine.packing import Segment, pair_segments
from orpo.engine.precision import HALF, compute_dtype
from orpo.engine.segments import Options, Segments, attend_segments
from orpo.engine.varlen import Case, VarlenKernel
from orpo.errors import first_line

KERNEL = VarlenKernel()


def attend(  # noqa: PLR0913 - all that a layer may ask
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """Attention of a micro-batch.

    Args:
        query: [1, H, N, D].
        key: [1, H / groups, N, D]; fewer heads than the query's are shared by groups.
        value: Like `key`, or with heads of another size.
        segments: Those of the micro-batch.
        scale: Factor on the scores; 1 / sqrt(D) by default.
        window: Sliding window in tokens, a query's own included; None for none.
        softcap: Scores become softcap * tanh(score / softcap).
        dropout: Probability of dropping an attention weight.
        sinks_H: A score for each head that takes a share of the weights and adds nothing to the output.

    Returns:
        [1, N, H, D], contiguous.
    """
    if window is not None and window >= segments.longest():
        window = None
    options = Options(scale, window, softcap, dropout, sinks_H)
    case = Case(
        query.device, compute_dtype(query.device, query.dtype), query.shape[1], key.shape[1], query.shape[3],
        value.shape[3], window is not None, softcap is not None, dropout > 0, sinks_H is not None,
    )  # fmt: skip
    if not _serves(KERNEL, case):
        return attend_segments(query, key, value, segments, options)
    segments.backend = KERNEL.description
    return attend_by_kernel(KERNEL, query, key, value, segments, options)


def attend_by_kernel(
    kernel: VarlenKernel, query: Tensor, key: Tensor, value: Tensor, segments: Segments, options: Options
) -> Tensor:
    """Attention by `kernel`, which serves the case; arguments and result as those of `attend`."""
    dtype = compute_dtype(query.device, query.dtype)
    # The kernel is not on autocast's list: a rotary embedding leaves it float32 queries and half values.
    with torch.autocast(query.device.type, enabled=False):
        query_NHD, key_NHD, value_NHD = (x.to(dtype)[0].transpose(0, 1) for x in (query, key, value))
        layout = segments.for_kernel(query.device)
        output = kernel(query_NHD, key_NHD, value_NHD, layout, scale=options.scale, window=options.window)
        return output[None].contiguous()


@functools.cache
def _serves(kernel: VarlenKernel, case: Case) -> bool:
    if kernel.refusal(case) is not None:
        return False
    problem = disagreement(kernel, case)
    if problem is not None:
        say(f"attention: {kernel.description} is not used: {problem}")
    return problem is None


_PAIRS = pair_segments([(5, 4, 3), (150, 41, 99), (1, 1, 1), (33, 64, 0), (2, 130, 7)])
KNOWN_TREE = (*_PAIRS, Segment(20, 2, 150), Segment(70, 2, 100), Segment(9, len(_PAIRS) + 1, 130))
"""Segments of the known problem: shorter and longer than a kernel's tile, alone, and several on one trunk."""

KNOWN_WINDOW = 37
HALF_LIMIT, PRECISE_LIMIT = 2e-2, 2e-3
"""Largest relative error of the output and of each gradient; a wrong alignment errs by far more than 0.1."""


def disagreement(kernel: VarlenKernel, case: Case) -> str | None:
    """What the kernel gets wrong on a known problem, in output or gradients; None if nothing."""
    segments = Segments(KNOWN_TREE)
    options = Options(1.5 * case.head_size**-0.5, KNOWN_WINDOW if case.windowed else None)
    by_segments = functools.partial(attend_segments, segments=segments, options=options)
    by_kernel = functools.partial(attend_by_kernel, kernel, segments=segments, options=options)
    try:
        with _as_if_at_start(case.device):
            inputs = _known_inputs(case)
            exact = output_and_gradients(by_segments, inputs)
            ours = output_and_gradients(by_kernel, [x.to(case.dtype) for x in inputs])
    except Exception as error:  # a kernel may fail in any way
        return f"{type(error).__name__}: {first_line(error)}"
    limit = HALF_LIMIT if case.dtype in HALF else PRECISE_LIMIT
    for name, tensor, reference in zip(("output", "query", "key", "value"), ours, exact, strict=True):
        difference = relative_error(tensor, reference)
        if not difference <= limit:
            what = name if name == "output" else f"gradient in the {name}"
            return f"its {what} on a known problem is off by {difference:.1e}"
    return None


@contextmanager
def _as_if_at_start(device: torch.device) -> Iterator[None]:
    """Autograd as outside of everything: a layer may first be called in evaluation or under checkpointing."""
    kept = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False), kept:
        yield


def _known_inputs(case: Case) -> list[Tensor]:
    """Query, key, value and the gradient of the output, float64 numbers that the case's dtype can hold."""
    generator = torch.Generator().manual_seed(0)
    num_tokens = sum(segment.tokens for segment in KNOWN_TREE)
    shapes = (
        (case.heads, num_tokens, case.head_size), (case.key_heads, num_tokens, case.head_size),
        (case.key_heads, num_tokens, case.value_size), (num_tokens, case.heads, case.value_size),
    )  # fmt: skip
    drawn = [torch.randn((1, *shape), generator=generator) for shape in shapes]
    return [x.to(case.dtype).to(case.device, torch.float64) for x in drawn]


def output_and_gradients(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Output, and gradients in query, key and value, where `inputs` are these and the output's gradient."""
    query, key, value = (x.detach().requires_grad_() for x in inputs[:3])
    output = function(query, key, value)
    return output.detach(), *torch.autograd.grad(output, (query, key, value), inputs[3])


def relative_error(tensor: Tensor, reference: Tensor) -> float:
    """Norm of the difference over the norm of `reference`."""
    difference = tensor.detach().double() - reference.detach().double()
    error: float = (difference.norm() / reference.detach().double().norm()).item()
    return error
