"""A server that speaks OpenAI's protocol as a source of answers: vLLM, llama.cpp, Ollama and others.

Requests run side by side, a bounded number at a time. What may pass (429, 5xx, a lost connection) is tried
again after a pause that grows; what will not (a wrong key, an unknown model) ends the run; a prompt the
server refuses is a failure of that prompt.
"""

from __future__ import annotations

import http.client
import json
import os
import queue
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from orpo.errors import ConfigError, ModelError, RunError, first_line
from orpo.evaluation.answers import Failure, Reply
from orpo.evaluation.generation import Sampling
from orpo.evaluation.prompts import Prompt

DEFAULT_KEY = "OPENAI_API_KEY"
_LONGEST_PAUSE = 60.0
_FAILED_IN_A_ROW = 3
"""After so many failed prompts for each request at a time, and no answer between them, the run ends."""
_PASSES = {408, 409, 425, 429}
_WILL_NOT_PASS = {301, 302, 303, 307, 308, 401, 403, 404, 405}


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where and how to ask.

    Attributes:
        url: `http://127.0.0.1:8000/v1`.
        model: The server's name of the model; None: the only one it has.
        api_key_env: Environment variable that holds the key; None: OPENAI_API_KEY, where there is one.
        concurrency: Requests at a time, at least 1.
        timeout: Seconds to wait for one answer.
        tries: How often a request is made at most, at least 1.
        pause: Seconds before the second try; each further one waits twice as long.
        request: Further fields of each request, over ours; None takes one away.

    Raises:
        ConfigError: One of them cannot be used.
    """

    url: str
    model: str | None = None
    api_key_env: str | None = None
    concurrency: int = 8
    timeout: float = 600.0
    tries: int = 6
    pause: float = 1.0
    request: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # None of these lines repeats the address: it may hold a key.
        try:
            parts = urllib.parse.urlsplit(self.url)
            is_address = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            is_address = False
        if not is_address:
            raise ConfigError("--endpoint: this is no address; expected one such as http://127.0.0.1:8000/v1")
        if "@" in parts.netloc or parts.query or parts.fragment:
            raise ConfigError(
                "--endpoint: give the address alone, and the key in an environment variable (--api_key_env)"
            )
        for name, least in (("concurrency", 1), ("tries", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}: {getattr(self, name)} is out of range; expected at least {least}")

    def key(self) -> str | None:
        """The key; None where there is none.

        Raises:
            ConfigError: The variable that was named is not set, or holds what no key can.
        """
        name = self.api_key_env or DEFAULT_KEY
        key = os.environ.get(name, "").strip()
        if not key and self.api_key_env:
            raise ConfigError(f"--api_key_env: the environment variable {name} is not set")
        if not (key.isascii() and key.isprintable()):
            raise ConfigError(f"--api_key_env: {name} holds characters that no key has")
        return key or None


class EndpointModel:
    """The model behind an endpoint.

    Attributes:
        name: The server's name of it.
        identity: Its name: which weights a server has loaded cannot be told from here.

    Raises:
        OrpoError: The server cannot be reached, or has no such model.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self._client = _Client(endpoint)
        self._client.check_reachable()
        self._endpoint = endpoint
        self.name = endpoint.model or self._only_model()
        self.identity = f"endpoint:{self.name}"

    def _only_model(self) -> str:
        listed = self._client.get("models")
        data = listed.get("data") if isinstance(listed, Mapping) else None
        names = [str(one.get("id")) for one in data or [] if isinstance(one, Mapping)]
        if len(names) != 1:
            known = f"it has {', '.join(names[:8])}" if names else "it does not list any"
            raise ConfigError(
                f"--endpoint_model: name the model that {self._endpoint.url} is to answer with; {known}"
            )
        return names[0]

    def prepare(self, prompt: Prompt) -> str:
        """The part of the request that decides on the answer and is not of the sampling, as JSON."""
        request = dict(self._endpoint.request)
        if isinstance(prompt.asked, str):
            return json.dumps({"prompt": prompt.asked} | request)
        body: dict[str, Any] = {"messages": prompt.asked}
        if prompt.tools:
            body["tools"] = prompt.tools
        if prompt.chat_template_kwargs:
            body["chat_template_kwargs"] = prompt.chat_template_kwargs
        return json.dumps(body | request)

    def answers(
        self, prompts: Sequence[tuple[Prompt, str]], sampling: Sampling, seeds: Sequence[int | None]
    ) -> Iterator[tuple[int, Reply | Failure]]:
        """Ask; yields the index of each prompt and its answer as they come; arguments as for `LocalModel`.

        Raises:
            OrpoError: No prompt can be answered.
        """
        waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
        for index in range(len(prompts)):
            waiting.put(index)
        done: queue.SimpleQueue[tuple[int, Reply | Failure | BaseException]] = queue.SimpleQueue()
        stopped = threading.Event()

        def work() -> None:
            while not stopped.is_set():
                try:
                    index = waiting.get_nowait()
                except queue.Empty:
                    return
                try:
                    done.put((index, self._ask(prompts[index][1], sampling, seeds[index])))
                except BaseException as error:
                    done.put((index, error))

        for _ in range(min(self._endpoint.concurrency, len(prompts))):
            threading.Thread(target=work, daemon=True).start()  # Ctrl-C must not wait for a server
        num_failed = 0
        try:
            for _ in range(len(prompts)):
                index, found = done.get()
                if isinstance(found, BaseException):
                    raise found
                yield index, found
                num_failed = num_failed + 1 if isinstance(found, Failure) else 0
                if isinstance(found, Failure) and num_failed >= _FAILED_IN_A_ROW * self._endpoint.concurrency:
                    raise RunError(
                        f"{num_failed} prompts in a row have failed, the last with: {found.reason}"
                    )
        finally:
            stopped.set()

    def _ask(self, prepared: str, sampling: Sampling, seed: int | None) -> Reply | Failure:
        ours: dict[str, Any] = {"model": self.name, "max_tokens": sampling.max_tokens}
        ours |= {"temperature": sampling.temperature}
        if sampling.temperature > 0:
            ours |= {"top_p": sampling.top_p} | ({} if seed is None else {"seed": seed})
        body = {name: value for name, value in (ours | json.loads(prepared)).items() if value is not None}
        chats = "messages" in body
        answered = self._client.post("chat/completions" if chats else "completions", body)
        return answered if isinstance(answered, Failure) else _reply(answered, chats)


