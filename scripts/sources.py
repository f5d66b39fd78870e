"""The public files the scripts read: found in a folder the user names, and checked before anything is done.

sources.tsv lists each file with its size, SHA-256, licence and address; README.md says how to get them all. A
file may lie there as it was downloaded or gzipped (`.gz` added); the checksum is that of the plain bytes.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import hashlib
import os
import zlib
from pathlib import Path
from typing import NamedTuple, NoReturn

TABLE = Path(__file__).with_name("sources.tsv")


class Source(NamedTuple):
    """A row of sources.tsv."""

    file: str
    bytes: str
    sha256: str
    licence: str
    address: str


class Parser(argparse.ArgumentParser):
    """Takes the folder of the sources; an error is one line and exit status 2."""

    def __init__(self, description: str) -> None:
        super().__init__(description=description)
        folder_help = "folder with the files of scripts/sources.tsv (default: $ORPO_SOURCES)"
        default = os.environ.get("ORPO_SOURCES") or None
        self.add_argument("--sources", type=Path, default=default, help=folder_help)

    def error(self, message: str) -> NoReturn:
        """Without argparse's usage lines."""
        self.exit(2, f"{self.prog}: {message}\n")

    def read_sources(self, folder: Path | None, part: str) -> dict[str, bytes]:
        """The plain bytes of every file whose name begins with `part`, in the table's order, by name."""
        if folder is None:
            self.error(
                "give --sources FOLDER or set ORPO_SOURCES: the folder with the public files of "
                "scripts/sources.tsv; scripts/README.md says how to get them"
            )
        wanted = [source for source in listed_sources() if source.file.startswith(part)]
        read = {source.file: _read(folder / source.file) for source in wanted}
        problems = [(s, problem) for s in wanted if (problem := _problem(s, read[s.file]))]
        if problems:
            source, problem = problems[0]
            count = f"{len(problems)} of {len(wanted)} files are missing or differ"
            others = f"; {count}" if len(problems) > 1 else ""
            self.error(f"{folder / source.file} {problem}: get it from {source.address}{others}")
        return {name: data for name, data in read.items() if isinstance(data, bytes)}


def listed_sources() -> list[Source]:
    """The rows of sources.tsv."""
    with TABLE.open(encoding="utf-8", newline="") as file:
        return [Source(**row) for row in csv.DictReader(file, delimiter="\t")]


def _read(path: Path) -> bytes | str:
    """The plain bytes of a file or of its gzipped form; else why there are none."""
    try:
        if path.exists():
            return path.read_bytes()
        return gzip.decompress(path.with_name(path.name + ".gz").read_bytes())
    except FileNotFoundError:
        return "is missing"
    except (OSError, EOFError, zlib.error) as error:
        return f"cannot be read ({error})"


def _problem(source: Source, data: bytes | str) -> str:
    """What is wrong with a file that was read, or nothing."""
    if isinstance(data, str):
        return data
    found = hashlib.sha256(data).hexdigest()
    if found == source.sha256:
        return ""
    return f"differs: {len(data)} bytes with SHA-256 {found}, expected {source.bytes} with {source.sha256}"
