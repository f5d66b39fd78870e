"""The text the demo's base model learns from: open sources -> cleaned documents -> token streams.

A document is either running text (a passage of a book) or a conversation, kept as messages so that it can be
rendered in the tokenizer's own chat template. Every 50th document of each source is held out for bits per
byte. No preference data enters, and `assert_no_preference_answer` makes sure that no answer of it does.

Run as a script it checks the sources (README.md), reads them and prints what there is; nothing is written.

    python scripts/pretrain_corpus.py --sources sources
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import sources
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BOS, EOS, PAD = "<|startoftext|>", "<|endoftext|>", "<|pad|>"
END_OF_TURN = "<|end|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
SPECIAL_TOKENS = [PAD, BOS, EOS, END_OF_TURN, *ROLES]

CHAT_TEMPLATE = (
    "{{- bos_token -}}\n"
    "{%- for message in messages -%}\n"
    "    {{- '<|' + message['role'] + '|>' + message['content'] | trim + '<|end|>' -}}\n"
    "{%- endfor -%}\n"
    "{%- if add_generation_prompt -%}\n"
    "    {{- '<|assistant|>' -}}\n"
    "{%- endif -%}\n"
)

SYSTEM_PROMPTS = {
    "topical_chat": "You are a friendly partner in a conversation.",
    "gsm8k": "You solve word problems step by step.",
    "gpteacher": "You write what you are asked to write.",
}
PASSAGE_CHARACTERS = 6000
HELD_OUT_EVERY = 50
PREFERENCES = Path(__file__).parents[1] / "src/orpo/demo/data/politeness"

_QUOTES = str.maketrans(
    {"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "-", "\u2014": "--"}
    | {"\u2026": "...", "\u00a0": " ", "\ufeff": ""}
)

_SLUR = re.compile(r"\bnigg", re.IGNORECASE)


@dataclass(frozen=True)
class Document:
    """One cleaned document: `text`, or `messages` with roles and contents; `num_bytes` counts its content."""

    source: str
    text: str = ""
    messages: tuple[tuple[str, str], ...] = ()

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of what was written by people or models, without template tokens."""
        return len(self.text.encode()) + sum(len(content.encode()) for _, content in self.messages)


def clean(text: str) -> str:
    """Plain quotes and dashes, single spaces, no trailing blanks."""
    text = text.translate(_QUOTES).replace("\r\n", "\n").replace("\t", " ")
    return re.sub(r"[ ]{2,}", " ", text).strip()


def strip_gutenberg(raw: str) -> str:
    """The book between Project Gutenberg's header and trailer (both carry its trademark licence).

    Raises:
        ValueError: if no header or trailer is found, or the name still occurs in what is left.
    """
    raw = raw.replace("\r\n", "\n")
    start = re.search(r"\*\*\* ?START OF TH[^\n]*\n|\*END\*? ?THE SMALL PRINT[^\n]*\n", raw)
    end = re.search(r"(?i)\n[^\n]*\b(?:End of (?:the |this )?Project Gutenberg|\*\*\* ?END OF TH)", raw)
    if start is None:
        raise ValueError("no Project Gutenberg header found")
    body = raw[start.end() : end.start() if end else len(raw)]
    body = re.sub(r"\A\s*(?:Produced by|E-text prepared by)[^\n]*(?:\n[^\n]+)*\n\n", "", body)
    if re.search("gutenberg", body, re.IGNORECASE):
        raise ValueError("Project Gutenberg is still named in the stripped text")
    return body


def book_passages(data: bytes) -> list[Document]:
    """A book as passages of whole paragraphs, at most about `PASSAGE_CHARACTERS` each, lines unwrapped."""
    try:
        raw = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raw = data.decode("latin-1")
    body = strip_gutenberg(raw)
    body = re.sub(r"\[(?:Illustration|Sidenote|Footnote)[^\]]*\]", "", body)
    paragraphs = [clean(re.sub(r"\s+", " ", part).replace("_", "")) for part in re.split(r"\n\s*\n", body)]
    passages, current, size = [], [], 0
    for paragraph in paragraphs:
        letters = re.findall("[A-Za-z]", paragraph)
        if sum(map(str.isupper, letters)) * 3 >= len(letters) or _SLUR.search(paragraph):
            continue  # headings and tables of contents in capitals, rules of asterisks
        current.append(paragraph)
        size += len(paragraph)
        if size > PASSAGE_CHARACTERS:
            passages.append("\n\n".join(current))
            current, size = [], 0
    if current:
        passages.append("\n\n".join(current))
    return [Document("books", text=passage) for passage in passages]


def topical_chat(data: bytes) -> list[Document]:
    """Conversations between two people; the first speaker is the user, repeated speakers are joined."""
    documents = []
    for conversation in json.loads(data).values():
        turns: list[tuple[str, str]] = []
        first = conversation["content"][0]["agent"]
        for turn in conversation["content"]:
            role, content = "user" if turn["agent"] == first else "assistant", clean(turn["message"])
            if turns and turns[-1][0] == role:
                turns[-1] = (role, f"{turns[-1][1]} {content}")
            elif content:
                turns.append((role, content))
        documents.append(Document("topical_chat", messages=tuple(turns)))
    return documents


