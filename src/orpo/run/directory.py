"""The run directory: the name of every file in it, and the reading and writing of each, without torch.

Every file may be missing: a run that has only begun, or was made by another tool, is read as far as it goes.
Checkpoints have a module of their own (checkpoints.py), and so have the lines of metrics.jsonl (log.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from orpo.errors import DataError, ModelError
from orpo.run.disk import replace_text
from orpo.run.log import Figure, Record, read_records, read_text

RECIPE = "recipe.yaml"
MODEL_CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"
BASE_WEIGHTS = "base_weights.json"
"""Beside an adapter: a few entries of the weights under it."""
_EVALUATION = "eval-{}.json"
_EVALUATED_PAIRS = "eval-{}.jsonl"
_SUITE = "suite-{}.json"
_STEP_RESULTS = "pairs-step-{}.jsonl"
_REFERENCE = "reference-{}.npy"
_RESULTS = (
    _EVALUATION.format("*"), _EVALUATED_PAIRS.format("*"), _SUITE.format("*"), _STEP_RESULTS.format("*"),
    _REFERENCE.format("*"),
)  # fmt: skip
_MODEL = (
    MODEL_CONFIG, ADAPTER_CONFIG, BASE_WEIGHTS, "*.safetensors", "*.safetensors.index.json", "pytorch_model*",
    "adapter_model*", "generation_config.json", "tokenizer*", "special_tokens_map.json",
    "added_tokens.json", "vocab.*", "merges.txt", "chat_template.jinja", "training_args.bin",
)  # fmt: skip
"""Names of the files that saving a model and its tokenizer writes."""

Samples = Sequence[Mapping[str, Any]]
"""For each prompt its answers by name: `{"prompt": ..., "answers": {"step 10": ...}}`."""


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """A folder by the names of its files.

    Attributes:
        path: The folder; it need not be there.
    """

    path: Path

    @property
    def recipe(self) -> Path:
        """The resolved settings of the run."""
        return self.path / RECIPE

    @property
    def log(self) -> Path:
        """Metrics, one record a line (log.py)."""
        return self.path / "metrics.jsonl"

    @property
    def data_report(self) -> Path:
        """What was read, what became of each row, and what is odd about the data."""
        return self.path / "data_report.json"

    @property
    def environment(self) -> Path:
        """Versions and hardware."""
        return self.path / "environment.json"

    @property
    def samples(self) -> Path:
        """Answers to held-out prompts, by step or by model."""
        return self.path / "samples.json"

    @property
    def card(self) -> Path:
        """The model card."""
        return self.path / "README.md"

    @property
    def finished(self) -> Path:
        """The mark of a finished run, written last (finished.py)."""
        return self.path / "finished.json"

    @property
    def page(self) -> Path:
        """The report, one self-contained page."""
        return self.path / "report.html"

    @property
    def page_request(self) -> Path:
        """What the page was last asked to show."""
        return self.path / "report.json"

    @property
    def trainer_output(self) -> Path:
        """What the trainer printed, where it was not to print on the terminal."""
        return self.path / "train.log"

    @property
    def cost(self) -> Path:
        """What training took of a process of its own, where it was measured."""
        return self.path / "cost.json"

    @property
    def demo_result(self) -> Path:
        """The figures of a demo's table."""
        return self.path / "demo.json"

    @property
    def test_pairs(self) -> Path:
        """The test pairs that a demo scored."""
        return self.path / "test.jsonl"

    @property
    def export_record(self) -> Path:
        """Of an exported model: from what, how it was checked, what an evaluation inherits."""
        return self.path / "export.json"

    def evaluation(self, name: str) -> Path:
        """What `orpo eval` found on one data set."""
        return self.path / _EVALUATION.format(name)

    def evaluated_pairs(self, name: str) -> Path:
        """The same pair by pair."""
        return self.path / _EVALUATED_PAIRS.format(name)

    def suite(self, name: str) -> Path:
        """What a suite of `orpo eval` found."""
        return self.path / _SUITE.format(name)

    def step_results(self, step: int) -> Path:
        """What the run's evaluation at a step found, pair by pair."""
        return self.path / _STEP_RESULTS.format(step)

    def reference(self, name: str) -> Path:
        """What DPO's reference says of the pairs of one set."""
        return self.path / _REFERENCE.format(name)

    def steps_with_results(self) -> list[int]:
        """The steps whose evaluation is kept pair by pair, in order."""
        start, _, end = _STEP_RESULTS.partition("{}")
        names = (path.name for path in self.path.glob(_STEP_RESULTS.format("*")))
        steps = (name.removeprefix(start).removesuffix(end) for name in names)
        return sorted(int(step) for step in steps if step.isdecimal())

    def checkpoint(self, step: int) -> Path:
        """The checkpoint of one step."""
        return self.path / f"checkpoint-{step}"

    def is_checkpoint(self, path: Path) -> bool:
        """Whether a path is named like a checkpoint of this run."""
        return path.parent == self.path and path.name.startswith(self.checkpoint(0).name.rstrip("0"))

    def files_written(self) -> list[Path]:
        """The files that training writes here, besides the model's."""
        return [
            self.recipe, self.log, self.data_report, self.environment, self.samples, self.card, self.page,
            self.page_request, self.finished,
        ]  # fmt: skip

    def of_the_run(self) -> list[Path]:
        """What lies here of a run but its checkpoints: files of training, of evaluations, of the model."""
        patterns = [*(path.name for path in self.files_written()), *_RESULTS]
        found = {path for pattern in patterns for path in self.path.glob(pattern)}
        return sorted(found.union(self.model_files()))

    def model_files(self) -> list[Path]:
        """The files of the model and its tokenizer, weights included."""
        return sorted({path for pattern in _MODEL for path in self.path.glob(pattern)})

    def is_run(self) -> bool:
        """Whether a run has begun here."""
        return self.recipe.is_file() or self.log.is_file()

    def read_recipe(self) -> dict[str, Any]:
        """The settings, unchecked; empty where there is no file.

        Raises:
            DataError: The file is not YAML.
        """
        if not self.recipe.exists():
            return {}
        try:
            recipe = yaml.safe_load(read_text(self.recipe))
        except yaml.YAMLError:
            raise DataError(f"{self.recipe}: not valid YAML") from None
        return recipe if isinstance(recipe, dict) else {}

    def write_recipe(self, settings: Mapping[str, Any]) -> None:
        """Write the settings, one key on each line."""
        replace_text(self.recipe, dump_yaml(settings))

    def read_data_report(self) -> dict[str, Any]:
        """What became of the rows, by data set; empty where there is no file.

        Raises:
            DataError: The file is damaged.
        """
        report: dict[str, Any] = read_json(self.data_report, {})
        for name, part in report.items():
            parts = [part, *(part.get(key, {}) for key in ("rows", "findings") if isinstance(part, Mapping))]
            if not all(isinstance(one, Mapping) for one in parts):
                raise DataError(
                    f"{self.data_report}: {name!r} is damaged; delete the file to go on without it"
                )
        return report

    def read_samples(self) -> list[dict[str, Any]]:
        """Answers to held-out prompts; none where there is no file.

        Raises:
            DataError: The file is damaged.
        """
        samples: list[dict[str, Any]] = read_json(self.samples, [])
        for number, sample in enumerate(samples, start=1):
            if not _is_sample(sample):
                raise DataError(
                    f"{self.samples}: entry {number} is no prompt with its answers; delete the file to go on"
                    " without them"
                )
        return samples

    def read_evaluations(self) -> dict[str, dict[str, Any]]:
        """Everything `orpo eval` has saved here, by name."""
        start, _, end = _EVALUATION.partition("{}")
        paths = sorted(self.path.glob(_EVALUATION.format("*")))
        return {path.name.removeprefix(start).removesuffix(end): read_json(path, {}) for path in paths}

    def forget_results(self) -> None:
        """Delete what was found out about the model that was here before."""
        for name in (_EVALUATION, _EVALUATED_PAIRS, _SUITE, _STEP_RESULTS, self.page_request.name):
            for stale in self.path.glob(name.format("*")):
                stale.unlink()


