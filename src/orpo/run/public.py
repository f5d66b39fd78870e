"""What may leave this machine: one answer for recipe.yaml, the model card, the page and each checkpoint.

Secrets are left out of every file. Paths stay in recipe.yaml and in checkpoints, which a run resumes with;
in the card, which is published, and in the page, which is mailed, only their last part is shown.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HIDDEN = "(left out: a secret)"

_SECRET_WORDS = {
    "token", "key", "apikey", "password", "passwd", "passphrase", "secret", "secrets", "authorization",
    "credential", "credentials", "bearer", "cookie",
}  # fmt: skip
_NO_SECRETS = re.compile(r"(?:bos|eos|pad|unk|sep|cls|mask|image|audio|video|stop|end|start|think)_token")
"""Names of tokens that a model reads."""
_WORD = re.compile(r"[A-Z]?[a-z0-9]+|[A-Z]+(?![a-z])")
_SECRET = re.compile(
    r"\bhf_[A-Za-z0-9]{8,}|\bapi_org_[A-Za-z0-9]{8,}|\bsk-[\w-]{16,}|\bgh[pousr]_[A-Za-z0-9]{16,}"
    r"|\bgithub_pat_\w{16,}|\bglpat-[\w-]{16,}|\bxox[abprs]-[\w-]{10,}|\bAKIA[A-Z0-9]{12,}"
    r"|(?i:\bbearer\s+)[\w.~+/=-]{8,}|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"
)
_PATH = re.compile(r"(?<![\w/.:<-])(?:file://)?~?(?:/[\w.@+%=-]+){2,}/?")
_WINDOWS = re.compile(r"(?<!\w)[A-Za-z]:[\\/][^\s\"']+")


def without_secrets(value: Any) -> Any:
    """A setting without its secrets: entries named like one, at any depth, and texts that hold one."""
    if isinstance(value, Mapping):
        return {
            name: without_secrets(one)
            for name, one in value.items()
            if not (is_secret_name(name) and _says(one))
        }
    if isinstance(value, (list, tuple)):
        return [without_secrets(one) for one in value]
    return _text_without_secrets(value) if isinstance(value, str) else value


def _text_without_secrets(text: str) -> str:
    if text.lstrip().startswith("{"):  # a mapping may be written as JSON
        try:
            written = json.loads(text)
        except (ValueError, RecursionError):
            written = None
        if isinstance(written, Mapping) and (left := without_secrets(written)) != written:
            return json.dumps(left)
    return _SECRET.sub(HIDDEN, text)


def is_secret_name(name: object) -> bool:
    """Whether a name is that of a secret, as `hub_token` and `api-key` are."""
    words = {word.lower() for word in _WORD.findall(str(name))}
    return bool(words & _SECRET_WORDS) and not _NO_SECRETS.search(str(name).lower())


def _says(value: Any) -> bool:
    """Whether a value can be a secret: true, false and nothing cannot."""
    return value is not None and not isinstance(value, bool)


def public(value: Any) -> Any:
    """A value for others to see: without secrets, and of each path of this machine the last part."""
    return _without_paths(without_secrets(value))


def public_name(name: str) -> str:
    """The name of a model or a data set for others to see: of a path the last part, a hub name as it is."""
    return (Path(name.rstrip("/\\")).name or "a folder") if is_local(name) else str(public(name))


def is_local(name: str) -> bool:
    """Whether a name is of this machine and not of the hub, whether anything is there or not."""
    return (
        name.startswith(("/", "~", ".", "file:"))
        or _WINDOWS.match(name) is not None
        or name.count("/") > 1
        or _is_there(name)
    )


def _is_there(name: str) -> bool:
    try:
        return Path(name).exists()
    except (OSError, ValueError):
        return False


def _without_paths(value: Any) -> Any:
    if isinstance(value, Mapping):
        found: dict[Any, Any] = {}
        for name, one in value.items():
            shown, number = _without_paths(name), 2
            while shown in found:
                shown, number = f"{_without_paths(name)} ({number})", number + 1
            found[shown] = _without_paths(one)
        return found
    if isinstance(value, (list, tuple)):
        return [_without_paths(one) for one in value]
    return _text_without_paths(value) if isinstance(value, str) else value


def _text_without_paths(text: str) -> str:
    if "\n" not in text and (text.startswith(("/", "~/", "file:")) or ("/" in text and _is_there(text))):
        return Path(text.rstrip("/")).name or "a folder"
    return _WINDOWS.sub(_last_part, _PATH.sub(_last_part, text))


def _last_part(path: re.Match[str]) -> str:
    return re.split(r"[\\/]", path[0].rstrip("\\/"))[-1]
