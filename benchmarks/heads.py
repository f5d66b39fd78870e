"""From hidden states to loss and gradients alone: ours next to five other ways, on the same hidden states.

Each variant runs in a process of its own (`measure.py` with task `head`). All compute the ORPO loss of the
same pairs, gradients to hidden states and vocabulary matrix included; what differs is what they keep, repeat
and pad.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from workloads import SHAPES, make_pairs

from orpo.engine.head import Denominators, Head, score_batch
from orpo.engine.objective import log_odds
from orpo.engine.packing import PackedBatch, Role, pack
from orpo.engine.passes import pair_lengths
from orpo.settings.config import Objective

Loss = Callable[[Tensor, Tensor], Tensor]
OBJECTIVE = Objective(preference_weight=0.1)

VARIANTS = {
    "ours": "ours, as it is on a CPU (256-token chunks)",
    "ours:64": "ours, 64-token chunks",
    "ours:128": "ours, 128-token chunks",
    "ours:512": "ours, 512-token chunks",
    "ours:1024": "ours, 1024-token chunks",
    "full": "full logits of the scored tokens",
    "checkpoint": "checkpointed chunks of 256 tokens",
    "torch": "torch linear_cross_entropy, default options",
    "torch:256": "torch linear_cross_entropy, 256-token chunks",
    "torch:1024": "torch linear_cross_entropy, 1024-token chunks",
    "liger": "Liger fused ORPO loss 0.8, eager",
    "liger:compiled": "Liger fused ORPO loss 0.8, compiled",
    "trl": "TRL 1.16: padded logits of every position",
}


def make_head(
    variant: str, shape: str, data: str, num_pairs: int
) -> tuple[Loss, Tensor, Tensor, PackedBatch]:
    """The variant as a function of packed hidden states [N, D] and matrix [V, D]; these two; the batch."""
    spec = SHAPES[shape]
    batch = pack(make_pairs(data, spec.vocab, num_pairs), OBJECTIVE)
    generator = torch.Generator().manual_seed(0)
    hidden_ND = torch.randn(batch.num_tokens, spec.hidden, generator=generator).requires_grad_()
    weight_VD = (torch.randn(spec.vocab, spec.hidden, generator=generator) * 0.02).requires_grad_()
    name, _, option = variant.partition(":")
    loss: Loss
    if name == "ours":
        denominators = Denominators(batch.nll_weight, batch.num_preferences)
        chunk = {"chunk_tokens": int(option), "max_chunk_tokens": max(int(option), 1024)} if option else {}

        def loss(hidden_ND: Tensor, weight_VD: Tensor) -> Tensor:
            return score_batch(hidden_ND, Head(weight_VD, **chunk), batch, denominators)[0]

    elif name in ("full", "checkpoint", "torch"):
        token_logprobs = {"full": _full, "checkpoint": _checkpointed, "torch": _torch(option)}[name]

        def loss(hidden_ND: Tensor, weight_VD: Tensor) -> Tensor:
            logprob_T = token_logprobs(hidden_ND[batch.source_T], weight_VD, batch.target_T)
            return _loss(logprob_T, batch)

    else:
        loss = _padded(batch, _liger(option) if name == "liger" else _trl)
    return loss, hidden_ND, weight_VD, batch


def _loss(logprob_T: Tensor, batch: PackedBatch) -> Tensor:
    """The objective from the scored tokens' log-probabilities, by autograd."""
    num_pairs = batch.num_pairs
    nll = -(logprob_T * batch.nll_weight_T).sum() / batch.nll_weight
    means = []
    for role in (Role.CHOSEN, Role.REJECTED):
        of_role_T = (batch.role_T == role).float()
        total = torch.zeros(num_pairs).index_add(0, batch.pair_T, logprob_T * of_role_T)
        means.append(total / torch.zeros(num_pairs).index_add(0, batch.pair_T, of_role_T))
    return nll + OBJECTIVE.preference_weight * -F.logsigmoid(log_odds(means[0]) - log_odds(means[1])).mean()