@dataclass(frozen=True, slots=True)
class Run:
    """What a run directory holds, as read; a missing file is empty.

    Attributes:
        name: For headings.
        records: The records of metrics.jsonl, in order.
        recipe: The resolved settings.
        data: What became of the rows.
        environment: Versions and hardware.
        samples: Answers to held-out prompts.
        saved_evaluations: By name, what `orpo eval` has found.
        suites: What its suites have found, each as `SuiteResult.to_json` writes it.
    """

    name: str
    records: list[Record]
    recipe: dict[str, Any]
    data: dict[str, Any]
    environment: dict[str, Any]
    samples: Samples
    saved_evaluations: dict[str, dict[str, Any]]
    suites: list[dict[str, Any]] = field(default_factory=list)

    @property
    def shared_prompts(self) -> int:
        """Held-out pairs whose prompt is also trained on."""
        findings = [part.get("findings", {}) for part in self.data.values() if isinstance(part, Mapping)]
        return sum(found.get("shared_prompts") or 0 for found in findings)

    def evaluation_sets(self) -> list[str]:
        """Names of the evaluation sets, in the order met; [""] where nothing was evaluated."""
        return list(dict.fromkeys(record.set for record in self._evaluations())) or [""]

    def first_evaluation(self, set_name: str) -> Record | None:
        """The evaluation before training, or the earliest there is."""
        return next(self._evaluations(set_name), None)

    def final_evaluation(self, set_name: str) -> Record | None:
        """The evaluation of the weights that the run ends with; of an unfinished run, the last one."""
        records = list(self._evaluations(set_name))
        final = [record for record in records if record.step == self.model_step]
        return next(reversed(final or records), None)

    def evaluation_at(self, set_name: str, step: int) -> Record | None:
        """The newest evaluation of a set at a step."""
        found = [record for record in self._evaluations(set_name) if record.step == step]
        return found[-1] if found else None

    @property
    def model_step(self) -> int | None:
        """The step whose weights the directory holds, 0 for those before training; None while unfinished."""
        saved = (record.model_step for record in reversed(self.records) if record.kind == "saved")
        return next(saved, None)

    @property
    def last_step(self) -> int:
        """Optimizer steps made so far."""
        return max((record.step for record in self.records), default=0)

    @property
    def stages(self) -> list[tuple[int, str]]:
        """First step of each stage, counted from 1, and the name of its objective; empty without stages."""
        return [(record.step + 1, record.stage) for record in self.records if record.kind == "stage"]

    def training_means(self) -> dict[str, Figure]:
        """What was measured while training, averaged over the log's lines, each with the steps it covers."""
        sums: dict[str, list[float]] = {}
        before = 0
        for record in self._training():
            steps, before = record.step - before, record.step
            for name, figure in record.metrics.items():
                total = sums.setdefault(name, [0.0, 0.0])
                total[0] += steps * figure.mean
                total[1] += steps
        return {name: Figure(total / steps) for name, (total, steps) in sums.items() if steps > 0}

    def series(self, metric: str, set_name: str | None = None) -> list[tuple[int, float, float | None]]:
        """Step, mean and standard error of a metric wherever it was measured.

        Args:
            metric: Its name.
            set_name: An evaluation set; None: as measured while training.
        """
        records = self._training() if set_name is None else self._evaluations(set_name)
        found = [(record.step, record.metrics.get(metric)) for record in records]
        return [(step, figure.mean, figure.se) for step, figure in found if figure is not None]

    def _training(self) -> Iterator[Record]:
        return (record for record in self.records if record.kind == "train")

    def _evaluations(self, set_name: str | None = None) -> Iterator[Record]:
        evaluations = (record for record in self.records if record.kind == "eval")
        return (record for record in evaluations if set_name is None or record.set == set_name)


