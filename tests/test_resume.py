"""Never lose work: exact resuming, signals, whole checkpoints, damaged ones, killed and full-disk saves."""

import errno
import itertools
import json
import multiprocessing
import os
import resource
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import tiny_models
import torch
from peft import LoraConfig
from tiny_training import random_pairs, tiny_trainer, weights
from transformers import TrainerCallback

from orpo.data.source import TokenizedStream
from orpo.errors import RunError
from orpo.pairs import TokenizedPair
from orpo.run.checkpoints import (
    STATE_FILE,
    checkpoint_problem,
    last_checkpoint,
    read_state,
    write_state,
    written_whole,
)
from orpo.training.resuming import check_changes
from orpo.training.saved_weights import load_renamed
from orpo.training.stopping import StopSignal

pytestmark = pytest.mark.usefixtures("lazy_disk")

CLOCKS = ("seconds", "tokens_per_second", "peak_memory")
SAVING = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": None, "optim": "adamw_torch"}


class StopAt(TrainerCallback):
    """Sends this process a signal within a step."""

    def __init__(self, step, number=signal.SIGTERM):
        self.step, self.number = step, number

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            os.kill(os.getpid(), self.number)


def metrics(folder):
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        for clock in CLOCKS:
            line.pop(clock, None)
            line.get("metrics", {}).pop(clock, None)
    return lines


