"""ORPO the obvious way: float64, one response at a time, full logits, textbook formulas, no packing."""

import copy
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orpo.pairs import TokenizedPair
from orpo.settings.config import Objective

LogprobsOf = Callable[[Sequence[int]], Tensor]
"""Token ids -> the log-probability of every token but the first."""


def nll_targets(pair: TokenizedPair, nll_on: str) -> list[int]:
    """Positions in `prompt ++ chosen` whose tokens are in the NLL."""
    response_start = len(pair.prompt) + pair.chosen_context
    end = len(pair.prompt) + len(pair.chosen)
    if nll_on == "full":
        return [t for t in range(end) if t > 0]
    earlier = [t for start, stop in pair.assistant_spans for t in range(start, stop) if t > 0]
    return (earlier if nll_on == "assistant" else []) + list(range(response_start, end))


def log_odds(mean_logprob: Tensor) -> Tensor:
    p = mean_logprob.exp()
    return torch.log(p / (1 - p))


def value(answer: Tensor, compares: str) -> Tensor:
    """What of an answer's token log-probs is compared, before a reference is taken off."""
    if compares in ("sums", "ratios"):
        return answer.sum()
    return log_odds(answer.mean()) if compares == "odds" else answer.mean()


def orpo_loss(
    logprobs: LogprobsOf,
    pairs: Sequence[TokenizedPair],
    objective: Objective,
    reference: LogprobsOf | None = None,
) -> Tensor:
    """The loss of one optimizer step that consists of `pairs`."""
    nlls, odds_terms = [], []
    for pair in pairs:
        chosen = logprobs([*pair.prompt, *pair.chosen])
        nlls.append(-torch.stack([chosen[t - 1] for t in nll_targets(pair, objective.nll_on)]))
        if len(pair.rejected):
            values = []
            for side, context in ((pair.chosen, pair.chosen_context), (pair.rejected, pair.rejected_context)):
                start = len(pair.prompt) + context - 1
                answer = logprobs([*pair.prompt, *side])[start:]
                values.append(value(answer, objective.compares))
                if objective.compares == "ratios":
                    values[-1] = values[-1] - reference([*pair.prompt, *side])[start:].sum().detach()
            z = objective.scale * (values[0] - values[1]) - objective.margin
            smoothing = objective.label_smoothing
            odds_terms.append(-(1 - smoothing) * F.logsigmoid(z) - smoothing * F.logsigmoid(-z))
    if objective.nll_reduction == "token":
        nll = torch.cat(nlls).mean()
    else:
        nll = torch.stack([each.mean() for each in nlls]).mean()
    odds = torch.stack(odds_terms).mean() if odds_terms else torch.zeros(())
    return objective.nll_weight * nll + objective.preference_weight * odds


def logprobs_of(model: nn.Module) -> LogprobsOf:
    def logprobs(ids: Sequence[int]) -> Tensor:
        ids_1N = torch.tensor([list(ids)])
        logits_NV = model(input_ids=ids_1N, use_cache=False).logits[0, :-1]
        return logits_NV.log_softmax(-1).gather(1, ids_1N[0, 1:, None])[:, 0]

    return logprobs


def loss_and_gradients(
    model: nn.Module, pairs: Sequence[TokenizedPair], objective: Objective
) -> tuple[float, dict[str, Tensor]]:
    """Loss and the gradient of every trained parameter, by a float64 copy of an unprepared model."""
    twin = copy.deepcopy(model).double()
    if hasattr(twin, "set_experts_implementation"):
        twin.set_experts_implementation("eager")  # the default has no float64
    loss = orpo_loss(logprobs_of(twin), pairs, objective)
    loss.backward()
    return loss.item(), gradients(twin)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Trained parameters' gradients; one that got none has a gradient of zero."""
    return {
        name: torch.zeros_like(weight) if weight.grad is None else weight.grad
        for name, weight in model.named_parameters()
        if weight.requires_grad
    }


def worst_gradient_error(ours: dict[str, Tensor], reference: dict[str, Tensor]) -> float:
    """Largest relative error of any parameter's gradient.

    One that is mathematically zero (of a bias of keys) is measured against a hundredth of the largest one.
    """
    assert ours.keys() == reference.keys()
    floor = 1e-2 * max(gradient.norm().item() for gradient in reference.values())
    return max(
        ((ours[name].double() - exact.double()).norm() / exact.double().norm().clamp_min(floor)).item()
        for name, exact in reference.items()
    )
