"""`optimizer_in_backward`: the same weights, norms and states as an ordinary step, without its gradients."""

import json
import os
import platform
import shutil
import subprocess
import sys

import pytest
import tiny_models
import torch
from peft import LoraConfig
from tiny_training import logged, tiny_trainer, weights
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import TrainerCallback

from orpo import ORPOConfig
from orpo.errors import ConfigError, RunError
from orpo.settings.config import ONE_WEIGHT_AT_A_TIME, check_recipe
from orpo.training.in_backward import stepping_in_backward

pytestmark = pytest.mark.usefixtures("lazy_disk")

ONE = {"tokens_per_micro_batch": 4096}
SEVERAL = {"tokens_per_micro_batch": 48}
ADAM = {"optim": "adamw_torch", "learning_rate": 1e-2, "weight_decay": 0.1, "lr_scheduler_type": "cosine"}


def both(folder, family="Llama", *, peft=None, **settings):
    """The same run with an ordinary step, and with the step in the backward."""
    runs = []
    for in_backward in (False, True):
        trainer = tiny_trainer(
            folder / str(in_backward),
            model=tiny_models.build(family),
            optimizer_in_backward=in_backward,
            arguments={"peft_config": peft},
            **(ADAM | settings),
        )
        trainer.train()
        runs.append(trainer)
    return runs


def assert_same(plain, ours):
    assert torch.equal(weights(plain), weights(ours))
    for name in ("loss", "grad_norm", "learning_rate"):
        assert logged(plain, name) == logged(ours, name)
    before, after = (one.optimizer.state_dict() for one in (plain, ours))
    assert before["param_groups"] == after["param_groups"] and before["state"].keys() == after["state"].keys()
    for weight, state in before["state"].items():
        for name, value in state.items():
            same = torch.equal(value, after["state"][weight][name]) if torch.is_tensor(value) else None
            assert same or value == after["state"][weight][name], (weight, name)


# ------------------------------------------------------------------------------------------ the same step


@pytest.mark.parametrize("optim", sorted(ONE_WEIGHT_AT_A_TIME))
def test_every_optimizer_that_is_allowed_makes_the_same_weights(tmp_path, optim):
    assert_same(*both(tmp_path, optim=optim, **SEVERAL))


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("family", ["Llama", "Qwen2", "OPT", "Qwen3Moe"])
def test_tied_matrices_and_recomputed_layers_move_once_by_the_whole_gradient(tmp_path, family, checkpointing):
    """A tied matrix gets the gradient of the head and that of the embedding in one backward pass."""
    for size in (ONE, SEVERAL):
        assert_same(*both(tmp_path, family, gradient_checkpointing=checkpointing, **size))


def test_an_adapter_trains_so_too(tmp_path):
    assert_same(*both(tmp_path, peft=LoraConfig(r=4, target_modules="all-linear"), **ONE))


def test_bfloat16_weights_and_autocast(tmp_path):
    assert_same(*both(tmp_path, bf16=True, **SEVERAL))


def test_a_weight_without_a_part_in_the_last_micro_batch_moves_in_the_ordinary_step():
    """Experts that no token of it is sent to."""
    torch.manual_seed(0)
    first, second = (nn.Linear(3, 3) for _ in range(2))
    twins = [nn.Linear(3, 3) for _ in range(2)]
    for twin, one in zip(twins, (first, second), strict=True):
        twin.load_state_dict(one.state_dict())
    x, norms = torch.randn(5, 3), {}
    for one, other, in_backward in ((first, second, True), (*twins, False)):
        optimizer = torch.optim.AdamW([*one.parameters(), *other.parameters()], lr=0.1)
        (one(x).square().mean() + other(x).square().mean()).backward()
        if in_backward:
            with stepping_in_backward(optimizer, norms):
                one(x + 1).square().mean().backward()
            assert all(weight.grad is None for weight in one.parameters())
            assert all(weight.grad is not None for weight in other.parameters())
        else:
            one(x + 1).square().mean().backward()
        optimizer.step()
    assert list(norms) and norms.keys() == set(first.parameters())
    for one, twin in zip((first, second), twins, strict=True):
        assert torch.equal(one.weight, twin.weight) and torch.equal(one.bias, twin.bias)


