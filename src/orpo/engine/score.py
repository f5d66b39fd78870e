"""Steps without gradients -> the scores of every pair, in the order of the data.

Every pair's scores are kept and averaged later, so neither the batch size nor the token budget changes a
number.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from orpo.engine.head import Denominators, PairScores
from orpo.engine.metrics import sum_dtype
from orpo.engine.steps import Step


@torch.no_grad()
def score(
    model: nn.Module,
    steps: Iterable[Step],
    num_pairs: int,
    *,
    device: torch.device,
    precision: Callable[[], AbstractContextManager[object]] = nullcontext,
    reduce: Callable[[Tensor], Tensor] = lambda table: table,
    progress: Callable[[int], None] | None = None,
) -> PairScores:
    """Score the pairs of some steps with a model that `prepare_model` has prepared.

    Args:
        model: Left in evaluation mode.
        steps: Whose micro-batches carry the index of each pair in [0, num_pairs).
        num_pairs: P, over all ranks.
        device: Where the model is.
        precision: Autocast, for instance.
        reduce: Adds a table over the ranks, which score different pairs.
        progress: Called with the number of pairs of each micro-batch scored.

    Returns:
        Scores [P] on the CPU.
    """
    model.eval()
    table = torch.zeros(len(PairScores._fields), num_pairs, dtype=sum_dtype(device), device=device)
    for step in steps:
        for batch in step.batches:
            with precision():
                output = model(batch=batch.to(device, non_blocking=True), denominators=Denominators(1.0, 1.0))
            if not batch.empty:
                table[:, list(batch.index)] = torch.stack([column.to(table) for column in output.pairs])
            if progress is not None:
                progress(batch.num_pairs)
    columns = dict(zip(PairScores._fields, reduce(table).cpu(), strict=True))
    return PairScores(**(columns | {"has_rejected_P": columns["has_rejected_P"] > 0}))
