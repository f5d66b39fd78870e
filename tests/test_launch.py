"""Several processes: torchrun within `orpo train --launch`, ranks from srun, jobs for a scheduler."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

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
        "own = [os.environ[name] for name in ('WORLD_SIZE', 'LOCAL_RANK', 'TORCHELASTIC_USE_AGENT_STORE')]\n"
        "with open(os.path.join(sys.argv[1], os.environ['RANK']), 'a') as file:\n"
        "    print(*own, *sys.argv[2:], file=file)\n"
        "first = os.environ['TORCHELASTIC_RESTART_COUNT'] == '0'\n"
        "if sys.argv[2] == 'die' and os.environ['RANK'] == '1' and first:\n"
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
    assert found["1"] == ["2 1 False die 0"] * 2, "killed once, then whole, with another store"
    assert found["0"][-1] == "2 0 False die 0"
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


# ------------------------------------------------------------------------------------------ jobs


def written(tmp_path, monkeypatch, where, *words):
    """The job of a recipe with a name that a shell would split."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "My recipe.yaml").write_text("model_name_or_path: m\ndataset_name: d\n")
    assert main(["launch", "--on", where, "My recipe.yaml", "--beta", "0.2", *words]) == 0
    return next(path for path in tmp_path.iterdir() if path.name.startswith("my-recipe")).read_text()


