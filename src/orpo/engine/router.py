"""The load-balancing loss of a mixture of experts, as the model itself defines it."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from orpo.errors import ModelError, first_line

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")
_DROP = "set output_router_logits: false in its config.json or model_init_kwargs to train without it"


@dataclass(frozen=True, slots=True)
class RouterLoss:
    """A model's own function and what it is called with.

    Attributes:
        function: `load_balancing_loss_func` of the model's module.
        coefficient: Its weight in the loss.
        num_experts: Experts of a layer.
        top_k: Experts that a token goes to.
    """

    function: Callable[..., Any]
    coefficient: float
    num_experts: int
    top_k: int

    def __call__(self, router_logits: Sequence[Tensor], attention_mask_BN: Tensor | None) -> Tensor:
        """The loss, weighted, of these router logits: one tensor [tokens, experts] a layer."""
        loss: Tensor = self.coefficient * self.function(
            tuple(router_logits), self.num_experts, self.top_k, attention_mask_BN
        )
        return loss


def is_asked_for(model: PreTrainedModel) -> bool:
    """Whether the configuration asks for a router loss."""
    return bool(getattr(model.config.get_text_config(), "output_router_logits", False))


def router_loss_of(model: PreTrainedModel) -> RouterLoss | None:
    """The router loss that the configuration asks for; None where it asks for none or the model has none.

    Raises:
        ModelError: The model has one whose weight or experts its configuration does not tell.
    """
    function = getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", None)
    if not is_asked_for(model) or function is None:
        return None
    config = model.config.get_text_config()
    experts, coefficient = (
        next((value for name in names if (value := getattr(config, name, None)) is not None), None)
        for names in (_EXPERTS, _COEFFICIENTS)
    )
    top_k = getattr(config, "num_experts_per_tok", None)
    if experts is None or coefficient is None or top_k is None:
        raise ModelError(
            f"{type(model).__name__}: its configuration does not tell the experts or the weight of its "
            f"router loss; {_DROP}"
        )
    return RouterLoss(function, float(coefficient), int(experts), int(top_k))


@torch.no_grad()
def checked_router_loss(
    model: PreTrainedModel, forward: Callable[..., Any], input_ids_BN: Tensor
) -> tuple[RouterLoss | None, list[str]]:
    """The router loss that training adds, compared with the model's own, and lines to print.

    Args:
        model: The transformers model.
        forward: Its plain forward.
        input_ids_BN: Tokens to try it on.

    Raises:
        ModelError: It cannot be computed as the model does.
    """
    if not is_asked_for(model):
        return None, []
    name = type(model).__name__
    ours = router_loss_of(model)
    output = forward(input_ids=input_ids_BN, use_cache=False, output_router_logits=True)
    own = getattr(output, "aux_loss", None)
    if ours is None or own is None:
        return None, [f"output_router_logits has no effect: {name} has no router loss"]
    try:
        found = ours(output.router_logits, None).item()
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
        raise ModelError(f"{name}: its router loss fails ({first_line(error)}); {_DROP}") from error
    expected = ours.coefficient * float(own)
    if not abs(found - expected) <= 1e-2 * abs(expected) + 1e-6:
        raise ModelError(
            f"{name}: its router loss is {expected:.4g}, not {found:.4g} as computed here; {_DROP}"
        )
    return ours, []