def with_dropout(**settings):
    return tiny_models.build("Llama", attention_dropout=0.2, **settings)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Seven steps over two epochs of four: evaluations, dropout, Adam, log windows of three steps."""
    folder = tmp_path_factory.mktemp("whole")
    trainer = make(folder)
    trainer.train()
    return {"folder": folder, "weights": weights(trainer), "metrics": metrics(folder)}


def make(folder, **settings):
    defaults = {
        **SAVING,
        "max_steps": 7,
        "logging_steps": 3,
        "logging_first_step": False,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "load_best_model_at_end": False,
        "disable_dropout": False,
        "learning_rate": 1e-2,
    }
    return tiny_trainer(
        folder, model=with_dropout(), evaluation=random_pairs(5, seed=2), **(defaults | settings)
    )


# ------------------------------------------------------------------------------------------ exact


@pytest.mark.parametrize("step", [3, 4, 5])
def test_resumed_run_equals_the_uninterrupted_one(uninterrupted, tmp_path, step):
    """Before the last step of an epoch, at its end, and in the next one within a log window."""
    shutil.copytree(uninterrupted["folder"], tmp_path, dirs_exist_ok=True)
    for folder in tmp_path.glob("checkpoint-*"):
        if int(folder.name[11:]) > step:
            shutil.rmtree(folder)
    trainer = make(tmp_path)
    trainer.train(resume_from_checkpoint=True)
    assert torch.equal(weights(trainer), uninterrupted["weights"])
    assert metrics(tmp_path) == uninterrupted["metrics"]
    assert trainer.state.global_step == 7


def test_a_resumed_run_keeps_its_rows_though_memory_has_changed(tmp_path, monkeypatch):
    """A token budget that nobody set follows the memory there is, when the run begins."""
    for room, steps in ((40, 2), (10_000, 7)):
        monkeypatch.setattr(
            "orpo.training.trainer.default_tokens_per_micro_batch", lambda *_, room=room, **__: room
        )
        trainer = make(
            tmp_path,
            tokens_per_micro_batch=None,
            arguments={"callbacks": [StopAt(steps)] if steps < 7 else []},
        )
        trainer.train(resume_from_checkpoint=steps == 7)
        assert trainer._batch_settings(evaluating=False).tokens_per_micro_batch == 40
        assert trainer.state.global_step == steps


def test_fresh_run_in_an_old_directory_starts_new_files(uninterrupted, tmp_path):
    shutil.copytree(uninterrupted["folder"], tmp_path, dirs_exist_ok=True)
    make(tmp_path, max_steps=2).train()
    assert [line["step"] for line in metrics(tmp_path)] == [0, 2, 2]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_signal_saves_after_the_step_and_the_run_goes_on_exactly(uninterrupted, tmp_path, number):
    """trap 8"""
    before = {s: signal.getsignal(s) for s in StopSignal.SIGNALS}
    # A limit of one must not delete what the signal saved, nor the best checkpoint be loaded over it.
    settings = {"save_steps": 2, "save_total_limit": 1}
    trainer = make(
        tmp_path, **settings, load_best_model_at_end=True, arguments={"callbacks": [StopAt(3, number)]}
    )
    trainer.train()
    assert trainer.stopped_by == signal.Signals(number).name and trainer.state.global_step == 3
    assert {s: signal.getsignal(s) for s in StopSignal.SIGNALS} == before
    assert last_checkpoint(tmp_path).name == "checkpoint-3"
    saved = safetensors.torch.load_file(tmp_path / "checkpoint-3" / "model.safetensors")
    assert all(torch.equal(trainer.model.get_parameter(name), weight) for name, weight in saved.items())
    resumed = make(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.stopped_by is None
    assert torch.equal(weights(resumed), uninterrupted["weights"])
    assert metrics(tmp_path) == uninterrupted["metrics"]


def test_second_ctrl_c_does_not_wait():
    stop = StopSignal()
    with stop.caught():
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.name == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_streamed_run_resumes_exactly(tmp_path):
    def stream(folder, callbacks=(), **settings):
        trainer = tiny_trainer(
            folder,
            **(SAVING | settings),
            logging_steps=2,
            max_steps=6,
            arguments={"callbacks": list(callbacks)},
        )
        trainer.train_dataset = TokenizedStream(lambda: iter(random_pairs()))
        return trainer

    whole, part, rest = (
        stream(tmp_path / "whole"),
        stream(tmp_path / "part", [StopAt(5)]),
        stream(tmp_path / "part"),
    )
    whole.train()
    part.train()
    assert part.state.global_step == 5
    rest.train(resume_from_checkpoint=True)
    assert torch.equal(weights(rest), weights(whole)) and metrics(tmp_path / "whole") == metrics(
        tmp_path / "part"
    )


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("change", ["order", "answers", "shorter", "sides", "boundaries"])
def test_a_stream_that_gives_other_pairs_is_refused(tmp_path, change, force, capsys):
    """Nothing but the pairs themselves tells, and those are read again to skip them."""
    pairs = random_pairs()
    changed = {
        "order": pairs[::-1],
        "answers": [TokenizedPair(p.prompt, p.rejected[:1], p.rejected) for p in pairs],
        "shorter": pairs[:-1],
        "sides": [TokenizedPair(p.prompt, p.rejected, p.chosen) for p in pairs],
        "boundaries": [TokenizedPair([*p.prompt, *p.chosen[:1]], p.chosen[1:], p.rejected) for p in pairs],
    }

    def stream(pairs, callbacks=(), **settings):
        trainer = tiny_trainer(
            tmp_path, **(SAVING | settings), max_steps=6, arguments={"callbacks": list(callbacks)}
        )
        trainer.train_dataset = TokenizedStream(lambda: iter(pairs))
        return trainer

    stream(pairs, [StopAt(3)]).train()
    other = stream(changed[change], force=force)
    if not force:
        with pytest.raises(RunError, match="the stream did not give the pairs that"):
            other.train(resume_from_checkpoint=True)
        assert last_checkpoint(tmp_path).name == "checkpoint-3"
        return
    other.train(resume_from_checkpoint=True)
    assert "force: the stream did not give the pairs" in capsys.readouterr().out


def test_data_that_begins_again_is_said(tmp_path, capsys):
    make(tmp_path, arguments={"callbacks": [StopAt(3)]}).train()
    make(tmp_path, ignore_data_skip=True).train(resume_from_checkpoint=True)
    assert "ignore_data_skip: the data begins again" in capsys.readouterr().out


def test_another_base_under_an_adapter_is_refused(tmp_path):
    """A checkpoint of an adapter holds none of the base's weights."""

    def run(scale=1.0, callbacks=(), dtype=torch.float32):
        model = tiny_models.build("Llama").to(dtype)
        model.model.layers[0].mlp.down_proj.weight.data[3, 5] *= scale
        arguments = {
            "callbacks": list(callbacks),
            "peft_config": LoraConfig(r=2, target_modules="all-linear"),
        }
        return tiny_trainer(tmp_path, model=model, **SAVING, arguments=arguments)

    run(callbacks=[StopAt(3)]).train()
    with pytest.raises(RunError, match=r"other settings \(base_weights: \w+ -> \w+\)"):
        run(scale=1.5).train(resume_from_checkpoint=True)
    with pytest.raises(RunError, match=r"weights_dtype: float32 -> bfloat16, float32"):
        run(dtype=torch.bfloat16).train(resume_from_checkpoint=True)
    run().train(resume_from_checkpoint=True)


