"""Attention by segments equals attention under a dense mask that says, token by token, who may see whom."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orpo.engine.attention import attend
from orpo.engine.packing import Run
from orpo.engine.segments import Segments

HEADS, SIZE = 4, 8
MICRO_BATCHES = {
    "one run": [Run(5, 4, 3)],
    "one token everywhere": [Run(1, 1, 1)],
    "several runs": [Run(3, 4, 6), Run(1, 1, 9), Run(12, 10, 1), Run(2, 5, 5)],
    "no rejected side": [Run(4, 3, 0)],
    "some without a rejected side": [Run(4, 3, 0), Run(2, 2, 4), Run(1, 3, 0)],
    "runs of equal lengths": [Run(3, 4, 5), Run(3, 4, 5), Run(4, 3, 5)],
}
OPTIONS = {
    "plain": {},
    "scale": {"scale": 0.3},
    "window": {"window": 4},
    "window of one token": {"window": 1},
    "window longer than the micro-batch": {"window": 100},
    "softcap": {"softcap": 0.7},
    "softcap, scale and window": {"softcap": 0.7, "scale": 0.5, "window": 3},
}


def visible(runs, window=None):
    """[N, N]: whether a query (line) may see a key (column)."""
    tokens = []  # (run, side, position) of every token
    for number, run in enumerate(runs):
        tokens += [(number, "prompt", n) for n in range(run.prompt)]
        tokens += [(number, "chosen", run.prompt + n) for n in range(run.chosen)]
        tokens += [(number, "rejected", run.prompt + n) for n in range(run.rejected)]

    def sees(query, key):
        same_run = query[0] == key[0]
        may_read = key[1] in ("prompt", query[1])
        behind = query[2] - key[2]
        return same_run and may_read and 0 <= behind < (window or 10**6)

    return torch.tensor([[sees(query, key) for key in tokens] for query in tokens])


def dense_attention(query, key, value, runs, *, scale=None, window=None, softcap=None):
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    score = query @ key.transpose(2, 3) * (SIZE**-0.5 if scale is None else scale)
    if softcap is not None:
        score = softcap * torch.tanh(score / softcap)
    score = score.masked_fill(~visible(runs, window), float("-inf"))
    return (score.softmax(-1) @ value).transpose(1, 2)


def heads(num_tokens, num_key_heads=HEADS, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (2 * torch.randn(1, number, num_tokens, SIZE, generator=generator, dtype=dtype)).requires_grad_()
        for number in (HEADS, num_key_heads, num_key_heads)
    ]


def assert_same_attention(runs, num_key_heads, options):
    inputs = heads(sum(map(sum, runs)), num_key_heads)
    ours = attend(*inputs, Segments(runs), **options)
    dense = dense_attention(*inputs, runs, **options)
    torch.testing.assert_close(ours, dense, rtol=1e-10, atol=1e-12)
    upstream = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1), dtype=ours.dtype)
    for mine, theirs in zip(
        torch.autograd.grad(ours, inputs, upstream), torch.autograd.grad(dense, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("num_key_heads", [4, 2, 1])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("runs", MICRO_BATCHES.values(), ids=MICRO_BATCHES)
def test_values_and_gradients_equal_a_dense_mask(runs, options, num_key_heads):
    assert_same_attention(runs, num_key_heads, options)


@given(
    st.lists(st.builds(Run, st.integers(1, 6), st.integers(1, 6), st.integers(0, 6)), min_size=1, max_size=4),
    st.one_of(st.none(), st.integers(1, 8)),
    st.one_of(st.none(), st.just(0.7)),
)
@settings(max_examples=30)
def test_any_micro_batch_equals_a_dense_mask(runs, window, softcap):
    assert_same_attention(runs, 2, {"window": window, "softcap": softcap})


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_low_precision_is_no_worse_than_the_dense_mask_in_low_precision(options):
    runs = MICRO_BATCHES["several runs"]
    exact = dense_attention(*heads(sum(map(sum, runs)), 2), runs, **options)
    low = [head.detach().bfloat16() for head in heads(sum(map(sum, runs)), 2)]
    ours = attend(*low, Segments(runs), **options)
    assert ours.dtype == torch.bfloat16
    naive = dense_attention(*low, runs, **options)
    assert (ours - exact).abs().max() <= 1.5 * (naive - exact).abs().max() + 1e-3


def test_other_pairs_and_the_other_side_change_nothing():
    runs = [Run(3, 4, 5), Run(2, 3, 4)]
    inputs = [head.detach() for head in heads(21)]
    before = attend(*inputs, Segments(runs))
    changed = [head.clone() for head in inputs]
    for head in changed:
        head[:, :, 3:7] += 5  # the first pair's chosen side
    after = attend(*changed, Segments(runs))
    moved = (before != after).any(-1).any(-1)[0]
    assert moved.tolist() == [False] * 3 + [True] * 4 + [False] * 14


def test_layers_that_share_segments_may_differ_in_window_and_precision():
    runs = [Run(3, 4, 5)]
    segments = Segments(runs)
    inputs = heads(12)
    for _ in range(2):
        for window in (2, None, 5):
            expected = dense_attention(*inputs, runs, window=window)
            ours = attend(*inputs, segments, window=window)
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
            low = attend(*(head.float() for head in inputs), segments, window=window)
            torch.testing.assert_close(low, expected.float(), rtol=1e-4, atol=1e-5)


def test_output_is_contiguous_with_heads_after_tokens():
    output = attend(*heads(12, 2), Segments([Run(3, 4, 5)]))
    assert output.shape == (1, 12, HEADS, SIZE)
    assert output.is_contiguous()


@pytest.mark.parametrize("softcap", [None, 0.7])
def test_dropout_keeps_the_mean_and_drops_something(softcap):
    runs = [Run(3, 4, 5)]
    inputs = [head.detach() for head in heads(12)]
    torch.manual_seed(0)
    samples = torch.stack([attend(*inputs, Segments(runs), dropout=0.3, softcap=softcap) for _ in range(600)])
    exact = attend(*inputs, Segments(runs), softcap=softcap)
    assert samples.std(0).mean() > 0.1
    assert (samples.mean(0) - exact).abs().max() < 0.6
