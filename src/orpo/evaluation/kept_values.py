"""Numbers that took long to compute, kept on the disk by what they depend on, so that work goes on.

A file holds one JSON list a line, key and value, and is only added to: work that is stopped keeps what it has
done, and a line that was cut off is done again. The name of the file and the key say everything a value
depends on: the weights, the settings, the tokens or the text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.constants import HF_HOME

from orpo.run.disk import cannot_write


def kept_folder() -> Path:
    """Where values of every model are kept: next to what the hub has given."""
    return Path(HF_HOME) / "orpo" / "evaluations"


def content_key(*parts: Any) -> str:
    """Equal for parts that are the same as JSON: 32 hexadecimal digits."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


class KeptValues:
    """Values by key, read from a file and added to it.

    Args:
        name: Of the file, without its ending.
        folder: It lies in; None: `kept_folder()`.
    """

    def __init__(self, name: str, folder: Path | None = None) -> None:
        self.path = (folder or kept_folder()) / f"{name}.jsonl"
        self._values: dict[str, Any] = dict(self._lines())

    def _lines(self) -> Iterable[tuple[str, Any]]:
        try:
            text = self.path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return
        for line in text.splitlines():
            try:
                key, value = json.loads(line)
            except (ValueError, TypeError):
                continue  # cut off as it was written; the value is computed again
            if isinstance(key, str):
                yield key, value

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def add(self, values: Mapping[str, Any]) -> None:
        """Keep further values.

        Raises:
            RunError: They cannot be written.
        """
        self._values |= values
        lines = "".join(json.dumps([key, value]) + "\n" for key, value in values.items())
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a+b") as file:
                if file.tell() and not _ends_a_line(file):
                    lines = "\n" + lines
                file.write(lines.encode())
        except OSError as error:
            raise cannot_write(self.path, error) from error


def _ends_a_line(file: Any) -> bool:
    file.seek(-1, 2)
    ends: bool = file.read(1) == b"\n"
    return ends
