"""Optimizer steps on one GPU, ours and the peers', for gpu_check.py: models, pairs, FLOPs, steps."""

import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM
from workloads import count_work

from orpo.engine.head import Denominators
from orpo.engine.packing import pack
from orpo.engine.planning import plan_step
from orpo.engine.scorer import base_model
from orpo.pairs import TokenizedPair
from orpo.settings.config import Objective

OBJECTIVE = Objective()


@dataclass(frozen=True)
class Shape:
    """A model of Llama's kind, built from its configuration with random weights."""

    hidden: int
    layers: int
    heads: int
    key_heads: int
    inner: int
    vocab: int
    tied: bool

    def build(self, device: torch.device, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
        """The model on `device`, with the same weights at every call."""
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=self.vocab, hidden_size=self.hidden, num_hidden_layers=self.layers,
            intermediate_size=self.inner, num_attention_heads=self.heads, num_key_value_heads=self.key_heads,
            max_position_embeddings=8192, tie_word_embeddings=self.tied,
        )  # fmt: skip
        with device:
            return LlamaForCausalLM._from_config(config, dtype=dtype).train()


SHAPES = {
    "0.5B": Shape(896, 24, 14, 2, 4864, 151936, True),
    "1.5B": Shape(1536, 28, 12, 2, 8960, 151936, True),
    "7B": Shape(4096, 32, 32, 8, 14336, 32000, False),
}
DATA = {"hh": ((122, 40, 50), 64), "ultrafeedback": ((149, 304, 304), 32), "long": ((615, 106, 104), 32)}
"""Mean tokens of prompt, chosen and rejected (log-normal, sigma 0.6, 0.5, 0.5), and pairs per step."""


@dataclass(frozen=True)
class Sizes:
    """What `--smoke` makes small."""

    device: torch.device
    shapes: dict[str, Shape]
    data: dict[str, tuple[tuple[int, int, int], int]]
    repeats: int
    micro_batches: tuple[int, ...]
    tokens_per_micro_batch: int
    gemm: int


