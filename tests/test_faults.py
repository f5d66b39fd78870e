"""Wrong results after a fault, and what leaks: real runs, killed, signalled, damaged, and started again."""

import contextlib
import errno
import gc
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_models
import torch
import yaml
from safetensors.torch import load_file
from test_commands import pairs, write_jsonl
from test_resume import StopAt, make, metrics, weights
from tiny_tokenizer import tiny_tokenizer
from torch.utils.serialization import config as serialization
from transformers import TrainerCallback

import orpo.report.page
import orpo.training.job  # forked processes must not import it each
from orpo import cli
from orpo.data.dataset import tokenize_pairs
from orpo.data.preferences import read_preferences
from orpo.errors import ConfigError, DataError, RunError
from orpo.report.page import write_report
from orpo.run.card import write_model_card
from orpo.run.checkpoints import begin_at, last_checkpoint, model_folder, read_state
from orpo.run.directory import RunDirectory
from orpo.run.disk import replace_text
from orpo.run.finished import unfinished_because
from orpo.run.lock import check_output_dir, held
from orpo.run.public import is_secret_name, public, without_secrets
from orpo.settings.schema import known_settings
from orpo.training.stopping import StopSignal

pytestmark = pytest.mark.usefixtures("lazy_disk")

TOKEN = "hf_aBcDeFgHiJkLmNoPqRsTuVwXyZ012345"
STEPS = ["--max_steps", "8", "--save_steps", "4", "--load_best_model_at_end", "false"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny model, 40 pairs (5 steps an epoch), 5 held out, and a recipe that evaluates every 4 steps."""
    folder = tmp_path_factory.mktemp("world")
    tokenizer = tiny_tokenizer("chatml")
    tiny_models.build("Llama", vocab_size=len(tokenizer), max_position_embeddings=256).save_pretrained(
        folder / "base"
    )
    tokenizer.save_pretrained(folder / "base")
    recipe = {
        "model_name_or_path": str(folder / "base"),
        "dataset_name": str(write_jsonl(folder / "train.jsonl", pairs(40))),
        "eval_dataset_name": str(write_jsonl(folder / "test.jsonl", pairs(5, first=50))),
        "learning_rate": 1e-3, "per_device_train_batch_size": 8, "logging_steps": 2, "report_to": "none",
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return folder


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Seven steps over two epochs of four, with Adam and dropout, saved after each."""
    folder = tmp_path_factory.mktemp("seven")
    trainer = make(folder)
    trainer.train()
    return {"folder": folder, "weights": weights(trainer)}


def train(world, run, *words, at=None):
    """`orpo train` in a forked process; `at` runs in it first. Returns its status and what it printed."""
    log = world / f"log-{run.name}"

    def main():
        with (
            log.open("w", buffering=1) as file,
            contextlib.redirect_stdout(file),
            contextlib.redirect_stderr(file),
        ):
            os.dup2(file.fileno(), 2)
            gc.freeze()  # what the tests hold is not to be searched for garbage
            orpo.report.page.figure_html = lambda *_, **__: ""  # curves take half of such a run's time
            if at is not None:
                at()
            os._exit(
                cli.main(["train", str(world / "recipe.yaml"), "--output_dir", str(run), *STEPS, *words])
            )

    process = multiprocessing.get_context("fork").Process(target=main)
    process.start()
    process.join(60)
    assert "Traceback" not in log.read_text(), log.read_text()
    return process.exitcode, log.read_text()


def at(place, number=signal.SIGKILL, step=None):
    """Send the process a signal when it calls a function of this package."""
    module, _, name = place.rpartition(".")

    def patch():
        owner = __import__(module, fromlist=[name])
        before = getattr(owner, name)

        def then(*arguments, **more):
            folder = Path(arguments[0]) if step is not None else None
            if folder is None or folder.name == f"checkpoint-{step}":
                os.kill(os.getpid(), number)
            return before(*arguments, **more)

        setattr(owner, name, then)

    return patch


@pytest.fixture(scope="module")
def whole(world):
    """The run that nothing disturbs."""
    run = world / "whole"
    assert train(world, run)[0] == 0
    return run


def assert_same_run(one, other):
    assert metrics(one) == metrics(other)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert unfinished_because(RunDirectory(one)) is None
    assert not list(one.glob(".saving*")) + list(one.glob("earlier*"))


# ------------------------------------------------------------------------------------------ one step too many


@pytest.mark.parametrize(
    ("place", "number"),
    [
        ("orpo.training.trainer.written_into", signal.SIGKILL),
        ("orpo.training.trainer.mark_finished", signal.SIGTERM),
    ],
)
def test_a_run_that_ends_in_mid_epoch_and_is_killed_at_the_end_trains_no_further(
    world, whole, tmp_path, place, number
):
    run = tmp_path / "run"
    assert train(world, run, at=at(place, number))[0] == -number
    assert unfinished_because(RunDirectory(run)) is not None
    status, printed = train(world, run)
    assert status == 0 and "checkpoint-8" in printed
    assert_same_run(run, whole)
    assert "already holds a finished run" in train(world, run)[1]


def test_resuming_a_complete_run_from_python_makes_no_step(uninterrupted, tmp_path):
    shutil.copytree(uninterrupted["folder"], tmp_path, dirs_exist_ok=True)
    trainer = make(tmp_path)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 7 and torch.equal(weights(trainer), uninterrupted["weights"])


def test_a_run_that_early_stopping_had_ended_trains_no_further(tmp_path):
    settings = {"early_stopping_patience": 1, "eval_steps": 1, "learning_rate": 1.0, "save_total_limit": 9}
    trainer = make(tmp_path, **settings, load_best_model_at_end=True)
    trainer.train()
    stopped = trainer.state.global_step
    assert stopped < 7
    again = make(tmp_path, **settings, load_best_model_at_end=True)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == stopped
    patient = make(tmp_path, **settings | {"early_stopping_patience": 9}, load_best_model_at_end=True)
    patient.train(resume_from_checkpoint=True)
    assert patient.state.global_step == 7, "more patience is heard"


# ------------------------------------------------------------------------------------------ finished, or not


def test_a_fresh_run_that_is_killed_is_not_taken_for_the_finished_one_before(world, whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    words = ["--learning_rate", "5e-3"]
    fresh = [*words, "--force", "true", "--resume_from_checkpoint", "false"]
    status, printed = train(world, run, *fresh, at=at("orpo.training.trainer.write_state", step=4))
    assert status == -signal.SIGKILL and "earlier-1" in printed
    assert (run / "earlier-1" / "model.safetensors").read_bytes() == (
        whole / "model.safetensors"
    ).read_bytes()
    assert (run / "earlier-1" / "checkpoint-8").is_dir() and not (run / "checkpoint-8").exists()
    status, printed = train(world, run, *words)
    assert status == 0 and "finished run" not in printed
    twin = tmp_path / "twin"
    train(world, twin, *words)
    shutil.rmtree(run / "earlier-1")
    assert_same_run(run, twin)


def test_a_setting_that_the_recipe_does_not_name_is_compared_too(world, whole):
    status, printed = train(world, whole, "--adam_beta1", "0.5")
    assert status == 2 and "adam_beta1: 0.9 -> 0.5" in printed


def test_weights_that_changed_since_are_not_the_finished_run(world, whole, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    flip(run / "model.safetensors")
    assert "checksum" in unfinished_because(RunDirectory(run))
    assert model_folder(str(run)) == str(run / "checkpoint-8")
    assert "model.safetensors is damaged (its checksum differs); using " in capsys.readouterr().out
    assert train(world, run)[0] == 0
    assert_same_run(run, whole)


@pytest.mark.parametrize(
    ("name", "damage", "what"),
    [
        ("tokenizer.json", lambda path: path.write_bytes(b""), "is empty"),
        ("tokenizer_config.json", lambda path: os.truncate(path, 9), "is cut off"),
        ("config.json", Path.unlink, "is missing"),
        ("chat_template.jinja", lambda path: path.write_bytes(b"\n"), "is empty"),
    ],
)
def test_a_finished_run_whose_small_files_are_damaged_is_saved_again(
    world, whole, tmp_path, name, damage, what
):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    damage(run / name)
    status, printed = train(world, run)
    assert status == 0 and f"{name} {what}, so the run is not taken for finished" in printed
    assert "checkpoint-8" in printed
    assert (run / name).read_bytes() == (whole / name).read_bytes()
    assert_same_run(run, whole)


def test_small_files_of_a_finished_run_may_be_edited(world, whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    (run / "generation_config.json").write_text('{"temperature": 0.5, "do_sample": true}')
    assert "already holds a finished run" in train(world, run)[1]


# ------------------------------------------------------------------------------------------ two trainings


def test_a_second_training_in_the_directory_is_refused_with_who_trains_there(world, tmp_path):
    run, ready = tmp_path / "run", tmp_path / "ready"

    def hold():
        with held(run):
            ready.touch()
            time.sleep(60)

    process = multiprocessing.get_context("fork").Process(target=hold)
    process.start()
    while not ready.exists():
        time.sleep(0.01)
    status, printed = train(world, run)
    with pytest.raises(RunError, match="is training there"):
        make(run).train()
    process.kill()
    process.join()
    assert status == 2 and f"process {process.pid} on {os.uname().nodename} is training there" in printed
    assert not (run / "recipe.yaml").exists(), "the second one has written nothing"
    with held(run), held(run):
        pass  # the lock went with its holder, and one process may ask twice


# ------------------------------------------------------------------------------------------ damaged bytes


def flip(path, position=None):
    """Change one bit, not the size."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if position is None else position] ^= 1
    path.write_bytes(content)


FLIPS = {
    "weights": ("model.safetensors", None),
    "optimizer's pickle": ("optimizer.pt", 100),
    "optimizer's tensors": ("optimizer.pt", None),
    "trainer state": ("trainer_state.json", None),
    "our state": ("orpo_state.json", 40),
}


@pytest.mark.parametrize("damage", FLIPS)
def test_one_flipped_bit_is_passed_over_by_all_who_ask(uninterrupted, tmp_path, capsys, damage):
    for step in (2, 3):
        shutil.copytree(uninterrupted["folder"] / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    RunDirectory(tmp_path).write_recipe({})
    name, position = FLIPS[damage]
    flip(tmp_path / "checkpoint-3" / name, position)
    older = tmp_path / "checkpoint-2"
    assert last_checkpoint(tmp_path) == older and model_folder(str(tmp_path)) == str(older)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all("checkpoint-3 is skipped: " in line for line in lines)


def test_a_checkpoint_of_ours_without_its_manifest_is_passed_over(uninterrupted, tmp_path, capsys):
    """Its archives have no checksums of their own: nobody could tell a flipped bit."""
    folder = shutil.copytree(uninterrupted["folder"] / "checkpoint-2", tmp_path / "checkpoint-2")
    (folder / "orpo_state.json").unlink()
    assert last_checkpoint(tmp_path) is None
    assert "orpo_state.json is missing, which holds the checksum of" in capsys.readouterr().out
    assert serialization.save.compute_crc32, "other files of the process keep their own"


def test_a_flipped_bit_without_a_manifest_is_found_by_the_archive_s_own_checksum(uninterrupted, tmp_path):
    """As plain transformers saves."""
    folder = shutil.copytree(uninterrupted["folder"] / "checkpoint-2", tmp_path / "checkpoint-2")
    (folder / "orpo_state.json").unlink()
    for path in (*folder.glob("*.pt"), *folder.glob("*.pth")):
        torch.save(torch.load(path, weights_only=False), path)
    assert last_checkpoint(tmp_path) == folder
    flip(folder / "optimizer.pt")
    assert last_checkpoint(tmp_path) is None


def test_files_that_a_crash_has_cut_do_not_stop_a_restart(world, whole, tmp_path):
    run = tmp_path / "run"
    status, _ = train(world, run, "--num_samples", "1", at=at("orpo.training.trainer.write_state", step=8))
    assert status == -signal.SIGKILL
    good = (run / "metrics.jsonl").read_text()
    (run / "samples.json").write_text('[{"prompt": "a"')
    (run / "recipe.yaml").write_bytes(b"beta: [\xff")
    (run / "metrics.jsonl").write_text(good.replace("\n", "\n\x00\x00{\n", 1))
    status, printed = train(world, run, "--num_samples", "1", "--max_completion_length", "4")
    assert status == 0, printed
    for name in ("samples.json", "recipe.yaml", "metrics.jsonl"):
        assert f"kept as {name}.damaged" in printed and (run / f"{name}.damaged").exists()
    assert_same_run(run, whole)


def test_a_damaged_token_cache_is_made_again(tmp_path, capsys):
    rows, tokenizer = read_preferences(pairs(20)), tiny_tokenizer("chatml")
    read = lambda: tokenize_pairs(rows, tokenizer, max_length=None, cache_dir=tmp_path / "cache")
    before = read()
    tokens = before.tokens.copy()  # they are mapped from the file
    (folder,) = (tmp_path / "cache").iterdir()
    zeros = lambda path: path.write_bytes(bytes(path.stat().st_size))
    for name, damage in {
        "tokens.npy": zeros, "offsets.npy": Path.unlink, "words.json": lambda path: os.truncate(path, 9),
        "manifest.json": zeros, "spans.npy": lambda path: os.truncate(path, 0),
    }.items():  # fmt: skip
        damage(folder / name)
        again = read()
        assert (again.tokens == tokens).all() and again.sources == before.sources
        assert f"{folder}: the cached tokens are damaged (" in capsys.readouterr().out
        read()
        assert capsys.readouterr().out == ""


# ------------------------------------------------------------------------------------------ disks


def test_a_text_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "samples.json"
    replace_text(path, "old")

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(RunError, match=r"No space left.*GiB are free") as failure:
            replace_text(path, "new")
    assert "\n" not in str(failure.value)
    assert path.read_text() == "old"
    assert [one.name for one in tmp_path.iterdir()] == ["samples.json"]
    (tmp_path / "folder").mkdir()
    with pytest.raises(RunError, match="folder could not be written"):
        replace_text(tmp_path / "folder", "new")
    old = os.umask(0o027)
    try:
        replace_text(path, "\ud83d")
        assert path.stat().st_mode & 0o777 == 0o640, "as the user's umask says"
    finally:
        os.umask(old)


@pytest.mark.parametrize("kilobytes", [0, 20])
def test_a_full_disk_at_any_point_is_one_line(world, tmp_path, kilobytes):
    """No file may grow beyond a size: that of the run files at the start, of the tokenizer in a save."""
    run = tmp_path / "run"
    room = kilobytes * 1000
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, room)) if room else full_from_the_start()
    words = ["--use_peft", "true", "--lora_r", "1"]  # so that the tokenizer is the largest file
    status, printed = train(world, run, *words, at=limit)
    assert status == 2, printed
    assert printed.count("orpo: error: ") == 1 and "could not be written" in printed.splitlines()[-1]
    assert not list(run.glob(".saving*")) + list(run.glob(".*.writing"))
    assert ("checkpoint-4" in printed) == bool(kilobytes)
    assert kilobytes or train(world, run, *words)[0] == 0


def full_from_the_start():
    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    os.fsync = full


def test_files_of_a_run_are_as_readable_as_the_umask_says(whole):
    mask = os.umask(0)
    os.umask(mask)
    files = [path for path in whole.rglob("*") if path.is_file() and path.name != ".lock"]
    assert any(path.name == "model.safetensors" for path in files)
    assert {oct(path.stat().st_mode & 0o777) for path in files} == {oct(0o666 & ~mask)}


def test_what_is_in_the_way_of_a_checkpoint_is_replaced(tmp_path):
    (tmp_path / "checkpoint-1").symlink_to(tmp_path / "nowhere")
    (tmp_path / ".saving-1").write_text("")
    make(tmp_path, max_steps=1, eval_strategy="no").train()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-1"


# ------------------------------------------------------------------------------------------ where it writes


@pytest.mark.parametrize(
    "name", ["", " ", "/dev/null", "FILE", "FILE/below", "BASE", "LINK", "RECIPE", "DATA"]
)
def test_an_output_dir_that_cannot_be_one_is_refused_in_one_line(world, tmp_path, name):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(world / "base")
    (tmp_path / "run" / "recipe.yaml").mkdir(parents=True)
    (tmp_path / "data").mkdir()
    words = ["--dataset_name", str(tmp_path / "data")] if name == "DATA" else []
    places = {"FILE": tmp_path / "file", "BASE": world / "base", "LINK": tmp_path / "link",
              "RECIPE": tmp_path / "run", "DATA": tmp_path / "data"}  # fmt: skip
    first, _, rest = name.partition("/")
    where = Path(places[first], rest) if first in places else name
    before = (world / "base" / "model.safetensors").read_bytes()
    log = world / "log-place"
    status, printed = train(world, log.with_name("place"), "--output_dir", str(where), *words)
    assert status == 2 and printed.splitlines()[-1].startswith("orpo: error: output_dir: "), printed
    assert (world / "base" / "model.safetensors").read_bytes() == before


def test_a_checkpoint_of_the_directory_is_no_model_to_start_from(whole, tmp_path):
    with pytest.raises(ConfigError, match="is a checkpoint in that folder"):
        check_output_dir(str(whole), [str(whole / "checkpoint-8")])
    check_output_dir(str(tmp_path), ["organisation/model", None, str(whole)])


def test_a_dry_run_leaves_no_parent_folders(world, tmp_path):
    assert train(world, tmp_path / "a" / "b" / "run", "--dry_run")[0] == 0
    assert not (tmp_path / "a").exists()


def test_a_card_of_others_is_moved_not_replaced(tmp_path, capsys):
    (tmp_path / "README.md").write_text("mine")
    begin_at(tmp_path, 0)
    assert (tmp_path / "earlier-1" / "README.md").read_text() == "mine"
    assert "(README.md) is now in" in capsys.readouterr().out
    begin_at(tmp_path, 0)
    assert not (tmp_path / "earlier-2").exists()


# ------------------------------------------------------------------------------------------ force


def interrupted(folder, **settings):
    """A run of seven steps that was stopped after three."""
    make(folder, **settings, arguments={"callbacks": [StopAt(3)]}).train()
    return folder


def rates(trainer):
    return {
        line["step"]: line["learning_rate"] for line in trainer.state.log_history if "learning_rate" in line
    }


def test_a_forced_learning_rate_takes_effect(tmp_path, capsys):
    settings = {"logging_steps": 1, "eval_strategy": "no", "learning_rate": 3e-2, "weight_decay": 0.1}
    whole = make(tmp_path / "whole", **settings)
    whole.train()
    other = settings | {"learning_rate": 1e-2, "weight_decay": 0.0, "lr_scheduler_type": "cosine"}
    forced = make(interrupted(tmp_path / "part", **other), **settings, force=True)
    forced.train(resume_from_checkpoint=True)
    assert {step: rate for step, rate in rates(forced).items() if step > 3} == {
        step: rate for step, rate in rates(whole).items() if step > 3
    }
    assert {group["weight_decay"] for group in forced.optimizer.param_groups} >= {0.1}
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("force: "))
    assert "learning_rate: 0.01 -> 0.03" in line and "lr_scheduler_type: cosine -> linear" in line
    assert yaml.safe_load((tmp_path / "part" / "recipe.yaml").read_text())["learning_rate"] == 3e-2


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"optim": "sgd"}, "optim"), ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "lr_sch")],
)
def test_what_a_checkpoint_was_built_with_is_refused_by_name(tmp_path, settings, named):
    forced = make(interrupted(tmp_path), **settings, force=True)
    with pytest.raises(RunError, match=rf"was made with another {named}.*force: true cannot change"):
        forced.train(resume_from_checkpoint=True)


def test_force_on_a_complete_run_would_change_nothing_and_is_refused(world, whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    status, printed = train(world, run, "--learning_rate", "5e-3", "--force")
    assert status == 2 and "complete at step 8, so learning_rate would change nothing" in printed
    assert yaml.safe_load((run / "recipe.yaml").read_text())["learning_rate"] == 1e-3


def test_settings_of_an_adapter_that_is_not_there_may_change(tmp_path):
    trainer = make(interrupted(tmp_path), lora_r=4, shuffle_buffer=7)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 7


def test_a_model_of_another_size_is_refused_before_its_weights_are_loaded(tmp_path):
    interrupted(tmp_path)
    from tiny_training import tiny_trainer

    settings = {"optim": "adamw_torch", "max_steps": 7, "learning_rate": 1e-2, "disable_dropout": False}
    wide = tiny_trainer(
        tmp_path, model=tiny_models.build("Llama", intermediate_size=64), **settings, force=True
    )
    with pytest.raises(RunError, match="another trained_weights"):
        wide.train(resume_from_checkpoint=True)


# ------------------------------------------------------------------------------------------ signals


class SignalInEvaluation(TrainerCallback):
    """Sends a signal within the evaluation of a step."""

    def __init__(self, step):
        self.step = step

    def on_prediction_step(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


class SignalInSamples(TrainerCallback):
    """Sends a signal when the answers of a step are to be generated; it stands before their writer."""

    def __init__(self, step):
        self.step = step

    def on_evaluate(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def sampling(folder, *callbacks):
    """A run that evaluates, generates two answers and saves every second step, and keeps the best model."""
    tokenizer = tiny_tokenizer("chatml")
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)  # the model has 97 embeddings
    settings = {"tokens_per_micro_batch": 40, "num_samples": 2, "max_completion_length": 4,
                "load_best_model_at_end": True, "save_steps": 2, "processing_class": tokenizer}  # fmt: skip
    return make(folder, **settings, arguments={"callbacks": list(callbacks)})


@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
    """The same, undisturbed."""
    folder = tmp_path_factory.mktemp("sampled")
    trainer = sampling(folder)
    trainer.train()
    return {"folder": folder, "weights": weights(trainer), "best": trainer.state.best_global_step}


@pytest.mark.parametrize(("where", "step"), [(SignalInEvaluation, 4), (SignalInSamples, 2)])
def test_a_signal_in_an_evaluation_acts_at_once_and_the_resumed_run_makes_it_again(
    sampled, tmp_path, where, step
):
    trainer = sampling(tmp_path, where(step))
    trainer.train()
    assert trainer.stopped_by == "SIGTERM" and trainer.state.global_step == step
    assert not [line for line in metrics(tmp_path) if (line["kind"], line["step"]) == ("eval", step)]
    assert f"step {step}" not in (tmp_path / "samples.json").read_text()
    assert read_state(tmp_path / f"checkpoint-{step}")["evaluation_waits"]
    resumed = sampling(tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert metrics(tmp_path) == metrics(sampled["folder"])
    assert torch.equal(weights(resumed), sampled["weights"])
    assert resumed.state.best_global_step == sampled["best"]
    samples = [(folder / "samples.json").read_text() for folder in (tmp_path, sampled["folder"])]
    assert samples[0] == samples[1]


def test_a_signal_before_the_first_step_leaves_nothing_to_resume(world, tmp_path):
    run = tmp_path / "run"
    early = at("orpo.training.job.summary", signal.SIGUSR1)
    status, printed = train(world, run, at=early)
    assert status == 128 + signal.SIGUSR1, printed
    assert "stopped by SIGUSR1: no step was made" in printed
    status, printed = train(world, run, "--eval_strategy", "no", at=early)
    assert status == 128 + signal.SIGUSR1 and "saved" in printed and (run / "checkpoint-1").is_dir()


def test_signals_that_are_ignored_stay_ignored():
    """`nohup orpo train ... &`"""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stop = StopSignal()
        with stop.caught():
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.name is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_ctrl_c_while_libraries_are_imported_is_one_line(world):
    """A real program; the signal comes when torch is half imported."""
    code = (
        "import sys, os, signal, runpy\n"
        "class Interrupt:\n"
        "    def find_spec(self, name, *more):\n"
        "        if name == 'torch.nn': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupt())\n"
        f"sys.argv = ['orpo', 'train', {str(world / 'recipe.yaml')!r}, '--output_dir', '/nowhere']\n"
        "runpy.run_module('orpo', run_name='__main__', alter_sys=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "orpo: stopped\n")


# ------------------------------------------------------------------------------------------ leaks


def test_no_secret_and_no_home_path_is_in_what_leaves(world, tmp_path):
    """As `model_init_kwargs: {token: ...}` and a mapping of data sets with its paths."""
    run = tmp_path / "<b>`x` run"
    words = ["--model_init_kwargs", json.dumps({"token": TOKEN, "cache_dir": str(tmp_path / "cache")}),
             "--hub_token", TOKEN, "--dataset_name", json.dumps({str(world / "train.jsonl"): 1.0}),
             "--run_name", f"key {TOKEN}"]  # fmt: skip
    status, printed = train(world, run, *words, at=at("orpo.training.trainer.mark_finished"))
    assert status == -signal.SIGKILL, printed
    without = [word for word in words if word not in ("--hub_token", TOKEN)]
    without[1] = json.dumps({"cache_dir": str(tmp_path / "cache")})
    assert train(world, run, *without)[0] == 0, "a run resumes without its secrets"
    assert "finished run" in train(world, run, *words)[1]
    found = [path for path in run.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    assert found == []
    for path in (run / "README.md", run / "report.html"):
        assert str(world) not in path.read_text() and str(tmp_path) not in path.read_text(), path
    assert "train.jsonl" in (run / "README.md").read_text()
    assert "\n# &lt;b>\\`x\\` run\n" in (run / "README.md").read_text()


def test_names_cannot_break_out_of_the_card(tmp_path):
    recipe = {"model_name_or_path": "a`b", "dataset_name": ["x``y/z"], "chat_template": "```\n# heading\n```"}
    write_model_card(tmp_path, recipe, [("accuracy, ~~a~~", "1.0")])
    text = (tmp_path / "README.md").read_text()
    assert "`` a`b `` trained on ``` x``y/z ```" in text
    assert "````yaml" in text and text.rstrip().endswith("\n````")
    assert "\\~\\~a\\~\\~" in text


@pytest.mark.parametrize(
    ("value", "left"),
    [
        ({"token": "x", "a": [{"api_key": "y", "b": 1}]}, {"a": [{"b": 1}]}),
        ({"headers": {"Authorization": "z"}, "AWS_SECRET_ACCESS_KEY": "w"}, {"headers": {}}),
        ({"use_auth_token": True, "accessToken": "x", "password": 12}, {"use_auth_token": True}),
        ({"pad_token": "<pad>", "max_tokens": 4}, {"pad_token": "<pad>", "max_tokens": 4}),
        ('{"token": "abc", "n": 1}', '{"n": 1}'),
        (f"use {TOKEN} here", "use (left out: a secret) here"),
        ("https://me:pw@host/x", "https://(left out: a secret)@host/x"),
        ("{{ messages }} {# token: key #}", "{{ messages }} {# token: key #}"),
    ],
)  # fmt: skip
def test_secrets_are_left_out_by_name_at_any_depth_and_by_shape(value, left):
    assert without_secrets(value) == left


def test_no_setting_of_a_run_is_taken_for_a_secret():
    secrets = {name for name in known_settings() if is_secret_name(name)}
    assert secrets == {name for name in secrets if name.endswith("hub_token")}


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("/home/jane doe/data/p.jsonl", "p.jsonl"),
        ({"/home/jane/a/p.jsonl": 1, "/home/jane/b/p.jsonl": 2}, {"p.jsonl": 1, "p.jsonl (2)": 2}),
        ("/home/jane/p.jsonl: format hh (columns)", "p.jsonl: format hh (columns)"),
        ("organisation/model", "organisation/model"),
        ("https://huggingface.co/a/b/c", "https://huggingface.co/a/b/c"),
        ("C:\\Users\\jane\\p.jsonl", "p.jsonl"),
        ("~/runs/first", "first"),
        ("<s>{{ x }}</s>", "<s>{{ x }}</s>"),
    ],
)
def test_of_a_path_the_last_part_is_shown(value, shown):
    assert public(value) == shown


def test_the_page_of_an_older_run_hides_what_its_files_tell(tmp_path):
    run = RunDirectory(tmp_path)
    run.log.write_text("")
    run.write_recipe({"model_init_kwargs": {"token": TOKEN}, "deepspeed": "/home/jane/z.json"})
    text = write_report(tmp_path).read_text()
    assert TOKEN not in text and "/home/jane" not in text and "z.json" in text


def test_a_damaged_file_named_in_one_line_still_stops_a_report(tmp_path):
    run = RunDirectory(tmp_path)
    run.log.write_text("")
    run.samples.write_text("[")
    with pytest.raises(DataError, match=r"samples\.json:1: not valid JSON"):
        write_report(tmp_path)
