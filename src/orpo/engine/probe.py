"""Whether a layout is exact for a model, found out by trying it on two pairs.

A model that cannot follow a layout fails silently. Two tests find out. One is sharp in every precision: the
log-probabilities of a side may not depend on the tokens of another side or pair, neither their values nor
their gradients, which are exactly zero or not. The other compares the loss and the gradients of all that is
trained with those of the plain model, one response at a time; in float32, where the weights can be had so.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from orpo.engine.lengths import reset_dynamic_rope, turning_points
from orpo.engine.logits import DAMAGED, are_numbers, plain_logprobs
from orpo.engine.masks import untold_limits
from orpo.engine.memory import free_memory
from orpo.engine.objective import log_odds
from orpo.engine.packing import PackedBatch, Role, pack
from orpo.engine.precision import HALF
from orpo.engine.router import checked_router_loss
from orpo.engine.scorer import NotOnTheInterfaceError, Scorer
from orpo.engine.vocabulary import are_bent, factor_between, is_transformed, measured_scale, reading
from orpo.errors import ModelError, first_line
from orpo.pairs import TokenizedPair
from orpo.settings.config import LayoutName, Objective

PROBE_OBJECTIVE = Objective(preference_weight=1.0)
MAX_PROBE_LENGTH = 512
"""Windows, chunks and switches up to this length are exceeded by the probe's first pair."""
LARGE_LOGIT = 200.0
"""Larger than any bound on logits that is in use."""

FAILURES = (
    RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError, ArithmeticError,
    ImportError,
)  # fmt: skip
"""What a model raises that cannot follow a layout."""


def layout_problem(model: nn.Module, scorer: Scorer, layout: LayoutName) -> str | None:
    """What a layout gets wrong: in full precision where the weights have it, and as training will run it.

    Full precision is sharp enough to tell a wrong layout from rounding. It goes by segments; a kernel for
    whole micro-batches is tried in the precision of training, and has its own test (attention.py).
    """
    device = next(model.parameters()).device
    try:
        with _probing(model, scorer):
            problem = _leak(model, scorer, layout)
            if problem is None and not _is_precise(model, device):
                with _full_precision(model, device) as there_is:
                    problem = _difference(model, scorer, layout) if there_is else None
            return problem or _difference(model, scorer, layout)
    except NotOnTheInterfaceError as error:
        return str(error)
    except torch.OutOfMemoryError:
        raise
    except FAILURES as error:
        return f"{type(error).__name__}: {first_line(error)}"


@contextmanager
def _probing(model: nn.Module, scorer: Scorer) -> Iterator[None]:
    """Without dropout and router loss, and with gradients."""
    before = model.training, scorer.router_loss
    model.eval()
    scorer.router_loss = None
    try:
        with torch.enable_grad():
            yield
    finally:
        model.train(before[0])
        scorer.router_loss = before[1]


def measure(model: nn.Module, scorer: Scorer, longest: int | None = None) -> list[str]:
    """Find out by the plain model what is done to hidden states and logits, its masks and its router loss.

    Args:
        model: As it will be called.
        scorer: Of it; what is found is noted there.
        longest: Longest side there will be, in tokens; None: any.

    Returns:
        Lines to print.

    Raises:
        ModelError: The model is not causal, bends its logits in a way that we do not know, or the router loss
            that its configuration asks for cannot be computed.
    """
    inner, device = scorer.model, next(model.parameters()).device
    ids = torch.tensor([_pairs(inner)[0].prompt], device=device)
    is_precise = _is_precise(model, device)
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), reading(scorer.backbone, inner.get_output_embeddings()) as found:
            logits = scorer.plain_forward(input_ids=ids, use_cache=False).logits
        _check_causal(scorer, ids, logits, is_precise)
        hidden = found.output[0]
        if found.entering is not None and (
            is_transformed(hidden, found.entering) or _drops_between(scorer, ids)
        ):
            scorer.has_transform, hidden = True, found.entering
        flat_ND = hidden.flatten(0, 1)
        scorer.logit_scale = measured_scale(inner, logits.flatten(0, 1), flat_ND, is_precise)
        if found.product is not None:
            _check_logits(
                scorer, ids, factor_between(inner, logits, found.product), found.product, is_precise
            )
        scorer.untold = untold_limits(scorer.configs, scorer.plain_forward, ids, longest)
        scorer.router_loss, notices = checked_router_loss(inner, scorer.plain_forward, ids)
        return notices
    except (torch.OutOfMemoryError, ModelError):
        raise
    except FAILURES:  # the probe meets it again, and says it
        return []
    finally:
        model.train(training)


