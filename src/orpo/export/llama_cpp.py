"""A process of its own that loads a GGUF file with llama.cpp and says what it computes.

    python -m orpo.export.llama_cpp REQUEST.json ANSWER.json

llama.cpp ends the whole process at some wrong files, hence a process; it is asked through its own server, as
its users ask it. Scores are exact only with the cache in float32 and without flash attention. The server
gives the log-prob of the token that it generates, so each wanted token is forced, one request a token.
"""

from __future__ import annotations

import json
import os
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

_FORCE = 1e6
_SMALL = 64 * 2**20
"""Bytes of a file that one thread computes faster than several, which wait for each other by spinning."""
_CONTROLS = 64
"""Special tokens that are tried as the end of an answer, at most."""


def serve(path: str, tokens: int) -> Any:
    """A llama.cpp server of one file, on a free port of this machine; it ends with the object.

    Args:
        path: Of a GGUF file.
        tokens: Longest prompt with its answer.
    """
    import xllamacpp

    exact = xllamacpp.CommonParams()
    exact.model.path = path
    exact.n_ctx = tokens
    exact.n_parallel = 1
    exact.warmup = False
    if os.path.getsize(path) < _SMALL:
        exact.cpuparams.n_threads = exact.cpuparams_batch.n_threads = 1
    exact.verbosity = -1
    exact.port = 0
    exact.cache_type_k = exact.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    exact.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return xllamacpp.Server(exact)


def post(address: str, body: dict[str, Any]) -> dict[str, Any]:
    """Ask the server.

    Raises:
        ValueError: It refuses, with its reason.
    """
    data, kind = json.dumps(body).encode(), {"Content-Type": "application/json"}
    try:
        with urllib.request.urlopen(urllib.request.Request(address, data, kind), timeout=600) as reply:
            answer: dict[str, Any] = json.load(reply)
    except urllib.error.HTTPError as error:
        raise ValueError(error.read().decode(errors="replace")[:300]) from error
    return answer


def _forced(server: str, prompt: list[int], token: int) -> dict[str, Any]:
    """Generate up to three tokens of which the first is `token`."""
    body = {"prompt": prompt, "n_predict": 3, "logit_bias": [[token, _FORCE]], "temperature": 0}
    return post(f"{server}/completion", body)


def _log_prob(server: str, prompt: list[int], token: int) -> float | None:
    """The log-prob of `token` after `prompt`; None where the server gives none, as for ends of answers."""
    body = {"prompt": prompt, "n_predict": 1, "logit_bias": [[token, _FORCE]], "n_probs": 1, "temperature": 0}
    found = post(f"{server}/completion", body | {"cache_prompt": True}).get("completion_probabilities")
    return float(found[0]["logprob"]) if found and found[0]["id"] == token else None


def _prompt(server: str, turns: list[dict[str, Any]]) -> tuple[str, int]:
    """What the server makes of a conversation, and how many tokens it reads."""
    written = post(f"{server}/apply-template", {"messages": turns})["prompt"]
    reply = post(f"{server}/v1/chat/completions", {"messages": turns, "max_tokens": 1})
    return str(written), int(reply["usage"]["prompt_tokens"])


def main(request_path: str, answer_path: str) -> None:
    """Load, compute, write the answer."""
    request = json.loads(Path(request_path).read_text(encoding="utf-8"))
    longest = max([len(ids) for ids in request["sequences"]] + request["prompt_tokens"])
    server = serve(request["path"], longest + 64)
    at, bos = server.listening_address, request["bos"]
    prompts = []
    for turns, tokens in zip(request["conversations"], request["prompt_tokens"], strict=True):
        written, read = _prompt(at, turns)
        # The server takes BOS off and puts it back as a token: the count tells whether it did.
        written = written if written.startswith(bos) else bos + written
        prompts.append(written if read == tokens else f"{written} [{read} tokens instead of {tokens}]")
    scores, left = [], request["most_tokens"]
    for ids, start in zip(request["sequences"], request["starts"], strict=True):
        places = [*range(start, len(ids))]
        scored = [_log_prob(at, ids[:place], ids[place]) for place in places[:left]]
        left -= len(scored)
        scores.append([*scored, *([None] * (len(places) - len(scored)))])
    opening = request["sequences"][0][: request["starts"][0]]
    ends = {
        name: _forced(at, opening, token)["tokens_predicted"] == 1
        for name, token in (request["stops"] | dict(request["controls"][:_CONTROLS])).items()
    }
    answer = {
        "ids": [
            post(f"{at}/tokenize", {"content": text, "add_special": False, "parse_special": True})["tokens"]
            for text in request["texts"]
        ],
        "prompts": prompts,
        "log_probs": scores,
        "stopped": {name: ends[name] for name in request["stops"]},
        "also_stops": [name for name, stopped in ends.items() if stopped and name not in request["stops"]],
    }
    Path(answer_path).write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
