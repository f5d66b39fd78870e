"""What the benchmarks run on: model shapes, and token pairs with the lengths of real and of synthetic data.

Every pair is made once as token ids and handed to both sides: to ours as `TokenizedPair`s, to TRL as text of
numbers under a tokenizer that reads one number as one id, so that its unchanged `tokenize_row` yields the
same ids.
"""

import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import numpy as np
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM, PreTrainedModel

from orpo.pairs import TokenizedPair

EOS = 2
FIRST_ID = 4
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
"""Ids below FIRST_ID."""


@dataclass(frozen=True)
class Shape:
    """A model built from a configuration with random weights; `opt`: an OPT with this activation."""

    hidden: int
    layers: int
    vocab: int
    tied: bool = False
    opt: str = ""

    def build(self) -> PreTrainedModel:
        """The model, float32; the caller seeds torch."""
        if self.opt:
            settings = {"dropout": 0.0, "pad_token_id": 1, "eos_token_id": EOS}
            return OPTForCausalLM(OPTConfig(activation_function=self.opt, **settings))
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=self.vocab, hidden_size=self.hidden, num_hidden_layers=self.layers,
                intermediate_size=self.hidden * 11 // 4, num_attention_heads=self.hidden // 64,
                num_key_value_heads=self.hidden // 64, max_position_embeddings=4096,
                tie_word_embeddings=self.tied,
            )
        )  # fmt: skip


SHAPES = {
    "h256": Shape(256, 6, 32000),
    "h512": Shape(512, 8, 32000),
    "v152k": Shape(256, 6, 151936, tied=True),
    "opt": Shape(768, 12, 50272, tied=True, opt="relu"),
    "opt_gelu": Shape(768, 12, 50272, tied=True, opt="gelu"),
}

for _vocab in (8192, 32000, 64000, 151936):
    SHAPES[f"h256v{_vocab}"] = Shape(256, 6, _vocab)

SYNTHETIC = {"uf": (149, 304, 304), "long": (615, 106, 104)}
"""Mean tokens of prompt, chosen, rejected; spread log-normally (sigma 0.6 in prompts, 0.5 in responses)."""

SYSTEM_TOKENS = 500
SHARING = ("ranked", "all ranked", "system")
"""Data whose pairs share something: four answers of UltraFeedback's lengths to a prompt, the best against
each (3 pairs) or each against every worse one (6), and HH-RLHF behind one system prompt."""


def make_pairs(data: str, vocab: int, num_pairs: int) -> list[TokenizedPair]:
    """`num_pairs` pairs of the data named, a function of the arguments alone. Every response ends with EOS.

    Args:
        data: `hh`, a key of `SYNTHETIC`, one of `SHARING`, or `P/C/R`: exact lengths.
        vocab: Ids are below it.
        num_pairs: How many.
    """
    rng = np.random.default_rng(0)
    if data == "hh":
        pairs = _hh_pairs()
        return [pairs[i] for i in rng.permutation(len(pairs))[:num_pairs]]
    if data in SHARING:
        return _sharing_pairs(data, vocab, num_pairs)
    means = SYNTHETIC.get(data) or tuple(map(int, data.split("/")))
    sigmas = (0.6, 0.5, 0.5) if data in SYNTHETIC else (0.0, 0.0, 0.0)

    def ids(mean: float, sigma: float, *, end: bool) -> list[int]:
        length = mean * np.exp(sigma * rng.standard_normal() - sigma**2 / 2)
        tokens = rng.integers(FIRST_ID, vocab, int(np.clip(round(length), 4, 1500))).tolist()
        return [*tokens[:-1], EOS] if end else tokens

    return [
        TokenizedPair(
            *(ids(m, s, end=side > 0) for side, (m, s) in enumerate(zip(means, sigmas, strict=True)))
        )
        for _ in range(num_pairs)
    ]


