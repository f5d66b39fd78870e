"""One process, several micro-batches, several ranks: the same training. Ranks are forked, on gloo."""

import json
import os
import signal

import numpy as np
import pytest
import safetensors.torch
import torch
from peft import LoraConfig
from tiny_training import logged, on_ranks, random_pairs, tiny_trainer, weights
from transformers import TrainerCallback

from orpo.errors import ConfigError, RunError
from orpo.pairs import TokenizedPair
from orpo.run.checkpoints import last_checkpoint


def run(folder, **settings):
    trainer = tiny_trainer(folder, evaluation=random_pairs(7, seed=1), eval_strategy="no", **settings)
    trainer.train()
    return {
        "weights": weights(trainer),
        "losses": logged(trainer),
        "accuracies": logged(trainer, "accuracy"),
        "chosen": logged(trainer, "chosen_logprob"),
        "tokens": logged(trainer, "tokens_per_second"),
        "evaluation": trainer.evaluate(),
        "world_size": trainer.args.world_size,
    }


def assert_same(one, other):
    assert one["losses"] == pytest.approx(other["losses"], rel=1e-6)
    assert one["chosen"] == pytest.approx(other["chosen"], rel=1e-5)
    assert one["accuracies"] == pytest.approx(other["accuracies"], rel=1e-6)
    torch.testing.assert_close(one["weights"], other["weights"], rtol=1e-6, atol=1e-6)
    for name, value in one["evaluation"].items():
        if "second" not in name and "runtime" not in name:
            assert other["evaluation"][name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


def test_accumulation_micro_batches_and_ranks_do_not_change_the_training(tmp_path):
    """peers 6"""
    one = run(tmp_path)
    assert_same(one, run(tmp_path, tokens_per_micro_batch=30))
    assert_same(one, run(tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=4))
    assert_same(
        one,
        run(
            tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2, tokens_per_micro_batch=60
        ),
    )
    for settings in (
        {"per_device_train_batch_size": 2},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "tokens_per_micro_batch": 25},
    ):
        ranks = on_ranks(lambda s=settings: run(tmp_path, **s))
        assert [rank["world_size"] for rank in ranks] == [2, 2]
        for rank in ranks:
            assert_same(one, rank)


def test_ranks_share_the_reference_of_dpo(tmp_path):
    """Each scores its part of the pairs, and all train against the whole."""
    settings = {"stages": [{"objective": "sft", "share": 0.5}, {"objective": "dpo", "beta": 0.5}]}

    def compared(folder, batch):
        trainer = tiny_trainer(
            folder, evaluation=random_pairs(7, seed=1), eval_strategy="no", learning_rate=0.1, **settings,
            per_device_train_batch_size=batch,
        )  # fmt: skip
        trainer.train()
        return weights(trainer), logged(trainer), trainer.evaluate()["eval_loss"]

    one = compared(tmp_path / "one", 4)
    for rank in on_ranks(lambda: compared(tmp_path / "two", 2)):
        torch.testing.assert_close(rank[0], one[0], rtol=1e-5, atol=1e-6)
        assert rank[1:] == (pytest.approx(one[1], rel=1e-5), pytest.approx(one[2], rel=1e-5))
    tables = [
        {len(table): table for table in map(np.load, (tmp_path / name).glob("reference-*.npy"))}
        for name in ("one", "two")
    ]
    assert tables[0].keys() == {13, 7}
    for number, table in tables[0].items():
        np.testing.assert_allclose(tables[1][number], table, rtol=1e-5)


def test_ranks_exchange_gradients_once_a_step(tmp_path):
    """Exchanging them after each micro-batch gives the same weights, later."""

    def run():
        trainer = tiny_trainer(tmp_path, per_device_train_batch_size=2, tokens_per_micro_batch=2, max_steps=3)
        plain, waiting = trainer.accelerator.no_sync, []
        trainer.accelerator.no_sync = lambda model: waiting.append(model) or plain(model)
        trainer.train()
        return len(waiting), len(trainer._last_step.batches), trainer.state.global_step

    for waiting, batches, steps in on_ranks(run):
        assert batches == 2 and waiting == steps * (batches - 1)


