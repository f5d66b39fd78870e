"""Which kernel serves a layer's attention on a GPU.

Backends are tried from the fastest on. Each says what it cannot do (precision, head size, windows,
soft-capped scores), and before a layer may use it, it solves a small known problem: kernels have differed
between versions in their arguments and in how they align queries with keys. What none can serve is left to
one scaled_dot_product_attention per segment (attention.py), as is everything without a GPU.
"""

import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from orpo.engine.flex import FlexKernel
from orpo.engine.packing import Run
from orpo.engine.varlen import HALF, Case, Options, Plan, VarlenKernel, plan_row, varlen_reference
from orpo.errors import ModelError

logger = logging.getLogger(__name__)

CHOICE = "ORPO_ATTENTION"
"""Environment variable that names the backend to take, for comparisons; unset or `auto`: the fastest."""

SEGMENTS = "segments"
"""Name of the way that needs no backend."""


class Backend(Protocol):
    """A way to attend over a whole row."""

    @property
    def name(self) -> str:
        """Short name, the one `ORPO_ATTENTION` takes."""

    @property
    def description(self) -> str:
        """What to print, with the version."""

    def refusal(self, case: Case) -> str | None:
        """Why the backend cannot serve the case, or None."""

    def __call__(
        self, query_NHD: Tensor, key_NHD: Tensor, value_NHD: Tensor, plan: Plan, options: Options
    ) -> Tensor:
        """Attend in row order; key and value may have fewer heads. [N, H, D] -> [N, H, D]."""


REFERENCE = VarlenKernel("reference", varlen_reference, anywhere=True)
"""Never chosen unless named; the judge of the others."""


@functools.cache
def installed() -> dict[str, Backend]:
    """The backends installed here by name, the fastest first."""
    return {backend.name: backend for backend in _find()}


def _find() -> Iterator[Backend]:
    if module := _module("flash_attn_interface"):
        yield VarlenKernel("flash_attn_3", module.flash_attn_varlen_func, description="flash-attn 3")
    if module := _module("torch.nn.attention.varlen"):
        version = f"torch {torch.__version__} varlen_attn"
        yield VarlenKernel("varlen", module.varlen_attn, description=version)
        yield VarlenKernel("varlen_repeat", module.varlen_attn, description=version, repeat_heads=True)
    if module := _module("flash_attn"):
        version = f"flash-attn {module.__version__}"
        yield VarlenKernel("flash_attn", module.flash_attn_varlen_func, description=version)
    yield FlexKernel()


def _module(name: str) -> Any:
    """An optional module, or None; one built for another torch fails on import, and is named."""
    if importlib.util.find_spec(name) is None:
        return None
    try:
        return importlib.import_module(name)
    except Exception as error:  # a binary may fail in any way
        logger.warning("attention: %s is not used: %s", name, (str(error).splitlines() or [""])[0])
        return None


@contextmanager
def by_segments() -> Iterator[None]:
    """Use no backend, unless the environment names one."""
    if os.environ.get(CHOICE):
        yield
        return
    os.environ[CHOICE] = SEGMENTS
    try:
        yield
    finally:
        del os.environ[CHOICE]


def choose(query: Tensor, key: Tensor, value: Tensor, options: Options) -> Backend | None:
    """The backend for a layer, or None for one attention call per segment.

    Args:
        query: [1, H, N, D].
        key: [1, H / groups, N, D].
        value: Like `key`, or with heads of another size.
        options: What the layer asks for; a window only where it is shorter than a segment.

    Raises:
        ModelError: `ORPO_ATTENTION` names a backend that is not there or cannot serve the layer.
    """
    name = os.environ.get(CHOICE) or "auto"
    if name == SEGMENTS or (name == "auto" and query.device.type != "cuda"):
        return None
    case = Case(
        query.device, _compute_dtype(query), query.shape[1], key.shape[1], query.shape[3], value.shape[3],
        options.window is not None, options.softcap, options.dropout > 0,
    )  # fmt: skip
    return _choose(case, name)


