"""`export_run`: from a run to a checked folder, GGUF files and a Modelfile; `orpo export`, for Python too.

Everything is written next to where it is to be, checked there by processes that know nothing of the run, and
renamed. What fails its check is deleted: a wrong model under a good name is worse than none.
"""

from __future__ import annotations

import os
import re
import shutil
import unicodedata
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import AutoConfig
from transformers.utils import logging

from orpo.console import say
from orpo.errors import ConfigError, RunError
from orpo.export.card import write_export_card
from orpo.export.check import (
    GGUF_LIMITS,
    LIMITS,
    Comparison,
    Expected,
    RoundingError,
    ask_another_process,
    compare,
    refuse,
)
from orpo.export.folder import check_folder, write_folder
from orpo.export.gguf_vocabulary import CONTROL, Vocabulary, vocabulary_of
from orpo.export.gguf_writer import TYPES, check_family, write_gguf
from orpo.export.hub import check_push, push
from orpo.export.merged import Merged, merge_run
from orpo.export.ollama import modelfile, turns_of
from orpo.export.reload import log_probs
from orpo.export.serving import MODELFILE, serving_commands
from orpo.run.checkpoints import base_model_name, model_folder
from orpo.run.directory import RunDirectory, gguf_file, is_adapter, write_json
from orpo.run.public import is_local
from orpo.settings.config import inherited_by_evaluation