# ------------------------------------------------------------------------------------------ FSDP2


def _as_if_on_gpus():
    """Let accelerate shard on a CPU: its FSDP branch is for several GPUs only, else it is DDP."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    plain = PartialState.__init__

    def initialise(self, *arguments, **settings):
        plain(self, *arguments, **settings)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = initialise


def tiny_adapter():
    return LoraConfig(r=2, init_lora_weights=False, target_modules="all-linear")


def sharded(folder, *, peft=False, **settings):
    _as_if_on_gpus()
    adapter = tiny_adapter() if peft else None
    wrapped = {"fsdp_version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
    trainer = tiny_trainer(
        folder,
        evaluation=random_pairs(7, seed=1),
        fsdp="full_shard auto_wrap",
        fsdp_config=wrapped,
        eval_strategy="steps",
        eval_steps=4,
        arguments={"peft_config": adapter},
        **settings,
    )
    with pytest.raises(RunError, match="eval_on_start"):
        trainer.evaluate()
    trainer.train()
    trainer.save_model()
    return {
        "kind": type(trainer.model).__name__,
        **{name: logged(trainer, name) for name in ("loss", "grad_norm", "eval_loss")},
        "again": trainer.evaluate()["eval_loss"],
    }


@pytest.mark.parametrize("peft", [False, True])
def test_sharded_ranks_train_as_one_process_does(tmp_path, peft):
    settings = {"per_device_train_batch_size": 2, "tokens_per_micro_batch": 60}
    one = tiny_trainer(
        tmp_path,
        evaluation=random_pairs(7, seed=1),
        eval_strategy="steps",
        eval_steps=4,
        tokens_per_micro_batch=30,
        arguments={"peft_config": tiny_adapter() if peft else None},
    )
    one.train()
    for rank in on_ranks(lambda: sharded(tmp_path / "sharded", peft=peft, **settings)):
        assert rank["kind"].startswith("FSDP"), "else this would be DDP"
        assert rank["loss"] == pytest.approx(logged(one), rel=1e-6)
        assert rank["grad_norm"] == pytest.approx(logged(one, "grad_norm"), rel=1e-5)
        assert rank["eval_loss"] == pytest.approx(logged(one, "eval_loss"), rel=1e-6)
        assert rank["again"] == rank["eval_loss"][-1]
    saved = safetensors.torch.load_file(next((tmp_path / "sharded").glob("*model.safetensors")))
    assert len(saved) == len([name for name, w in one.model.named_parameters() if w.requires_grad])


# ------------------------------------------------------------------------------------------ stopping


class _SignalOne(TrainerCallback):
    """SIGTERM for one rank only, or for each at a step of its own."""

    def __init__(self, steps):
        self.steps = steps

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.steps.get(args.process_index):
            os.kill(os.getpid(), signal.SIGTERM)


SAVING = {"per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 100, "max_steps": 6}


def test_sharded_ranks_share_the_reference_of_dpo_after_another_stage(tmp_path):
    """Each has a part of the model that is the reference; its name is made from all parts."""
    stages = [{"objective": "sft", "share": 0.5}, {"objective": "dpo", "beta": 0.5}]
    settings = {"stages": stages, "evaluation": random_pairs(7, seed=1), "learning_rate": 0.1}

    def compared(folder, batch, **more):
        if more:
            _as_if_on_gpus()
        trainer = tiny_trainer(
            folder, eval_strategy="no", per_device_train_batch_size=batch, **settings, **more
        )
        trainer.train()
        return logged(trainer), trainer.evaluate()["eval_loss"], trainer.reference._identity

    cut = {
        "fsdp": "full_shard auto_wrap",
        "fsdp_config": {"fsdp_version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]},
    }
    losses, eval_loss, name = compared(tmp_path / "one", 4)
    ranks = on_ranks(lambda: compared(tmp_path / "two", 2, **cut))
    for rank in ranks:
        assert rank[:2] == (pytest.approx(losses, rel=1e-5), pytest.approx(eval_loss, rel=1e-5))
    assert ranks[0][2] == ranks[1][2] != name


@pytest.mark.parametrize("kind", ["context", "tensor"])
def test_rows_and_layers_are_not_divided_over_ranks(tmp_path, kind):
    """transformers takes both, and would train each rank on rows of its own, or wait for ever."""
    from accelerate.parallelism_config import ParallelismConfig

    def refused():
        _as_if_on_gpus()
        wrapped = {"fsdp_version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
        settings = {
            "context": {
                "parallelism_config": ParallelismConfig(cp_size=2),
                "fsdp": "full_shard auto_wrap",
                "fsdp_config": wrapped,
            },
            "tensor": {"parallelism_config": ParallelismConfig(tp_size=2)},
        }[kind]
        with pytest.raises(ConfigError, match=f"{kind} parallelism over 2 processes: not supported"):
            tiny_trainer(tmp_path, **settings)
        return True

    assert on_ranks(refused) == [True, True]


def stopped(folder, steps):
    trainer = tiny_trainer(folder, **SAVING, arguments={"callbacks": [_SignalOne(steps)]})
    trainer.train()
    return trainer.state.global_step, trainer.stopped_by


def test_ranks_stop_together_whoever_gets_the_signal_and_any_number_of_them_resumes(tmp_path):
    """trap 8: a signal at different times on two ranks ended in a size mismatch and half a checkpoint."""
    assert {step for step, _ in on_ranks(stopped, tmp_path, {1: 2})} == {2}
    checkpoint = last_checkpoint(tmp_path)
    assert checkpoint.name == "checkpoint-2" and len(list(checkpoint.glob("rng_state_*.pth"))) == 2
    whole = tiny_trainer(tmp_path / "whole", **(SAVING | {"per_device_train_batch_size": 4}))
    whole.train()

    def resume(**settings):
        trainer = tiny_trainer(tmp_path, **(SAVING | settings))
        trainer.train(resume_from_checkpoint=str(checkpoint))
        return weights(trainer)

    one_rank = resume(per_device_train_batch_size=4)
    for resumed in (*on_ranks(resume), one_rank):
        torch.testing.assert_close(resumed, weights(whole), rtol=1e-6, atol=1e-6)


def test_signals_at_different_steps_stop_at_the_first(tmp_path):
    assert on_ranks(stopped, tmp_path, {0: 3, 1: 2}) == [(2, "another rank"), (2, "SIGTERM")]


def test_a_loss_that_is_not_a_number_on_one_rank_stops_all(tmp_path):
    def run():
        pairs = [*random_pairs(7), TokenizedPair([96], [96], [96], source="data.jsonl:118")]
        trainer = tiny_trainer(tmp_path, train=pairs, per_device_train_batch_size=4, tokens_per_micro_batch=2)
        with torch.no_grad():
            trainer.model.get_input_embeddings().weight[96] = float("nan")
        try:
            trainer.train()
        except RunError as error:
            return str(error)
        return "trained on"

    messages = on_ranks(run)
    assert all("not finite" in message for message in messages), messages
    assert sum("data.jsonl:118" in message for message in messages) == 1


# ------------------------------------------------------------------------------------------ the rest


def test_streams_and_files_of_two_ranks(tmp_path):
    """peers 19: what is written is written by the first rank, once."""

    def stream(**settings):
        from orpo.data.source import TokenizedStream

        trainer = tiny_trainer(tmp_path, **settings)
        trainer.train_dataset = TokenizedStream(lambda: iter(random_pairs()))
        trainer.train()
        return weights(trainer)

    one = stream()
    for rank in on_ranks(lambda: stream(per_device_train_batch_size=2)):
        torch.testing.assert_close(rank, one, rtol=1e-6, atol=1e-6)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
