"""The shape of the package: imports go one way, light things stay light, every module says what it is for."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "src" / "orpo"

# Folders that only group modules; the others (commands, demo) are one place each.
GROUPS = ("settings", "data", "engine", "training", "results")

# A module imports from layers above its own only. A new module gets its place here.
LAYERS = (
    ("errors",),
    ("config", "counts", "near_duplicates", "planning", "renamed", "rows"),
    ("messages", "runs", "schema"),
    ("formats", "recipe", "templates"),
    ("detect",),
    ("preferences",),
    ("rendering",),
    ("tokenize",),
    ("dataset", "packing"),
    ("logits", "objective", "varlen"),
    ("flex",),
    ("backends",),
    ("attention",),
    ("head",),
    ("data_report", "metrics", "steps"),
    # transformers begins here
    ("checkpoints", "loading", "progress", "run_files", "scorer"),
    ("memory", "probe"),
    ("model",),
    ("arguments", "inference", "samples", "training_data"),
    ("resolve", "resuming"),
    ("evaluate", "trainer"),
    ("report",),
    ("demo",),
    ("commands",),
    ("cli",),
    ("__main__",),
)
FIRST_WITH_TRANSFORMERS = next(number for number, layer in enumerate(LAYERS) if "scorer" in layer)
MATHEMATICS = ("packing", "objective", "attention", "head", "logits", "varlen", "flex")
LIGHT = ("errors", "config", "renamed", "schema", "recipe", "runs", "cli", "commands", "__init__")
HEAVY = {"torch", "transformers", "peft", "accelerate", "datasets", "numpy", "pandas", "matplotlib", "trl"}

MODULES = sorted(PACKAGE.rglob("*.py"))


def unit(path: Path) -> str:
    """`commands/train.py` -> `commands`, `engine/head.py` -> `head`, `cli.py` -> `cli`."""
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 and parts[0] not in GROUPS else path.stem


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
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tree.body = [
        node
        for node in tree.body
        if not (
            isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        )
    ]
    return tree


def own_imports(path: Path) -> set[str]:
    parts = [name.split(".") for name in imported(runtime_tree(path)) if name.startswith("orpo.")]
    names = {part[2] if part[1] in GROUPS else part[1] for part in parts}
    return names - {"__version__"}


def layer_of(name: str) -> int:
    places = [number for number, layer in enumerate(LAYERS) if name in layer]
    assert places, f"{name} has no place in LAYERS"
    return places[0]


def test_every_module_has_its_place_and_no_place_is_empty():
    units = {unit(path) for path in MODULES} - {"__init__"}
    assert units == {name for layer in LAYERS for name in layer}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    if unit(path) == "__init__":
        return
    place = layer_of(unit(path))
    for name in own_imports(path) - {unit(path)}:
        assert layer_of(name) < place, f"{path.name} imports {name}, which is not above it"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_transformers_is_not_imported_below_the_model(path):
    if unit(path) == "__init__" or layer_of(unit(path)) >= FIRST_WITH_TRANSFORMERS:
        return
    roots = {name.split(".")[0] for name in imported(runtime_tree(path))}
    assert not roots & {"transformers", "peft", "accelerate"}


def test_the_mathematics_knows_torch_only():
    for name in MATHEMATICS:
        roots = {item.split(".")[0] for item in imported(runtime_tree(PACKAGE / "engine" / f"{name}.py"))}
        foreign = roots - {"torch", "numpy", "orpo"} - set(sys.stdlib_module_names)
        assert not foreign, f"{name} imports {foreign}"


@pytest.mark.parametrize(
    "path", [p for p in MODULES if unit(p) in LIGHT], ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_light_modules_import_nothing_heavy_when_they_are_imported(path):
    roots = {name.split(".")[0] for name in imported(runtime_tree(path), top_only=True)}
    assert not roots & HEAVY


def test_importing_the_light_modules_loads_nothing_heavy():
    light = [path.relative_to(PACKAGE.parent).with_suffix("") for path in MODULES if unit(path) in LIGHT]
    names = [".".join(path.parts) for path in light if path.name != "__init__"]
    code = f"import sys\nfor name in {names}: __import__(name)\nprint({HEAVY} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_module_opens_with_what_it_is_for(path):
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert docstring
    assert docstring[0].isupper() or docstring[0] in "`"


def test_no_module_is_a_drawer_for_odds_and_ends():
    assert not {path.stem for path in MODULES} & {
        "utils",
        "util",
        "common",
        "helpers",
        "helper",
        "misc",
        "core",
    }


def test_no_negative_hundred_marks_a_token():
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            is_negative = isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub)
            assert not (
                is_negative and isinstance(node.operand, ast.Constant) and node.operand.value == 100
            ), path