_GGUF_LIMIT_S = 1800.0
_TOKENS = {"f32": 300}
"""Log-probs compared for a type of GGUF file, where it is not 200: one request each."""
_INSTALL = "pip install 'orpo[gguf]'"


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """What was exported.

    Attributes:
        folder: The model folder.
        dtype: Of its weights.
        check: How the folder agrees with the run.
        gguf: By type, the file, and how it agrees; None where the package that checks is missing.
        commands: By server, what to type.
        address: On the hub, where it was uploaded.
    """

    folder: Path
    dtype: str
    check: Comparison
    gguf: dict[str, tuple[Path, Comparison | None]] = field(default_factory=dict)
    commands: dict[str, str] = field(default_factory=dict)
    address: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How to export.

    Attributes:
        gguf: Types of GGUF files to write as well (`f32`, `f16`, `bf16`, `q8_0`).
        dtype: Of the weights in the folder (`float32`, `bfloat16`, `float16`); None: that of the base model.
        base: Base model of an adapter, where it is no longer where it was.
        data: Pairs to compare on; None: those that the run held out, else its first.
        split: Of a hub data set.
        max_shard_size: Largest weight file.
        force: Replace an earlier export.
        push: `owner/name` to upload to.
        private: Whether a new repository is private.
    """

    gguf: Sequence[str] = ()
    dtype: str | None = None
    base: str | None = None
    data: Any = None
    split: str | None = None
    max_shard_size: str = "5GB"
    force: bool = False
    push: str | None = None
    private: bool = False


def export_run(run: str, output_dir: str | Path | None = None, **options: Any) -> Exported:
    """Export a run, or any model or adapter, and check what was written.

    Args:
        run: Run directory, model or adapter folder, GGUF file or hub name.
        output_dir: Where to; None: `RUN-export`.
        options: Those of `Options`.

    Raises:
        OrpoError: The run cannot be exported, or what was written does not agree with it.
    """
    asked = Options(**options)
    logging.disable_progress_bar()
    target = Path(output_dir) if output_dir is not None else _default_target(run)
    _check_arguments(run, target, asked)
    try:
        exported = _export(run, target, asked, asked.dtype)
    except RoundingError as error:
        if asked.dtype is not None:
            raise
        say(f"{run}: in the dtype of its base, {error.problem}; so it is written in float32")
        exported = _export(run, target, asked, "float32")
    if asked.push is None:
        return exported
    return replace(exported, address=push(target, asked.push, private=asked.private))


def _export(run: str, target: Path, asked: Options, dtype: str | None) -> Exported:
    """Write everything next to where it is to be, check it there, and rename it."""
    merged = merge_run(run, base=asked.base, dtype=dtype, data=asked.data, split=asked.split)
    work = target.with_name(f".{target.name}.exporting")
    shutil.rmtree(work, ignore_errors=True)
    try:
        work.mkdir(parents=True)
        files = _write_ggufs(merged, work, target.name, asked.gguf)
        expected = write_folder(merged, work, max_shard_size=asked.max_shard_size)
        trust = bool(merged.recipe.get("trust_remote_code"))
        check = check_folder(work, expected, merged.dtype_name, trust_remote_code=trust)
        exported = _described(run, merged, work, target, check, files)
        if target.exists():
            shutil.rmtree(target)
        os.rename(work, target)
        return exported
    except OSError as error:
        raise RunError(f"{target} could not be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _default_target(run: str) -> Path:
    path = Path(run).expanduser()
    if path.exists():
        path = path if path.name not in ("", "..") else path.resolve()
        return path.with_name(f"{path.stem if path.is_file() else path.name}-export")
    return Path(f"{path.name}-export")


def _check_arguments(run: str, target: Path, asked: Options) -> None:
    """Refuse what can be refused before a model is loaded."""
    if asked.dtype is not None and asked.dtype not in LIMITS:
        raise ConfigError(f"--dtype {asked.dtype}: expected one of {', '.join(LIMITS)}")
    if not re.fullmatch(r"[1-9]\d*([KMGT]B)?", str(asked.max_shard_size), re.IGNORECASE):
        raise ConfigError(f"--max_shard_size {asked.max_shard_size}: expected a size, such as 5GB or 500MB")
    if asked.private and asked.push is None:
        raise ConfigError(
            "--private: nothing is uploaded without --push OWNER/NAME; leave it out, or add that"
        )
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        if not asked.force:
            raise ConfigError(f"{target} is there already; name another --output_dir, or add --force")
        if not RunDirectory(target).export_record.is_file():
            raise ConfigError(f"{target} holds something else than an export; name another --output_dir")
    if asked.push is not None:
        check_push(asked.push)
    if asked.gguf:
        _check_gguf(run, asked.gguf)


def _check_gguf(run: str, kinds: Sequence[str]) -> None:
    """Refuse types and families that are not written here."""
    for kind in kinds:
        if kind not in TYPES:
            raise ConfigError(
                f"--gguf {kind}: expected {', '.join(TYPES)}; for smaller ones write f16, then llama-quantize"
            )
    if find_spec("gguf") is None:
        raise ConfigError(f"--gguf needs the package gguf: {_INSTALL}")
    folder = model_folder(run)
    source = base_model_name(folder) if is_adapter(folder) else folder
    if source and gguf_file(source) is None:
        try:
            config = AutoConfig.from_pretrained(source)
        except (OSError, ValueError):
            return  # loading says why
        check_family(config)


# ------------------------------------------------------------------------------------------- GGUF files


def _write_ggufs(
    merged: Merged, work: Path, name: str, kinds: Sequence[str]
) -> dict[str, tuple[Path, Comparison | None]]:
    """Write and check a file of each type, from the weights in float32; and the Modelfile for the last."""
    files: dict[str, tuple[Path, Comparison | None]] = {}
    if not kinds:
        return files
    check_family(merged.model.config)
    stops = list(merged.expected.stops.values())
    vocabulary = vocabulary_of(merged.tokenizer, merged.template, stops)
    for kind in dict.fromkeys(kinds):
        path = work / f"{name}-{kind}.gguf"
        for line in write_gguf(path, merged.model, vocabulary, kind):
            say(f"{path.name}: {line}")
        files[kind] = (path, check_gguf(path, merged, vocabulary, kind))
    turns = None
    if merged.template is not None:
        turns = turns_of(merged.tokenizer, merged.template, merged.expected.conversations)
        if turns is None:
            say(
                f"{MODELFILE}: Ollama's language cannot write this chat template; send prompts with raw: true"
            )
    text = modelfile(path.name, turns, list(merged.expected.stops))
    (work / MODELFILE).write_text(text, encoding="utf-8")
    return files


def check_gguf(path: Path, merged: Merged, vocabulary: Vocabulary, kind: str) -> Comparison | None:
    """Let llama.cpp load a file in a process of its own, and compare what it computes with the run.

    Returns:
        None, after a printed line, where the package that runs llama.cpp is not installed.

    Raises:
        RunError: It cannot be loaded, or does not agree with the run.
    """
    if find_spec("xllamacpp") is None:
        say(f"{path.name}: not checked, for want of the package xllamacpp: {_INSTALL}")
        return None
    expected = _expected_of_llama_cpp(merged, vocabulary)
    ids = [merged.tokenizer(text, add_special_tokens=False)["input_ids"] for text in expected.prompts]
    opening = merged.tokenizer.bos_token if vocabulary.adds_bos else ""
    names = [
        (token, number)
        for number, (token, sort) in enumerate(zip(vocabulary.tokens, vocabulary.kinds, strict=True))
        if sort == CONTROL and number not in expected.stops.values()
    ]
    request = {
        "path": str(path),
        "bos": opening,
        "prompt_tokens": [len(one) for one in ids],
        "most_tokens": _TOKENS.get(kind, 200),
        "controls": names,
        **expected.questions(),
    }
    try:
        found = ask_another_process("orpo.export.llama_cpp", request, limit_s=_GGUF_LIMIT_S)
    except RunError as error:
        raise RunError(f"{path.name} is refused: {error}") from error
    comparison = compare(expected, found, GGUF_LIMITS[kind])
    finer = " or ".join(one for one in ("f16", "f32") if GGUF_LIMITS[one] < GGUF_LIMITS[kind])
    try:
        refuse(path.name, expected, found, comparison, f"--gguf {finer} keeps them" if finer else None)
    except RoundingError as error:  # which asks for another dtype of the folder
        raise RunError(str(error)) from None
    return comparison


def _expected_of_llama_cpp(merged: Merged, vocabulary: Vocabulary) -> Expected:
    """What the run says, without what a GGUF file leaves out: spare rows, and the normalisation of text."""
    expected, rows = merged.expected, merged.model.get_input_embeddings().weight.shape[0]
    if rows > len(vocabulary.tokens):
        places = zip(expected.sequences, expected.starts, strict=True)
        scores = [log_probs(merged.model, *place, len(vocabulary.tokens)) for place in places]
        expected = replace(expected, log_probs=scores)
    if vocabulary.normalises:
        expected = replace(expected, texts=[unicodedata.normalize("NFC", text) for text in expected.texts])
    return expected


# ------------------------------------------------------------------------------------------- card and record


def _described(
    run: str,
    merged: Merged,
    work: Path,
    target: Path,
    check: Comparison,
    files: dict[str, tuple[Path, Comparison | None]],
) -> Exported:
    """Write the card and the record; returns the result under its final paths."""
    moved = {kind: (target / path.name, found) for kind, (path, found) in files.items()}
    last = next((path for path, _ in reversed(moved.values())), None)
    context = int(merged.model.config.get_text_config().max_position_embeddings)
    dtype = merged.dtype_name
    beside = Path(target.name, last.name) if last is not None else None
    here = serving_commands(Path(target.name), dtype_name=dtype, context=context, gguf=beside)
    checks = {f"folder, {dtype}": check, **{kind: found for kind, (_, found) in files.items()}}
    write_export_card(run, merged, work, target.name, checks=checks, commands=here)
    record = {
        "exported": Path(run).name,
        "checks": {what: None if found is None else asdict(found) for what, found in checks.items()},
        "recipe": _remembered(merged),
    }
    write_json(RunDirectory(work).export_record, record)
    return Exported(
        folder=target,
        dtype=dtype,
        check=check,
        gguf=moved,
        commands=serving_commands(target, dtype_name=dtype, context=context, gguf=last),
    )


def _remembered(merged: Merged) -> dict[str, Any]:
    """The settings that decide how an exported model is evaluated and talked to."""
    kept = inherited_by_evaluation(merged.recipe)
    kept.pop("chat_template", None)  # the tokenizer has it
    return kept | ({"model_name_or_path": merged.base} if merged.base and not is_local(merged.base) else {})
