"""A process of its own that loads an exported folder with plain transformers and says what it computes.

    python -m orpo.export.reload REQUEST.json ANSWER.json

It knows nothing of the run: whatever the folder does not hold is missing here too.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor, LogitsProcessorList


class _First(LogitsProcessor):
    """Makes one token certain."""

    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores in which that token wins."""
        forced = torch.full_like(scores, -1e9)
        forced[:, self.token] = 0.0
        return forced


def checksums(model: Any) -> dict[str, str]:
    """SHA-256 of every weight as it is stored, its type and shape included."""
    found = {}
    for name, tensor in model.state_dict().items():
        digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        found[name] = digest.hexdigest()
    return found


@torch.no_grad()
def log_probs(model: Any, ids: list[int], start: int, vocabulary: int | None = None) -> list[float]:
    """Log-probs of the tokens from `start` on, given those before.

    Args:
        model: In evaluation mode.
        ids: N tokens.
        start: At least 1.
        vocabulary: Tokens that there are; None: as many as the model has rows.
    """
    logits_NV = model(torch.tensor([ids], device=model.device)).logits[0, start - 1 : -1, :vocabulary].float()
    targets_N = torch.tensor(ids[start:], device=model.device)
    scores_N = logits_NV.log_softmax(-1).gather(-1, targets_N[:, None])[:, 0]
    return [float(score) for score in scores_N]


def stops_at(model: Any, prompt: list[int], token: int) -> bool:
    """Whether generation ends when `token` comes first."""
    output = model.generate(
        torch.tensor([prompt], device=model.device),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long, device=model.device),
        max_new_tokens=3,
        do_sample=False,
        logits_processor=LogitsProcessorList([_First(token)]),
    )
    return int(output.shape[1]) == len(prompt) + 1


def main(request_path: str, answer_path: str) -> None:
    """Load, compute, write the answer."""
    request = json.loads(Path(request_path).read_text(encoding="utf-8"))
    folder, trust = request["folder"], request["trust_remote_code"]
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", trust_remote_code=trust).eval()
    tensors = checksums(model)
    model = model.float()
    prompt = request["sequences"][0][: request["starts"][0]]
    answer = {
        "ids": [tokenizer(text, add_special_tokens=False)["input_ids"] for text in request["texts"]],
        "prompts": [
            tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            for turns in request["conversations"]
        ],
        "log_probs": [
            log_probs(model, ids, start)
            for ids, start in zip(request["sequences"], request["starts"], strict=True)
        ],
        "stopped": {name: stops_at(model, prompt, token) for name, token in request["stops"].items()},
        "tensors": tensors,
    }
    Path(answer_path).write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
