"""The shape of the package: folders in one order, no cycles, one owner for each fact, light things light."""

import ast
import functools
import graphlib
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from orpo.run.directory import ADAPTER_CONFIG, RECIPE, RunDirectory
from orpo.settings.renamed import understood_names
from orpo.settings.schema import known_settings

PACKAGE = Path(__file__).parent.parent / "src" / "orpo"
MODULES = sorted(PACKAGE.rglob("*.py"))
LONGEST = 84
"""Lines of the longest function, `ORPOTrainer.__init__` with TRL's signature; it may only shrink."""

# A folder, or a file next to the folders, imports only from those before it; those on one line stand side by
# side and do not import each other.
ORDER = (
    ("errors", "pairs", "console", "html_page"),
    ("run",),
    ("settings",),
    ("data", "engine"),
    ("evaluation",),
    ("judging",),
    ("suites",),
    ("report",),
    ("curation", "export", "training"),
    ("comparing",),
    ("demo", "launch", "plan"),
    ("commands",),
    ("cli",),
    ("__main__",),
)
FLOOR = {name: number for number, names in enumerate(ORDER) for name in names}

MATHEMATICS = (
    "packing", "passes", "objective", "attention", "segments", "varlen", "head", "logits", "precision",
)  # fmt: skip
WITH_TRANSFORMERS = {
    "scorer", "vocabulary", "router", "adapters", "loading", "probe", "model", "memory", "stop_tokens",
    "gguf_model", "footprint", "masks",
}  # fmt: skip
"""Modules of `engine` that know transformers; of the folders before `evaluation` no other does."""
LIGHT = ("errors", "pairs", "console", "html_page", "settings", "run", "cli", "commands", "__init__")
HEAVY = {"torch", "transformers", "peft", "accelerate", "datasets", "numpy", "pandas", "matplotlib", "trl"}


@functools.cache
def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@functools.cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(_text(path))


