"""Pretrain the demo's small base model from a seed, on two CPU threads, in under an hour.

Reads the open text described in `pretrain_corpus.py`, trains a tokenizer, and trains a Llama-type model with
Muon for the matrices and AdamW for the rest. The learning rate is constant, then falls to zero. The budget of
tokens is given, or, with `--minutes`, set from the speed so far when the decay has to begin; a run that then
becomes too slow still cools down in time. The budget is recorded: given as `--tokens` with the same seed, it
repeats the run. An interrupted run resumes from its last checkpoint. Where the sources come from: README.md.

    python scripts/pretrain_base.py --sources sources --minutes 55
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import resource
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import sources
import torch
from pretrain_corpus import (
    END_OF_TURN,
    Document,
    assert_no_preference_answer,
    encode,
    load_documents,
    train_tokenizer,
)
from torch.nn import functional as F

if TYPE_CHECKING:  # imported where they are used: a missing source is named sooner
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

SOURCES = ("books", "topical_chat", "gsm8k", "gpteacher")
GRACE = 0.05  # by how much of the time limit a run may be late before time, not tokens, sets the rate


def build_model(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama with tied embeddings; residual outputs start at zero: every block starts as the identity."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden,
        intermediate_size=args.feed_forward,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // args.head_dim,
        num_key_value_heads=args.kv_heads or args.hidden // args.head_dim,
        head_dim=args.head_dim,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        initializer_range=0.02,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    return model


class Muon:
    """Momentum whose update is orthogonalised by Newton-Schulz steps, all matrices of one shape at once.

    Like torch.optim.Muon with `adjust_lr_fn="match_rms_adamw"`, in float32: bf16 is slower here without AMX.
    """

    COEFFICIENTS = (3.4445, -4.7750, 2.0315)

    def __init__(self, parameters: list[torch.nn.Parameter], weight_decay: float) -> None:
        shapes = sorted({p.shape for p in parameters})
        self.groups = [[p for p in parameters if p.shape == shape] for shape in shapes]
        self.momentum_buffers = [torch.zeros(len(group), *group[0].shape) for group in self.groups]
        self.weight_decay, self.momentum = weight_decay, 0.95

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update from the parameters' gradients, which are then freed."""
        a, b, c = self.COEFFICIENTS
        for group, buffer in zip(self.groups, self.momentum_buffers, strict=True):
            gradient = torch.stack([p.grad for p in group])
            buffer.lerp_(gradient, 1 - self.momentum)
            x = gradient.lerp(buffer, self.momentum)
            x = x.mT if x.shape[1] > x.shape[2] else x
            x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
            for _ in range(5):
                gram = x @ x.mT
                x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
            x = x.mT if x.shape[1:] != buffer.shape[1:] else x
            for parameter, update in zip(group, x, strict=True):
                parameter.mul_(1 - lr * self.weight_decay)
                parameter.add_(update, alpha=-0.2 * lr * max(update.shape) ** 0.5)
                parameter.grad = None


