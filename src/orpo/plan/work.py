"""What a run computes: the tokens of its micro-batches, and the operations of its matrix products.

One multiplication and addition are two operations. A backward takes as many for the inputs of a product and,
where its matrix is trained, as many again; gradient checkpointing runs the layers forward once more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass

import numpy as np
import numpy.typing as npt

from orpo.engine.packing import runs_rejected
from orpo.engine.planning import pair_tokens
from orpo.plan.on_paper import PaperModel
from orpo.settings.config import LayoutName, Objective

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Work:
    """What an average pair costs.

    Attributes:
        tokens: Tokens that the layers read, padding included; in the shared layout the prompt's once for both
            sides, what pairs share once.
        separate_tokens: The same where each side brings its prompt, as in other trainers.
        scored: Tokens whose logits are made.
        forward: Operations of a forward pass.
        training: Operations of forward and backward, with what checkpointing computes again.
    """

    tokens: float
    separate_tokens: float
    scored: float
    forward: float
    training: float


def work_of(
    model: PaperModel,
    tokens: Int64,
    objective: Objective,
    *,
    checkpointing: bool,
    layout: LayoutName = "shared",
    read: float | None = None,
) -> Work:
    """Work of an average pair.

    Args:
        model: On paper.
        tokens: (prompt, chosen, rejected) tokens of pairs. Shape [n, 3].
        objective: Decides which tokens are scored, and whether rejected sides are run.
        checkpointing: Whether layers are run forward twice.
        layout: Of a micro-batch.
        read: Tokens that a pair takes in micro-batches on average, fewer than alone where pairs share and
            more where they are padded to each other; None: each is alone.
    """
    lengths = tokens * (1, 1, runs_rejected(objective, None))
    prompt, chosen, rejected = lengths.T.astype(float)
    alone = float(pair_tokens(lengths, layout).mean())
    read = alone if read is None else read
    separate = float(pair_tokens(lengths, "packed").mean())
    context = 0.0 if objective.nll_on == "response" or objective.nll_weight == 0 else prompt - 1
    scored = float((context + chosen + rejected).mean()) * min(1.0, read / alone)
    products, trained = 2 * model.products * read, 2 * model.trained_products * read
    attention = 4 * model.attention * attended(model, prompt, chosen, rejected, layout) * read / alone
    head = 2.0 * model.vocabulary * model.hidden * scored
    layers = products + attention
    backward = products + trained + 2 * attention
    again = layers - 2 * model.not_again * read
    training = layers + checkpointing * again + backward + head * (2 + model.head_trained)
    return Work(read, separate, scored, layers + head, training)


def mean_work(of_stages: Sequence[Work], shares: Sequence[float]) -> Work:
    """Work of an average pair of a run whose stages have these shares, which add up to 1."""
    numbers = zip(*map(astuple, of_stages), strict=True)
    return Work(*(sum(share * one for share, one in zip(shares, each, strict=True)) for each in numbers))


def attended(
    model: PaperModel, prompt: object, chosen: object, rejected: object, layout: LayoutName = "shared"
) -> float:
    """Mean number of (query, key) pairs of a pair in a layer, sliding windows counted."""
    p, c, r = (np.asarray(one, dtype=float) for one in (prompt, chosen, rejected))
    window, share = model.window

    def causal(length: npt.NDArray[np.float64], most: float) -> npt.NDArray[np.float64]:
        inside = np.minimum(length, most)
        below: npt.NDArray[np.float64] = inside * (inside + 1) / 2 + (length - inside) * inside
        return below

    def pairs(most: float) -> float:
        if layout == "padded":
            return float(((1 + (r > 0)) * causal(p + np.maximum(c, r), most)).mean())
        again = r > 0 if layout == "packed" else 0.0
        return float((causal(p + c, most) + causal(p + r, most) - (1 - again) * causal(p, most)).mean())

    full = pairs(np.inf)
    return full if window is None else share * pairs(window) + (1 - share) * full
