"""Answers to many prompts: in batches as one at a time, resumed as in one go, from a server as from here."""

import contextlib
import io
import json
import logging
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import tiny_models
import torch
import transformers
from answer_server import answer_server
from safetensors.torch import load_file, save_file
from tiny_tokenizer import tiny_tokenizer
from tiny_training import random_pairs, tiny_trainer

import orpo
from orpo import cli
from orpo.data.refusals import refuses
from orpo.engine.stop_tokens import stop_token_ids
from orpo.errors import ConfigError, DataError, ModelError, RunError
from orpo.evaluation import answer_options
from orpo.evaluation.answer_summary import repetition
from orpo.evaluation.decoding import Decoding, check_decoding, decode
from orpo.evaluation.endpoint import Endpoint
from orpo.evaluation.generation import ChatModel, Sampling
from orpo.evaluation.prompts import read_prompts
from orpo.settings.config import OrpoSettings

DEMO = str(Path(orpo.__file__).parent / "demo" / "model")
QUESTIONS = [
    "Hi.",
    "Name a solid commonly found in the Earth's crust, and say in a few words what people have made of it.",
    "What is 2 plus 2?",
    "Tell me a story about a boat.",
    "Why is the sky blue, and why is it red in the evening, and what colour is it at night?",
]
SHORT = Sampling(temperature=0.0, top_p=1.0, max_tokens=16, seed=0)
DRAWN = Sampling(temperature=1.0, top_p=0.9, max_tokens=12, seed=3)


