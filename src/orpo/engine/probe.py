"""Whether a layout is exact for a model, found out by trying it on two pairs.

A model that cannot follow a layout fails silently, so the loss and a few gradients of each layout are
compared with those of the plain model, one response at a time.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from orpo.engine.objective import log_odds, odds_ratio_loss
from orpo.engine.packing import pack
from orpo.engine.scorer import NotOnTheInterfaceError, Scorer
from orpo.errors import first_line
from orpo.pairs import TokenizedPair
from orpo.settings.config import LayoutName, Objective

PROBE_OBJECTIVE = Objective(beta=1.0)
MAX_PROBE_WINDOW = 512
"""Sliding windows up to this length are exceeded by the probe's first pair."""


def layout_problem(model: nn.Module, scorer: Scorer, layout: LayoutName) -> str | None:
    """What a layout gets wrong: in full precision where the weights have it, and as training will run it.

    Full precision is sharp enough to tell a wrong layout from rounding. It goes by segments; a kernel for
    whole micro-batches is tried in the precision of training, and has its own test (attention.py).
    """
    kind = next(model.parameters()).device.type
    if torch.is_autocast_enabled(kind) and _has_full_precision(model):
        with torch.autocast(kind, enabled=False):
            problem = _probe(model, scorer, layout)
        if problem is not None:
            return problem
    return _probe(model, scorer, layout)


def _has_full_precision(model: nn.Module) -> bool:
    return all(weight.dtype in (torch.float32, torch.float64) for weight in model.parameters())


def _is_precise(model: nn.Module, device: torch.device) -> bool:
    """Whether rounding is that of float32: no half precision, no TF32."""
    if torch.is_autocast_enabled(device.type) or not _has_full_precision(model):
        return False
    try:
        return device.type != "cuda" or torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # set through torch's newer switches, which the old question refuses to mix with
        return False


def _probe(model: nn.Module, scorer: Scorer, layout: LayoutName) -> str | None:
    """Compare a layout with the plain model on two pairs, loss and gradient; return what differs, or None."""
    pairs = _probe_pairs(scorer.model)
    weights = _probe_weights(model, scorer.model)
    device = next(model.parameters()).device
    training, objective = model.training, scorer.objective
    model.eval()
    scorer.objective, scorer.router_loss = PROBE_OBJECTIVE, False
    try:
        with torch.enable_grad():
            ours = model(batch=pack(pairs, PROBE_OBJECTIVE, layout=layout).to(device)).loss
            ours_grads = torch.autograd.grad(ours, weights, materialize_grads=True) if weights else ()
            plain = _plain_loss(model, pairs, device)
            plain_grads = torch.autograd.grad(plain, weights, materialize_grads=True) if weights else ()
    except NotOnTheInterfaceError as error:
        return str(error)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
        return f"{type(error).__name__}: {first_line(error)}"
    finally:
        model.train(training)
        scorer.objective, scorer.router_loss = objective, True
    loss_limit, grad_limit = (2e-5, 1e-3) if _is_precise(model, device) else (2e-2, 0.2)
    difference = abs(ours.item() - plain.item()) / max(abs(plain.item()), 1e-12)
    if not difference <= loss_limit:
        return f"loss {ours.item():.6f} instead of {plain.item():.6f}"
    floor = 1e-2 * max(
        (grad.norm().item() for grad in plain_grads), default=0.0
    )  # a bias of keys has no gradient but rounding
    for mine, theirs in zip(ours_grads, plain_grads, strict=True):
        difference = (mine - theirs).float().norm().item() / max(theirs.float().norm().item(), floor, 1e-12)
        if not difference <= grad_limit:
            return f"a gradient differs by {difference:.1e} of its norm"
    return None


def _probe_pairs(model: PreTrainedModel) -> list[TokenizedPair]:
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None) or 0
    generator = torch.Generator().manual_seed(0)

    def ids(length: int) -> list[int]:
        return torch.randint(1, config.vocab_size, (length,), generator=generator).tolist()

    prompt = 9 + (window if window <= MAX_PROBE_WINDOW else 0)
    return [TokenizedPair(ids(prompt), ids(7), ids(5)), TokenizedPair(ids(3), ids(4), ids(6))]


def _probe_weights(model: nn.Module, inner: PreTrainedModel) -> list[nn.Parameter]:
    """A few trained weights near the input, whose gradients have passed everything above, and the head's."""
    trained = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    inside = [
        weight for name, weight in trained if "embed" not in name and "wte" not in name and "wpe" not in name
    ]
    head = [weight for weight in inner.get_output_embeddings().parameters() if weight.requires_grad]
    return (inside or [weight for _, weight in trained])[:4] + head


def _plain_loss(model: nn.Module, pairs: list[TokenizedPair], device: torch.device) -> Tensor:
    """`PROBE_OBJECTIVE` by the plain model, one response at a time."""
    nll, means = [], []
    for pair in pairs:
        for side in (pair.chosen, pair.rejected):
            ids = torch.tensor([[*pair.prompt, *side]], device=device)
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
            logprob_T = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            means.append(logprob_T[len(pair.prompt) - 1 :].mean())
            if side is pair.chosen:
                nll.append(-logprob_T)
    chosen_P, rejected_P = torch.stack(means[::2]), torch.stack(means[1::2])
    odds = odds_ratio_loss(log_odds(chosen_P) - log_odds(rejected_P)).mean()
    return torch.cat(nll).mean() + PROBE_OBJECTIVE.beta * odds
