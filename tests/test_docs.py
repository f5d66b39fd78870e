"""The documents are true: what they promise is what there is, and what they tell a user to write works."""

import argparse
import inspect
import re
import shlex
import textwrap
from pathlib import Path

import pytest
import yaml

import orpo
from orpo.cli import _parser
from orpo.settings.recipe import load_recipe

ROOT = Path(__file__).parents[1]
DOCS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")])


def blocks(name, language):
    text = (ROOT / "docs" / name).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


# ------------------------------------------------------------------------------------------ what is public


def commands(parser, words=()):
    """Each command with its options, in the order of `--help`."""
    below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not below:
        shown = [option for action in parser._actions for option in action.option_strings]
        yield " ".join(words), sorted({word.replace("-", "_").lstrip("_") for word in shown} - {"h", "help"})
    for action in below:
        for word, one in action.choices.items():
            yield from commands(one, (*words, word))


def signatures():
    """Each public name of the package with its parameters; classes and settings are listed by name."""
    for name in sorted(orpo.__all__):
        found = getattr(orpo, name)
        is_function = inspect.isfunction(found)
        yield name, list(inspect.signature(found).parameters) if is_function else []


def test_what_is_public_is_what_the_stability_promise_lists():
    """To add a name: write it into docs/stability.md. To remove one: keep the promise that stands there."""
    lines = re.sub(r"\n +", " ", blocks("stability.md", "text")[0]).splitlines()
    listed = {name: words.split() for name, _, words in (line.partition(":") for line in lines)}
    there = {f"orpo {word}": options for word, options in commands(_parser())}
    there |= {f"orpo.{name}": parameters for name, parameters in signatures()}
    text = "".join(
        textwrap.fill(f"{name}: {' '.join(words)}".removesuffix(": "), 110, subsequent_indent="    ") + "\n"
        for name, words in there.items()
    )
    assert listed == there, f"docs/stability.md should list:\n{text}"


# ------------------------------------------------------------------------------------------ what users type


@pytest.mark.parametrize("recipe", blocks("migrating.md", "yaml"))
def test_a_recipe_of_another_tool_is_read_whole(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    written = yaml.safe_load(recipe)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text(
        '{"my_pairs": {"file_name": "p.jsonl", "ranking": true}}'
    )
    (tmp_path / "recipe.yaml").write_text(recipe)
    settings = load_recipe("recipe.yaml").settings
    assert settings["output_dir"] == written["output_dir"]
    assert settings["max_length"] == 2048 and settings["beta"] in (0.05, 0.1)
    assert settings["model_name_or_path"] in recipe and settings["learning_rate"] in (5e-6, 8e-5)


def test_the_authors_command_line_is_understood():
    """All options of their script, and those that a run here needs besides."""
    _, after = blocks("migrating.md", "bash")[-1].split("# after\n")
    words = shlex.split(after.replace("\\\n", " "))
    settings = load_recipe(None, words[words.index("--launch") + 2 :]).settings
    assert (settings["beta"], settings["learning_rate"], settings["max_length"]) == (0.05, 5e-6, 2048)
    assert settings["attn_implementation"] == "flash_attention_2" and settings["dataset_num_proc"] == 8


def test_links_between_documents_lead_somewhere():
    for path in DOCS:
        for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_the_dockerfile_copies_what_is_there():
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
    copied = [word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]]
    assert len(copied) == 5 and all((ROOT / name).exists() for name in copied)