def _drops_between(scorer: Scorer, ids_BN: Tensor) -> bool:
    """Whether training drops something between the backbone and the vocabulary matrix."""
    model = scorer.model
    if not any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules()):
        return False
    devices = [ids_BN.device] if ids_BN.device.type == "cuda" else []
    model.train()
    try:
        with (
            torch.random.fork_rng(devices),
            torch.no_grad(),
            reading(scorer.backbone, model.get_output_embeddings()) as found,
        ):
            scorer.plain_forward(input_ids=ids_BN, use_cache=False)
    finally:
        model.eval()
    return found.entering is not None and is_transformed(found.output[0], found.entering)


def _check_causal(scorer: Scorer, ids_BN: Tensor, logits_BNV: Tensor, is_precise: bool) -> None:
    """The first half of a text may not depend on the second, neither in values nor in gradients.

    Args:
        scorer: Of the model.
        ids_BN: A text.
        logits_BNV: What the plain model says of it.
        is_precise: Whether rounding is that of float32.

    Raises:
        ModelError: It does.
    """
    model, half = scorer.model, ids_BN.shape[1] // 2
    size = model.config.get_text_config().vocab_size
    changed_BN = ids_BN.clone()
    changed_BN[:, half:] = 1 + ids_BN[:, half:] % (size - 1)

    def first_half(ids: Tensor) -> Tensor:
        logits: Tensor = scorer.plain_forward(input_ids=ids, use_cache=False).logits[:, :half].float()
        return logits

    with torch.no_grad():
        logits, other = logits_BNV[:, :half].float(), first_half(changed_BN)
        if not are_numbers(logits):
            raise ModelError(f"{type(model).__name__}: its logits are not numbers; {DAMAGED}")
        difference = (logits - other).abs().max() / logits.abs().max().clamp_min(1e-30)
    if difference == 0:
        return
    if difference <= (1e-4 if is_precise else 2e-2):  # rounding, as by experts with other numbers of tokens?
        with torch.enable_grad(), _embedded(model) as found:
            logits = first_half(ids_BN)
            if len(found) != 1 or found[0].shape[:2] != ids_BN.shape:
                return
            (slope,) = torch.autograd.grad(logits.square().sum(), found, allow_unused=True)
        if slope is None or not slope[:, half:].any():
            return
    encodes = [name for name in ("is_decoder", "causal") if getattr(model.config, name, True) is False]
    why = f", `{encodes[0]}` being false in its configuration" if encodes else ""
    raise ModelError(
        f"{type(model).__name__} is no causal language model: what it says of a token depends on the tokens "
        f"after it{why}"
    )


@torch.no_grad()
def _check_logits(scorer: Scorer, ids_BN: Tensor, scale: float, product: Tensor, is_precise: bool) -> None:
    """Large logits show what small ones, those of a new model, do not: a bound that no setting tells.

    Args:
        scorer: Of the model.
        ids_BN: A text.
        scale: The factor between its logits, before their soft cap, and `product`.
        product: What the vocabulary matrix gave for it.
        is_precise: Whether rounding is that of float32.

    Raises:
        ModelError: There is one.
    """
    model = scorer.model
    enlarged = LARGE_LOGIT / float((scale * product).abs().max().clamp_min(1e-30))
    with reading(scorer.backbone, model.get_output_embeddings(), enlarged):
        logits = scorer.plain_forward(input_ids=ids_BN, use_cache=False).logits
    if are_bent(model, logits, enlarged * scale * product, is_precise):
        raise ModelError(
            f"{type(model).__name__} bends its logits, and no factor or soft cap that its configuration tells"
            " explains how; its loss cannot be computed here"
        )


# ---------------------------------------------------------------------------------------- neighbours


def _leak(model: nn.Module, scorer: Scorer, layout: LayoutName) -> str | None:
    """Whether a side's log-probabilities depend on tokens that it must not see; how, or None."""
    first, second = _pairs(scorer.model)
    other_first, other_second = (_others(pair, scorer.model) for pair in (first, second))
    exchanges = (
        (1, Role.REJECTED, (other_first, replace(second, chosen=other_second.chosen))),
        (0, Role.CHOSEN, (replace(first, rejected=other_first.rejected), other_second)),
    )
    device = next(model.parameters()).device
    batch = pack([first, second], PROBE_OBJECTIVE, layout=layout).to(device)
    for number, role, exchanged in exchanges:
        changed = pack(exchanged, PROBE_OBJECTIVE, layout=layout).to(device)
        foreign_BN = batch.input_ids_BN != changed.input_ids_BN
        value, slope = _side(model, scorer, batch, number, role, foreign_BN)
        other, _ = _side(model, scorer, changed, number, role)
        difference = abs(value - other)
        if difference and (
            _has_experts(scorer.model) or value != _side(model, scorer, batch, number, role)[0]
        ):
            # Experts with other numbers of tokens round otherwise, and so do kernels that add in any order.
            difference = 0.0 if difference <= (2e-5 if _is_precise(model, device) else 2e-2) else difference
        if slope or difference != 0:  # not a number is no 0
            return f"a side's log-probs depend on its neighbours (by {abs(value - other):.1e})"
    return None