class _Held(TrainerCallback):
    """The most gradients that are there when a weight moves."""

    def __init__(self):
        self.most = 0

    def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        plain = optimizer.optimizer.step

        def step(*arguments):
            self.most = max(self.most, sum(weight.grad is not None for weight in model.parameters()))
            return plain(*arguments)

        if state.global_step == 0:
            optimizer.optimizer.step = step


@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
def test_one_gradient_is_there_at_a_time(tmp_path, family):
    most = []
    for in_backward in (True, False):
        settings = {"optimizer_in_backward": in_backward, **ADAM, **ONE}
        trainer = tiny_trainer(tmp_path, model=tiny_models.build(family), **settings)
        trainer.add_callback(held := _Held())
        trainer.train()
        most.append(held.most)
    assert most[0] == 1 and most[1] == len(list(trainer.model.parameters()))


def test_a_step_of_several_micro_batches_says_that_gradients_are_held(tmp_path, capsys):
    for size, said in ((ONE, 0), (SEVERAL, 1)):
        tiny_trainer(tmp_path, optimizer_in_backward=True, **size).train()
        assert capsys.readouterr().out.count("holds its gradients until the last") == said


_GAPS = """
import torch
from orpo.training.in_backward import give_back_what_is_freed
from orpo.training.recorder import peak_resident

torch.ones(2**20)  # so that glibc would keep the next ones
{call}
before, moments = peak_resident(), []
for _ in range(30):
    gradient = torch.ones(2**20)
    moments.append(torch.ones(2**20))
    del gradient
print((peak_resident() - before) // 2**20)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc alone")
def test_freed_gradients_between_moments_leave_the_process():
    """30 moments of 4 MiB, with a gradient of the same size before each."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    words = [sys.executable, "-c", _GAPS.format(call="give_back_what_is_freed()")]
    done = subprocess.run(words, capture_output=True, text=True, check=True, env=environment)
    assert 115 < int(done.stdout) < 140, done.stdout


# ------------------------------------------------------------------------------------------ resuming


@pytest.mark.parametrize("resumes_so", [True, False])
@pytest.mark.parametrize("begins_so", [True, False])
def test_a_run_resumes_exactly_with_or_without(tmp_path, begins_so, resumes_so):
    settings = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": None, **ADAM, **SEVERAL}
    whole = tiny_trainer(tmp_path / "whole", optimizer_in_backward=begins_so, **settings)
    whole.train()
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    shutil.rmtree(tmp_path / "part" / "checkpoint-4")
    part = tiny_trainer(tmp_path / "part", optimizer_in_backward=resumes_so, **settings)
    part.train(resume_from_checkpoint=True)
    assert torch.equal(weights(part), weights(whole))
    losses = [
        [line["metrics"].get("loss") for line in map(json.loads, log.read_text().splitlines())]
        for log in sorted(tmp_path.glob("*/metrics.jsonl"))
    ]
    assert losses[0] == losses[1]


# ------------------------------------------------------------------------------------------ what goes wrong