def gsm8k(data: bytes) -> list[Document]:
    """Questions and worked answers, without the calculator's annotations."""
    documents = []
    for line in data.decode().splitlines():
        row = json.loads(line)
        answer = re.sub(r"<<[^>]*>>", "", row["answer"])
        answer = re.sub(r"\n#### (.*)", r"\nThe answer is \1.", answer)
        messages = (("user", clean(row["question"])), ("assistant", clean(answer)))
        documents.append(Document("gsm8k", messages=messages))
    return documents


def gpteacher(data: bytes) -> list[Document]:
    """Role-play instructions and answers (written by GPT-4)."""
    documents = []
    for row in json.loads(data):
        question = "\n\n".join(part for part in (clean(row["instruction"]), clean(row["input"])) if part)
        answer = clean(row["response"])
        if question and answer:
            documents.append(Document("gpteacher", messages=(("user", question), ("assistant", answer))))
    return documents


def load_documents(files: Mapping[str, bytes]) -> tuple[list[Document], list[Document]]:
    """All documents of the sources under `pretrain/` without duplicates, as (training, held out).

    A fourth of the conversations get a system turn.
    """
    names = sorted(files)
    books = [name for name in names if name.startswith("pretrain/books/")]
    chats = [name for name in names if name.startswith("pretrain/topical_chat/")]
    parts = {
        "books": [document for name in books for document in book_passages(files[name])],
        "topical_chat": [document for name in chats for document in topical_chat(files[name])],
        "gsm8k": gsm8k(files["pretrain/gsm8k_train.jsonl"]),
        "gpteacher": gpteacher(files["pretrain/gpteacher_roleplay.json"]),
    }
    train, held_out = [], []
    for name, documents in parts.items():
        for i, document in enumerate(dict.fromkeys(documents)):
            if document.messages and i % 4 == 1:
                system = ("system", SYSTEM_PROMPTS[name])
                document = Document(name, messages=(system, *document.messages))
            (held_out if i % HELD_OUT_EVERY == HELD_OUT_EVERY // 2 else train).append(document)
    return train, held_out


def normalised(text: str) -> str:
    """Lower-case words only: what two texts share when they say the same thing in the same words."""
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


def preference_answers() -> list[str]:
    """Both answers of every politeness pair the demo ships, held out or not."""
    lines = [line for path in sorted(PREFERENCES.glob("*.jsonl")) for line in path.read_text().splitlines()]
    return [row[side] for row in map(json.loads, lines) for side in ("chosen", "rejected")]


def assert_no_preference_answer(documents: list[Document], min_words: int = 6) -> int:
    """Check that no answer of at least `min_words` words occurs in the documents; how many were checked.

    Raises:
        ValueError: naming the first answer that occurs.
    """
    parts = (part for d in documents for part in (d.text, *(content for _, content in d.messages)))
    haystack = " | ".join(normalised(part) for part in parts)
    checked = [a for a in dict.fromkeys(map(normalised, preference_answers())) if len(a.split()) >= min_words]
    for answer in checked:
        if f" {answer} " in haystack:
            raise ValueError(f"an answer of the demo's pairs occurs in the pretraining text: {answer!r}")
    return len(checked)


def train_tokenizer(documents: list[Document], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with the chat template; it starts plain text as training does."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (part for d in documents for part in (d.text, *(content for _, content in d.messages)) if part)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def render(document: Document, tokenizer: PreTrainedTokenizerFast) -> str:
    """Start token, text or conversation in the chat template, end-of-text token."""
    if not document.messages:
        return BOS + document.text + EOS
    messages = [{"role": role, "content": content} for role, content in document.messages]
    return tokenizer.apply_chat_template(messages, tokenize=False) + EOS


def encode(documents: list[Document], tokenizer: PreTrainedTokenizerFast) -> list[np.ndarray]:
    """The token ids of each rendered document."""
    texts = [render(document, tokenizer) for document in documents]
    encodings = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]


def main() -> None:
    """Check and read the sources, and print what there is."""
    parser = sources.Parser("Check the sources of the pretraining text and count their documents.")
    train, held_out = load_documents(parser.read_sources(parser.parse_args().sources, "pretrain/"))
    print(f"none of {assert_no_preference_answer(train + held_out):,} preference answers occurs in the text")
    for name in dict.fromkeys(document.source for document in train):
        kept, apart = ([d for d in part if d.source == name] for part in (train, held_out))
        size = sum(document.num_bytes for document in kept)
        print(f"{name}: {len(kept):,} documents of {size / 1e6:.1f} MB to train on, {len(apart):,} held out")


if __name__ == "__main__":
    main()