def _has_experts(model: PreTrainedModel) -> bool:
    """Whether a token's experts see how many other tokens came to them, which changes their rounding."""
    settings = vars(model.config.get_text_config()).items()
    return any("expert" in name and isinstance(value, int) and value > 1 for name, value in settings)


def _side(
    model: nn.Module,
    scorer: Scorer,
    batch: PackedBatch,
    number: int,
    role: Role,
    foreign_BN: Tensor | None = None,
) -> tuple[float, bool]:
    """Mean log-probability of one side, and whether it has a slope in the embeddings of foreign tokens."""
    mine_T = (batch.pair_T == number) & (batch.role_T == role)
    nll_alone = replace(PROBE_OBJECTIVE, preference_weight=0.0)
    batch = replace(batch, nll_weight_T=mine_T.float(), objective=nll_alone)
    with _embedded(scorer.model) as found:
        with _frozen(scorer.model.get_output_embeddings()):  # its gradient, a large one, is not asked for
            output = model(batch=batch)
        if foreign_BN is None or len(found) != 1 or found[0].shape[:2] != foreign_BN.shape:
            return _value(output.pairs, number, role), False
        (slope,) = torch.autograd.grad(output.loss, found, allow_unused=True)
    return _value(output.pairs, number, role), slope is not None and bool(slope[foreign_BN].any().item())


