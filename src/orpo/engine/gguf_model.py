"""A GGUF file as a model: its weights unpacked to dense tensors, its tokenizer split as the file names it.

transformers reads the file. What is added here is what it leaves out: a plain load marks dense weights as
quantized, so that they can neither be trained nor saved; text is split as GPT-2 does wherever its table has
no entry for the file's `tokenizer.ggml.pre`; and of the tokens that end an answer it takes one.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from orpo.console import say
from orpo.errors import ModelError, raised_as

_INSTALL = "reading GGUF files needs gguf and transformers 5.23: pip install 'orpo[gguf]'"
_PART = re.compile(r"-\d{5}-of-\d{5}\.gguf$")

_DIGITS = {"type": "Digits", "individual_digits": True}
_GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_BYTES = {**_GPT2, "use_regex": False}
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _split(numbers: str) -> dict[str, Any]:
    pattern = {"Regex": _WORDS + numbers + _REST}
    return {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}


SPLITS: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [_GPT2],
    "smollm": [_DIGITS, _GPT2],
    "starcoder": [_DIGITS, _GPT2],
    "refact": [_DIGITS, _GPT2],
    "command-r": [_DIGITS, _GPT2],
    "codeshell": [_DIGITS, _GPT2],
    "exaone": [_DIGITS, _GPT2],
    "llama-bpe": [_split(r"\p{N}{1,3}"), _BYTES],
    "qwen2": [_split(r"\p{N}"), _BYTES],
}
"""By llama.cpp's name of a way to split text (`tokenizer.ggml.pre`), the pre-tokenizers that do the same.

Of names for one way, the first is the one to write.
"""


def load_gguf_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a GGUF file; a line is printed where it may cut texts unlike llama.cpp.

    Raises:
        ModelError: The file cannot be read, or its kind of tokenizer is not known to transformers.
    """
    metadata = _metadata(path)
    with raised_as(ModelError, f"{path}: no tokenizer could be read"):
        tokenizer: PreTrainedTokenizerBase = PreTrainedTokenizerFast.from_pretrained(
            path.parent, gguf_file=path.name
        )
    if metadata.get("tokenizer.ggml.model") == "gpt2":
        _set_split(tokenizer, metadata.get("tokenizer.ggml.pre"), path)
    return tokenizer


def _set_split(tokenizer: Any, name: str | None, path: Path) -> None:
    """Split text as the file says, where that is known."""
    backend = tokenizer.backend_tokenizer
    if name in SPLITS:
        empty = json.loads(Tokenizer(BPE()).to_str())
        empty["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": SPLITS[name]}
        backend.pre_tokenizer = Tokenizer.from_str(json.dumps(empty)).pre_tokenizer
    elif isinstance(backend.pre_tokenizer, ByteLevel):  # what transformers falls back to
        named = f"splits text as {name!r}, which is not known here" if name else "does not name its split"
        say(f"{path}: its tokenizer {named}: split as GPT-2's, so some texts get other ids than in llama.cpp")


def gguf_loading_arguments(path: Path) -> dict[str, Any]:
    """What `from_pretrained` of the file's folder needs to load it as a dense model.

    Raises:
        ModelError: The file is one part of several, or the packages that read it are not installed.
    """
    if _PART.search(path.name):
        raise ModelError(f"{path}: one part of a model; join the parts first (llama-gguf-split --merge)")
    _metadata(path)
    from transformers import GgufConfig

    return {"gguf_file": path.name, "quantization_config": GgufConfig(dequantize=True)}


@contextlib.contextmanager
def no_bar_in_a_file() -> Iterator[None]:
    """Without the bar that transformers draws while it unpacks a file, where nobody watches it."""
    with contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO()):
        yield


def settle_gguf_model(model: PreTrainedModel, path: Path) -> None:
    """Tell a loaded model where it comes from, and every token that the file ends answers with."""
    model.config._name_or_path = model.name_or_path = str(path)
    if (stops := gguf_stop_token_ids(path)) and model.generation_config is not None:
        model.generation_config.eos_token_id = stops


def gguf_stop_token_ids(path: Path) -> list[int]:
    """Ids that generation stops at by a GGUF file: its end of text, of turn and of message.

    Raises:
        ModelError: The file cannot be read.
    """
    metadata = _metadata(path)
    found = (metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
    return list(dict.fromkeys(int(token) for token in found if token is not None))


def gguf_family(path: Path) -> str:
    """The architecture that a GGUF file names."""
    return str(_metadata(path).get("general.architecture"))


def _metadata(path: Path) -> dict[str, Any]:
    try:
        from gguf import GGUFReader  # noqa: F401  (transformers reads tensors with it)
        from transformers.integrations.gguf.reader import read_gguf_metadata
    except ImportError as error:
        raise ModelError(f"{path}: {_INSTALL}") from error
    with raised_as(ModelError, f"{path}: not a whole GGUF file"):
        metadata: dict[str, Any] = read_gguf_metadata(str(path))[0]
    return metadata