def lines(path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def orpo_main(*words: object) -> tuple[int, str]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        status = cli.main([str(word) for word in words])
    return status, out.getvalue()


# ------------------------------------------------------------------------------------------------ decoding


def greedy_by_hand(model, prompt: list[int], decoding: Decoding) -> list[int]:
    """One prompt, no padding, no cache: the slow twin."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(decoding.max_tokens):
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
            if ids[-1] in decoding.ends:
                break
    return ids[len(prompt) :]


FEW = ("Llama", "Gemma2", "GPT2", "Qwen3Moe", "Bloom", "Mamba")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in FEW else pytest.mark.slow)
        for name in (*tiny_models.SHARING, *tiny_models.FALLING_BACK)
    ],
)
def test_a_batch_answers_as_one_prompt_at_a_time(name):
    model = tiny_models.build(name)
    prompts = [tiny_models.token_ids(length, length) for length in (3, 17, 9, 1, 30)]
    greedy = Decoding(max_tokens=12, ends=range(2, tiny_models.VOCAB, 9), pad=2)
    expected = [greedy_by_hand(model, prompt, greedy) for prompt in prompts]
    assert decode(model, prompts, greedy) == expected
    drawn = Decoding(max_tokens=12, ends=range(2, tiny_models.VOCAB, 9), pad=2, temperature=1.0, top_p=0.9)
    alone = [decode(model, [prompt], drawn, [seed])[0] for seed, prompt in enumerate(prompts)]
    assert decode(model, prompts[::-1], drawn, range(4, -1, -1)) == alone[::-1]
    assert alone != expected
    assert any(answer[-1] in drawn.ends and len(answer) < 12 for answer in [*expected, *alone])


def test_tokens_are_drawn_as_often_as_the_model_thinks_and_only_from_top_p():
    model = tiny_models.build("Llama")
    prompt, number, top_p = tiny_models.token_ids(5), 4000, 0.8
    decoding = Decoding(max_tokens=1, ends=[], pad=0, temperature=0.7, top_p=top_p)
    counted = torch.zeros(tiny_models.VOCAB)
    for (token,) in decode(model, [prompt] * number, decoding, range(number)):
        counted[token] += 1
    with torch.no_grad():
        likely, order = (
            (model(torch.tensor([prompt])).logits[0, -1].double() / 0.7).softmax(-1).sort(descending=True)
        )
    kept = likely * (likely.cumsum(0) - likely < top_p)
    expected = number * kept / kept.sum()
    assert not counted[order][expected == 0].any()
    inside = expected > 0
    chi_square = ((counted[order] - expected)[inside].square() / expected[inside]).sum()
    freedom = int(inside.sum()) - 1
    assert freedom > 3
    assert chi_square < freedom + 5 * (2 * freedom) ** 0.5


def test_what_a_model_ships_for_its_own_sampling_neither_counts_nor_warns():
    model = tiny_models.build("Llama")
    prompt = tiny_models.token_ids(5)
    decoding = Decoding(max_tokens=6, ends=[2], pad=0)
    expected = decode(model, [prompt], decoding)
    model.generation_config.update(
        temperature=0.6, top_p=0.5, top_k=3, min_p=0.1, max_length=4096, max_new_tokens=2, do_sample=True
    )
    before = model.generation_config.to_dict()
    heard = io.StringIO()
    handler = logging.StreamHandler(heard)
    transformers.logging.get_logger("transformers").addHandler(handler)
    transformers.logging.set_verbosity_warning()
    try:
        assert decode(model, [prompt], decoding) == expected
        decode(model, [prompt], Decoding(max_tokens=6, ends=[2], pad=0, temperature=1.0), [1])
    finally:
        transformers.logging.set_verbosity_error()
        transformers.logging.get_logger("transformers").removeHandler(handler)
    assert heard.getvalue() == ""
    assert model.generation_config.to_dict() == before


def with_generation(**settings):
    model = tiny_models.build("Llama")
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    return model


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"repetition_penalty": -1.0}, "repetition_penalty -1.0 cannot be used to generate"),
        ({"no_repeat_ngram_size": 2, "bad_words_ids": [4]}, r"bad_words_ids \[4\] cannot"),
        ({"bad_words_ids": [[999999]]}, r"bad_words_ids \[\[999999\]\] cannot"),
        ({"sequence_bias": [[[4], "x"]]}, "sequence_bias .* cannot"),
        ({"forced_eos_token_id": 999999}, "forced_eos_token_id 999999 cannot"),
    ],
)
def test_what_would_fail_as_answers_are_made_is_refused_before(tmp_path, settings, expected):
    with pytest.raises(ModelError, match=f"^generation_config.json: {expected}"):
        check_decoding(with_generation(**settings))
    with pytest.raises(ModelError, match=expected):
        tiny_trainer(
            tmp_path, model=with_generation(**settings), evaluation=random_pairs(3), num_samples=1,
            eval_strategy="steps",
        )  # fmt: skip


@pytest.mark.parametrize(
    "settings",
    [
        {"return_dict_in_generate": True, "output_scores": True}, {"dola_layers": "high"},
        {"constraints": [1]}, {"prompt_lookup_num_tokens": 3}, {"eos_token_id": -1},
        {"eos_token_id": [2, 2**40]},
    ],
)  # fmt: skip
def test_ways_to_generate_that_are_not_taken_change_no_answer_and_are_named(settings):
    prompt, model = tiny_models.token_ids(5), with_generation(**settings)
    stops = stop_token_ids(model)
    assert -1 not in stops and 2**40 not in stops
    answers = decode(model, [prompt] * 2, Decoding(max_tokens=4, ends=stops, pad=0))
    assert answers == decode(
        tiny_models.build("Llama"), [prompt] * 2, Decoding(max_tokens=4, ends=stops, pad=0)
    )
    lines = check_decoding(model)
    ways = [name for name in settings if not name.startswith(("return", "output", "eos"))]
    assert [line.split()[1] for line in lines] == ways and not model.generation_config.num_beams


def test_settings_that_can_be_used_pass_and_the_model_is_as_it_was():
    model = with_generation(repetition_penalty=1.1, suppress_tokens=[3]).train()
    before = model.generation_config.to_dict()
    assert check_decoding(model) == []
    assert model.training and model.generation_config.to_dict() == before


# ---------------------------------------------------------------------------------------------- whole runs


def test_answers_stand_in_the_order_of_the_prompts_and_are_those_of_chat(tmp_path):
    out = tmp_path / "answers.json"
    result = orpo.generate(DEMO, QUESTIONS, out, sampling=SHORT, batch_size=2)
    written = json.loads(out.read_text())
    assert [row["instruction"] for row in written] == QUESTIONS
    assert {row["generator"] for row in written} == {DEMO}
    assert not out.with_name("answers.json.unfinished").exists()
    for question, row in zip(QUESTIONS, written, strict=True):
        chat = ChatModel.load(DEMO)
        assert chat.answer(question, SHORT) == row["output"]
    assert result.summary.number == 5
    assert result.summary.ended == sum(row["ended"] for row in written) / 5
    assert all(row["num_tokens"] == 16 for row in written if not row["ended"])


def test_a_stopped_run_goes_on_and_ends_with_the_same_file(tmp_path, capsys):
    whole = tmp_path / "whole.jsonl"
    orpo.generate(DEMO, QUESTIONS, whole, sampling=DRAWN, samples=2)

    class StoppedError(Exception):
        pass

    def stop_at(number):
        def stop(done, total):
            assert total == 10
            if done == number:
                raise StoppedError

        return stop

    def again(batch_size, progress):
        orpo.generate(
            DEMO, QUESTIONS, out, sampling=DRAWN, samples=2, batch_size=batch_size, progress=progress
        )
        return capsys.readouterr().err

    out = tmp_path / "again.jsonl"
    with pytest.raises(StoppedError):
        again(3, stop_at(6))
    assert "6 of 10 answers are kept" in capsys.readouterr().err
    assert len(lines(out)) == 6
    out.write_bytes(out.read_bytes()[:-40])  # as a machine that lost its power leaves it
    with pytest.raises(StoppedError):
        again(1, stop_at(7))
    assert "the last line was cut off" in capsys.readouterr().err
    assert len(lines(out)) == 7
    began = []
    assert "cut off" not in again(4, lambda done, total: began.append(done))
    assert began[0] == 7
    assert lines(out) == lines(whole)
    assert len({row["output"] for row in lines(out)}) == 10


def test_another_models_answers_are_refused_in_one_line(tmp_path):
    other = tmp_path / "other"
    shutil.copytree(DEMO, other)
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"] += 0.01
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    out = tmp_path / "a.jsonl"
    orpo.generate(DEMO, QUESTIONS[:2], out, sampling=SHORT)
    before = out.read_bytes()
    cases = [
        (str(other), QUESTIONS[:2], SHORT, f"holds answers of {DEMO}"),
        (DEMO, QUESTIONS[:2], DRAWN, "temperature 0.0, not 1.0"),
        (DEMO, QUESTIONS[:1], SHORT, "1 of its 2 answers are to prompts that are not asked now"),
    ]
    for model, prompts, sampling, expected in cases:
        with pytest.raises(ConfigError, match=expected):
            orpo.generate(model, prompts, out, sampling=sampling)
        assert out.read_bytes() == before
    orpo.generate(DEMO, QUESTIONS[:3], out, sampling=SHORT)
    assert [row["instruction"] for row in lines(out)] == QUESTIONS[:3]
    out.write_text('{"prompt": "mine"}\n')
    with pytest.raises(DataError, match="was not written by orpo generate"):
        orpo.generate(DEMO, QUESTIONS[:2], out, sampling=SHORT)
    assert out.read_text() == '{"prompt": "mine"}\n'


def test_a_prompt_that_does_not_fit_is_named_and_the_others_are_answered(tmp_path):
    prompts = tmp_path / "p.txt"
    prompts.write_text("Hi.\n\n" + "very long " * 2000 + "\nWhat is 2 plus 2?\n")
    status, printed = orpo_main(
        "generate", DEMO, "--prompts", prompts, "--out", tmp_path / "a.jsonl", "--max_tokens", 8
    )
    assert status == 2
    assert "1 prompt has no answer (first: p.txt:3: " in printed
    assert "tokens and an answer of 8 do not fit into the 1024 tokens" in printed
    assert [row["source"] for row in lines(tmp_path / "a.jsonl")] == ["p.txt:1", "p.txt:4"]


def test_a_token_that_the_model_has_no_embedding_for_is_refused_in_one_line(tmp_path, monkeypatch):
    model, prompts = tmp_path / "model", tmp_path / "p.txt"
    shutil.copytree(DEMO, model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["rewriteword"])
    tokenizer.save_pretrained(model)
    prompts.write_text("Hi.\nSay rewriteword twice.\n")
    said = r"token \d+ \('rewriteword'\) has no embedding in the model, which has [\d,]+; use the tokenizer"
    status, printed = orpo_main("generate", model, "--prompts", prompts, "--out", tmp_path / "a.jsonl")
    assert status == 2 and re.fullmatch(rf"orpo: error: p\.txt:2: {said}.*\n", printed)
    assert not (tmp_path / "a.jsonl").exists()
    monkeypatch.setattr(sys, "stdin", io.StringIO("rewriteword\n"))
    status, printed = orpo_main("chat", model)
    assert status == 2 and re.search(rf"error: the prompt: {said}", printed)
    pair = {"prompt": "Say it.", "chosen": "I say rewriteword.", "rejected": "no"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair))
    status, printed = orpo_main("data", "show", tmp_path / "pairs.jsonl", "--model", model)
    assert status == 2 and "rewriteword" in printed.partition("error:")[0]
    assert re.search(rf"error: pairs\.jsonl:1: {said}", printed)


def test_a_batch_that_is_too_large_for_the_memory_is_halved(tmp_path, monkeypatch, capsys):
    expected = orpo.generate(DEMO, QUESTIONS, tmp_path / "a.jsonl", sampling=SHORT).answers
    from orpo.evaluation import local_model

    def scarce(model, prompts, *arguments):
        if len(prompts) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(model, prompts, *arguments)

    monkeypatch.setattr(local_model, "decode", scarce)
    found = orpo.generate(DEMO, QUESTIONS, tmp_path / "b.jsonl", sampling=SHORT).answers
    assert found == expected
    assert "out of memory: 2 prompts at once instead of 5" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- prompts

USER = [{"role": "user", "content": "Hi."}]
TALK = [*USER, {"role": "assistant", "content": "Hello."}, {"role": "user", "content": "And?"}]


@pytest.mark.parametrize(
    ("row", "asked"),
    [
        ({"prompt": "Hi."}, USER),
        ({"question": "Hi.", "answer": "Hello."}, USER),
        ({"instruction": "Hi.", "output": "Hello.", "generator": "x"}, USER),
        ({"instruction": "Say:", "input": "Hi."}, [{"role": "user", "content": "Say:\n\nHi."}]),
        ({"messages": TALK}, TALK),
        ({"messages": TALK[:2]}, USER),
        ({"prompt": TALK}, TALK),
        ({"prompt": "Hi.", "chosen": "Hello.", "rejected": "No."}, USER),
        ({"chosen": TALK[:2], "rejected": [*USER, {"role": "assistant", "content": "No."}]}, USER),
    ],
)
def test_rows_of_every_kind_are_asked(row, asked, tmp_path):
    (tmp_path / "p.jsonl").write_text(json.dumps(row) + "\n")
    (prompt,) = read_prompts(str(tmp_path / "p.jsonl"), OrpoSettings(), tiny_tokenizer()).prompts
    assert prompt.asked == asked
    assert prompt.source == "p.jsonl:1"
    (prompt,) = read_prompts(
        str(tmp_path / "p.jsonl"), OrpoSettings(), tiny_tokenizer(), system="Be brief."
    ).prompts
    assert prompt.asked == [{"role": "system", "content": "Be brief."}, *asked]


def test_a_model_without_a_template_continues_texts_and_is_asked_no_conversations():
    plain = tiny_tokenizer(None)
    (prompt,) = read_prompts(["Once upon a"], OrpoSettings(), plain).prompts
    assert prompt.asked == "Once upon a"
    with pytest.raises(DataError, match="a conversation of 3 turns, and no chat template"):
        read_prompts([{"prompt": TALK}], OrpoSettings(), plain)
    with pytest.raises(ConfigError, match="--system needs a chat template"):
        read_prompts(["Hi."], OrpoSettings(), plain, system="Be brief.")


def test_prompts_that_cannot_be_asked_are_named_or_counted():
    tokenizer = tiny_tokenizer()
    twice = read_prompts(["Hi.", "Ho.", "Hi."], OrpoSettings(), tokenizer)
    assert [prompt.instruction for prompt in twice.prompts] == ["Hi.", "Ho."]
    assert twice.notices == ("prompts that repeat an earlier one, and are asked once: 1",)
    rows = [{"prompt": "Hi."}, {"prompt": 3}, {"prompt": " "}]
    with pytest.raises(DataError, match="row:1: 'prompt' is an int"):
        read_prompts(rows, OrpoSettings(), tokenizer)
    lenient = read_prompts(rows, OrpoSettings(on_bad_row="skip"), tokenizer)
    assert lenient.notices == ("skipped 2: rows without a prompt that can be read (first: row:1)",)
    with pytest.raises(DataError, match="holds the tokens of a chat template already"):
        read_prompts(["<|im_start|>user\nHi.<|im_end|>\n"], OrpoSettings(), tokenizer)


def test_a_misspelled_column_of_prompts_is_refused(tmp_path):
    prompts, tokenizer = tmp_path / "p.jsonl", tiny_tokenizer()
    prompts.write_text('{"q": "Hi.", "instruction": "Other."}\n')
    with pytest.raises(DataError, match=r"columns: promt: nothing here reads .*; did you mean prompt\?"):
        read_prompts(prompts, OrpoSettings(columns={"promt": "q"}), tokenizer)
    of_pairs = OrpoSettings(columns={"prompt": "q", "chosen": "good", "rejected": "bad"})
    assert [one.instruction for one in read_prompts(prompts, of_pairs, tokenizer).prompts] == ["Hi."]


# ------------------------------------------------------------------------------------------------ endpoint


def test_rows_of_which_none_asks_anything_are_named_with_the_reason(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "Hi"},\n{"prompt": "You"},\n')
    for on_bad_row in ("stop", "skip"):
        with pytest.raises(DataError, match=r"^p\.jsonl:1: is not JSON"):
            read_prompts(tmp_path / "p.jsonl", OrpoSettings(on_bad_row=on_bad_row))


def test_a_server_answers_side_by_side_and_what_fails_is_named_and_asked_again(tmp_path, monkeypatch, capsys):
    key = "sk-never-to-be-seen"
    monkeypatch.setenv("MY_KEY", f"{key}\n")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    prompts = [
        *(f"number {n}" for n in range(12)),
        "fail 503 2",
        "fail 400 1",
        "drop it",
        "cut it",
        "fail 429 1",
    ]
    out = tmp_path / "a.jsonl"
    with answer_server(key) as url:
        endpoint = Endpoint(url=url, api_key_env="MY_KEY", concurrency=3, pause=0.01)
        first = orpo.generate(None, prompts, out, endpoint=endpoint)
        assert [source for source, _ in first.failures] == ["prompt:13"]
        with pytest.raises(
            RunError, match=r"1 prompt has no answer \(first: prompt:13: HTTP 400: not now, Bearer"
        ):
            first.check()
        assert [row["instruction"] for row in lines(out)] == [*prompts[:13], *prompts[14:]]
        second = orpo.generate(None, prompts, out, endpoint=endpoint)
        stats = json.loads(urllib.request.urlopen(f"{url[:-3]}/stats").read())
    assert second.failures == [] and second.num_known == 16
    assert [row["output"] for row in lines(out)] == [f"You said: {prompt}" for prompt in prompts]
    assert [row["instruction"] for row in lines(out) if not row["ended"]] == ["cut it"]
    assert stats["most"] == 3
    assert len(stats["requests"]) == len(prompts) + 2 + 1 + 1 + 1  # each failure was tried once more
    seen = capsys.readouterr()
    assert key not in out.read_text() + seen.out + seen.err + str(first.failures) + repr(endpoint)


def test_what_a_server_gets_is_what_was_asked_for(tmp_path):
    with answer_server() as url:
        drawn = Sampling(temperature=0.5, top_p=0.9, max_tokens=7, seed=1)
        endpoint = Endpoint(url=url, model="parrot", request={"top_k": 5, "max_tokens": None})
        orpo.generate(
            None, ["Hi."], tmp_path / "a.jsonl", endpoint=endpoint, sampling=drawn, samples=2, system="Be."
        )
        orpo.generate(None, ["Hi."], tmp_path / "b.jsonl", endpoint=Endpoint(url=url), text_rows="plain")
        requests = json.loads(urllib.request.urlopen(f"{url[:-3]}/stats").read())["requests"]
    turns = [{"role": "system", "content": "Be."}, {"role": "user", "content": "Hi."}]
    seeds = [request.pop("seed") for request in requests[:2]]
    assert requests[:2] == [
        {"model": "parrot", "temperature": 0.5, "top_p": 0.9, "messages": turns, "top_k": 5}
    ] * 2  # fmt: skip
    assert seeds[0] != seeds[1] and all(0 <= seed < 2**31 for seed in seeds)
    assert requests[2] == {"model": "parrot", "max_tokens": 512, "temperature": 0.0, "prompt": "Hi."}


def test_a_server_that_will_not_answer_ends_the_run_in_one_line(tmp_path, monkeypatch):
    out = tmp_path / "a.jsonl"
    monkeypatch.setenv("OPENAI_API_KEY", "sk-wrong")
    with answer_server("sk-right") as url:
        with pytest.raises(
            ModelError, match="HTTP 401: wrong key Bearer \\*\\*\\*; the key is read from OPENAI"
        ) as failed:
            orpo.generate(None, ["Hi."], out, endpoint=Endpoint(url=url, model="parrot"))
        assert "sk-wrong" not in str(failed.value)
        monkeypatch.setenv("OPENAI_API_KEY", "sk-right")
        with pytest.raises(ModelError, match="HTTP 404: there is no crow; check --endpoint"):
            orpo.generate(None, ["Hi."], out, endpoint=Endpoint(url=url, model="crow"))
        with pytest.raises(ModelError, match=r"HTTP 302: .*; give the address it points to"):
            orpo.generate(None, ["moved"], out, endpoint=Endpoint(url=url, model="parrot"))
        many = [f"fail 500 {99 + n}" for n in range(50)]
        fast = Endpoint(url=url, concurrency=2, tries=2, pause=0.0)
        with pytest.raises(RunError, match=r"6 prompts in a row have failed, .*500: not now.*after 2 tries"):
            orpo.generate(None, many, out, endpoint=fast)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
        with pytest.raises(ModelError, match=r"no server answers \(.*refused\); is it running\?"):
            orpo.generate(None, ["Hi."], out, endpoint=Endpoint(url=nobody, model="parrot"))
    assert not out.exists()


@pytest.mark.parametrize(
    "url",
    [
        "127.0.0.1:8000/v1",
        "http://me:sk-secret@host/v1",
        "http://host/v1?key=sk-secret",
        "http://[::1/sk-secret",
    ],
)
def test_an_address_that_holds_a_key_is_refused_and_not_repeated(url):
    with pytest.raises(ConfigError) as refused:
        Endpoint(url=url)
    assert "sk-secret" not in str(refused.value)


def test_the_command_takes_settings_next_to_an_endpoint(tmp_path, monkeypatch):
    (tmp_path / "p.jsonl").write_text('{"ask": "say [\\"No.\\", \\"Yes.\\"]"}\n')
    words = ["generate", "--prompts", tmp_path / "p.jsonl", "--columns", "{prompt: ask}", "--out"]
    with answer_server() as url:
        given = ["--endpoint", url, "--samples", 2, "--temperature", 1, "--concurrency", 1]
        status, printed = orpo_main(*words, tmp_path / "a.jsonl", *given)
        assert (status, [row["output"] for row in lines(tmp_path / "a.jsonl")]) == (0, ["No.", "Yes."])
        assert "answers     2" in printed
        status, printed = orpo_main(*words, tmp_path / "b.jsonl", *given, "--samples", 1, "--temperature", 0)
        assert status == 0
        status, printed = orpo_main(*words, tmp_path / "c.jsonl", "--samples", 2)
        assert status == 2 and "at temperature 0 are the same" in printed
    assert orpo_main(*words, tmp_path / "d.jsonl")[1].startswith("orpo: error: name one model")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_real_server_gives_the_answers_of_the_batch(tmp_path):
    """Against `transformers serve`, where fastapi and uvicorn are installed."""
    for needed in ("fastapi", "uvicorn"):
        pytest.importorskip(needed)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [Path(sys.executable).with_name("transformers"), "serve", DEMO, "--host", "127.0.0.1"]
    options = ["--port", str(port), "--dtype", "float32", "--device", "cpu"]
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [*words, *options], env=offline, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        for line in process.stdout:
            if b"running on" in line:
                break
        here = orpo.generate(DEMO, QUESTIONS, tmp_path / "a.jsonl", sampling=SHORT)
        endpoint = Endpoint(url=f"http://127.0.0.1:{port}/v1")
        there = orpo.generate(None, QUESTIONS, tmp_path / "b.jsonl", sampling=SHORT, endpoint=endpoint)
    finally:
        process.kill()
        process.wait()
    for one, other in zip(here.answers, there.answers, strict=True):
        assert (one.output, one.ended, one.num_tokens) == (other.output, other.ended, other.num_tokens)


# ------------------------------------------------------------------------------------------------- figures


def test_repetition_is_the_share_of_runs_of_three_words_that_came_before():
    assert repetition("one two three four") == 0
    assert repetition("no no no no no") == pytest.approx(2 / 3)
    draw = random.Random(0)
    words = [draw.choice("abcd") for _ in range(200)]
    seen, repeated = set(), 0
    for start in range(198):
        run = tuple(words[start : start + 3])
        repeated += run in seen
        seen.add(run)
    assert repetition(" ".join(words)) == pytest.approx(repeated / 198)
    assert repetition("天地玄黄天地玄黄") == pytest.approx(2 / 6)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("I\u2019m not able to provide medical advice.", True),
        ("Unfortunately, I am unable to do this.", True),
        ("As an AI language model, I have no opinions.", True),
        ("I must respectfully decline.", True),
        ("I will not say.", True),
        ("Sorry for the wait! The answer is 4.", False),
        ("You can't divide by zero.", False),
        ("I can help with that.", False),
        ("He said that he cannot come. " + "So we went. " * 40 + "I cannot help you.", False),
        ("", False),
    ],
)
def test_refusals_are_told_by_their_beginning(text, expected):
    assert refuses(text) is expected


def test_the_time_left_is_that_of_what_is_missing_at_the_rate_so_far(monkeypatch, capsys):
    """Answers come a batch at a time, and those that were there before took no time."""
    clock = [100.0]
    monkeypatch.setattr(answer_options.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(answer_options.sys.stderr, "isatty", lambda: False, raising=False)
    with answer_options.progress() as progress:
        for seconds, done in ((0, 8), (40, 12), (40, 12), (41, 12), (100, 20), (130, 28)):
            clock[0] = 100.0 + seconds
            progress(done, 28)
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["12 of 28 answers, 0:02:40 left", "20 of 28 answers, 0:01:06 left"]