@contextmanager
def _embedded(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """What each call of the input embeddings returns, with gradients."""
    found: list[Tensor] = []

    def keep(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        found.append(output if output.requires_grad else output.detach().requires_grad_())
        return found[-1].clone()  # some models change it in place, which no leaf allows

    hook = model.get_input_embeddings().register_forward_hook(keep)
    try:
        yield found
    finally:
        hook.remove()


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Weights that train do not, for now."""
    trained = [weight for weight in module.parameters() if weight.requires_grad]
    try:
        for weight in trained:
            weight.requires_grad_(False)
        yield
    finally:
        for weight in trained:
            weight.requires_grad_(True)


def _value(scores: object, number: int, role: Role) -> float:
    side = "rejected_logprob_P" if role == Role.REJECTED else "chosen_logprob_P"
    return float(getattr(scores, side)[number].item())


def _others(pair: TokenizedPair, model: PreTrainedModel) -> TokenizedPair:
    """A pair of the same lengths, other in every token."""
    size = model.config.get_text_config().vocab_size

    def move(ids: object) -> list[int]:
        return [1 + id % (size - 1) for id in ids]  # type: ignore[attr-defined]

    return replace(pair, prompt=move(pair.prompt), chosen=move(pair.chosen), rejected=move(pair.rejected))


# ---------------------------------------------------------------------------------------- the plain model


def _has_full_precision(model: nn.Module) -> bool:
    return all(weight.dtype in (torch.float32, torch.float64) for weight in model.parameters())


@contextmanager
def _full_precision(model: nn.Module, device: torch.device) -> Iterator[bool]:
    """The model in float32, without autocast, where its weights can be had so; gives whether they can.

    Weights of half precision become float32 one after the other, and what they were again: no bit changes.
    """
    tensors = [*model.parameters(), *model.buffers()]
    half = [each for each in tensors if each.dtype in HALF]
    floats = all(each.dtype.itemsize >= 2 for each in tensors if each.is_floating_point())
    whole = not any(isinstance(each, DTensor) or hasattr(each, "ds_tensor") for each in tensors)
    quantized = any(getattr(module, "is_quantized", False) for module in model.modules())
    if not floats or not whole or quantized or sum(each.nbytes for each in half) > free_memory(device) / 2:
        yield False
        return
    dtypes = [each.dtype for each in half]
    try:
        for each in half:
            each.data = each.data.float()
        with torch.autocast(device.type, enabled=False):
            yield True
    finally:
        for each, dtype in zip(half, dtypes, strict=True):
            each.data = each.data.to(dtype)


def _is_precise(model: nn.Module, device: torch.device) -> bool:
    """Whether rounding is that of float32: no half precision, no TF32."""
    if torch.is_autocast_enabled(device.type) or not _has_full_precision(model):
        return False
    try:
        return device.type != "cuda" or torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # set through torch's newer switches, which the old question refuses to mix with
        return False


def _difference(model: nn.Module, scorer: Scorer, layout: LayoutName) -> str | None:
    """What loss or gradient differs from the plain model's on two pairs, or None."""
    points = turning_points(scorer.model.config.get_text_config())
    longest = scorer.longest or 2 * MAX_PROBE_LENGTH
    pairs = _pairs(scorer.model, [point for point in points if point < longest], longest)
    device = next(model.parameters()).device
    precise = _is_precise(model, device)
    weights = _probe_weights(model, scorer.model, precise)
    ours = model(batch=pack(pairs, PROBE_OBJECTIVE, layout=layout).to(device)).loss
    ours_grads = torch.autograd.grad(ours, weights, materialize_grads=True) if weights else ()
    plain = _plain_loss(model, scorer, pairs, device)
    plain_grads = torch.autograd.grad(plain, weights, materialize_grads=True) if weights else ()
    loss_limit, grad_limit = (2e-5, 1e-3) if precise else (2e-2, 0.2)
    difference = abs(ours.item() - plain.item()) / max(abs(plain.item()), 1e-12)
    if not difference <= loss_limit:
        return f"loss {ours.item():.6f} instead of {plain.item():.6f}"
    floor = 1e-2 * max(
        (grad.norm().item() for grad in plain_grads if grad.isfinite().all()), default=0.0
    )  # a bias of keys has no gradient but rounding
    for mine, theirs in zip(ours_grads, plain_grads, strict=True):
        if not theirs.isfinite().all():
            continue  # training stops there, and says it better
        difference = (mine - theirs).float().norm().item() / max(theirs.float().norm().item(), floor, 1e-12)
        if not difference <= grad_limit:
            return f"a gradient differs by {difference:.1e} of its norm"
    return None


def _pairs(
    model: PreTrainedModel, beyond: Sequence[int] = (), longest: int = 2 * MAX_PROBE_LENGTH
) -> list[TokenizedPair]:
    """Two pairs, the first longer than those of the lengths `beyond` that a probe can afford.

    They begin and end as texts do: a model may do something of its own where a text or a turn ends.
    """
    generator = torch.Generator().manual_seed(0)
    config = model.config.get_text_config()
    begin = _ids(getattr(config, "bos_token_id", None), config.vocab_size)
    ends = _ids(getattr(config, "eos_token_id", None), config.vocab_size)

    def ids(length: int, *, ends_turn: bool = True) -> list[int]:
        drawn: list[int] = torch.randint(1, config.vocab_size, (length,), generator=generator).tolist()
        return [*drawn[:-1], ends[-1]] if ends and ends_turn else drawn

    prompt = 9 + max((length for length in beyond if length <= MAX_PROBE_LENGTH), default=0)
    prompt = max(9, min(prompt, longest - 7))
    first = [*begin, *ids(prompt, ends_turn=False)][:prompt]
    if ends:
        first[prompt // 2] = ends[0]
    return [TokenizedPair(first, ids(7), ids(5)), TokenizedPair(ids(3), ids(4), ids(6))]


def _ids(given: int | Sequence[int] | None, size: int) -> list[int]:
    """Special tokens that the vocabulary has."""
    listed = [given] if isinstance(given, int) else [*(given or ())]
    return [id for id in listed if 0 <= id < size]


def _probe_weights(model: nn.Module, inner: PreTrainedModel, precise: bool) -> list[nn.Parameter]:
    """Weights whose gradients are compared: all that are trained, or, where rounding would show, a few.

    These are near the input, so that their gradients have passed everything above, and the head's.
    """
    trained = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    if precise:
        return [weight for _, weight in trained]
    inside = [
        weight for name, weight in trained if "embed" not in name and "wte" not in name and "wpe" not in name
    ]
    head = [weight for weight in inner.get_output_embeddings().parameters() if weight.requires_grad]
    return (inside or [weight for _, weight in trained])[:4] + head


def _plain_loss(model: nn.Module, scorer: Scorer, pairs: list[TokenizedPair], device: torch.device) -> Tensor:
    """`PROBE_OBJECTIVE` by the plain model, one response at a time."""
    nll, means = [], []
    for pair in pairs:
        for side in (pair.chosen, pair.rejected):
            ids = torch.tensor([[*pair.prompt, *side]], device=device)
            if scorer.limits.alone:
                reset_dynamic_rope(scorer.backbone)
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
            logprob_T = plain_logprobs(logits, ids[0, 1:])
            means.append(logprob_T[len(pair.prompt) - 1 :].mean())
            if side is pair.chosen:
                nll.append(-logprob_T)
    chosen_P, rejected_P = torch.stack(means[::2]), torch.stack(means[1::2])
    odds = -F.logsigmoid(log_odds(chosen_P) - log_odds(rejected_P)).mean()
    return torch.cat(nll).mean() + PROBE_OBJECTIVE.preference_weight * odds
