"""The recipes that come with the package: their names, what each is for, and copies of them."""

from __future__ import annotations

import shutil
from importlib.resources import as_file, files
from pathlib import Path
from typing import NamedTuple

from orpo.errors import ConfigError

LAUNCH = "launch"
"""Folder of the configurations for `accelerate launch`."""


class Shipped(NamedTuple):
    """A recipe, or a configuration for `accelerate launch`.

    Attributes:
        name: `mistral-7b-capybara`, or `launch/fsdp2`.
        title: What it is for: its first line.
        text: All of it.
    """

    name: str
    title: str
    text: str


def shipped() -> list[Shipped]:
    """All of them, by name; configurations for launching last."""
    folder = files("orpo") / "recipes"
    found = []
    for prefix, here in (("", folder), (f"{LAUNCH}/", folder / LAUNCH)):
        for path in sorted(here.iterdir(), key=lambda path: path.name):
            if path.name.endswith(".yaml"):
                text = path.read_text(encoding="utf-8")
                title = next((line for line in text.splitlines() if line.startswith("# ")), "")
                found.append(
                    Shipped(prefix + path.name.removesuffix(".yaml"), title.removeprefix("# "), text)
                )
    return found


def copy_shipped(name: str, out: Path) -> Path:
    """Copy one to `out`, a file that is not there yet.

    Raises:
        ConfigError: There is none of that name, or the file cannot be written.
    """
    known = {one.name: one for one in shipped()}
    if name not in known:
        raise ConfigError(f"{name}: no such recipe; `orpo recipes` lists them")
    if out.exists():
        raise ConfigError(f"{out} is there already; write --out with another name, or delete it")
    try:
        with as_file(files("orpo") / "recipes" / f"{name}.yaml") as source:
            shutil.copyfile(source, out)
    except OSError as error:
        raise ConfigError(
            f"{out}: cannot be written ({error.strerror}); write --out with another name"
        ) from None
    return out
