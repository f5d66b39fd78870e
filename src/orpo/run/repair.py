"""What a crash can leave in a run directory, put aside: a restart must not wait for a person."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from orpo.console import say
from orpo.errors import DataError
from orpo.run.directory import RunDirectory, read_json
from orpo.run.disk import cannot_write
from orpo.run.log import readable_records, write_records

_DAMAGED = ".damaged"


def put_damaged_aside(run: RunDirectory) -> None:
    """Rename the files of a run that cannot be read; of metrics.jsonl, only damaged lines are left out.

    Each is a printed line, and what was there is kept under another name. The run itself makes the recipe,
    the samples and the rest again.

    Raises:
        RunError: A file cannot be renamed.
    """
    evaluations = [path for path in run.of_the_run() if path.match(run.evaluation("*").name)]
    objects = [run.finished, run.environment, run.page_request, *evaluations]
    readers: dict[Path, Callable[[], Any]] = {path: partial(read_json, path, {}) for path in objects}
    readers |= {
        run.recipe: run.read_recipe, run.samples: run.read_samples, run.data_report: run.read_data_report,
    }  # fmt: skip
    for path, read in readers.items():
        try:
            read()
        except DataError as error:
            _rename(path)
            what, _, _ = str(error).partition(";")
            say(f"{what}; kept as {path.name}{_DAMAGED}, and made again")
    _leave_lines_out(run.log)


def _leave_lines_out(log: Path) -> None:
    try:
        records, damaged = readable_records(log)
    except DataError as error:
        _rename(log)
        say(f"{error}; kept as {log.name}{_DAMAGED}: the curves begin here")
        return
    if damaged:
        try:
            shutil.copyfile(log, log.with_name(log.name + _DAMAGED))
        except OSError as error:
            raise cannot_write(log.with_name(log.name + _DAMAGED), error) from error
        write_records(log, records)
        say(f"{log}: {damaged} lines cannot be read and are left out; all are kept as {log.name}{_DAMAGED}")


def _rename(path: Path) -> None:
    try:
        os.replace(path, path.with_name(path.name + _DAMAGED))
    except OSError as error:
        raise cannot_write(path, error) from error