def read_run(path: Path, name: str | None = None) -> Run:
    """Read what a run directory holds.

    Raises:
        DataError: There is no such directory, it holds no run, or one of its files cannot be read.
    """
    path = path.expanduser()
    run = RunDirectory(path)
    if not path.is_dir():
        raise DataError(f"{path}: no such run directory")
    if not run.is_run():
        raise DataError(f"{path}: not a run directory (it has neither {run.log.name} nor {RECIPE})")
    return Run(
        name=name or path.resolve().name,
        records=read_records(run.log),
        recipe=run.read_recipe(),
        data=run.read_data_report(),
        environment=read_json(run.environment, {}),
        samples=run.read_samples(),
        saved_evaluations=run.read_evaluations(),
        suites=[read_json(path, {}) for path in sorted(run.path.glob(_SUITE.format("*")))],
    )


def _is_sample(value: Any) -> bool:
    """Whether a value is what training writes of a prompt."""
    if not isinstance(value, Mapping) or not isinstance(value.get("prompt"), str):
        return False
    answers, tokens, longest = value.get("answers"), value.get("tokens", {}), value.get("longest", 0)
    return (
        isinstance(answers, Mapping)
        and all(isinstance(answer, str) for answer in answers.values())
        and isinstance(tokens, Mapping)
        and all(isinstance(number, int) for number in [*tokens.values(), longest or 0])
    )