def _full(hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor) -> Tensor:
    return (hidden_TD @ weight_VD.T).log_softmax(-1).gather(1, target_T[:, None])[:, 0]


def _checkpointed(hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor) -> Tensor:
    from torch.utils.checkpoint import checkpoint

    pieces = zip(hidden_TD.split(256), target_T.split(256), strict=True)
    return torch.cat([checkpoint(_full, h, weight_VD, t, use_reentrant=False) for h, t in pieces])


def _torch(option: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    options = torch.nn.LinearCrossEntropyOptions(
        **({"batch_chunk_size": int(option), "chunking_method": None} if option else {})
    )

    def token_logprobs(hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor) -> Tensor:
        return -F.linear_cross_entropy(hidden_TD, weight_VD, target_T, reduction="none", options=options)

    return token_logprobs


def _padded(batch: PackedBatch, head: Callable[..., Tensor]) -> Loss:
    """Give `head` what a padded trainer has: hidden states [2P, L, D], chosen sides first, and labels."""
    sides = ([], [])  # type: tuple[list[Tensor], list[Tensor]]
    labels = ([], [])  # type: tuple[list[Tensor], list[Tensor]]
    ids_N, offset = batch.input_ids_BN[0], 0
    for prompt, chosen, rejected in pair_lengths(batch.tree):
        for side, (start, length) in enumerate(
            ((offset + prompt, chosen), (offset + prompt + chosen, rejected))
        ):
            index = torch.cat([torch.arange(offset, offset + prompt), torch.arange(start, start + length)])
            sides[side].append(index)
            label = ids_N[index].clone()
            label[:prompt] = -100
            labels[side].append(label)
        offset += prompt + chosen + rejected
    indices = torch.nn.utils.rnn.pad_sequence([*sides[0], *sides[1]], batch_first=True)
    label_BL = torch.nn.utils.rnn.pad_sequence([*labels[0], *labels[1]], batch_first=True, padding_value=-100)
    ids = [ids_N[index] for index in (*sides[0], *sides[1])]
    nll_label_BL = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=-100)

    def loss(hidden_ND: Tensor, weight_VD: Tensor) -> Tensor:
        return head(hidden_ND[indices], weight_VD, label_BL, nll_label_BL)

    return loss


def _liger(option: str) -> Callable[..., Tensor]:
    from liger_kernel.chunked_loss import LigerFusedLinearORPOLoss

    fused = LigerFusedLinearORPOLoss(beta=OBJECTIVE.preference_weight, compiled=option == "compiled")

    def head(hidden_BLD: Tensor, weight_VD: Tensor, label_BL: Tensor, nll_label_BL: Tensor) -> Tensor:
        loss: Tensor = fused(
            weight_VD, hidden_BLD[:, :-1], label_BL[:, 1:], nll_target=nll_label_BL[:, 1:].contiguous()
        )[0]
        return loss

    return head


def _trl(hidden_BLD: Tensor, weight_VD: Tensor, label_BL: Tensor, nll_label_BL: Tensor) -> Tensor:
    """As TRL's concatenated_forward, get_batch_logps and odds_ratio_loss do it."""
    from trl.experimental.orpo import ORPOTrainer
    from trl.experimental.orpo.orpo_trainer import log1mexp

    chosen = len(label_BL) // 2
    logits_BLV = hidden_BLD @ weight_VD.T
    nll = F.cross_entropy(
        logits_BLV[:chosen, :-1].contiguous().flatten(0, 1), nll_label_BL[:chosen, 1:].contiguous().flatten()
    )
    mean_B = ORPOTrainer.get_batch_logps(logits_BLV, label_BL, average_log_prob=True)
    ratio = (mean_B[:chosen] - mean_B[chosen:]) - (log1mexp(mean_B[:chosen]) - log1mexp(mean_B[chosen:]))
    return nll - OBJECTIVE.preference_weight * F.logsigmoid(ratio).mean()
