"""`orpo train --launch` with real processes: minutes, so it runs with `pytest -m slow` only."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import safetensors.torch
import tiny_models
import torch
from tiny_tokenizer import tiny_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture
def words(tmp_path):
    """A recipe of 60 steps on two processes, a checkpoint every 5."""
    tiny_models.build("Llama", vocab_size=1000).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    rows = [
        {"prompt": f"a {n} b", "chosen": "c d " * (1 + n % 3), "rejected": "d a " * (1 + n % 2)}
        for n in range(24)
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = {
        "model_name_or_path": tmp_path / "model", "dataset_name": tmp_path / "pairs.jsonl",
        "eval_strategy": "no", "max_steps": 60, "save_steps": 5, "per_device_train_batch_size": 2,
        "learning_rate": "1e-3",
        "chat_template": "zephyr", "num_samples": 0, "max_dropped": 1,
    }  # fmt: skip
    return [word for key, value in given.items() for word in (f"--{key}", str(value))]


def start(words, folder, *, launch=("--launch", "2", "--max_restarts", "1")):
    command = [sys.executable, "-m", "orpo", "train", *words, *launch, "--output_dir", str(folder)]
    environment = {key: value for key, value in os.environ.items() if key != "RANK"}
    return subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def finished(process):
    said, _ = process.communicate(timeout=600)
    return process.returncode, said


def test_a_killed_rank_is_started_again_and_the_run_ends_as_if_nothing_had_happened(words, tmp_path):
    status, said = finished(start(words, tmp_path / "whole"))
    assert status == 0, said
    process = start(words, tmp_path / "killed")
    while not (tmp_path / "killed" / "checkpoint-5").is_dir():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    ranks = psutil.Process(process.pid).children()
    victim = next(rank for rank in ranks if rank.environ().get("RANK") == "1")
    victim.send_signal(signal.SIGKILL)
    status, said = finished(process)
    assert status == 0 and "resuming from" in said, said
    whole, killed = (
        safetensors.torch.load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed")
    )
    assert whole.keys() == killed.keys()
    for name, weight in whole.items():
        assert torch.equal(weight, killed[name]), name


def test_a_signal_to_the_launcher_saves_a_checkpoint_and_the_same_command_ends_the_run(words, tmp_path):
    process = start(words, tmp_path / "run")
    while not (tmp_path / "run" / "checkpoint-5").is_dir():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    process.send_signal(signal.SIGUSR1)
    status, said = finished(process)
    assert status == 128 + signal.SIGTERM and "run the same command to resume" in said, said
    status, said = finished(start(words, tmp_path / "run"))
    assert status == 0 and "resuming from" in said, said


def test_one_process_and_two_end_with_the_same_weights(words, tmp_path):
    """Under `--launch`, under torchrun, and as srun would start them."""
    short = [*words, "--max_steps", "6", "--save_strategy", "no"]
    status, said = finished(
        start([*short, "--per_device_train_batch_size", "4"], tmp_path / "one", launch=())
    )
    assert status == 0, said
    status, said = finished(start(short, tmp_path / "launched"))
    assert status == 0, said
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    done = subprocess.run(
        [*torchrun, "orpo", "train", *short, "--output_dir", str(tmp_path / "torchrun")],
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    srun = {"SLURM_JOB_ID": "7", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "localhost"}
    ranks = []
    for number in ("0", "1"):
        command = [sys.executable, "-m", "orpo", "train", *short, "--output_dir", str(tmp_path / "srun")]
        environment = os.environ | srun | {"SLURM_PROCID": number, "SLURM_LOCALID": number}
        ranks.append(subprocess.Popen(command, env=environment, text=True, stdout=-1, stderr=-2))
    for rank in ranks:
        assert finished(rank)[0] == 0
    one = safetensors.torch.load_file(tmp_path / "one" / "model.safetensors")
    for name in ("launched", "torchrun", "srun"):
        other = safetensors.torch.load_file(tmp_path / name / "model.safetensors")
        for key, weight in one.items():
            torch.testing.assert_close(weight, other[key], rtol=1e-5, atol=1e-6, msg=f"{name}: {key}")
