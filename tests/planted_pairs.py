"""Per-pair results with known outcomes."""

import torch

from orpo.engine.head import PairScores
from orpo.evaluation.per_pair import PairResults


def results(chosen, rejected, prompts=None, *, nll=None, sources=None, groups=None) -> PairResults:
    """Pairs with these mean log-probs."""
    chosen, rejected = torch.as_tensor(chosen).double(), torch.as_tensor(rejected).double()
    number, ones = len(chosen), torch.ones(len(chosen), dtype=torch.float64)
    prompts = torch.arange(number) if prompts is None else torch.as_tensor(prompts)
    nll = -chosen if nll is None else torch.as_tensor(nll).double()
    return PairResults(
        PairScores(
            *(chosen, rejected, nll, ones, ones, ones > 0, ones / 2, ones / 2, ones / 2),
            *(ones, ones, ones * torch.nan, ones * torch.nan),
        ),
        prompts,
        sources or [f"pairs.jsonl:{line}" for line in range(number)],
        groups or [None] * number,
    )
