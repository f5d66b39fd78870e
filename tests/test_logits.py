"""The GPU's way through a chunk of logits, on a CPU: same numbers, and no harm where nothing compiles."""

import pytest
import torch

from orpo.engine import head
from orpo.engine.head import Denominators, Head, score_batch
from orpo.engine.logits import OnePass, logprob_slopes, product, token_logprobs
from orpo.engine.packing import pack
from orpo.pairs import TokenizedPair
from orpo.settings.config import Objective


def chunk(softcap):
    torch.manual_seed(0)
    raw = torch.randn(5, 11, dtype=torch.float64, requires_grad=True)
    capped = raw if softcap is None else softcap * torch.tanh(raw / softcap)
    return raw, capped, torch.tensor([0, 10, 3, 3, 7])


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_log_probabilities_and_slopes_are_those_of_autograd(softcap):
    raw, capped, target = chunk(softcap)
    expected = capped.log_softmax(1).gather(1, target[:, None])[:, 0]
    (grad,) = torch.autograd.grad(expected.sum(), raw)
    with torch.no_grad():
        found = token_logprobs(capped, target)
        slope = logprob_slopes(capped, *found, target, softcap, torch.float64)
    torch.testing.assert_close(found[0], expected)
    torch.testing.assert_close(slope, -grad)


def test_slopes_come_in_half_precision_where_the_products_do():
    _, capped, target = chunk(None)
    found = token_logprobs(capped.float(), target)
    assert logprob_slopes(capped.float(), *found, target, None, torch.bfloat16).dtype == torch.bfloat16


def test_a_cpu_multiplies_in_the_operands_precision():
    one = torch.ones(2, 2, dtype=torch.bfloat16)
    assert product(one, one, torch.float32).dtype == torch.bfloat16


def test_what_does_not_compile_runs_as_it_stands_and_says_so_once(monkeypatch, capsys):
    def no_compiler(*args):
        raise RuntimeError("cannot find a C compiler\nmore")

    monkeypatch.setattr(torch, "compile", lambda function: no_compiler)
    double = OnePass(lambda x: 2 * x, anywhere=True)
    assert [double(torch.ones(1)).item() for _ in range(3)] == [2.0] * 3
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_running_out_of_memory_is_not_taken_for_a_broken_compiler(monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch, "compile", lambda function: full)
    with pytest.raises(torch.OutOfMemoryError):
        OnePass(lambda x: x, anywhere=True)(torch.ones(1))


@pytest.mark.parametrize("chunk_tokens", [3, 100])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("biased", [False, True])
def test_the_head_is_the_same_by_the_gpu_way(monkeypatch, chunk_tokens, softcap, biased):
    pairs = [TokenizedPair([1, 2, 3], [4, 5, 6, 7], [8, 9]), TokenizedPair([3, 1], [2], [5, 6, 7])]
    batch = pack(pairs, Objective(preference_weight=0.7))
    torch.manual_seed(0)
    inputs = [torch.randn(batch.num_tokens, 6), torch.randn(10, 6), torch.randn(10)][: 3 if biased else 2]
    inputs = [x.double().requires_grad_() for x in inputs]

    def run():
        projection = Head(
            inputs[1], inputs[2] if biased else None, scale=0.8, softcap=softcap,
            chunk_tokens=chunk_tokens, max_chunk_tokens=chunk_tokens,
        )  # fmt: skip
        loss, scores = score_batch(inputs[0], projection, batch, Denominators(11.0, 2.0))
        return [loss, scores.chosen_logprob_P, *torch.autograd.grad(loss, inputs)]

    expected = run()
    plain = head._Sweep.__init__

    def on_a_gpu(self, *args):
        plain(self, *args)
        self.compiled = True

    monkeypatch.setattr(head._Sweep, "__init__", on_a_gpu)
    for ours, theirs in zip(run(), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
