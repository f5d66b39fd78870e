"""The commands that serve an exported model, each with the model's own name and files."""

from __future__ import annotations

import shlex
from pathlib import Path

MODELFILE = "Modelfile"

CLIENT = "Each answers as OpenAI's server does: `POST /v1/chat/completions`."


def serving_commands(folder: Path, *, dtype_name: str, context: int, gguf: Path | None) -> dict[str, str]:
    """By server, what to type.

    Args:
        folder: The exported folder.
        dtype_name: Of its weights; servers take float32 for half precision unless told.
        context: Tokens that the model can read.
        gguf: A GGUF file of it, where there is one.
    """
    place, name = shlex.quote(str(folder)), shlex.quote(folder.name.lower())
    dtype = " --dtype float32" if dtype_name == "float32" else ""
    commands = {
        "transformers": f"transformers serve {place} --port 8000",
        "vLLM": f"vllm serve {place} --served-model-name {name}{dtype}",
        "SGLang": f"python -m sglang.launch_server --model-path {place} --served-model-name {name}{dtype}",
    }
    if gguf is not None:
        commands["llama.cpp"] = f"llama-server -m {shlex.quote(str(gguf))} -c {context} --jinja"
        commands["Ollama"] = (
            f"ollama create {name} -f {shlex.quote(str(folder / MODELFILE))} && ollama run {name}"
        )
    return commands