def holds_model(folder: Path) -> bool:
    """Whether a folder is a model or an adapter."""
    return (folder / MODEL_CONFIG).is_file() or is_adapter(folder)


def is_adapter(folder: str | Path) -> bool:
    """Whether a local folder holds a PEFT adapter rather than a model."""
    return (Path(folder) / ADAPTER_CONFIG).is_file()


def at_home(name: str | None) -> str | None:
    """A name with `~` at its start written out: it is a folder, since no name on the hub begins so."""
    return str(Path(name).expanduser()) if name and name.startswith("~") else name


def gguf_file(name: str | Path) -> Path | None:
    """The GGUF file that a name stands for: a file, or a folder that holds one and no other model.

    Raises:
        ModelError: A folder of several, of which none is named.
    """
    path = Path(name).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return path
    if not path.is_dir() or holds_model(path):
        return None
    found = sorted(path.glob("*.gguf"))
    if len(found) > 1:
        raise ModelError(f"{path}: holds {len(found)} GGUF files; name one of them, such as {found[0]}")
    return found[0] if found else None


def adapter_base(folder: str | Path) -> str | None:
    """Name of the model that an adapter was trained on, as its folder says; None where it does not."""
    base = read_json(Path(folder) / ADAPTER_CONFIG, {}).get("base_model_name_or_path")
    return str(base) if base else None


def read_json(path: Path, missing: Any) -> Any:
    """The value in a JSON file, of the type of `missing`, which is returned where there is no file.

    Raises:
        DataError: The file is not JSON, or holds another type of value.
    """
    if not path.exists():
        return missing
    try:
        value = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: not valid JSON") from None
    except (ValueError, RecursionError):
        raise DataError(f"{path}: not JSON that can be read") from None
    if not isinstance(value, type(missing)):
        expected = "an object" if isinstance(missing, dict) else "a list"
        raise DataError(f"{path}: not a file of this package; expected {expected}")
    return value


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file that people read."""
    replace_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_json_lines(path: Path, values: Iterable[Any]) -> None:
    """Write one JSON value a line."""
    replace_text(path, "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values))


def dump_yaml(settings: Mapping[str, Any]) -> str:
    """Settings as YAML in the order given, one key on each line."""
    return yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True, width=100)