def batches(
    documents: list[np.ndarray], weights: np.ndarray, batch: int, length: int, seed: int
) -> Iterator[torch.Tensor]:
    """Endless batches [batch, length + 1]; each epoch shuffles the documents and cuts the stream anew.

    A document of weight 1.5 is read once in each epoch, and a second time in half of them.
    """
    rng = np.random.default_rng(seed)
    while True:
        copies = np.floor(weights + rng.random(len(documents))).astype(int)
        order = rng.permutation(np.repeat(np.arange(len(documents)), copies))
        stream = np.concatenate([documents[i] for i in order])
        stream = stream[rng.integers(length) :]
        num_windows = (len(stream) - 1) // length
        for rows in np.array_split(rng.permutation(num_windows), max(1, num_windows // batch)):
            if len(rows) >= batch:
                windows = [stream[r * length : (r + 1) * length + 1] for r in rows[:batch]]
                yield torch.from_numpy(np.stack(windows))


def token_nll(model: LlamaForCausalLM, ids: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    """Cross-entropy in nats of ids[:, 1:] given what precedes."""
    hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
    logits = F.linear(hidden, model.lm_head.weight)
    return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction=reduction)


@torch.no_grad()
def bits_per_byte(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, documents: list[Document], length: int = 512
) -> float:
    """Bits for the documents' tokens, template and end tokens included, per byte of their content."""
    stream = torch.from_numpy(np.concatenate(encode(documents, tokenizer)))
    nats = 0.0
    for start in range(0, len(stream) - 1, 8 * length):
        part = stream[start : start + 8 * length + 1]
        rows = (len(part) - 1) // length
        if rows:
            windows = torch.stack([part[r * length : (r + 1) * length + 1] for r in range(rows)])
            nats += token_nll(model, windows, "sum").item()
        if len(part) - 1 > rows * length:
            nats += token_nll(model, part[None, rows * length :], "sum").item()
    return nats / math.log(2) / sum(document.num_bytes for document in documents)


@dataclass
class Progress:
    """Where a run stands; all that a checkpoint holds besides weights and optimizer states."""

    budget: int  # tokens; 0 while not yet known
    tokens: int = 0
    step: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    time_bound: bool = False  # whether the time limit ever set the learning rate
    log: list[dict[str, float]] = field(default_factory=list)

    def share_done(self, minutes_limit: float, decay: float) -> float:
        """Share of the budget that is done, or of the time if the run is late; sets the budget when due."""
        time_share = self.seconds / 60 / minutes_limit if minutes_limit else 0.0
        if not self.budget and time_share >= 1 - decay:
            self.budget = round(self.tokens / (1 - decay))
        token_share = self.tokens / self.budget if self.budget else 0.0
        if self.budget and time_share - GRACE > max(token_share, 1 - decay):
            self.time_bound = True
            return time_share - GRACE
        return token_share


def multiplier(step: int, share_done: float, decay: float) -> float:
    """Share of the learning rate: 100 steps of warm-up, constant, linear fall over the last part, `decay`."""
    return min((step + 1) / 100, 1.0, (1.0 - share_done) / decay)


def cpu_seconds() -> float:
    """User and system time of this process and its finished children."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in usage)


def prepare(
    args: argparse.Namespace, files: dict[str, bytes]
) -> tuple[list[np.ndarray], np.ndarray, list[Document], PreTrainedTokenizerFast]:
    """Training token ids by document, the documents' weights, held-out documents, tokenizer."""
    documents, held_out = load_documents(files)
    num_checked = assert_no_preference_answer(documents + held_out)
    print(f"none of {num_checked:,} preference answers occurs in the text")
    tokenizer = train_tokenizer(documents, args.vocab)
    tokens = encode(documents, tokenizer)
    print(f"{sum(map(len, tokens)):,} tokens in {sum(d.num_bytes for d in documents):,} bytes")
    mix = dict(zip(SOURCES, args.mix, strict=True))
    return tokens, np.array([mix[document.source] for document in documents]), held_out, tokenizer


def fit(
    args: argparse.Namespace, model: LlamaForCausalLM, tokens: list[np.ndarray], weights: np.ndarray
) -> Progress:
    """Train from scratch, or from `checkpoint.pt` in the output folder, to the end of the budget."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [model.model.embed_tokens.weight, *(p for p in model.parameters() if p.ndim == 1)]
    print(f"{sum(p.numel() for p in matrices):,} parameters in matrices, {model.num_parameters():,} in all")
    muon = Muon(matrices, args.weight_decay)
    adam = torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    loss_function = torch.compile(token_nll) if args.compile else token_nll

    progress = Progress(args.tokens)
    checkpoint = args.out / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint)
        model.load_state_dict(state["model"])
        adam.load_state_dict(state["adam"])
        muon.momentum_buffers = state["muon"]
        progress = Progress(**state["progress"])
    data = batches(tokens, weights, args.batch, args.length, args.seed)
    for _ in range(progress.step):
        next(data)

    start, cpu_start = time.monotonic() - progress.seconds, cpu_seconds() - progress.cpu_seconds
    losses, saved_at = [], time.monotonic()
    while (share_done := progress.share_done(args.minutes, args.decay)) < 1.0:
        factor = multiplier(progress.step, share_done, args.decay)
        loss = loss_function(model, next(data))
        loss.backward()
        muon.step(lr=args.lr * factor)
        adam.param_groups[0]["lr"] = args.embedding_lr * factor
        adam.step()
        adam.zero_grad()
        losses.append(loss.item())
        progress.step += 1
        progress.tokens += args.batch * args.length
        progress.seconds, progress.cpu_seconds = time.monotonic() - start, cpu_seconds() - cpu_start
        if progress.step % args.log_every == 0:
            row = {
                "step": progress.step,
                "tokens": progress.tokens,
                "loss": round(sum(losses) / len(losses), 4),
                "learning_rate": round(args.lr * factor, 6),
                "minutes": round(progress.seconds / 60, 2),
                "cpu_minutes": round(progress.cpu_seconds / 60, 2),
            }
            losses = []
            progress.log.append(row)
            print(row, flush=True)
        if time.monotonic() - saved_at > 60 * args.save_minutes:
            state = {"model": model.state_dict(), "adam": adam.state_dict(), "muon": muon.momentum_buffers}
            torch.save(state | {"progress": asdict(progress)}, checkpoint.with_suffix(".new"))
            checkpoint.with_suffix(".new").replace(checkpoint)
            saved_at = time.monotonic()
    return progress


def write_curve(folder: Path, log: list[dict[str, float]]) -> None:
    """The loss as loss.csv and loss.svg."""
    from matplotlib.figure import Figure

    with (folder / "loss.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, log[0])
        writer.writeheader()
        writer.writerows(log)
    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    axes.plot([row["tokens"] / 1e6 for row in log], [row["loss"] for row in log], linewidth=1)
    axes.set(xlabel="million tokens", ylabel="training loss, nats a token")
    axes.grid(alpha=0.3)
    figure.savefig(folder / "loss.svg", metadata={"Date": None})


def main() -> None:
    """From text to a folder with model, tokenizer and loss curve, and the run's figures in summary.json."""
    from transformers import GenerationConfig

    args, files = parse()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    folder = args.out / "model"
    folder.mkdir(parents=True, exist_ok=True)
    tokens, weights, held_out, tokenizer = prepare(args, files)
    model = build_model(args, tokenizer)
    progress = fit(args, model, tokens, weights)
    write_curve(folder, progress.log)

    model.eval().to(torch.bfloat16)
    end_of_turn = tokenizer.convert_tokens_to_ids(END_OF_TURN)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[tokenizer.eos_token_id, end_of_turn],
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model.float()  # what is measured is what is shipped: bf16 values
    parts = {source: [d for d in held_out if d.source == source] for source in SOURCES} | {"all": held_out}
    summary = {
        "tokens": progress.tokens,
        "budget": progress.budget,
        "time_bound": progress.time_bound,
        "steps": progress.step,
        "minutes": round(progress.seconds / 60, 1),
        "cpu_minutes": round(progress.cpu_seconds / 60, 1),
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "parameters": model.num_parameters(),
        "corpus_tokens": sum(map(len, tokens)),
        "bits_per_byte": {k: round(bits_per_byte(model, tokenizer, part), 4) for k, part in parts.items()},
        "arguments": {name: value for name, value in vars(args).items() if not isinstance(value, Path)},
    }
    (args.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(json.dumps(summary))


def parse() -> tuple[argparse.Namespace, dict[str, bytes]]:
    """The arguments, whose defaults are those of the shipped model, and the checked sources."""
    parser = sources.Parser("Pretrain the demo's base model.")
    parser.add_argument("--out", type=Path, default=Path("runs/base"))
    parser.add_argument("--tokens", type=int, default=0, help="budget; 0: set from the speed")
    parser.add_argument("--minutes", type=float, default=0.0, help="wall-time limit; 0: none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--feed_forward", type=int, default=384)
    parser.add_argument("--head_dim", type=int, default=64)
    parser.add_argument("--kv_heads", type=int, default=0, help="0: as many as heads")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--lr", type=float, default=0.007)
    parser.add_argument("--embedding_lr", type=float, default=0.005)
    parser.add_argument("--weight_decay", type=float, default=0.1)
    parser.add_argument("--decay", type=float, default=0.5, help="share of the run with a falling rate")
    mix_help = f"weights of {', '.join(SOURCES)}"
    parser.add_argument("--mix", type=float, nargs=len(SOURCES), default=[0.5, 1.5, 1.0, 2.0], help=mix_help)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--log_every", type=int, default=20)
    parser.add_argument("--save_minutes", type=float, default=3.0)
    args = parser.parse_args()
    files = parser.read_sources(args.sources, "pretrain/")
    if not args.tokens and not args.minutes:
        parser.error("give --tokens, --minutes or both")
    if not 0 < args.decay < 1:
        parser.error("--decay is a share of the run, above 0 and below 1")
    return args, files


if __name__ == "__main__":
    main()