def name_of(path: Path) -> str:
    """`src/orpo/engine/head.py` -> `orpo.engine.head`."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def folder_of(name: str) -> str:
    """`orpo.engine.head` -> `engine`; a file next to the folders is its own."""
    return name.split(".")[1] if "." in name else "__init__"


def ids(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def imported(tree: ast.AST, *, top_only: bool = False) -> set[str]:
    """Full names of what is imported; under `if TYPE_CHECKING` nothing is."""
    names: set[str] = set()
    for node in tree.body if top_only else ast.walk(tree):  # type: ignore[attr-defined]
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def runtime_tree(path: Path) -> ast.Module:
    body = [
        node
        for node in _tree(path).body
        if not (
            isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        )
    ]
    return ast.Module(body, type_ignores=[])


NAMES = {name_of(path): path for path in MODULES}


def own_imports(path: Path) -> set[str]:
    """Modules of this package that a module imports, wherever in it the import stands."""
    found = set()
    for name in imported(runtime_tree(path)):
        module = name if name in NAMES else name.rpartition(".")[0]
        if module in NAMES and module != "orpo":
            found.add(module)
    return found - {name_of(path)}


@pytest.mark.parametrize("path", MODULES, ids=ids)
def test_folders_import_in_one_order(path):
    if path == PACKAGE / "__init__.py":
        return
    own = folder_of(name_of(path))
    assert own in FLOOR, f"{own} is not in ORDER"
    for module in own_imports(path):
        other = folder_of(module)
        assert other == own or FLOOR[other] < FLOOR[own], f"{ids(path)} imports {module}"


def test_modules_are_imported_by_their_full_names():
    """The other rules read these names: a relative or a computed import would pass them by."""
    for path in MODULES:
        tree = _tree(path)
        assert not [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level], path
        computed = {"importlib.import_module", "importlib"} & imported(tree)
        assert not computed or path == PACKAGE / "__init__.py", ids(path)


def test_no_modules_import_each_other():
    graph = {name: own_imports(path) for name, path in NAMES.items() if name != "orpo"}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the cycle


@pytest.mark.parametrize("path", MODULES, ids=ids)
def test_transformers_is_known_from_the_model_upwards_only(path):
    folder = folder_of(name_of(path))
    if FLOOR.get(folder, 99) >= FLOOR["evaluation"] or path.stem in WITH_TRANSFORMERS:
        return
    roots = {name.split(".")[0] for name in imported(runtime_tree(path))}
    assert not roots & {"transformers", "peft", "accelerate"}


def test_the_mathematics_knows_torch_only():
    for name in MATHEMATICS:
        roots = {item.split(".")[0] for item in imported(runtime_tree(PACKAGE / "engine" / f"{name}.py"))}
        foreign = roots - {"torch", "numpy", "orpo"} - set(sys.stdlib_module_names)
        assert not foreign, f"{name} imports {foreign}"


@pytest.mark.parametrize("path", [p for p in MODULES if folder_of(name_of(p)) in LIGHT], ids=ids)
def test_light_modules_import_nothing_heavy_when_they_are_imported(path):
    roots = {name.split(".")[0] for name in imported(runtime_tree(path), top_only=True)}
    assert not roots & HEAVY


def test_importing_the_light_modules_loads_nothing_heavy():
    names = [name for name in NAMES if folder_of(name) in LIGHT]
    code = f"import sys\nfor name in {names}: __import__(name)\nprint({HEAVY} & set(sys.modules))"
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("path", MODULES, ids=ids)
def test_every_module_opens_with_what_it_is_for(path):
    docstring = ast.get_docstring(_tree(path))
    assert docstring
    assert docstring[0].isupper() or docstring[0] in "`"


def test_no_module_is_a_drawer_for_odds_and_ends():
    drawers = {"utils", "util", "common", "helpers", "helper", "misc", "core"}
    assert not {path.stem for path in MODULES} & drawers


def test_no_negative_hundred_marks_a_token():
    """But in the columns that other code asks a pair for."""
    for path in (path for path in MODULES if path.name != "pairs.py"):
        for node in ast.walk(_tree(path)):
            is_negative = isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub)
            assert not (
                is_negative and isinstance(node.operand, ast.Constant) and node.operand.value == 100
            ), path


@cache
def texts(path: Path) -> list[str]:
    """The text constants of a module, parts of f-strings included, docstrings not."""
    tree = _tree(path)
    alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    return [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in alone
    ]


def run_files() -> set[str]:
    """Names of the files of a run directory, as `RunDirectory` has them."""
    run = RunDirectory(Path("/run"))
    values = (getattr(run, name) for name, value in vars(RunDirectory).items() if isinstance(value, property))
    return {path.name for path in values} | {ADAPTER_CONFIG, "eval-", "checkpoint-"}


def test_no_file_of_a_run_directory_is_named_outside_run():
    names = run_files() - {RECIPE, "README.md"}  # help texts have recipes, folders of data have cards
    assert len(names) > 10
    for path in MODULES:
        if folder_of(name_of(path)) != "run":
            named = names & {word for text in texts(path) for word in text.split("/")[-1].split()[-1:]}
            assert not named, f"{ids(path)} names {named}"


def test_the_prefix_of_evaluated_metrics_is_put_on_in_one_place():
    settings = {name for name in {*known_settings(), *understood_names()} if name.startswith("eval_")}
    for path in MODULES:
        if name_of(path) not in ("orpo.run.log", "orpo.training.trainer"):
            found = [text for text in texts(path) for word in text.split() if word.startswith("eval_")]
            assert not [text for text in found if not any(name in text for name in settings)], ids(path)


def test_no_command_imports_another():
    for path in MODULES:
        if folder_of(name_of(path)) == "commands" and path.stem != "__init__":
            assert not {module for module in own_imports(path) if module.startswith("orpo.commands")}, ids(
                path
            )


def test_commands_are_short():
    for path in MODULES:
        if folder_of(name_of(path)) == "commands":
            assert len(_text(path).splitlines()) <= 125, ids(path)


def test_nothing_reads_the_source_of_this_package():
    """The recipe reader parses the source of transformers, the row reader cells, and no other module any."""
    parsing = ("orpo.settings.schema", "orpo.data.rows")
    for path in MODULES:
        text = _text(path)
        assert "__file__" not in text, ids(path)
        assert "inspect.getsource" not in text, ids(path)
        assert name_of(path) in parsing or "ast.parse" not in text, ids(path)


def test_one_function_writes_figures_with_their_errors():
    for path in MODULES:
        if name_of(path) != "orpo.engine.metrics":
            tree = _tree(path)
            joined = [node for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)]
            parts = [part for text in joined for part in zip(text.values, text.values[1:], strict=False)]
            written = [
                first.value
                for first, then in parts
                if isinstance(first, ast.Constant) and str(first.value).endswith("± ")
                and isinstance(then, ast.FormattedValue) and then.format_spec is not None
            ]  # fmt: skip
            assert not written, ids(path)


def test_a_row_is_a_line_of_data_and_no_micro_batch():
    lines_of_data = "the stream has no row that can train"
    for path in MODULES:
        if folder_of(name_of(path)) == "engine":
            text = _text(path).replace(lines_of_data, "")
            assert not re.findall(r".*(?:(?<![A-Za-z])rows?(?![a-z])|Row|ROW).*", text), ids(path)


def test_words_of_a_dialect_do_not_come_back():
    for path in MODULES:
        assert not re.findall(r"\b(?:mend|anew|alike)", _text(path)), ids(path)


def test_no_function_is_longer_than_the_longest_was():
    for path in MODULES:
        for node in ast.walk(_tree(path)):
            if isinstance(node, ast.FunctionDef):
                assert (node.end_lineno or 0) - node.lineno < LONGEST, f"{ids(path)}: {node.name}"