def test_another_configuration_of_the_base_is_refused(tmp_path):
    """All weights come from the checkpoint; what they are multiplied by comes from the base's config.json."""

    def run(callbacks=(), **config):
        model = tiny_models.build("Llama", **config)
        return tiny_trainer(tmp_path, model=model, **SAVING, arguments={"callbacks": list(callbacks)})

    run(callbacks=[StopAt(3)]).train()
    with pytest.raises(RunError, match=r"other settings \(config.rms_norm_eps: 1e-06 -> 0.5\)"):
        run(rms_norm_eps=0.5).train(resume_from_checkpoint=True)
    with pytest.raises(RunError, match=r"config.rope_parameters: "):
        run(rope_parameters={"rope_theta": 100.0, "rope_type": "default"}).train(resume_from_checkpoint=True)
    run(use_cache=False).train(resume_from_checkpoint=True)


def test_an_adapter_of_other_settings_than_the_recipe_s_is_refused(tmp_path):
    """Of a folder, or of a script: its weights come from the checkpoint, what they are scaled by does not."""

    def run(callbacks=(), **changes):
        adapter = LoraConfig(**{"r": 2, "lora_alpha": 4, "target_modules": ["v_proj", "q_proj"]} | changes)
        arguments = {"callbacks": list(callbacks), "peft_config": adapter}
        return tiny_trainer(tmp_path, **SAVING, arguments=arguments)

    run(callbacks=[StopAt(3)]).train()
    for changes, said in (
        ({"lora_alpha": 40}, r"adapter\.default\.lora_alpha: 4 -> 40"),
        ({"use_rslora": True}, r"adapter\.default\.use_rslora: False -> True"),
        ({"lora_dropout": 0.1}, r"adapter\.default\.lora_dropout: 0\.0 -> 0\.1"),
    ):
        with pytest.raises(RunError, match=rf"other settings \({said}\)"):
            run(**changes).train(resume_from_checkpoint=True)
    run(target_modules=["q_proj", "v_proj"], base_model_name_or_path="x").train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    "change",
    [
        lambda pair: replace(pair, prompt=[*pair.prompt, pair.chosen[0]], chosen=pair.chosen[1:]),
        lambda pair: replace(pair, chosen=[*pair.chosen, pair.rejected[0]], rejected=pair.rejected[1:]),
        lambda pair: replace(pair, chosen_context=1),
        lambda pair: replace(pair, assistant_spans=((0, 1),)),
    ],
)
def test_the_same_tokens_with_other_ends_of_their_parts_are_refused(change, tmp_path):
    pairs = random_pairs(12, seed=1)
    make(tmp_path, train=pairs, save_total_limit=1, arguments={"callbacks": [StopAt(2)]}).train()
    pairs[5] = change(pairs[5])
    with pytest.raises(RunError, match=r"other settings \(pairs_parts: \d+ -> \d+\)"):
        make(tmp_path, train=pairs).train(resume_from_checkpoint=True)


def test_another_reference_than_the_model_before_training_is_refused(tmp_path):
    def run(scale=1.0, callbacks=(), **settings):
        model = tiny_models.build("Llama")
        model.model.layers[0].mlp.down_proj.weight.data[3, 5] *= scale
        return tiny_trainer(
            tmp_path, model=model, **(SAVING | settings), arguments={"callbacks": list(callbacks)}
        )

    run(callbacks=[StopAt(3)], objective="dpo").train()
    with pytest.raises(RunError, match=r"other settings \(base_weights: \w+ -> \w+\)"):
        run(scale=1.5, objective="dpo").train(resume_from_checkpoint=True)
    run(objective="dpo").train(resume_from_checkpoint=True)


