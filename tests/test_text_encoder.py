"""Tokens put together from words are those of whole texts; pairs are the same with and without shortcuts."""

import functools
import random

import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from real_templates import CASES, TEMPLATES, real_tokenizer
from tiny_tokenizer import SHAPES, TEXT, tiny_tokenizer
from turns import bot, system, user

from orpo.data.text_encoder import TextEncoder, words_are_independent
from orpo.data.tokenize import PairTokenizer
from orpo.demo.experiment import BASE
from orpo.pairs import PreferencePair

_END = "|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
_LLAMA = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _END
_O200K = "|".join(
    [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*",
    ]
)
PATTERNS = {"gpt2": None, "llama3": _LLAMA, "qwen2": _LLAMA.replace("{1,3}", ""), "o200k": _O200K + _END}
CORPUS = [
    TEXT,
    "  def f(x):\n\treturn x  # it's\n\n",
    "don't we'll 1234 漢字 kana かな é e\u0301 <a>\r\n",
] * 3


@functools.cache
def trained(name, *, add_prefix_space=False):
    """A byte-level tokenizer with one of the published patterns and tokens of blanks, words and digits."""
    split, steps = tokenizers.pre_tokenizers, []
    if PATTERNS[name] is not None:
        steps.append(split.Split(tokenizers.Regex(PATTERNS[name]), "isolated"))
    steps.append(split.ByteLevel(add_prefix_space=add_prefix_space, use_regex=PATTERNS[name] is None))
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = split.Sequence(steps)
    backend.normalizer = tokenizers.normalizers.NFC() if name == "qwen2" else None
    backend.decoder = tokenizers.decoders.ByteLevel()
    alphabet = split.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=alphabet, show_progress=False, special_tokens=["</s>", "<|x|>"]
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_tokens(["    ", "\n\n  "])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


def plain(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


LETTERS = st.sampled_from(
    [*"aZé漢\u0301\u200b0 9'.,/-_\"<>|\n\r\t \u00a0\x1c\x85\u2028\U0001f1e9🙂", "  ", "   ", " \n", "\n\n",
     "'s", "'ll", "don't", " the", "</s>", "<|x|>", "1234", "<s>", "<|im_end|>", "    "]
)  # fmt: skip
TEXTS = st.lists(LETTERS, max_size=24).map("".join)


@pytest.mark.parametrize("name", PATTERNS)
@settings(max_examples=100, deadline=None)
@given(text=TEXTS)
def test_words_give_the_tokens_of_the_text(name, text):
    tokenizer = trained(name)
    encoder = TextEncoder(tokenizer)
    assert encoder.remembers
    for _ in range(2):  # the second time from memory
        assert encoder.encode([text])[0].tolist() == plain(tokenizer, text)


@settings(max_examples=80, deadline=None)
@given(texts=st.lists(TEXTS, max_size=5), data=st.data())
def test_a_token_is_found_by_a_character_as_the_tokenizer_finds_it(texts, data):
    tokenizer = trained(data.draw(st.sampled_from([*PATTERNS])))
    text = " ".join(texts)
    words, whole = TextEncoder(tokenizer), TextEncoder(tokenizer, remember=False)
    position = data.draw(st.integers(0, len(text)))
    ids = words.encode([text])[0]
    assert words.token_at(text, ids, position) == whole.token_at(text, ids, position)


def test_a_long_text_of_real_words_through_the_demo_tokenizer():
    tokenizer = transformers.AutoTokenizer.from_pretrained(BASE)
    rng = random.Random(0)
    words = TEXT.split(" ")
    texts = ["<|user|>" + " ".join(rng.choices([*words, "", "\n-", "x\n"], k=300)) for _ in range(20)]
    encoder = TextEncoder(tokenizer)
    assert encoder.remembers
    assert [ids.tolist() for ids in encoder.encode(texts)] == [plain(tokenizer, text) for text in texts]


def test_other_tokenizers_get_whole_texts():
    assert not words_are_independent(trained("gpt2", add_prefix_space=True).backend_tokenizer)
    backend = tokenizers.Tokenizer.from_str(trained("gpt2").backend_tokenizer.to_str())
    assert words_are_independent(backend)
    for change in (
        {"normalizer": tokenizers.normalizers.Prepend("_")},
        {"normalizer": tokenizers.normalizers.Replace("b a", "c")},
        {"pre_tokenizer": tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"\w+ \w+|\s+"), "isolated")},
        {"pre_tokenizer": tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"\s+"), "merged_with_next")},
        {"pre_tokenizer": tokenizers.pre_tokenizers.Metaspace()},
        {"pre_tokenizer": tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)},
    ):
        other = tokenizers.Tokenizer.from_str(backend.to_str())
        for name, value in change.items():
            setattr(other, name, value)
        assert not words_are_independent(other), change
    for token in (
        tokenizers.AddedToken("two words"), tokenizers.AddedToken("open "),
        tokenizers.AddedToken("<r>", rstrip=True), tokenizers.AddedToken("word", single_word=True),
    ):  # fmt: skip
        other = tokenizers.Tokenizer.from_str(backend.to_str())
        other.add_tokens([token])
        assert not words_are_independent(other), token.content
    backend.model.dropout = 0.5
    assert not words_are_independent(backend)


