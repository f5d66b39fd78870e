"""The scripts that made the demo's data and model say in one line which public file they lack."""

import gzip
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "scripts"
POLITENESS = "preference/rasbt_instruction-data-with-preference.json"


def run_script(name: str, *words: str) -> tuple[int, str, str]:
    environment = {key: value for key, value in os.environ.items() if key != "ORPO_SOURCES"}
    done = subprocess.run(
        [sys.executable, SCRIPTS / name, *words], capture_output=True, text=True, env=environment
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("name", ["make_demo_data.py", "pretrain_corpus.py", "pretrain_base.py"])
def test_a_script_without_its_sources_says_in_one_line_where_they_come_from(name):
    status, printed, message = run_script(name)
    assert (status, printed) == (2, "")
    assert message.startswith(f"{name}: give --sources FOLDER")
    assert message.count("\n") == 1
    assert "scripts/sources.tsv" in message
    assert "scripts/README.md" in message


def test_a_missing_file_is_named_with_its_address(tmp_path):
    status, _, message = run_script("make_demo_data.py", "--sources", str(tmp_path))
    assert status == 2
    assert message.count("\n") == 1
    assert (
        f"{tmp_path / POLITENESS} is missing: get it from https://raw.githubusercontent.com/rasbt/" in message
    )


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_a_file_with_another_checksum_is_named_with_both(tmp_path, ending):
    path = tmp_path / (POLITENESS + ending)
    path.parent.mkdir()
    path.write_bytes(gzip.compress(b"[]") if ending else b"[]")
    out = tmp_path / "out"
    status, _, message = run_script("make_demo_data.py", "--sources", str(tmp_path), "--out", str(out))
    assert status == 2
    assert message.count("\n") == 1
    found = "4f53cda18c2baa0c0354bb5f9a3ecbe5ed12ab4d8e11ba873c2f11161202b945"
    expected = "305315abf14f65fa42c01a0877572f832606571c2a7d49f152ac1d758b16756e"
    assert f"differs: 2 bytes with SHA-256 {found}, expected 386968 with {expected}" in message
    assert not out.exists()


def test_a_damaged_archive_is_named(tmp_path):
    path = tmp_path / (POLITENESS + ".gz")
    path.parent.mkdir()
    path.write_bytes(gzip.compress(b"[]" * 99)[:-9])
    status, _, message = run_script("make_demo_data.py", "--sources", str(tmp_path))
    assert (status, message.count("\n")) == (2, 1)
    assert "cannot be read" in message


def test_one_line_stands_for_many_missing_files(monkeypatch, capsys, tmp_path):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import sources

    with pytest.raises(SystemExit) as stop:
        sources.Parser("").read_sources(tmp_path, "pretrain/")
    message = capsys.readouterr().err
    assert stop.value.code == 2
    assert message.count("\n") == 1
    assert "27 of 27 files are missing or differ" in message


def test_the_shipped_splits_are_what_the_script_makes_of_the_shipped_rows(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import make_demo_data

    folder = make_demo_data.DEMO_DATA / "harmless"
    parts = make_demo_data.split(make_demo_data.harmless_rows(folder), make_demo_data.harmless_keys)
    make_demo_data.write(tmp_path, parts, compress=True)
    for name in parts:
        shipped, again = (gzip.decompress((f / f"{name}.jsonl.gz").read_bytes()) for f in (folder, tmp_path))
        assert shipped == again


def test_no_script_names_a_folder_outside_the_repository():
    for path in SCRIPTS.iterdir():
        if path.is_file():
            assert "../" not in path.read_text(), path.name