def test_without_a_reference_the_checkpoint_holds_all_weights(tmp_path):
    def run(scale=1.0, callbacks=()):
        model = tiny_models.build("Llama")
        model.model.layers[0].mlp.down_proj.weight.data[3, 5] *= scale
        return tiny_trainer(tmp_path, model=model, **SAVING, arguments={"callbacks": list(callbacks)})

    run(callbacks=[StopAt(3)]).train()
    run(scale=1.5).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3Moe"])
def test_a_mixture_of_experts_resumes_exactly_and_keeps_its_best(tmp_path, name):
    """Its weights have other names in the file; transformers' Trainer goes on without the experts'."""

    def run(folder, callbacks=(), compute_metrics=None, **settings):
        return tiny_trainer(
            tmp_path / folder,
            model=tiny_models.build(name),
            evaluation=random_pairs(3, seed=1),
            **(SAVING | settings),
            arguments={"callbacks": list(callbacks), "compute_metrics": compute_metrics},
        )

    whole, part, rest = run("whole"), run("part", [StopAt(3)]), run("part")
    whole.train()
    part.train()
    rest.train(resume_from_checkpoint=True)
    assert torch.equal(weights(rest), weights(whole))

    best = {"load_best_model_at_end": True, "metric_for_best_model": "mine", "eval_strategy": "steps"}
    worse = itertools.count()
    trainer = run("best", (), lambda _: {"mine": next(worse)}, **best, eval_steps=1, greater_is_better=False)
    trainer.train()
    kept = Path(trainer.state.best_model_checkpoint)
    assert kept.name != "checkpoint-4"
    saved = type(trainer.model).from_pretrained(kept, config=tiny_models.build(name).config)
    for mine, theirs in zip(trainer.model.parameters(), saved.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_checkpoint_without_some_weights_is_refused(tmp_path):
    model = tiny_models.build("Mixtral")
    model.save_pretrained(tmp_path)
    stored = safetensors.torch.load_file(tmp_path / "model.safetensors")
    lost = next(key for key in stored if "gate" in key)
    safetensors.torch.save_file(
        {key: value for key, value in stored.items() if key != lost},
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(RunError, match="cannot resume, 1 weights of MixtralForCausalLM are not in it"):
        load_renamed(model, tmp_path)


def test_adapter_resumes_exactly(tmp_path):
    def lora(folder, callbacks=()):
        return make(
            folder,
            arguments={
                "callbacks": list(callbacks),
                "peft_config": LoraConfig(
                    r=2, lora_dropout=0.1, target_modules="all-linear", init_lora_weights=False
                ),
            },
        )

    whole, part, rest = (
        lora(tmp_path / "whole"),
        lora(tmp_path / "part", [StopAt(3)]),
        lora(tmp_path / "part"),
    )
    whole.train()
    part.train()
    rest.train(resume_from_checkpoint=True)
    assert torch.equal(weights(rest), weights(whole)) and metrics(tmp_path / "whole") == metrics(
        tmp_path / "part"
    )


# ------------------------------------------------------------------------------------------ refused


def test_changed_recipe_is_refused_with_the_differences(uninterrupted, tmp_path):
    shutil.copytree(uninterrupted["folder"], tmp_path, dirs_exist_ok=True)
    changed = make(tmp_path, learning_rate=2e-2, beta=0.2)
    with pytest.raises(RunError, match=r"beta: 0.1 -> 0.2; learning_rate: 0.01 -> 0.02.*force: true"):
        changed.train(resume_from_checkpoint=True)
    other_data = make(tmp_path, train=random_pairs(13, seed=5))
    with pytest.raises(RunError, match="pairs_checksum"):
        other_data.train(resume_from_checkpoint=True)
    with pytest.raises(RunError, match="pairs_per_step: 4 -> 8"):
        make(tmp_path, gradient_accumulation_steps=2).train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    "settings",
    [
        {
            "logging_steps": 1,
            "save_total_limit": 9,
            "report_to": "none",
            "run_name": "new",
            "tokens_per_micro_batch": 40,
        },
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        {"learning_rate": 2e-2, "force": True},
    ],
)
def test_changes_that_cannot_change_the_mathematics_pass(uninterrupted, tmp_path, settings):
    shutil.copytree(uninterrupted["folder"], tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "checkpoint-7")
    make(tmp_path, **settings).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("repeated", [True, False])
def test_a_checkpoint_with_another_order_of_pairs_is_refused(tmp_path, repeated):
    """Version 0.2.0 did not bring pairs of a prompt together, and wrote nothing about the order."""
    pairs = random_pairs(12, seed=1)
    if repeated:
        pairs[6:] = [replace(pair, prompt=pairs[n].prompt) for n, pair in enumerate(pairs[6:])]
    make(tmp_path, train=pairs, save_total_limit=1, arguments={"callbacks": [StopAt(2)]}).train()
    (state,) = tmp_path.glob(f"checkpoint-*/{STATE_FILE}")
    content = read_state(state.parent)
    expected = "pairs of a prompt together" if repeated else "each pair for itself"
    assert content["run"]["order"] == expected
    del content["run"]["order"]
    write_state(state.parent, content)
    again = make(tmp_path, train=pairs)
    if not repeated:
        again.train(resume_from_checkpoint=True)
        return
    with pytest.raises(RunError, match=r"order: each pair for itself -> pairs of a prompt together"):
        again.train(resume_from_checkpoint=True)


def test_checkpoint_of_plain_transformers_is_not_compared():
    check_changes(Path("checkpoint-1"), None, {"beta": 0.1})


def test_a_resumed_run_is_evaluated_and_saved_as_often_as_it_is_told(tmp_path):
    """Settings that cannot change where a run goes; transformers goes by those of the checkpoint."""
    often = {"eval_strategy": "steps", "save_strategy": "steps", "eval_on_start": False}

    def run(callbacks=(), **steps):
        arguments = {"callbacks": list(callbacks)}
        return tiny_trainer(
            tmp_path, evaluation=random_pairs(3, seed=2), max_steps=8, load_best_model_at_end=False,
            save_total_limit=9, arguments=arguments, **often, **steps,
        )  # fmt: skip

    run([StopAt(4)], eval_steps=4, save_steps=4, logging_steps=4).train()
    again = run(eval_steps=2, save_steps=1, logging_steps=1)
    again.train(resume_from_checkpoint=True)
    history = [line for line in again.state.log_history if line["step"] > 4]
    assert [line["step"] for line in history if "eval_loss" in line] == [6, 8]
    assert [line["step"] for line in history if "loss" in line] == [5, 6, 7, 8]
    assert {f"checkpoint-{n}" for n in range(4, 9)} <= {path.name for path in tmp_path.iterdir()}


def test_no_checkpoint_is_said(tmp_path):
    with pytest.raises(RunError, match="there is no whole checkpoint"):
        make(tmp_path).train(resume_from_checkpoint=True)


# ------------------------------------------------------------------------------------------ damaged


DAMAGES = {
    "no trainer state": lambda folder: (folder / "trainer_state.json").unlink(),
    "no optimizer": lambda folder: (folder / "optimizer.pt").unlink(),
    "no generators": lambda folder: (folder / "rng_state.pth").unlink(),
    "no schedule": lambda folder: (folder / "scheduler.pt").unlink(),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "cut weights": lambda folder: os.truncate(folder / "model.safetensors", 5000),
    "cut optimizer": lambda folder: os.truncate(folder / "optimizer.pt", 5000),
    "cut state": lambda folder: os.truncate(folder / STATE_FILE, 20),
}


@pytest.mark.parametrize("manifest", [True, False])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_is_passed_over(uninterrupted, tmp_path, capsys, damage, manifest):
    """trap 7: without optimizer.pt transformers resumes, silently, with a fresh optimizer."""
    for step in (2, 3):
        shutil.copytree(uninterrupted["folder"] / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    newest = tmp_path / "checkpoint-3"
    assert last_checkpoint(tmp_path) == newest
    if not manifest and damage != "cut state":
        (newest / STATE_FILE).unlink()
    DAMAGES[damage](newest)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    assert "checkpoint-3 is skipped: " in capsys.readouterr().out
    with pytest.raises(RunError, match="cannot resume"):
        make(tmp_path).train(resume_from_checkpoint=str(newest))


def test_files_that_nobody_can_parse_are_known_by_their_size(uninterrupted, tmp_path):
    folder = shutil.copytree(uninterrupted["folder"] / "checkpoint-2", tmp_path / "checkpoint-2")
    os.truncate(folder / "chat_template.jinja", 10)
    assert "chat_template.jinja has 10 bytes instead of" in checkpoint_problem(folder)


def test_weights_alone_cannot_be_resumed(tmp_path):
    make(tmp_path, save_only_model=True, max_steps=1).train()
    assert "save_only_model" in checkpoint_problem(tmp_path / "checkpoint-1")
    assert (tmp_path / "checkpoint-1" / "model.safetensors").is_file()


# ------------------------------------------------------------------------------------------ interrupted saves


def test_old_checkpoints_go_only_after_the_new_one_is_there(tmp_path):
    trainer = make(tmp_path, save_total_limit=1, max_steps=2)
    trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]

    def no_disk(*arguments, **more):
        raise OSError(errno.ENOSPC, "No space left on device")

    trainer = make(tmp_path, save_total_limit=1, max_steps=3, force=True)
    trainer._save_optimizer_and_scheduler = no_disk
    with pytest.raises(RunError) as failure:
        trainer.train(resume_from_checkpoint=True)
    message = str(failure.value)
    assert (
        "checkpoint-3 could not be written" in message and "No space left" in message and "\n" not in message
    )
    assert [
        path.name for path in tmp_path.iterdir() if "checkpoint" in path.name or "saving" in path.name
    ] == ["checkpoint-2"]
    assert last_checkpoint(tmp_path)


def test_everything_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    synced = set()

    def sync(handle):
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        synced.add(path.name if path != tmp_path else "run directory")
        assert (tmp_path / "checkpoint-1").exists() == (path == tmp_path)

    monkeypatch.setattr(os, "fsync", sync)
    with written_whole(tmp_path / "checkpoint-1", is_writer=True, wait=lambda: None) as folder:
        (folder / "shard").mkdir()
        for name in ("weights", "shard/optimizer"):
            (folder / name).write_text(name)
    assert synced == {"weights", "optimizer", "shard", "checkpoint-1", "run directory"}


def test_a_checkpoint_of_the_same_name_is_replaced_whole(tmp_path):
    target = tmp_path / "checkpoint-1"
    for content in ("old", "new"):
        with written_whole(target, is_writer=True, wait=lambda: None) as folder:
            (folder / content).write_text(content)
    assert [path.name for path in target.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_kill_during_a_save_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    """A real process, killed with SIGKILL while the third checkpoint is half written."""

    def hang(folder):
        if folder.name == "checkpoint-3":
            (tmp_path / "half written").touch()
            time.sleep(60)

    monkeypatch.setattr("orpo.run.checkpoints.flush_folder", hang)
    process = in_process(lambda: make(tmp_path, max_steps=3, eval_strategy="no").train())
    while not (tmp_path / "half written").exists() and process.is_alive():
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    monkeypatch.undo()
    assert (tmp_path / ".saving-3").is_dir() and not (tmp_path / "checkpoint-3").exists()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    whole = make(tmp_path / "whole", max_steps=3, eval_strategy="no")
    whole.train()
    resumed = make(tmp_path, max_steps=3, eval_strategy="no")
    resumed.train(resume_from_checkpoint=True)
    assert torch.equal(weights(resumed), weights(whole))
    assert metrics(tmp_path) == metrics(tmp_path / "whole")
    assert not (tmp_path / ".saving-3").exists()


@pytest.mark.parametrize("share", [0.5, 1.5])
def test_full_disk_is_one_clear_line_and_the_checkpoint_before_is_whole(tmp_path, share):
    """The system refuses to let a file grow: the weights, or the optimizer's state (twice their size)."""

    def run():
        trainer = make(tmp_path, max_steps=3, eval_strategy="no", save_steps=2)
        size = int(share * sum(4 * weight.numel() for weight in trainer.model.parameters()))
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        try:
            trainer.train(resume_from_checkpoint=True)
        except RunError as error:
            (tmp_path / "message").write_text(str(error))

    make(tmp_path, max_steps=3, eval_strategy="no", arguments={"callbacks": [StopAt(1)]}).train()
    in_process(run).join()
    message = (tmp_path / "message").read_text()
    assert "checkpoint-2 could not be written" in message and "Make room and run again" in message
    assert len(message.splitlines()) == 1
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-1"
    assert not list(tmp_path.glob(".saving*"))


def in_process(function):
    process = multiprocessing.get_context("fork").Process(target=function)
    process.start()
    return process