def test_a_tokenizer_that_cuts_and_pads_for_others_does_not_for_us():
    tokenizer = tiny_tokenizer("chatml")
    expected = plain(tokenizer, "some words more than three")
    for remember in (True, False):
        tokenizer(["a b c d", "a"], truncation=True, max_length=2, padding="max_length")
        encoder = TextEncoder(tokenizer, remember=remember)
        assert encoder.encode(["some words more than three"])[0].tolist() == expected


# ------------------------------------------------------------------------------------------- whole pairs


def slow(encoder):
    """The same tokenizer of pairs without shortcuts: whole texts, and every conversation through Jinja."""
    encoder._texts = TextEncoder(encoder.tokenizer, remember=False)
    encoder.renderer._verbatim = lambda template: None
    return encoder


ROWS = [
    *CASES.values(),
    PreferencePair(
        [user("Q")], [bot("A b  c"), user("more"), bot("x y")], [bot("B"), user("less"), bot("z")]
    ),
    PreferencePair(
        [system("S"), user("Q \n one"), bot("old  answer"), user("two")], [bot("yes it is")], None
    ),
    PreferencePair([user("Q")], [bot("same")], [bot("same")]),
    PreferencePair([user("Q")], [bot("A<|im_end|>")], [bot("in <|im_end|> side")]),
    PreferencePair([user("Q")], [bot("A")], [bot("   ")]),
    PreferencePair("The sky is", " blue.", " a lie"),
    PreferencePair("Crossing wor", "ds here", "th it"),
    PreferencePair("end \n", "\n\nlater on", "  now"),
    PreferencePair([user("word " * 40), bot("short"), user("last one")], [bot("yes " * 9)], [bot("no")]),
]


def same(make, lengths):
    for max_length in lengths:
        fast, plain_ = make(max_length), slow(make(max_length))
        assert fast.encode(ROWS) == plain_.encode(ROWS)
        assert fast.counts == plain_.counts


@pytest.mark.parametrize("shape", [*SHAPES, None])
@pytest.mark.parametrize("special_tokens", [True, False])
def test_pairs_are_the_same_without_shortcuts(shape, special_tokens):
    tokenizer = tiny_tokenizer(shape, special_tokens=special_tokens)
    same(lambda length: PairTokenizer(tokenizer, max_length=length), (None, 120, 60, 25))


@pytest.mark.parametrize("name", TEMPLATES[::3])
def test_pairs_of_real_templates_are_the_same_without_shortcuts(name):
    tokenizer, stops = real_tokenizer(name)
    same(lambda length: PairTokenizer(tokenizer, max_length=length, stop_tokens=stops), (None, 90))
