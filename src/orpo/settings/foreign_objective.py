"""Which objective a recipe of another tool asks for, and with which of that tool's defaults.

TRL names a trainer and a `loss_type`, Axolotl says `rl`, ms-swift `rlhf_type`, LLaMA-Factory `stage` and
`pref_loss`. Each comes to one `objective` here; where its defaults are not ours they are written out, so that
the recipe trains what it trained there. A loss that does not exist here is refused.
"""

from __future__ import annotations

from typing import Any, Literal

from orpo.settings.other_tools import Translation, Written, is_off, written_as

NAMES = ("pref_loss", "rl", "rlhf_type", "loss_type", "stage")
"""Keys that name a loss, the first that is written decides."""
WEIGHTS = {"cpo_alpha": ("cpo", "cpo_simpo", "simpo"), "rpo_alpha": ("dpo",), "pref_ftx": ("dpo", "simpo")}
"""What other tools call the weight of the NLL -> objectives in which they add it."""
OF_DPO = ("dpo_label_smoothing", "dpo_beta")
REFERENCE = ("ref_model", "ref_model_name_or_path", "ref_adapter", "ref_adapters", "ref_model_adapters")

_NONE = "it belongs to another loss"
_BETAS = {"beta", "pref_beta", "rl_beta", "dpo_beta"}
_LOSSES = {
    "orpo": "orpo", "simpo": "simpo", "cpo": "cpo", "dpo": "dpo", "sigmoid": "dpo", "sft": "sft",
}  # fmt: skip
_DEFAULTS: dict[str, dict[str, float]] = {
    "pref_loss": {"beta": 0.1, "simpo_gamma": 0.5, "alpha": 0.0},
    "stage": {"beta": 0.1, "simpo_gamma": 0.5, "alpha": 0.0},
    "rl": {"beta": 0.1, "simpo_gamma": 0.5, "alpha": 1.0},
    "rlhf_type": {"beta": 2.0, "simpo_gamma": 1.0, "alpha": 1.0},
    "loss_type": {"beta": 0.1, "simpo_gamma": 0.5, "alpha": 1.0},
}
"""What SimPO has in each tool where its recipe does not say."""


def objective_named(key: str, value: Any, written: Written) -> Translation:
    """What a key that names a loss comes to.

    Raises:
        ValueError: The loss does not exist here.
    """
    loss = _loss(key, value, written)
    if loss is None:
        return {}, "no effect: ORPO is what is trained unless objective says otherwise"
    if next(name for name in NAMES if _loss(name, written.get(name), written) is not None) != key:
        return {}, "no effect: another key names the loss"
    if loss == "orpo":
        if key != "pref_loss":
            return {}, "no effect: ORPO is what is trained"
        entries: dict[str, Any] = {"objective": "llamafactory"}
        return entries, written_as(entries) + ", LLaMA-Factory's ORPO; objective: orpo is the paper's"
    entries = {"objective": loss}
    if loss == "sft":
        entries |= {"nll_on": "response", "sft_rows": "use"}
    elif loss in ("simpo", "cpo_simpo"):
        defaults = _DEFAULTS[key]
        entries |= {} if _BETAS & set(written) else {"beta": defaults["beta"]}
        entries |= {} if "simpo_gamma" in written else {"simpo_gamma": defaults["simpo_gamma"]}
    return entries, written_as(entries)


def nll_weight(key: str, value: Any, written: Written) -> Translation:
    """The weight of the NLL next to a preference loss, where the loss that is asked for has one."""
    if is_off(value) or _objective(written) not in WEIGHTS[key]:
        return {}, f"no effect: {'it is off' if is_off(value) else _NONE}"
    entries = {"nll_weight": value} | ({} if "nll_on" in written else {"nll_on": "response"})
    return entries, written_as(entries)


def of_dpo(key: str, value: Any, written: Written) -> Translation:
    """A setting of DPO that has another name here."""
    if _objective(written) != "dpo":
        return {}, f"no effect: {_NONE}"
    name = key.removeprefix("dpo_")
    return {name: value}, f"now called {name}"


def reference(key: str, value: Any, written: Written) -> Translation:
    """The reference model of another tool: here it is always the model as it is before training.

    Raises:
        ValueError: Another one is asked for.
    """
    if _objective(written) != "dpo" or is_off(value):
        return {}, "no effect: only DPO has a reference, the model as it is before training"
    models = {
        str(written.get(name))
        for name in ("model_name_or_path", "base_model", "model", "adapter_name_or_path")
    }
    if str(value) in models:
        return {}, "no effect: the reference is the model as it is before training"
    raise ValueError(
        f"{key}: {value}: the reference is the model as it is before training; train that one without it"
    )


def _objective(written: Written) -> str | None:
    """The objective that a recipe asks for, under whatever name; None where it does not say."""
    if not is_off(written.get("objective")):
        return str(written["objective"])
    for name in NAMES:
        try:
            loss = _loss(name, written.get(name), written)
        except ValueError:  # refused where that key is read
            return None
        if loss is not None:
            return loss
    return None


def _loss(key: str, value: Any, written: Written) -> str | None:
    """The objective that a key with this value names; None where it names none."""
    value = value[0] if isinstance(value, list) and len(value) == 1 else value
    if is_off(value):
        return None
    if key == "stage" and str(value).lower() == "dpo" and any(not is_off(written.get(n)) for n in NAMES[:-1]):
        return None  # LLaMA-Factory's stage of all losses on pairs
    loss = _LOSSES.get(str(value).lower())
    if loss is None:
        raise ValueError(
            f"{key}: {value} is not trained here; objective says what is: orpo, sft, dpo, simpo, ..."
        )
    if loss == "dpo" and key == "loss_type":
        by_cpo = str(written.get("rlhf_type")).lower() == "cpo" or "cpo_alpha" in written
        return "cpo" if by_cpo else "dpo"
    return "cpo_simpo" if loss == "simpo" and _alpha(key, written) > 0 else loss


def _alpha(key: str, written: Written) -> float:
    """The weight of the NLL next to SimPO's loss."""
    name: Literal["pref_ftx", "cpo_alpha"] = "pref_ftx" if key in ("pref_loss", "stage") else "cpo_alpha"
    try:
        return float(written.get(name, _DEFAULTS[key]["alpha"]))
    except (TypeError, ValueError):
        return 1.0  # not a number: refused under the name it has here