@functools.cache
def _choose(case: Case, name: str) -> Backend | None:
    if name != "auto":
        named = {**installed(), REFERENCE.name: REFERENCE}
        if name not in named:
            raise ModelError(
                f"{CHOICE}={name} is not installed here; take auto, {SEGMENTS}, {', '.join(named)}"
            )
        if problem := named[name].refusal(case) or disagreement(named[name], case):
            raise ModelError(f"{CHOICE}={name} cannot serve this model: {problem}")
        return named[name]
    for backend in installed().values():
        if backend.refusal(case) is None:
            problem = disagreement(backend, case)
            if problem is None:
                return backend
            logger.warning("attention: %s is not used: %s", backend.description, problem)
    return None


def _compute_dtype(tensor: Tensor) -> torch.dtype:
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype


def attend_row(
    backend: Backend, query: Tensor, key: Tensor, value: Tensor, plan: Plan, options: Options
) -> Tensor:
    """Attention of a row through `backend`; tensors as in `choose`. Returns [1, N, H, D], contiguous."""
    dtype = _compute_dtype(query)
    # Kernels are not on autocast's list: a rotary embedding leaves them float32 queries beside half values.
    with torch.autocast(query.device.type, enabled=False):
        query_NHD, key_NHD, value_NHD = (x.to(dtype)[0].transpose(0, 1) for x in (query, key, value))
        return backend(query_NHD, key_NHD, value_NHD, plan, options)[None].contiguous()


KNOWN_ROW = (Run(5, 4, 3), Run(150, 41, 99), Run(1, 1, 1), Run(33, 64, 0), Run(2, 130, 7))
"""Runs of the known problem: shorter and longer than a kernel's tile, with and without a rejected answer."""

KNOWN_WINDOW = 37
HALF_LIMIT, PRECISE_LIMIT = 2e-2, 2e-3
"""Largest relative error of the output and of each gradient; a wrong alignment errs by far more than 0.1."""


def disagreement(backend: Backend, case: Case) -> str | None:
    """What a backend gets wrong on a known problem, in output or gradients; None if nothing."""
    options = Options(1.5 * case.head_size**-0.5, KNOWN_WINDOW if case.windowed else None, case.softcap)
    try:
        with _as_if_at_start(case.device):
            plan = plan_row(KNOWN_ROW, case.device)
            inputs = _known_inputs(case)
            exact = output_and_gradients(REFERENCE, inputs, plan, options)
            ours = output_and_gradients(backend, [x.to(case.dtype) for x in inputs], plan, options)
    except Exception as error:  # an optional kernel may fail in any way
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
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


def relative_error(tensor: Tensor, reference: Tensor) -> float:
    """Norm of the difference over the norm of `reference`."""
    difference = tensor.detach().double() - reference.detach().double()
    error: float = (difference.norm() / reference.detach().double().norm()).item()
    return error


def _known_inputs(case: Case) -> list[Tensor]:
    """Query, key, value and the gradient of the output, float64 numbers that the case's dtype can hold."""
    generator = torch.Generator().manual_seed(0)
    num_tokens = sum(sum(run) for run in KNOWN_ROW)
    shapes = (
        (case.heads, case.head_size), (case.key_heads, case.head_size),
        (case.key_heads, case.value_size), (case.heads, case.value_size),
    )  # fmt: skip
    drawn = [torch.randn((num_tokens, *shape), generator=generator) for shape in shapes]
    return [x.to(case.dtype).to(case.device, torch.float64) for x in drawn]


def output_and_gradients(
    backend: Backend, inputs: Sequence[Tensor], plan: Plan, options: Options
) -> tuple[Tensor, ...]:
    """Output, and gradients in query, key and value, where `inputs` are these and the output's gradient."""
    query, key, value = (x.detach().requires_grad_() for x in inputs[:3])
    output = backend(query, key, value, plan, options)
    return output.detach(), *torch.autograd.grad(output, (query, key, value), inputs[3])