class _Poison(TrainerCallback):
    """Puts a NaN into the embeddings before the first step."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        with torch.no_grad():
            model.get_input_embeddings().weight[:, 0] = float("nan")


def test_a_loss_that_is_not_finite_moves_no_weight(tmp_path):
    trainer = tiny_trainer(tmp_path, optimizer_in_backward=True, **SEVERAL)
    trainer.add_callback(_Poison())
    before = weights(trainer)
    with pytest.raises(RunError, match=r"step 1: the loss .*no weight was changed"):
        trainer.train()
    poisoned = weights(trainer).isnan()
    assert poisoned.sum() == tiny_models.VOCAB and torch.equal(weights(trainer)[~poisoned], before[~poisoned])


def test_an_infinite_gradient_of_a_finite_loss_stops_with_the_way_back(tmp_path):
    trainer = tiny_trainer(tmp_path, optimizer_in_backward=True)
    next(iter(trainer.model.parameters())).register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(RunError, match=r"step 1: .*not finite \(gradient norm \w+\); go back to the last"):
        trainer.train()


def test_memory_that_ends_before_a_weight_has_moved_is_tried_again(tmp_path, capsys):
    plain, ours = (tiny_trainer(tmp_path / str(on), optimizer_in_backward=on, **ONE) for on in (False, True))
    plain.train()
    run = ours._run_batch

    def small_machine(model, batch, *arguments, **options):
        if batch.num_pairs > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        run(model, batch, *arguments, **options)

    ours._run_batch = small_machine
    ours.train()
    torch.testing.assert_close(weights(ours), weights(plain), rtol=1e-6, atol=1e-6)
    assert "retrying with micro-batches of half as many pairs" in capsys.readouterr().out


def test_memory_that_ends_among_moved_weights_stops_with_the_way_back(tmp_path):
    trainer = tiny_trainer(tmp_path, optimizer_in_backward=True, **ONE)

    def no_memory(gradient):
        raise torch.OutOfMemoryError("CUDA out of memory")

    trainer._preparation()
    next(iter(trainer.model.parameters())).register_hook(no_memory)  # of the embedding, which comes last
    with pytest.raises(RunError, match=r"step 1: out of memory .*some weights have moved, so go back"):
        trainer.train()


def test_a_gradient_in_two_parts_is_refused():
    layer = nn.Linear(3, 3)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    x = torch.randn(2, 3, requires_grad=True)
    for _ in range(2):
        x = checkpoint(layer, x, use_reentrant=True)
    with stepping_in_backward(optimizer, {}), pytest.raises(RunError, match="came in two parts"):
        x.sum().backward()


# ------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "max_grad_norm is on by default, .* set max_grad_norm: 0"),
        ({"max_grad_norm": 1.0}, r"max_grad_norm is 1\.0, .* set max_grad_norm: 0"),
        ({"max_grad_norm": 0, "optim": "schedule_free_adamw"}, "optim: schedule_free_adamw .* adamw_torch"),
        ({"max_grad_norm": 0, "optim": "galore_adamw"}, "optim: galore_adamw is not known"),
        ({"max_grad_norm": 0, "fp16": True}, "fp16 looks for infinite gradients"),
        ({"max_grad_norm": 0, "fsdp": "full_shard"}, "fsdp adds up"),
        ({"max_grad_norm": 0, "deepspeed": "zero.json"}, "deepspeed has an optimizer step of its own"),
    ],
)
def test_what_needs_all_gradients_at_once_is_refused(settings, expected, tmp_path):
    with pytest.raises(ConfigError, match=expected):
        check_recipe({"optimizer_in_backward": True, **settings})
    with pytest.raises(ConfigError, match=expected.replace("on by default", r"1\.0")):
        ORPOConfig(str(tmp_path), optimizer_in_backward=True, **settings)
    check_recipe({"optimizer_in_backward": True, "max_grad_norm": 0.0})
    check_recipe(settings)


def test_what_shows_in_the_process_alone_is_refused_there(tmp_path, monkeypatch):
    reentrant = {"use_reentrant": True}
    with pytest.raises(ConfigError, match="under use_reentrant each layer"):
        tiny_trainer(tmp_path, optimizer_in_backward=True, gradient_checkpointing_kwargs=reentrant)
    optimizer = torch.optim.LBFGS([torch.zeros(1, requires_grad=True)])
    with pytest.raises(ConfigError, match="LBFGS given in `optimizers`"):
        tiny_trainer(tmp_path, optimizer_in_backward=True, arguments={"optimizers": (optimizer, None)})
    monkeypatch.setattr(ORPOConfig, "world_size", 2)
    with pytest.raises(ConfigError, match="optimizer_in_backward: 2 processes add up"):
        tiny_trainer(tmp_path, optimizer_in_backward=True)
