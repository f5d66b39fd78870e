"""Several processes: torchrun within `orpo train --launch`, ranks from srun, jobs for a scheduler."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from orpo.cli import main
from orpo.errors import ConfigError
from orpo.launch.local import Launch, run_processes
from orpo.launch.ranks import LAUNCHED, adopt_srun, first_node
from orpo.settings.needs import check_needs

ROOT = Path(__file__).parent.parent


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module that notes the rank it runs as, and ends as it is told."""
    (tmp_path / "noting.py").write_text(
        "import os, signal, sys\n"
        "open(os.path.join(sys.argv[1], os.environ['RANK']), 'a').write(\n"
        "    f\"{os.environ['WORLD_SIZE']} {os.environ['LOCAL_RANK']} {sys.argv[2:]} {len(os.environ['ORPO_LAUNCHED'])}\\n\")\n"
        "if sys.argv[2] == 'die' and os.environ['RANK'] == '1' and os.environ['TORCHELASTIC_RESTART_COUNT'] == '0':\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "sys.exit(int(sys.argv[3]) if os.environ['RANK'] == '1' else 0)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("RANK", raising=False)
    out = tmp_path / "out"
    out.mkdir()
    return out


def launched(out, *words, **options):
    status = run_processes(Launch(2, **options), "noting", [str(out), *words])
    return status, {path.name: path.read_text().splitlines() for path in sorted(out.iterdir())}


def test_processes_get_their_ranks_and_a_killed_one_is_started_again(module):
    status, found = launched(module, "die", "0", restarts=1)
    assert status == 0
    assert set(found) == {"0", "1"}
    assert found["1"] == ["2 1 ['die', '0'] 1"] * 2, "killed once, then whole"
    assert found["0"][-1] == "2 0 ['die', '0'] 1"
    assert LAUNCHED not in os.environ


def test_the_status_of_the_process_that_failed_is_passed_on(module, capfd):
    assert launched(module, "fail", "2")[0] == 2
    assert "Traceback" not in capfd.readouterr().err
    assert launched(module, "die", "0")[0] == 128 + signal.SIGKILL
    assert "process 1 ended" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("launch", "says"),
    [
        (Launch(0), "at least 1 process"),
        (Launch(2, nodes="2"), "--rdzv_endpoint HOST:PORT"),
        (Launch(2, restarts=-1), "--max_restarts -1"),
    ],
)
def test_what_cannot_be_launched_is_one_line(launch, says, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ConfigError, match=says):
        launch.check()


def test_a_launcher_does_not_launch_within_another(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError, match="leave --launch out"):
        Launch(2).check()


def test_nodes_meet_where_they_are_told():
    words = Launch(8, nodes="4", endpoint="node1:29500", restarts=2).words()
    assert words[words.index("--rdzv-endpoint") + 1] == "node1:29500"
    assert "--standalone" not in words and "--standalone" in Launch(8).words()


def test_fsdp_needs_several_processes_or_a_launch(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    settings = {"model_name_or_path": "m", "dataset_name": "d", "fsdp": "full_shard auto_wrap"}
    with pytest.raises(ConfigError, match="--launch N"):
        check_needs(settings)
    check_needs(settings, launched=True)


# ------------------------------------------------------------------------------------------ srun

SRUN = {
    "SLURM_JOB_ID": "41234", "SLURM_PROCID": "11", "SLURM_STEP_NUM_TASKS": "16", "SLURM_LOCALID": "3",
    "SLURM_NODEID": "1", "SLURM_STEP_NODELIST": "gpu[07-08]", "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
}  # fmt: skip


def test_srun_says_which_process_this_is():
    environment = dict(SRUN)
    assert adopt_srun(environment)
    assert {key: environment[key] for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")} == {
        "RANK": "11", "WORLD_SIZE": "16", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "8",
    }  # fmt: skip
    assert environment["MASTER_ADDR"] == "gpu07"
    assert 20000 <= int(environment["MASTER_PORT"]) < 40000
    other = dict(SRUN, SLURM_PROCID="0", SLURM_NODEID="0", SLURM_STEP_TASKS_PER_NODE="9,7")
    adopt_srun(other)
    assert other["MASTER_PORT"] == environment["MASTER_PORT"] and other["LOCAL_WORLD_SIZE"] == "9"
    adopt_srun(last := dict(SRUN, SLURM_STEP_TASKS_PER_NODE="9,7"))
    assert last["LOCAL_WORLD_SIZE"] == "7"


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "16"},  # the batch script itself
        SRUN | {"SLURM_STEP_NUM_TASKS": "1"},
        SRUN | {"RANK": "0"},
    ],
)
def test_other_processes_stay_what_they_are(environment):
    before = dict(environment)
    assert not adopt_srun(environment)
    assert environment == before


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu[07-09,12],cpu1", "gpu07"), ("one", "one"), ("a1,a2", "a1"), ("n[3,5-6]x,m", "n3x"), ("h-2", "h-2")],
)
def test_the_first_node_of_a_list(nodes, first):
    assert first_node(nodes) == first
