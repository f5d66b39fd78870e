"""Runs of a fraction of a second: a two-layer model, random pairs of unlike lengths, ranks by fork."""

import multiprocessing
import os
import pickle
import random
import socket
import traceback

import tiny_models
import torch
from tiny_tokenizer import tiny_tokenizer

from orpo import ORPOConfig, ORPOTrainer
from orpo.pairs import TokenizedPair


def random_pairs(number=13, seed=0, vocabulary=tiny_models.VOCAB):
    """Pairs of very unlike lengths; their `source` is their index."""
    draw = random.Random(seed)

    def ids(longest):
        return [draw.randrange(vocabulary) for _ in range(draw.randint(1, longest))]

    return [TokenizedPair(ids(9), ids(20), ids(12), source=f"pairs:{n}") for n in range(number)]


def tiny_config(folder, **settings):
    """Four pairs a step, SGD (so that a gradient's scale shows in the weights), nothing saved."""
    defaults = {
        "per_device_train_batch_size": 4,
        "learning_rate": 0.05,
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "max_steps": 4,
        "disable_tqdm": True,
    }
    return ORPOConfig(output_dir=str(folder), **(defaults | settings))


def tiny_trainer(folder, *, model=None, train=None, evaluation=None, processing_class=None, **settings):
    arguments = settings.pop("arguments", {})
    return ORPOTrainer(
        model=tiny_models.build("Llama") if model is None else model,
        args=tiny_config(folder, **settings),
        train_dataset=random_pairs() if train is None else train,
        eval_dataset=evaluation,
        processing_class=processing_class or tiny_tokenizer(),
        **arguments,
    )


def logged(trainer, name="loss"):
    return [line[name] for line in trainer.state.log_history if name in line]


def weights(trainer):
    return torch.cat([weight.detach().flatten() for weight in trainer.model.parameters()])


def on_ranks(function, *arguments, number=2):
    """Call `function(*arguments)` in forked ranks of one gloo group; returns their results by rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe(duplex=False) for _ in range(number)]
    processes = [
        context.Process(target=_rank, args=(rank, number, port, pipes[rank][1], function, arguments))
        for rank in range(number)
    ]
    for process in processes:
        process.start()
    try:
        results = [pickle.loads(pipe.recv_bytes()) if pipe.poll(60) else "no answer" for pipe, _ in pipes]
    finally:
        for process in processes:
            process.join(10)
            process.kill()
    failures = [result for result in results if isinstance(result, str)]
    assert not failures, "\n".join(failures)
    return [result[0] for result in results]


def _rank(rank, number, port, pipe, function, arguments):
    from accelerate.state import AcceleratorState, GradientState, PartialState

    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(number),
        "LOCAL_WORLD_SIZE": str(number),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    try:
        result = (function(*arguments),)
    except BaseException:
        result = traceback.format_exc()
    # Plain pickle copies a tensor; the pipe's own would share its memory with a process about to end.
    pipe.send_bytes(pickle.dumps(result))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    os._exit(0)
