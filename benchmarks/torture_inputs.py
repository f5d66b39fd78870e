"""The bad inputs of `torture.py inputs`: files, rows, settings, models, run directories, command lines."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from torture import RAN, REFUSED, Case, run_command

Row = dict[str, Any]


def pairs(number: int, first: int = 0) -> list[Row]:
    """Conversational pairs with prompts of their own."""
    return [
        {
            "prompt": [{"role": "user", "content": f"What is {n} plus {n % 7}?"}],
            "chosen": [{"role": "assistant", "content": f"It is {n + n % 7}, of course."}],
            "rejected": [{"role": "assistant", "content": "No, I will not say." + " Never!" * (n % 4)}],
        }
        for n in range(first, first + number)
    ]


def texts(number: int) -> list[Row]:
    """Pairs of plain texts."""
    return [
        {"prompt": f"What is {n}?", "chosen": f" It is {n}.", "rejected": f" No {n}."} for n in range(number)
    ]


def jsonl(rows: Sequence[Any]) -> str:
    """Rows as lines of JSON."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def make_world(folder: Path) -> None:
    """A tiny model, pairs, a finished run and a finished adapter run."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(str(files("orpo") / "demo" / "model"))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    (folder / "train.jsonl").write_text(jsonl(pairs(40)))
    (folder / "test.jsonl").write_text(jsonl(pairs(12, first=50)))
    for name, extra in (("run", []), ("lora", ["--use_peft", "true"])):
        words = [*train_words(folder, folder / name), "--max_steps", "4", "--save_steps", "2", *extra]
        status, output = run_command(words, folder)
        assert status == 0, output


def train_words(world: Path, out: Path | str, data: Path | str | None = None) -> list[str]:
    """A run of a fraction of a second."""
    return [
        "train",
        "--model_name_or_path",
        str(world / "base"),
        "--dataset_name",
        str(data or world / "train.jsonl"),
        "--output_dir",
        str(out),
        "--max_steps",
        "2",
        "--per_device_train_batch_size",
        "4",
        "--num_samples",
        "0",
        "--max_completion_length",
        "8",
        "--report_to",
        "none",
    ]


def cases(world: Path) -> Iterator[Case]:
    """All of them; `world` is a folder that stays until the last has run."""
    make_world(world)
    yield from _files(world)
    yield from _rows(world)
    yield from _texts_in_rows(world)
    yield from _settings(world)
    yield from _recipes(world)
    yield from _models(world)
    yield from _runs(world)
    yield from _command_lines(world)


# ------------------------------------------------------------------------------------------- data files


def _train_on(world: Path, name: str, content: bytes | Callable[[Path], None]) -> Callable[[Path], list[str]]:
    def build(folder: Path) -> list[str]:
        file = folder / name
        if isinstance(content, bytes):
            file.write_bytes(content)
        else:
            content(file)
        return [*train_words(world, folder / "out", file), "--dry_run", "true"]

    return build


def _whole_files(folder: Path) -> dict[str, bytes]:
    """The same good pairs in every kind of file."""
    from datasets import Dataset

    rows = texts(40)
    text = jsonl(rows).encode()
    table = io.StringIO()
    writer = csv.DictWriter(table, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    data = Dataset.from_list(rows)
    data.to_parquet(folder / "p.parquet")
    data.save_to_disk(folder / "disk")
    arrow = next((folder / "disk").glob("*.arrow")).read_bytes()
    return {
        "jsonl": text,
        "json": json.dumps(rows).encode(),
        "csv": table.getvalue().encode(),
        "jsonl.gz": gzip.compress(text),
        "csv.gz": gzip.compress(table.getvalue().encode()),
        "parquet": (folder / "p.parquet").read_bytes(),
        "arrow": arrow,
    }


def _flipped(data: bytes, seed: int, number: int) -> bytes:
    draw = random.Random(seed)
    changed = bytearray(data)
    for _ in range(number):
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def _files(world: Path) -> Iterator[Case]:
    scratch = world / "files"
    scratch.mkdir()
    whole = _whole_files(scratch)
    for kind, data in whole.items():
        yield Case(f"file:{kind}:whole", _train_on(world, f"d.{kind}", data), RAN)
        damaged: dict[str, bytes] = {
            "empty": b"",
            "one byte": data[:1],
            "half": data[: len(data) // 2],
            "all but the last byte": data[:-1],
            "all but the last 30": data[:-30],
            "twice": data * 2,
            "noise": random.Random(1).randbytes(3000),
            "zeros": bytes(len(data)),
            "zeros in the middle": data[: len(data) // 3] + bytes(200) + data[len(data) // 3 + 200 :],
            "html": b"<!doctype html><html><body>404</body></html>\n" * 3,
            "noise behind": data + random.Random(2).randbytes(300),
            "lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12\n",
        }
        damaged |= {f"bits {seed}": _flipped(data, seed, 3 + seed * 10) for seed in range(4)}
        for how, content in damaged.items():
            yield Case(f"file:{kind}:{how}", _train_on(world, f"d.{kind}", content))
    good = whole["jsonl"].decode()
    for name, content, says in (
        ("utf-16", good.encode("utf-16"), ""),
        ("utf-32", good.encode("utf-32"), ""),
        ("latin-1", good.replace("is", "café").encode("latin-1"), ""),
        ("cp1252 quotes", good.replace("is", "“x”").encode("cp1252"), ""),
        ("gzip inside", gzip.compress(good.encode()), ""),
        ("one array", json.dumps(texts(5)).encode(), ""),
        ("trailing commas", good.replace("}\n", "},\n").encode(), ""),
        ("scalars", b"1\n2\n3\n", ""),
        ("strings", b'"a"\n"b"\n', ""),
        ("single quotes", good.replace('"', "'").encode(), ""),
        ("deep", (b'{"prompt":' + b"[" * 100_000 + b"]" * 100_000 + b"}\n"), ""),
        ("5000 digits", b'{"prompt":"a","chosen":' + b"9" * 5000 + b',"rejected":"b"}\n', ""),
        ("NUL", good.replace("What", "Wh\x00at").encode(), ""),
        ("NUL bytes as JSON", b"\x00\x00\x00\n" + good.encode(), ""),
        (
            "half an emoji",
            (good + '{"prompt":"a b","chosen":"x \\ud83d y","rejected":"z"}\n').encode(),
            "d.jsonl:41",
        ),
        ("no newline, unclosed", good.encode() + b'{"prompt":"aaa', "d.jsonl:41"),
        ("duplicate keys", b'{"prompt":"a","chosen":"b","rejected":"c","chosen":"d"}\n', ""),
        ("line separators", good.replace("What", "Wh\u2028at").encode(), ""),
        ("carriage returns", good.replace("\n", "\r").encode(), ""),
    ):
        expect = RAN if name in ("line separators",) else REFUSED
        if name in ("NUL", "carriage returns", "gzip inside", "one array"):
            expect = None
        yield Case(f"file:jsonl text:{name}", _train_on(world, "d.jsonl", content), expect, says)
    for name, content in (
        ("two arrays", json.dumps(texts(3)) * 2),
        ("behind the array", json.dumps(texts(3)) + " x"),
        ("an object", json.dumps(texts(1)[0])),
        ("a number", "5"),
        ("null", "null"),
        ("array of arrays", "[[1],[2]]"),
        ("array of null", "[null, null]"),
        ("100,000 brackets", "[" * 100_000),
        ("data under a key", json.dumps({"data": texts(10)})),
    ):
        expect = None if name in ("an object", "data under a key") else REFUSED
        yield Case(f"file:json text:{name}", _train_on(world, "d.json", content.encode()), expect)
    rows = [f"question {n} please,good answer {n},bad answer {n}" for n in range(60)]
    for name, lines in (
        (
            "stray quote",
            [*rows[:19], 'question 19 please,"good answer 19,bad', *rows[20:29], 'q,a",b', *rows[30:]],
        ),
        ("unquoted comma", [*rows, "Hello, world,a b,c d"]),
        ("too few cells", [*rows, "Hello"]),
        ("no header", rows[0:0]),
        ("header twice", ["prompt,chosen,rejected", *rows]),
        ("semicolons", [row.replace(",", ";") for row in rows]),
        ("tabs", [row.replace(",", "\t") for row in rows]),
        ("two columns of one name", rows),
        ("NUL", [*rows, "a\x00,b,c"]),
        ("a field of 1 MB", [*rows, f"{'a' * 1_000_000},b c,d e"]),
    ):
        head = "prompt,prompt,rejected" if name.startswith("two columns") else "prompt,chosen,rejected"
        content = "\n".join([head, *lines]).encode() + b"\n"
        expect = REFUSED if name in ("stray quote", "unquoted comma", "too few cells", "no header") else None
        yield Case(f"file:csv text:{name}", _train_on(world, "d.csv", content), expect)
    yield from _odd_paths(world, good)


def _odd_paths(world: Path, good: str) -> Iterator[Case]:
    def unreadable(file: Path) -> None:
        file.write_text(good)
        file.chmod(0)

    def fifo(file: Path) -> None:
        os.mkfifo(file)

    odd: dict[str, Callable[[Path], None]] = {
        "a folder": lambda file: file.mkdir(),
        "dead link": lambda file: file.symlink_to("nowhere"),
        "link to itself": lambda file: file.symlink_to(file),
        "named pipe": fifo,
    }
    if os.geteuid() != 0:
        odd["no permission"] = unreadable
    for how, make in odd.items():
        yield Case(f"file:path:{how}", _train_on(world, "d.jsonl", make), REFUSED)
    for name in (
        "/dev/null",
        "",
        ".",
        "nowhere.jsonl",
        "a/b",
        "d.xyz",
        "x" * 300,
        "a\nb",
        "~nobody/x.jsonl",
        "/proc",
    ):
        words = train_words(world, "out", name or " ")
        yield Case(f"file:path:{name[:20]!r}", lambda _, words=words: [*words, "--dry_run", "true"], REFUSED)

    def disk(folder: Path, damage: Callable[[Path], None]) -> list[str]:
        from datasets import Dataset

        Dataset.from_list(texts(20)).save_to_disk(folder / "disk")
        damage(folder / "disk")
        return [*train_words(world, folder / "out", folder / "disk"), "--dry_run", "true"]

    for how, damage in {
        "whole": lambda path: None,
        "state.json cut": lambda path: (path / "state.json").write_text('{"_data'),
        "state.json gone": lambda path: (path / "state.json").unlink(),
        "info cut": lambda path: (path / "dataset_info.json").write_text("{"),
        "info a list": lambda path: (path / "dataset_info.json").write_text("[]"),
        "arrow gone": lambda path: [file.unlink() for file in path.glob("*.arrow")],
        "arrow cut": lambda path: [
            file.write_bytes(file.read_bytes()[:100]) for file in path.glob("*.arrow")
        ],
    }.items():
        expect = RAN if how == "whole" else None
        yield Case(f"file:disk:{how}", lambda folder, damage=damage: disk(folder, damage), expect)


# ------------------------------------------------------------------------------------------- rows

_TURN = {"role": "assistant", "content": "Yes, I do."}
_ASK = {"role": "user", "content": "Do you?"}
_SHAPES: dict[str, Row] = {
    "standard": {"prompt": "a b", "chosen": "c d", "rejected": "e f"},
    "conversational": {"prompt": [_ASK], "chosen": [_TURN], "rejected": [{**_TURN, "content": "No."}]},
    "implicit": {"chosen": [_ASK, _TURN], "rejected": [_ASK, {**_TURN, "content": "No."}]},
    "messages": {"messages": [_ASK, _TURN], "rejected_response": "No."},
    "sharegpt": {
        "conversations": [{"from": "human", "value": "Do you?"}],
        "chosen": {"from": "gpt", "value": "Yes."},
        "rejected": {"from": "gpt", "value": "No."},
    },
    "instruction": {
        "instruction": "Do it",
        "input": "x",
        "system": "Be.",
        "chosen": "Yes.",
        "rejected": "No.",
    },
    "ranked": {"prompt": "a b", "answers": ["x y", "z"], "scores": [1.0, 0.5]},
    "pairwise": {"prompt": "a b", "response_0": "x", "response_1": "y", "better_response_id": 1},
    "hh": {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
    "with tools": {
        "prompt": [_ASK],
        "chosen": [_TURN],
        "rejected": [{**_TURN, "content": "No."}],
        "tools": [{}],
    },
    "with kwargs": {
        "prompt": [_ASK],
        "chosen": [_TURN],
        "rejected": [{**_TURN, "content": "No."}],
        "chat_template_kwargs": {"enable_thinking": True},
    },
    "with history": {"instruction": "Do it", "history": [["a", "b"]], "chosen": "Yes.", "rejected": "No."},
}
_VALUES: dict[str, Any] = {
    "null": None,
    "5": 5,
    "true": True,
    "empty text": "",
    "blank text": " \n",
    "[]": [],
    "{}": {},
    "[null]": [None],
    "[[]]": [[]],
    "nested": {"a": {"b": [{"c": 1}]}},
    "role missing": [{"content": "x"}],
    "content missing": [{"role": "assistant"}],
    "content 5": [{"role": "assistant", "content": 5}],
    "role 5": [{"role": 5, "content": "x"}],
    "unknown role": [{"role": "wizard", "content": "x"}],
    "content null": [{"role": "assistant", "content": None}],
    "half an emoji": "x \ud83d y",
    "half an emoji inside": [{"role": "assistant", "content": "x \ud83d y"}],
    "nan": float("nan"),
    "only system": [{"role": "system", "content": "x"}],
    "two assistants": [_TURN, _TURN],
}


def _rows(world: Path) -> Iterator[Case]:
    """One bad value in one column of the last of some good rows; the run must stop there or count it."""
    for shape, row in _SHAPES.items():
        for column in row:
            for value_name, value in _VALUES.items():
                bad = [*[dict(row) for _ in range(3)], {**row, column: value}]
                content = jsonl(bad).encode()
                yield Case(f"row:{shape}:{column}:{value_name}", _train_on(world, "d.jsonl", content))


def _texts_in_rows(world: Path) -> Iterator[Case]:
    """Texts that hold what a template writes, what a tokenizer splits oddly, and what is very long."""
    odd = {
        "special token": "a <|endoftext|> b",
        "header": "<|im_start|>assistant\nYes",
        "control": "a\x01\x02\x1b[31mb",
        "bidi": "a\u202eb",
        "zero width": "a\u200bb\ufeff",
        "long word": "a" * 200_000,
        "many words": "a b " * 60_000,
        "combining": "e" + "\u0301" * 5000,
        "jinja": "{{ 7 * 7 }}{% raw %}",
        "only newlines": "\n\n\n",
        "html": "<script>alert(1)</script>",
        "emoji": "👩‍👩‍👧‍👦" * 200,
        "replacement": "a\ufffdb",
    }
    for name, text in odd.items():
        for place in ("prompt", "chosen"):
            rows = pairs(8)
            rows[3][place][0]["content"] = text
            content = jsonl(rows).encode()

            def build(folder: Path, content: bytes = content) -> list[str]:
                (folder / "d.jsonl").write_bytes(content)
                return [*train_words(world, folder / "out", folder / "d.jsonl"), "--max_dropped", "0.5"]

            yield Case(f"text:{place}:{name}", build)


# ------------------------------------------------------------------------------------------- settings

_NUMBERS = ("-1", "0", "1e22", "nan", ".inf", "foo", "null", "[1]", "{a: 1}", "true", "1:30")


def _settings(world: Path) -> Iterator[Case]:
    """Every setting with values it cannot have; a dry run, so that nothing is trained by those it can."""
    from orpo.settings.schema import known_settings

    for name in sorted(known_settings()):
        if name in ("output_dir", "model_name_or_path", "dry_run", "env"):
            continue
        draw = random.Random(name)
        for value in draw.sample(_NUMBERS, 3):

            def build(folder: Path, name: str = name, value: str = value) -> list[str]:
                recipe = folder / "r.yaml"
                recipe.write_text(f"{name}: {value}\n")
                words = _without(train_words(world, folder / "out"), name)
                return ["train", str(recipe), *words[1:], "--dry_run", "true"]

            yield Case(f"setting:{name}:{value}", build)
    together: dict[str, tuple[Row, str | None]] = {
        "best with other steps": ({"load_best_model_at_end": True, "save_steps": 7, "eval_steps": 3}, None),
        "best without evaluation": ({"load_best_model_at_end": True, "eval_strategy": "no"}, None),
        "unknown metric": ({"metric_for_best_model": "foo"}, REFUSED),
        "bf16 and fp16": ({"bf16": True, "fp16": True}, REFUSED),
        "galore": ({"optim": "galore_adamw"}, REFUSED),
        "lomo": ({"optim": "lomo"}, REFUSED),
        "schedule free": ({"optim": "schedule_free_adamw"}, REFUSED),
        "scheduler without arguments": ({"lr_scheduler_type": "cosine_with_min_lr"}, REFUSED),
        "scheduler with others": ({"lr_scheduler_kwargs": {"nope": 3}}, REFUSED),
        "report to foo": ({"report_to": "foo"}, REFUSED),
        "fsdp": ({"fsdp": "full_shard"}, None),
        "fsdp foo": ({"fsdp": "foo"}, REFUSED),
        "targets": ({"use_peft": True, "lora_target_modules": "(("}, REFUSED),
        "targets that are not there": ({"use_peft": True, "lora_target_modules": ["nope"]}, REFUSED),
        "model arguments": ({"model_init_kwargs": {"a": 1}}, REFUSED),
        "columns swap": ({"columns": {"chosen": "rejected", "rejected": "chosen"}}, RAN),
        "columns that are not there": ({"columns": {"chosen": "better"}}, REFUSED),
        "split that is not there": ({"dataset_train_split": "foo"}, REFUSED),
        "test split that is not there": ({"dataset_test_split": "foo"}, REFUSED),
        "weights": ({"dataset_name": {"train.jsonl": float("nan")}}, REFUSED),
        "weight too large": ({"dataset_name": {"train.jsonl": 1e12}}, REFUSED),
        "weight infinite": ({"dataset_name": {"train.jsonl": float("inf")}}, REFUSED),
        "length too short": ({"max_length": 1}, REFUSED),
        "length beyond the model": ({"max_length": 100_000}, None),
        "template": ({"chat_template": "nope.jinja"}, REFUSED),
        "template that is broken": ({"chat_template": "{% for %}"}, REFUSED),
        "template without end": ({"chat_template": "{% for i in range(10**9) %}{% endfor %}x"}, REFUSED),
        "prefetch without workers": ({"dataloader_prefetch_factor": 2}, REFUSED),
        "warm-up": ({"warmup_ratio": 2}, REFUSED),
        "beta 1.5": ({"adam_beta1": 1.5}, REFUSED),
        "epsilon": ({"adam_epsilon": -1}, REFUSED),
        "environment": ({"env": {"X": "a\0b"}}, REFUSED),
        "deepspeed": ({"deepspeed": "nope.json"}, REFUSED),
        "eval set that is the training set": ({"eval_dataset_name": "train.jsonl"}, REFUSED),
        "output is the model": ({"output_dir": "base", "model_name_or_path": "base"}, REFUSED),
        "output is a file": ({"output_dir": "train.jsonl"}, REFUSED),
        "output is /dev/null": ({"output_dir": "/dev/null"}, REFUSED),
        "output is empty": ({"output_dir": ""}, REFUSED),
        "output inside a file": ({"output_dir": "train.jsonl/x"}, REFUSED),
        "output in /proc": ({"output_dir": "/proc/x"}, REFUSED),
        "resume from nowhere": ({"resume_from_checkpoint": "nowhere"}, REFUSED),
        "answers without end": ({"max_completion_length": 100_000, "num_samples": 1}, None),
    }
    for name, (recipe, expect) in together.items():

        def build(folder: Path, recipe: Row = recipe, name: str = name) -> list[str]:
            for part in ("base", "train.jsonl"):
                target = folder / part
                source = world / part
                shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
            (folder / "r.yaml").write_text(yaml.safe_dump(recipe))
            words = train_words(world, folder / "out")
            for key in recipe:
                words = _without(words, key)
            return ["train", "r.yaml", *words[1:]]

        yield Case(f"settings:{name}", build, expect)


def _without(words: Sequence[str], name: str) -> list[str]:
    """The words of a command without one option and its value."""
    kept, rest = list(words[:1]), list(words[1:])
    while rest:
        option, value = rest.pop(0), rest.pop(0)
        if option != f"--{name}":
            kept += [option, value]
    return kept


def _recipes(world: Path) -> Iterator[Case]:
    good = f"model_name_or_path: {world / 'base'}\ndataset_name: {world / 'train.jsonl'}\n"
    contents: dict[str, bytes] = {
        "empty": b"",
        "a list": b"- a\n- b\n",
        "a text": b"hello\n",
        "null": b"null\n",
        "unclosed": good.encode() + b"columns: {a: b\n",
        "tabs": good.encode() + b"\tbeta: 1\n",
        "NUL": good.encode() + b"run_name: a\x00b\n",
        "escape": good.encode() + b"run_name: a\x1bb\n",
        "noise": random.Random(3).randbytes(500),
        "utf-16": good.encode("utf-16"),
        "latin-1": (good + "run_name: café\n").encode("latin-1"),
        "a tag": good.encode() + b"beta: !!python/object/apply:os.system [true]\n",
        "a float tag": good.encode() + b"beta: !!float O\n",
        "a merge key": b"a: &a {beta: 1}\n<<: *a\n" + good.encode(),
        "an alias to itself": good.encode() + b"columns: &a {b: *a}\n",
        "undefined alias": good.encode() + b"beta: *a\n",
        "a bomb": good.encode()
        + b"".join(
            f"x{i}: &x{i} [{', '.join([f'*x{i - 1}' if i else 'a'] * 9)}]\n".encode() for i in range(9)
        ),
        "duplicates": good.encode() + b"beta: 1\nbeta: 2\n",
        "nested duplicates": good.encode() + b"columns: {chosen: a, chosen: b}\n",
        "two documents": good.encode() + b"---\nbeta: 1\n",
        "5000 digits": good.encode() + b"seed: " + b"9" * 5000 + b"\n",
        "deep": good.encode() + b"columns: " + b"{a: " * 3000 + b"1" + b"}" * 3000 + b"\n",
        "a date": good.encode() + b"run_name: 2026-11-27\n",
        "a number key": good.encode() + b"5: 6\n",
        "a list key": good.encode() + b"? [a, b]\n: c\n",
        "a null key": good.encode() + b"null: c\n",
        "lone surrogate": good.encode() + b'run_name: "\\ud83d"\n',
        "infinite whole number": good.encode() + b"lora_r: .inf\n",
        "a typing error": good.encode() + b"learning_rat: 1\n",
    }
    refused = set(contents) - {"a date", "a merge key", "lone surrogate"}
    for name, content in contents.items():

        def build(folder: Path, content: bytes = content) -> list[str]:
            (folder / "r.yaml").write_bytes(content)
            return ["train", "r.yaml", "--output_dir", "out", "--dry_run", "true"]

        yield Case(f"recipe:{name}", build, REFUSED if name in refused else None)
    for suffix in ("json", "toml", "txt", ""):

        def build(folder: Path, suffix: str = suffix) -> list[str]:
            (folder / f"r.{suffix}").write_text('{"beta": ')
            return ["train", f"r.{suffix}", "--dry_run", "true"]

        yield Case(f"recipe:as .{suffix}", build, REFUSED)


# ------------------------------------------------------------------------------------------- models


def _json(change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def apply(file: Path) -> None:
        file.write_text(json.dumps(change(json.loads(file.read_text()))))

    return apply


def _tensors(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Path], None]:
    def apply(file: Path) -> None:
        from safetensors.torch import load_file, save_file

        save_file(change(load_file(file)), file, metadata={"format": "pt"})

    return apply


def write(content: bytes) -> Callable[[Path], None]:
    """Damage that replaces a file."""

    def apply(file: Path) -> None:
        file.write_bytes(content)

    return apply


def _models(world: Path) -> Iterator[Case]:
    """Damage to one file of a model folder; a real step, so that a bad model cannot hide."""

    def cut(file: Path) -> None:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])

    everywhere = {
        "empty": write(b""),
        "cut": cut,
        "noise": write(random.Random(4).randbytes(400)),
        "null": write(b"null"),
        "a list": write(b"[]"),
        "an object": write(b'{"bad": 1}'),
        "gone": Path.unlink,
    }
    files = (
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "model.safetensors",
        "generation_config.json",
        "chat_template.jinja",
    )
    for file in files:
        for how, damage in everywhere.items():
            sure = file in ("config.json", "model.safetensors") or (
                file == "tokenizer.json" and how != "gone"
            )
            yield _model(world, file, how, damage, REFUSED if sure else None)
    yield from _configs(world)
    yield from _weights(world)
    yield from _tokenizers(world)
    pickle = b"\x80\x04\x95\x1d\x00\x00\x00\x00\x00\x00\x00\x8c\x08builtins\x8c\x05print\x93\x8c\x02hi\x85R."
    for file in ("pytorch_model.bin", "adapter_model.bin"):
        yield _model(world, file, "a foreign pickle", write(pickle), None, drop="model.safetensors")
    yield from _adapters(world, everywhere)


def _configs(world: Path) -> Iterator[Case]:
    config: dict[str, Callable[[Any], Any]] = {
        "one layer more": lambda c: {**c, "num_hidden_layers": 3},
        "one layer less": lambda c: {**c, "num_hidden_layers": 1},
        "no layers": lambda c: {**c, "num_hidden_layers": 0},
        "layers a text": lambda c: {**c, "num_hidden_layers": "two"},
        "layers negative": lambda c: {**c, "num_hidden_layers": -1},
        "heads that do not divide": lambda c: {**c, "num_attention_heads": 5},
        "no heads": lambda c: {**c, "num_attention_heads": 0},
        "another activation": lambda c: {**c, "hidden_act": "nope"},
        "another width": lambda c: {**c, "hidden_size": 64},
        "another vocabulary": lambda c: {**c, "vocab_size": 100},
        "another architecture": lambda c: {**c, "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]},
        "unknown type": lambda c: {**c, "model_type": "nope"},
        "no type": lambda c: {k: v for k, v in c.items() if k != "model_type"},
        "type 5": lambda c: {**c, "model_type": 5},
        "a classifier": lambda c: {**c, "architectures": ["LlamaForSequenceClassification"]},
        "an encoder": lambda c: {"model_type": "bert"},
        "encoder and decoder": lambda c: {"model_type": "t5"},
        "remote code": lambda c: {**c, "model_type": "mine", "auto_map": {"AutoConfig": "a.B"}},
        "quantized": lambda c: {**c, "quantization_config": {"quant_method": "gptq", "bits": 4}},
        "quantized somehow": lambda c: {**c, "quantization_config": {"quant_method": "nope"}},
        "dtype": lambda c: {**c, "dtype": "float99"},
        "rope": lambda c: {**c, "rope_parameters": {"rope_type": "nope"}},
        "positions a text": lambda c: {**c, "max_position_embeddings": "many"},
        "epsilon a text": lambda c: {**c, "rms_norm_eps": "small"},
    }
    said_elsewhere = {"a classifier", "dtype", "positions a text", "no type", "one layer less"}
    for how, change in config.items():
        expect = None if how in said_elsewhere else REFUSED
        yield _model(world, "config.json", how, _json(change), expect)


def _weights(world: Path) -> Iterator[Case]:
    import torch

    def without(part: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
        return lambda t: {name: value for name, value in t.items() if part not in name}

    def filled(value: float) -> Callable[[dict[str, Any]], dict[str, Any]]:
        return lambda t: {
            n: v if "layers.1.mlp.up" not in n else torch.full_like(v, value) for n, v in t.items()
        }

    weights: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
        "a tensor gone": without("layers.1.mlp.up_proj"),
        "the head gone": without("lm_head"),
        "the embedding gone": without("embed_tokens"),
        "norm gone": without("model.norm"),
        "a layer gone": without("layers.1."),
        "NaN": filled(float("nan")),
        "infinite": filled(float("inf")),
        "int8": lambda t: {name: value.to(torch.int8) for name, value in t.items()},
        "other names": lambda t: {f"x.{name}": value for name, value in t.items()},
        "transposed": lambda t: {n: v.T.contiguous() if "up_proj" in n else v for n, v in t.items()},
        "a reward model": lambda t: without("lm_head")(t) | {"score.weight": torch.zeros(1, 32)},
    }
    for how, change_weights in weights.items():
        yield _model(world, "model.safetensors", how, _tensors(change_weights), REFUSED)


def _tokenizers(world: Path) -> Iterator[Case]:
    tokens: dict[str, Callable[[Any], Any]] = {
        "no eos": lambda c: {k: v for k, v in c.items() if "eos" not in k},
        "eos 5": lambda c: {**c, "eos_token": 5},
        "length a text": lambda c: {**c, "model_max_length": "x"},
        "class unknown": lambda c: {**c, "tokenizer_class": "Nope"},
        "template broken": lambda c: {**c, "chat_template": "{% if %}"},
        "template 5": lambda c: {**c, "chat_template": 5},
    }
    for how, change in tokens.items():
        yield _model(world, "tokenizer_config.json", how, _json(change))
    yield _model(world, "tokenizer.json", "tokens beyond the embedding", _json(_more_tokens), REFUSED)


def _adapters(world: Path, everywhere: Mapping[str, Callable[[Path], Any]]) -> Iterator[Case]:
    adapter = {
        "garbage": write(b"{{"),
        "a list": write(b"[]"),
        "null": write(b"null"),
        "gone": Path.unlink,
        "no base": _json(lambda c: {**c, "base_model_name_or_path": None}),
        "base that is not there": _json(lambda c: {**c, "base_model_name_or_path": "nowhere/x"}),
        "another kind": _json(lambda c: {**c, "peft_type": "NOPE"}),
        "rank a text": _json(lambda c: {**c, "r": "many"}),
        "rank 0": _json(lambda c: {**c, "r": 0}),
        "targets 5": _json(lambda c: {**c, "target_modules": 5}),
        "key unknown": _json(lambda c: {**c, "brand_new_key": 5}),
    }
    for how, damage in adapter.items():
        yield _adapter(world, "adapter_config.json", how, damage, None if how == "key unknown" else REFUSED)
    for how, damage in everywhere.items():
        yield _adapter(world, "adapter_model.safetensors", how, damage, REFUSED)


def _more_tokens(tokenizer: Any) -> Any:
    last = max(token["id"] for token in tokenizer["added_tokens"])
    size = max([last, *tokenizer["model"]["vocab"].values()])
    one = {**tokenizer["added_tokens"][0], "content": "is 0 plus", "id": size + 50, "special": False}
    tokenizer["added_tokens"].append(one)
    return tokenizer


def _model(
    world: Path, file: str, how: str, damage: Callable[[Path], Any], expect: str | None = None, drop: str = ""
) -> Case:
    def build(folder: Path) -> list[str]:
        shutil.copytree(world / "base", folder / "base")
        if drop:
            (folder / "base" / drop).unlink()
        if (folder / "base" / file).exists() or drop:
            damage(folder / "base" / file)
        words = train_words(world, folder / "out")
        words[words.index("--model_name_or_path") + 1] = str(folder / "base")
        return words

    return Case(f"model:{file}:{how}", build, expect)


def _adapter(world: Path, file: str, how: str, damage: Callable[[Path], Any], expect: str | None) -> Case:
    def build(folder: Path) -> list[str]:
        shutil.copytree(world / "lora", folder / "lora")
        for checkpoint in (folder / "lora").glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        damage(folder / "lora" / file)
        return ["eval", str(folder / "lora"), "--data", str(world / "test.jsonl")]

    return Case(f"adapter:{file}:{how}", build, expect)


# ------------------------------------------------------------------------------------------- run directories


def _runs(world: Path) -> Iterator[Case]:
    """Damage to each file of a finished run, given to each command that reads runs."""
    names = sorted(
        str(path.relative_to(world / "run"))
        for path in (world / "run").rglob("*")
        if path.is_file() and "checkpoint-2" not in path.parts
    )
    damages: dict[str, Callable[[Path], Any]] = {
        "empty": lambda file: file.write_bytes(b""),
        "cut": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
        "of another shape": lambda file: file.write_text("[5]"),
        "flipped": lambda file: file.write_bytes(
            _flipped(file.read_bytes(), 5, 1 + file.stat().st_size // 200)
        ),
        "gone": Path.unlink,
    }
    for name in names:
        weights = name.endswith((".safetensors", ".pt", ".pth", ".bin"))
        for how, damage in damages.items():
            commands: tuple[str, ...] = (
                ("report", "train") if name.startswith("checkpoint") else ("report", "eval")
            )
            if weights or "/" in name:
                commands = ("train",)
            for command in commands:
                yield _run(world, name, how, damage, command)


def _run(world: Path, name: str, how: str, damage: Callable[[Path], Any], command: str) -> Case:
    def build(folder: Path) -> list[str]:
        shutil.copytree(world / "run", folder / "run")
        damage(folder / "run" / name)
        if command == "report":
            return ["report", "run"]
        if command == "eval":
            return ["eval", "run", "--data", str(world / "test.jsonl")]
        for done in ("README.md", "model.safetensors"):  # as if it had been killed at the end
            (folder / "run" / done).unlink(missing_ok=True)
        words = [*train_words(world, folder / "run"), "--save_steps", "2"]
        words[words.index("--max_steps") + 1] = "4"
        return [*words, "--force", "true"]

    return Case(f"run:{command}:{name}:{how}", build)


def _command_lines(world: Path) -> Iterator[Case]:
    lines: dict[str, list[str]] = {
        "unknown word": ["trian"],
        "unknown option": ["eval", "run", "--dta", "x"],
        "no model": ["train", "--dataset_name", "x.jsonl"],
        "no data": ["train", "--model_name_or_path", "x"],
        "option without value": ["train", "--beta"],
        "word without option": ["train", "a.yaml", "b.yaml"],
        "recipe that is not there": ["train", "nowhere.yaml"],
        "recipe that is a folder": ["train", "."],
        "option twice": ["train", "--beta", "1", "--beta", "2"],
        "eval of nothing": ["eval", "nowhere"],
        "eval without data": ["eval", str(world / "base")],
        "eval on nothing": ["eval", str(world / "run"), "--data", "nowhere.jsonl"],
        "eval under a path": [
            "eval",
            str(world / "run"),
            "--data",
            str(world / "test.jsonl"),
            "--name",
            "../../x",
        ],
        "eval under a NUL": [
            "eval",
            str(world / "run"),
            "--data",
            str(world / "test.jsonl"),
            "--name",
            "a\tb/c",
        ],
        "report of nothing": ["report", "nowhere"],
        "report of a model": ["report", str(world / "base")],
        "chat of nothing": ["chat", "nowhere"],
        "data show of nothing": ["data", "show", "nowhere.jsonl", "--model", str(world / "base")],
        "data show without model": ["data", "show", str(world / "train.jsonl")],
        "data show row -1": [
            "data",
            "show",
            str(world / "train.jsonl"),
            "--model",
            str(world / "base"),
            "--row",
            "-1",
        ],
        "data show row x": [
            "data",
            "show",
            str(world / "train.jsonl"),
            "--model",
            str(world / "base"),
            "--row",
            "x",
        ],
        "data show row 10^20": [
            "data",
            "show",
            str(world / "train.jsonl"),
            "--model",
            str(world / "base"),
            "--row",
            "1" + "0" * 20,
        ],
        "config with options": ["config", "--nope"],
    }
    runs = {"option twice", "eval without data", "report of a model", "eval under a path", "eval under a NUL"}
    for name, words in lines.items():
        yield Case(f"command:{name}", lambda _, words=words: words, None if name in runs else REFUSED)