def sizes(smoke: bool) -> Sizes:
    """Full sizes on the GPU, or tiny ones on the CPU."""
    if not smoke:
        return Sizes(torch.device("cuda"), SHAPES, DATA, 7, (8, 16), 16384, 8192)
    tiny = {name: Shape(64, 2, 4, 2, 96, 512, shape.tied) for name, shape in SHAPES.items()}
    data = {name: (tuple(max(4, n // 20) for n in means), 6) for name, (means, _) in DATA.items()}
    return Sizes(torch.device("cpu"), tiny, data, 2, (2, 3), 64, 128)


def make_pairs(means: tuple[int, int, int], count: int, vocab: int) -> list[TokenizedPair]:
    """Random pairs with log-normal lengths; a function of the arguments alone."""
    rng = np.random.default_rng(0)
    sigma = np.array([0.6, 0.5, 0.5])
    drawn = np.array(means) * np.exp(sigma * rng.standard_normal((count, 3)) - sigma**2 / 2)
    lengths = drawn.round().clip(2, 4000).astype(int)
    return [TokenizedPair(*(rng.integers(4, vocab, n).tolist() for n in line)) for line in lengths]


def useful_flops(pairs: list[TokenizedPair], shape: Shape, frozen: bool) -> float:
    """FLOPs that forward and backward of the pairs need; see the module's docstring."""
    size = shape.hidden // shape.heads
    layer = 2 * shape.hidden * size * (shape.heads + shape.key_heads) + 3 * shape.hidden * shape.inner
    tokens, attended, scored = count_work(pairs)
    attention = 4 * shape.hidden * shape.layers * attended
    products = 2 * layer * shape.layers * tokens + 2 * shape.hidden * shape.vocab * scored
    return 3 * attention + (2 if frozen else 3) * products


def to_padded(pairs: list[TokenizedPair], device: torch.device | None = None) -> dict[str, torch.Tensor]:
    """A batch as TRL's collator makes it."""
    batch = {}
    for side in ("chosen", "rejected"):
        rows = [torch.tensor([*pair.prompt, *getattr(pair, side)]) for pair in pairs]
        answers = [torch.tensor([-100] * len(pair.prompt) + list(getattr(pair, side))) for pair in pairs]
        masks = [torch.ones_like(row) for row in rows]
        for name, value, fill in (
            ("input_ids", rows, 0),
            ("attention_mask", masks, 0),
            ("labels", answers, -100),
        ):
            padded = torch.nn.utils.rnn.pad_sequence(value, batch_first=True, padding_value=fill)
            batch[f"{side}_{name}"] = padded.to(device)
    return batch


def concatenated(batch: dict[str, torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """Ids, mask and labels of both sides, one padded batch."""
    width = max(batch[f"{side}_input_ids"].shape[1] for side in ("chosen", "rejected"))
    names = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    sides = [
        [
            F.pad(batch[f"{s}_{n}"], (0, width - batch[f"{s}_{n}"].shape[1]), value=v)
            for s in ("chosen", "rejected")
        ]
        for n, v in names.items()
    ]
    return [torch.cat(side).to(device, non_blocking=True) for side in sides]


def padded_loss(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """TRL's arithmetic in plain PyTorch: both sides in one padded batch, logits of every position."""
    device = next(model.parameters()).device
    ids, mask, labels = concatenated(batch, device)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    half = len(ids) // 2
    targets = torch.where(mask == 1, ids, -100)[:half, 1:]
    nll = F.cross_entropy(logits[:half, :-1].flatten(0, 1).float(), targets.flatten())
    labels = labels[:, 1:]
    scored = labels != -100
    logprobs = F.log_softmax(logits[:, :-1].float(), -1).gather(2, labels.clamp_min(0)[..., None])[..., 0]
    means = (logprobs * scored).sum(1) / scored.sum(1)
    odds = means - torch.log(-torch.expm1(means))
    return nll - OBJECTIVE.preference_weight * F.logsigmoid(odds[:half] - odds[half:]).mean()


def trl_loss() -> tuple[str, Callable[..., torch.Tensor]]:
    """TRL's own loss, cut loose from its trainer's set-up, or the plain imitation; with its label."""
    try:
        from trl.experimental.orpo import ORPOTrainer
    except Exception as error:  # not installed, or not with everything it needs
        return f"padded (TRL's arithmetic in plain PyTorch: {type(error).__name__})", padded_loss

    trainer = object.__new__(ORPOTrainer)
    trainer.is_encoder_decoder, trainer.padding_value, trainer.aux_loss_enabled = False, 0, False
    trainer.beta = OBJECTIVE.preference_weight

    def loss(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        device = next(model.parameters()).device
        trainer.accelerator = SimpleNamespace(device=device, gather_for_metrics=lambda x: x)
        return trainer.get_batch_loss_metrics(model, batch)[0]

    return f"TRL {importlib.metadata.version('trl')}", loss


def liger_loss(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Liger's fused linear ORPO loss over the padded batch."""
    from liger_kernel.chunked_loss import LigerFusedLinearORPOLoss

    inner = base_model(model)
    ids, mask, labels = concatenated(batch, next(model.parameters()).device)
    hidden = inner.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[:, :-1]
    half = torch.bfloat16
    function = LigerFusedLinearORPOLoss(beta=OBJECTIVE.preference_weight, compiled=hidden.is_cuda)
    weight = inner.get_output_embeddings().weight.to(half)
    targets = torch.where(mask == 1, ids, -100)[:, 1:]
    return function(weight, hidden.to(half), labels[:, 1:], nll_target=targets)[0]


def make_step(
    model: torch.nn.Module, losses: list[Callable[[], torch.Tensor]], sizes: Sizes
) -> Callable[[], None]:
    """An optimizer step's forward and backward: the losses one after the other."""

    def step() -> None:
        model.zero_grad(set_to_none=True)
        for loss in losses:
            with torch.autocast(sizes.device.type, torch.bfloat16):
                value = loss()
            value.backward()

    return step


def our_step(
    model: torch.nn.Module, pairs: list[TokenizedPair], sizes: Sizes, tokens: int
) -> Callable[[], None]:
    """Our step over micro-batches of at most `tokens` tokens."""
    lengths = np.array([[len(p.prompt), len(p.chosen), len(p.rejected)] for p in pairs])
    plan = plan_step(lengths, num_ranks=1, tokens_per_micro_batch=tokens)[0]
    batches = [pack([pairs[i] for i in planned.pairs], OBJECTIVE) for planned in plan]
    counts = Denominators(sum(b.nll_weight for b in batches), sum(b.num_preferences for b in batches))
    losses = [lambda b=batch: model(batch=b.to(sizes.device), denominators=counts).loss for batch in batches]
    return make_step(model, losses, sizes)


def peer_steps(
    model: torch.nn.Module, pairs: list[TokenizedPair], sizes: Sizes
) -> dict[str, Callable[[], None]]:
    """Steps of TRL and, where installed, Liger: random order and grouped by length, several micro-batches."""
    name, loss = trl_loss()
    peers = {name: loss}
    if importlib.util.find_spec("liger_kernel"):
        peers[f"Liger {importlib.metadata.version('liger_kernel')}"] = liger_loss
    grouped = sorted(pairs, key=lambda p: len(p.prompt) + max(len(p.chosen), len(p.rejected)))
    steps = {}
    for peer, function in peers.items():
        for order, ordered in (("random", pairs), ("grouped", grouped)):
            for size in sizes.micro_batches:
                batches = [to_padded(ordered[i : i + size]) for i in range(0, len(pairs), size)]
                share = 1 / len(batches)
                losses = [lambda b=b, f=function, s=share: f(model, b) * s for b in batches]
                steps[f"{peer}, {order}, micro-batch {size}"] = make_step(model, losses, sizes)
    return steps
