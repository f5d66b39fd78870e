"""pyproject.toml allows what `make test-oldest` tests, and what is written of versions says the same."""

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from orpo.engine import gguf_model

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
OLDEST_EXTRAS = re.findall(r"^EXTRAS_oldest := (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)


def pins(name):
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    required = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(one.name): Version(str(one.specifier).removeprefix("==")) for one in required}


def bounds(lines):
    required = [Requirement(line) for line in lines]
    assert all(re.fullmatch(r">=[\d.]+", str(one.specifier)) for one in required)
    return {canonicalize_name(one.name): Version(str(one.specifier).removeprefix(">=")) for one in required}


def allowed():
    """What a user may have, without the tools of the tests."""
    extras = [name for name in OLDEST_EXTRAS[0].split(",") if name != "test"]
    optional = [line for name in extras for line in PROJECT["optional-dependencies"][name]]
    return bounds(PROJECT["dependencies"] + optional)


def test_the_oldest_versions_that_are_allowed_are_the_oldest_that_are_tested():
    oldest = pins("constraints-oldest.txt")
    assert {name: oldest.get(name) for name in allowed()} == allowed()


def test_the_usual_pins_lie_between_the_oldest_and_the_newest():
    usual, newest = pins("constraints.txt"), pins("constraints-newest.txt")
    for name, version in allowed().items():
        assert version <= usual[name] <= newest.get(name, usual[name]), name
    assert {"torch", "transformers"} <= newest.keys()


def test_what_is_written_of_versions_is_what_pyproject_says():
    def short(version):
        return f"{version.major}.{version.minor}"

    python = PROJECT["requires-python"].removeprefix(">=")
    torch, transformers = short(allowed()["torch"]), short(allowed()["transformers"])
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"need Python {python}, torch {torch} and transformers {transformers}, or newer" in readme
    gguf = bounds(PROJECT["optional-dependencies"]["gguf"])
    assert f"transformers {short(gguf['transformers'])}:" in gguf_model._INSTALL
