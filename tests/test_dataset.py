"""A tokenized set is the same pairs whether made by one process or two, in memory, on disk or in a pickle."""

import gc
import os
import pickle
import sys
from dataclasses import replace

import numpy as np
import pytest
from tiny_tokenizer import tiny_tokenizer

from orpo.data.dataset import TokenizedDataset, tokenize_pairs
from orpo.data.preferences import PreferenceSet, read_preferences
from orpo.data.tokenize import PairTokenizer
from orpo.errors import DataError
from orpo.pairs import PreferencePair, TokenizedPair


def user(text):
    return {"role": "user", "content": text}


def bot(text):
    return {"role": "assistant", "content": text}


def make_pairs(number=40):
    pairs = []
    for i in range(number):
        prompt = [user(f"Q{i}")] if i % 3 else [user("P"), bot("O"), user(f"Q{i}")]
        rejected = None if i % 7 == 6 else [bot("same")] if i % 5 == 4 else [bot(f"B{i}" * (i % 4))]
        chosen = [bot("same")] if i % 5 == 4 else [bot(f"A{i}")]
        if i % 11 == 10:
            chosen = [bot("x"), user("more"), *chosen]
        pairs.append(PreferencePair(prompt, chosen, rejected, source=f"p:{i}", group="g" if i % 2 else None))
    return pairs


def content(data):
    return [data[i] for i in range(len(data))]


def test_items_arrays_and_labels_agree_with_tokenizing_one_by_one():
    pairs = make_pairs()
    tokenizer = tiny_tokenizer("chatml")
    data = tokenize_pairs(pairs, tokenizer, max_length=64)
    expected = PairTokenizer(tokenizer, max_length=64).encode(pairs)
    kept = [i for i, tokens in enumerate(expected) if tokens is not None]
    assert content(data) == [expected[i] for i in kept] and 0 < len(kept) < len(pairs)
    assert data.pair_index.tolist() == kept
    assert data.sources == [pairs[i].source for i in kept] and data.groups == [pairs[i].group for i in kept]
    lengths = [(len(t.prompt), len(t.chosen), len(t.rejected)) for t in content(data)]
    assert data.lengths.tolist() == [list(three) for three in lengths]
    assert data[-1] == data[len(data) - 1]
    with pytest.raises(IndexError):
        data[len(data)]
    assert any(t.chosen_context for t in content(data)) and any(t.assistant_spans for t in content(data))
    assert (
        data.end_token == "<|im_end|>" and data.counts.total == len(pairs) and data.counts.kept == len(data)
    )


def test_two_processes_make_the_same_set():
    pairs = make_pairs(1500)
    tokenizer = tiny_tokenizer("zephyr")
    one = tokenize_pairs(pairs, tokenizer, max_length=64)
    two = tokenize_pairs(pairs, tokenizer, max_length=64, num_proc=2)
    assert content(one) == content(two)
    assert one.counts.to_dict() == two.counts.to_dict() and one.pair_index.tolist() == two.pair_index.tolist()


def test_counting_continues_from_what_reading_has_counted():
    rows = [{"prompt": "P", "chosen": "a", "rejected": "b"}] * 8 + [
        {"prompt": "P", "chosen": "", "rejected": "b"}
    ]
    rows += [{"prompt": "long " * 50, "chosen": "a", "rejected": "b"}, {"prompt": 3}]
    found = read_preferences(rows, on_bad_row="skip", max_dropped=1.0)
    data = tokenize_pairs(found, tiny_tokenizer("mistral"), max_length=20)
    assert data.counts.lines() == [
        "using 8 of 11 rows",
        "skipped 1: 'prompt' is an int; expected text (first: row:10)",
        "dropped 1: empty chosen answer (first: row:8)",
        "dropped 1: too long: the last question with its answer exceeds max_length 20 (first: row:9)",
    ]
    assert data.chat_template is None and found.counts.total == 11 and len(found.counts.dropped) == 1
    with pytest.raises(DataError, match=r"the data: 3 of 11 rows \(27%\) cannot be used"):
        data.counts.check(0.1)


@pytest.mark.skipif(sys.platform != "linux", reason="needs a fork that is safe")
def test_other_work_is_done_once_while_processes_tokenize():
    pairs, done, frozen = make_pairs(3) * 400, [], gc.get_freeze_count()
    alone = tokenize_pairs(pairs, tiny_tokenizer("chatml"), max_length=64, meanwhile=lambda: done.append(1))
    assert not done
    shared = tokenize_pairs(
        pairs, tiny_tokenizer("chatml"), max_length=64, num_proc=2, meanwhile=lambda: done.append(2)
    )
    assert done == [2] and (gc.get_freeze_count() == 0) == (frozen == 0)
    assert content(shared) == content(alone)