@pytest.mark.parametrize(("status", "queued"), [(0, False), (2, False), (1, False), (138, True), (143, True)])
def test_a_slurm_job_that_was_cut_off_is_queued_again(tmp_path, monkeypatch, status, queued):
    """The script is run, with programs in the place of Slurm's."""
    script = written(
        tmp_path, monkeypatch, "slurm", "--gpus", "4", "--nodes", "2", "--gpu", "a100", "--hours", "3"
    )
    asked = [line.split()[1] for line in script.splitlines() if line.startswith("#SBATCH")]
    assert {
        "--nodes=2",
        "--ntasks-per-node=4",
        "--gpus-per-node=a100:4",
        "--time=3:00:00",
        "--requeue",
    } <= set(asked)
    for name, does in (
        ("srun", f'printf "%s|" "$@" >> calls; exit {status}'),
        ("scontrol", 'echo "$@" >> queued'),
    ):
        (tmp_path / name).write_text(f"#!/bin/bash\n{does}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "77"}
    done = subprocess.run(["bash", "-c", script], env=environment, cwd=tmp_path, check=False)
    assert done.returncode == status
    assert (tmp_path / "calls").read_text() == "--kill-on-bad-exit=1|orpo|train|My recipe.yaml|--beta|0.2|"
    assert (tmp_path / "queued").exists() == queued
    if queued:
        assert (tmp_path / "queued").read_text() == "requeue 77\n"


def test_a_sky_task_keeps_the_run_and_meets_on_the_first_node(tmp_path, monkeypatch):
    task = yaml.safe_load(written(tmp_path, monkeypatch, "sky", "--nodes", "4"))
    assert task["num_nodes"] == 4 and task["resources"]["accelerators"] == "H100:8"
    assert task["run"].splitlines()[1] == (
        "orpo train 'My recipe.yaml' --beta 0.2 --launch 8 --nnodes 4 --rdzv_endpoint $HEAD:29500"
        " --max_restarts 3 --output_dir /runs/my-recipe"
    )
    assert subprocess.run(["bash", "-n", "-c", task["run"]], check=False).returncode == 0


def test_a_kubernetes_job_has_a_place_to_meet_and_replaces_evicted_pods(tmp_path, monkeypatch):
    service, job = yaml.safe_load_all(
        written(tmp_path, monkeypatch, "k8s", "--nodes", "2", "--image", "me/orpo:1")
    )
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert spec["completions"] == spec["parallelism"] == 2 and spec["completionMode"] == "Indexed"
    assert pod["restartPolicy"] == "Never", "which a policy for failures asks for"
    container = pod["containers"][0]
    assert container["image"] == "me/orpo:1" and container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    host = f"{job['metadata']['name']}-0.{pod['subdomain']}"
    assert f"--rdzv_endpoint {host}:29500" in container["command"][-1]
    assert service["metadata"]["name"] == pod["subdomain"]
    assert service["spec"]["selector"] == job["spec"]["template"]["metadata"]["labels"]
    failing, ignored = spec["podFailurePolicy"]["rules"]
    assert (
        failing["onExitCodes"]["values"] == [2, 3]
        and failing["onExitCodes"]["containerName"] == container["name"]
    )
    assert ignored["action"] == "Ignore"


@pytest.mark.parametrize(
    ("status", "starts_again"), [(0, False), (2, False), (3, False), (1, True), (143, True)]
)
def test_a_ray_script_starts_a_process_for_each_gpu_and_again_what_was_cut_off(
    tmp_path, monkeypatch, status, starts_again
):
    """Ray itself is a stand-in here; `benchmarks/distributed_check.py --engines ray` runs it."""
    script = written(tmp_path, monkeypatch, "ray", "--gpus", "4", "--nodes", "3")
    assert "num_workers=12" in script
    calls = []
    context = SimpleNamespace(
        get_world_rank=lambda: 5,
        get_local_rank=lambda: 1,
        get_world_size=lambda: 12,
        get_local_world_size=lambda: 4,
    )
    ray_train = ModuleType("ray.train")
    ray_train.get_context = lambda: context
    ray_train.FailureConfig = ray_train.RunConfig = ray_train.ScalingConfig = dict
    torch_trainer = ModuleType("ray.train.torch")

    class TorchTrainer:
        def __init__(self, function, **settings):
            self.function = function

        def fit(self):
            return SimpleNamespace(return_value=self.function())

    torch_trainer.TorchTrainer = TorchTrainer
    ray = ModuleType("ray")
    ray.train = ray_train
    for module in (ray, ray_train, torch_trainer):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr("orpo.cli.main", lambda words: calls.append((words, os.environ["RANK"])) or status)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "")
    names = {"__name__": "job"}
    exec(compile(script, "job", "exec"), names)
    if starts_again:
        with pytest.raises(SystemExit):
            names["train_here"]()
    else:
        with pytest.raises(SystemExit) as ended:
            exec(compile(script, "job", "exec"), {"__name__": "__main__"})
        assert ended.value.code == status
    assert calls == [(["train", "My recipe.yaml", "--beta", "0.2"], "5")]
    assert os.environ["WORLD_SIZE"] == "12" and os.environ["LOCAL_WORLD_SIZE"] == "4"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--gpus", "0"], "--gpus 0: at least 1"),
        (["--name", "Mine!"], "--name Mine!"),
        (["--model_name_or_path", ""], "model_name_or_path is not set"),
        (["--out", "there"], "there is there already"),
        (["--out", "no/such/folder"], "cannot be written"),
        (["--learnin_rate", "1"], "did you mean 'learning_rate'"),
    ],
)
def test_a_job_that_cannot_be_written_is_one_line(tmp_path, monkeypatch, capsys, words, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").write_text("kept")
    given = ["--model_name_or_path", "m", "--dataset_name", "d"]
    assert main(["launch", "--on", "slurm", *given, *words]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
    assert (tmp_path / "there").read_text() == "kept"


# ------------------------------------------------------------------------------------------ recipes


def test_shipped_recipes_are_listed_and_copied(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["recipes"]) == 0
    listed = capsys.readouterr().out
    assert "mistral-7b-capybara  " in listed and "launch/fsdp2 " in listed
    assert main(["recipes", "mistral-7b-capybara"]) == 0
    assert "beta: 0.05" in (tmp_path / "mistral-7b-capybara.yaml").read_text()
    capsys.readouterr()
    assert main(["recipes", "mistral-7b-capybara"]) == 2, "nothing is written over"
    assert main(["recipes", "launch/fsdp2", "--out", "mine.yaml"]) == 0
    assert main(["recipes", "../pyproject"]) == 2
    assert "no such recipe" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "fsdp2-lora", "fsdp2-qlora", "zero2", "zero3"])
def test_configurations_for_accelerate_load(name):
    from accelerate.commands.config.config_args import load_config_from_file

    path = ROOT / "src" / "orpo" / "recipes" / "launch" / f"{name}.yaml"
    config = load_config_from_file(str(path))
    kind = str(getattr(config.distributed_type, "value", config.distributed_type))
    expected = {"ddp": "MULTI_GPU", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}.get(name, "FSDP")
    assert kind == expected and config.num_processes == 8 and config.mixed_precision == "bf16"
    if kind == "FSDP":
        assert config.fsdp_config["fsdp_version"] == 2
    if kind == "DEEPSPEED":
        assert config.deepspeed_config["zero_stage"] == int(name[-1])
    if kind == "DEEPSPEED":
        assert config.deepspeed_config["gradient_accumulation_steps"] == 1, "a step of ours is whole"


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
    [
        ("gpu[07-09,12],cpu1", "gpu07"),
        ("one", "one"),
        ("a1,a2", "a1"),
        ("n[3,5-6]x,m", "n3x"),
        ("h-2", "h-2"),
    ],
)
def test_the_first_node_of_a_list(nodes, first):
    assert first_node(nodes) == first