def _reply(answered: Any, chats: bool) -> Reply | Failure:
    """What the first choice of a response says."""
    try:
        choice = answered["choices"][0]
        said = choice["message"] if chats else choice
        text = said["content" if chats else "text"]
        ends = choice.get("finish_reason")
        usage = answered.get("usage") or {}
        num_tokens = usage.get("completion_tokens")
        reasoning = said.get("reasoning_content") or said.get("reasoning")
    except (KeyError, IndexError, TypeError, AttributeError):
        return Failure("the server's answer holds no choice")
    if ends == "content_filter":
        return Failure("the server's filter held the answer back")
    if text is None and not said.get("tool_calls") and ends != "length":
        return Failure("the server's answer holds no text")
    text = str(text or "")
    return Reply(text.strip() if chats else text, ends != "length", num_tokens, reasoning)


@dataclass
class _Client:
    """JSON over HTTP, with the key in a header and nowhere else."""

    endpoint: Endpoint
    _key: str | None = field(init=False, repr=False)
    _opener: Any = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._key = self.endpoint.key()
        self._opener = urllib.request.build_opener(_NoRedirects)

    def check_reachable(self) -> None:
        """Stop where nothing listens, before any prompt waits for it."""
        try:
            self._once("models", None)
        except urllib.error.HTTPError:
            return  # something is there; what it thinks of prompts it will say
        except (OSError, http.client.HTTPException) as error:
            reason = self._without_key(first_line(getattr(error, "reason", None) or error))
            raise ModelError(f"{self.endpoint.url}: no server answers ({reason}); is it running?") from None
        except ValueError:
            return

    def get(self, path: str) -> Any:
        answered = self._tried(path, None)
        if isinstance(answered, Failure):
            raise ModelError(f"{self.endpoint.url}: {answered.reason}")
        return answered

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        return self._tried(path, json.dumps(body).encode())

    def _tried(self, path: str, data: bytes | None) -> Any:
        """What the server answers; a `Failure` where it will not or, after all tries, cannot."""
        endpoint = self.endpoint
        pause, reason = endpoint.pause, ""
        for number in range(endpoint.tries):
            try:
                return self._once(path, data)
            except urllib.error.HTTPError as error:
                reason = f"HTTP {error.code}: {self._said(error)}"
                if error.code in _WILL_NOT_PASS:
                    raise ModelError(f"{endpoint.url}/{path}: {reason}{self._advice(error.code)}") from None
                if error.code < 500 and error.code not in _PASSES:
                    return Failure(reason)
                asked = error.headers.get("Retry-After", "")
                pause = max(pause, float(asked)) if asked.isdigit() else pause
            except (OSError, http.client.HTTPException, ValueError) as error:
                reason = self._without_key(first_line(getattr(error, "reason", None) or error))
            if number < endpoint.tries - 1:
                time.sleep(min(pause, _LONGEST_PAUSE))
                pause *= 2
        return Failure(f"{reason} (after {endpoint.tries} tries)")

    def _once(self, path: str, data: bytes | None) -> Any:
        request = urllib.request.Request(f"{self.endpoint.url.rstrip('/')}/{path}", data=data)
        request.add_header("Content-Type", "application/json")
        if self._key is not None:
            request.add_header("Authorization", f"Bearer {self._key}")
        with self._opener.open(request, timeout=self.endpoint.timeout) as response:
            return json.loads(response.read())

    def _said(self, error: urllib.error.HTTPError) -> str:
        """The server's message on one line, without the key that some repeat."""
        try:
            text = error.read(10_000).decode("utf-8", "replace")
        except (OSError, http.client.HTTPException):
            text = ""
        try:
            said = json.loads(text)
            said = said.get("error", said) if isinstance(said, Mapping) else said
            text = (
                str(said.get("message") or said.get("detail") or said)
                if isinstance(said, Mapping)
                else str(said)
            )
        except ValueError:
            pass
        return self._without_key(" ".join(text.split())[:300]) or error.reason or "no message"

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text

    def _advice(self, code: int) -> str:
        if code in (401, 403):
            name = self.endpoint.api_key_env or DEFAULT_KEY
            return f"; the key is read from {name}" if self._key else f"; put the key into {name}"
        if code in (404, 405):
            return "; check --endpoint, which usually ends in /v1, and --endpoint_model"
        return "; give the address it points to as --endpoint"


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would send the key to another place, and the prompt nowhere."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        """Follow none: the caller gets the status."""