def test_rejected_sides_can_be_left_out_of_the_same_rows():
    pairs = make_pairs()
    tokenizer = tiny_tokenizer("chatml")
    both = tokenize_pairs(pairs, tokenizer, max_length=30)
    alone = tokenize_pairs(pairs, tokenizer, max_length=30, drop_rejected=True)
    assert content(alone) == [replace(t, rejected=[], rejected_context=0) for t in content(both)]


def test_from_pairs():
    pairs = [TokenizedPair([1, 2], [3], [4, 5], 0, 1, ((0, 1),), "a"), TokenizedPair([1], [2], [])]
    assert content(TokenizedDataset.from_pairs(pairs)) == pairs
    assert len(TokenizedDataset.from_pairs([])) == 0


def test_the_cache_is_mapped_and_gives_the_same_set(tmp_path, monkeypatch):
    pairs = make_pairs()
    tokenizer = tiny_tokenizer("chatml")
    fresh = tokenize_pairs(pairs, tokenizer, max_length=64)
    first = tokenize_pairs(pairs, tokenizer, max_length=64, cache_dir=tmp_path)
    monkeypatch.setattr(PairTokenizer, "encode_arrays", None)
    again = tokenize_pairs(pairs, tokenizer, max_length=64, cache_dir=tmp_path)
    for data in (first, again, pickle.loads(pickle.dumps(again)), pickle.loads(pickle.dumps(fresh))):
        assert content(data) == content(fresh)
        assert data.counts.to_dict() == fresh.counts.to_dict()
        assert (data.notices, data.chat_template, data.groups) == (
            fresh.notices,
            fresh.chat_template,
            fresh.groups,
        )
    assert isinstance(again.tokens, np.memmap)
    assert len(pickle.dumps(again)) < 500  # the path, not the tokens
    assert [path.name for path in tmp_path.iterdir()] == [again.folder.name]  # nothing half-written is left


def test_whatever_changes_a_token_changes_the_cache(tmp_path):
    pairs = make_pairs(6)

    def made(pairs=pairs, shape="chatml", template=None, max_length=64, **options):
        tokenizer = tiny_tokenizer(shape)
        tokenizer.chat_template = template or tokenizer.chat_template
        tokenize_pairs(pairs, tokenizer, max_length=max_length, cache_dir=tmp_path, **options)
        return len(list(tmp_path.iterdir()))

    assert made() == 1 == made(num_proc=2)
    other = tiny_tokenizer("chatml").chat_template.replace("\\n", " ")
    variations = [
        {"shape": "llama3"}, {"template": other}, {"max_length": 65}, {"chat_template": "zephyr"},
        {"drop_rejected": True}, {"pairs": pairs[:5]}, {"pairs": [replace(pairs[0], tools=[{}]), *pairs[1:]]},
        {"pairs": [replace(pairs[0], chosen=[bot("new")]), *pairs[1:]]}, {"pairs": [*pairs[1:], pairs[0]]},
    ]  # fmt: skip
    for number, variation in enumerate(variations, start=2):
        assert made(**variation) == number
    assert made() == len(variations) + 1


def test_a_cache_that_cannot_be_written_is_said_and_not_fatal(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    data = tokenize_pairs(make_pairs(6), tiny_tokenizer("chatml"), max_length=64, cache_dir=blocked)
    assert len(data) > 0 and "could not be cached" in data.notices[-1]


def test_a_set_that_another_process_wrote_meanwhile_is_taken(tmp_path):
    pairs, tokenizer = make_pairs(6), tiny_tokenizer("chatml")
    first = tokenize_pairs(pairs, tokenizer, max_length=64, cache_dir=tmp_path)
    with pytest.raises(OSError, match=r"not empty|exists"):
        first.save(first.folder)
    assert os.listdir(tmp_path) == [first.folder.name]


def test_an_empty_set_says_why():
    same = PreferencePair([user("Q")], [bot("a ")], [bot("a")], source="p:1")
    with pytest.raises(
        DataError,
        match="the data: no row can be used: dropped 1: chosen and rejected are identical once rendered",
    ):
        tokenize_pairs(PreferenceSet([same]), tiny_tokenizer("llama3"), max_length=64)