def _sharing_pairs(data: str, vocab: int, num_pairs: int) -> list[TokenizedPair]:
    if data == "system":
        system = np.random.default_rng(1).integers(FIRST_ID, vocab, SYSTEM_TOKENS).tolist()
        pairs = make_pairs("hh", vocab, num_pairs)
        return [TokenizedPair([*system, *pair.prompt], pair.chosen, pair.rejected) for pair in pairs]
    drawn = make_pairs("uf", vocab, 2 * num_pairs)  # of two pairs in a row one prompt and all four answers
    pairs = []
    for one, two in zip(drawn[::2], drawn[1::2], strict=True):
        answers = [one.chosen, one.rejected, two.chosen, two.rejected]
        better = answers if data == "all ranked" else answers[:1]
        pairs += [TokenizedPair(one.prompt, a, b) for n, a in enumerate(better) for b in answers[n + 1 :]]
    return pairs[:num_pairs]


def _hh_pairs() -> list[TokenizedPair]:
    """HH-RLHF harmless transcripts as ids of a BPE trained on them (means 122 / 40 / 50 tokens)."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    turn = "\n\nAssistant:"
    texts = []
    folder = files("orpo") / "demo" / "data" / "harmless"
    for split in ("train", "validation", "test"):
        for line in gzip.decompress((folder / f"{split}.jsonl.gz").read_bytes()).decode().splitlines():
            row = json.loads(line)
            prompts = [row[side][: row[side].rfind(turn) + len(turn)] for side in ("chosen", "rejected")]
            if prompts[0] == prompts[1]:
                texts.append(
                    (prompts[0], row["chosen"][len(prompts[0]) :], row["rejected"][len(prompts[0]) :])
                )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=8192 - FIRST_ID, show_progress=False)
    tokenizer.train_from_iterator((part for text in texts for part in text), trainer)

    def ids(text: str) -> list[int]:
        return [FIRST_ID + i for i in tokenizer.encode(text).ids]

    return [TokenizedPair(ids(p), [*ids(c), EOS], [*ids(r), EOS]) for p, c, r in texts]


def useful_flops(pairs: list[TokenizedPair], shape: Shape, model: PreTrainedModel) -> float:
    """Floating-point operations that forward and backward of these pairs need.

    Matrix products only, each token and key once: 3 x forward for layers, exact causal attention, and the
    vocabulary on scored tokens (prompt and chosen but for the first token, and rejected).
    """
    embeddings = {id(p) for name, p in model.named_parameters() if "embed" in name or "lm_head" in name}
    layers = sum(p.numel() for p in model.parameters() if p.ndim == 2 and id(p) not in embeddings)
    tokens, attended, scored = count_work(pairs)
    return 3 * (
        2 * layers * tokens
        + 4 * shape.hidden * shape.layers * attended
        + 2 * shape.hidden * shape.vocab * scored
    )


def count_work(pairs: list[TokenizedPair]) -> tuple[int, float, int]:
    """Tokens, pairs of a token and one it attends to, and scored tokens, each counted once."""
    tokens, attended, scored = 0, 0.0, 0
    for pair in pairs:
        p, c, r = len(pair.prompt), len(pair.chosen), len(pair.rejected)
        tokens += p + c + r
        attended += (p + c) * (p + c + 1) / 2 + r * p + r * (r + 1) / 2
        scored += p + c - 1 + r
    return tokens, attended, scored


def number_tokenizer(vocab: int) -> Any:
    """A tokenizer under which the text "17 5" is the ids [17, 5]."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({_word(i): i for i in range(vocab)}, unk_token=SPECIAL[3]))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token=SPECIAL[EOS], pad_token=SPECIAL[0], unk_token=SPECIAL[3]
    )


def _word(token: int) -> str:
    return SPECIAL[token] if token < FIRST_ID else str(token)


def _text(tokens: Sequence[int]) -> str:
    return " ".join(map(_word, tokens))


def trl_rows(pairs: list[TokenizedPair]) -> list[dict[str, Any]]:
    """The pairs as TRL's text columns, with the `length` of the longer side, which its grouping reads."""
    return [
        {
            "prompt": _text(pair.prompt),
            "chosen": " " + _text(pair.chosen),
            "rejected": " " + _text(pair.rejected),
            "length": len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)),
        }
        for pair in pairs
    ]
