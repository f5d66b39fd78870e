"""The shipped preference data and base model are what their READMEs say."""

import gzip
import json
import math
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

DEMO = Path(__file__).parents[1] / "src" / "orpo" / "demo"
COUNTS = {"politeness": (767, 109, 218), "harmless": (825, 117, 235)}

# Written for this test. Measured: 1.205 bits per byte.
UNSEEN_TEXT = (
    "The old woman closed the door behind her and walked slowly down the hill. It had rained all night, and "
    'the road was full of mud. "I shall be late," she said to the dog, who did not seem to mind. When they '
    "came to the river, the bridge was gone, and a boy was sitting on a stone, looking at the water.\n\n"
    '"Can you tell me how I may get across?" she asked.\n\n'
    '"You must wait for the boat," he said. "My father will bring it back before dinner, I think."'
)
BITS_PER_BYTE_BOUND = 1.3


def words(text):
    return " ".join(re.findall(r"\w+", text.lower())) or text.strip()


def rows(name, split):
    path = DEMO / "data" / name / f"{split}.jsonl"
    data = path.read_bytes() if path.exists() else gzip.decompress(path.with_suffix(".jsonl.gz").read_bytes())
    return [json.loads(line) for line in data.decode().splitlines()]


def last_answer(text):
    return words(text.rpartition("\n\nAssistant:")[2])


def opening(text):
    return words(text.split("\n\nAssistant:")[0])


@pytest.mark.parametrize("name", COUNTS)
def test_counts_are_those_of_the_readme(name):
    sizes = tuple(len(rows(name, split)) for split in ("train", "validation", "test"))
    assert sizes == COUNTS[name]
    assert " / ".join(map(str, sizes)) in (DEMO / "data" / "README.md").read_text()


@pytest.mark.parametrize("name", COUNTS)
def test_no_pair_has_identical_or_empty_sides(name):
    for split in ("train", "validation", "test"):
        for row in rows(name, split):
            assert row["chosen"].strip() != row["rejected"].strip()
            assert all(value.strip() for value in row.values())


@pytest.mark.parametrize("name", COUNTS)
def test_no_prompt_and_no_answer_is_in_two_splits(name):
    seen = {}
    for split in ("train", "validation", "test"):
        for row in rows(name, split):
            keys = {f"answer {last_answer(row[side])}" for side in ("chosen", "rejected")}
            keys |= {f"prompt {words(row['prompt']) if 'prompt' in row else opening(row['chosen'])}"}
            for key in keys:
                assert seen.setdefault(key, split) == split


def test_politeness_has_three_columns_and_harmless_two():
    assert all(set(row) == {"prompt", "chosen", "rejected"} for row in rows("politeness", "test"))
    assert all(set(row) == {"chosen", "rejected"} for row in rows("harmless", "test"))


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO / "model")


CONVERSATIONS = [
    [("user", "Name a colour.")],
    [("system", "Be brief."), ("user", "  Name a colour.\n")],
    [("user", "Hi"), ("assistant", "Hello!"), ("user", "Name a colour, please: caf\u00e9 \U0001f600")],
]


@pytest.mark.parametrize("turns", CONVERSATIONS)
def test_rendered_prompt_is_a_true_prefix_and_the_answer_ends_with_one_end_of_turn(tokenizer, turns):
    messages = [{"role": role, "content": content} for role, content in turns]
    answer = [{"role": "assistant", "content": "Red, I think."}]

    def ids(messages, generation):
        return tokenizer.apply_chat_template(messages, add_generation_prompt=generation, return_dict=False)

    prompt, whole = ids(messages, True), ids(messages + answer, False)
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert whole[: len(prompt)] == prompt
    assert whole[len(prompt) :].count(end) == 1
    assert whole[-1] == end
    assert whole.count(tokenizer.bos_token_id) == 1
    assert end not in (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert tokenizer.decode(whole[len(prompt) : -1]) == "Red, I think."


def test_tokenizer_gives_any_text_back_and_starts_it_once(tokenizer):
    text = "  Caf\u00e9 \U0001f600 x=1,234\n\n\tend "
    ids = tokenizer(text).input_ids
    assert ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) == text


def test_shipped_model_predicts_unseen_text(tokenizer):
    model = AutoModelForCausalLM.from_pretrained(DEMO / "model", dtype=torch.float32)
    ids = tokenizer(UNSEEN_TEXT, return_tensors="pt").input_ids
    with torch.no_grad():
        nats = model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
    assert nats / math.log(2) / len(UNSEEN_TEXT.encode()) < BITS_PER_BYTE_BOUND


def test_shipped_model_is_small_and_stops_at_both_end_tokens(tokenizer):
    model = AutoModelForCausalLM.from_pretrained(DEMO / "model")
    assert (DEMO / "model" / "model.safetensors").stat().st_size < 14e6
    assert model.dtype == torch.bfloat16
    assert model.config.vocab_size == len(tokenizer)
    ends = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|end|>")}
    assert set(model.generation_config.eos_token_id) == ends
