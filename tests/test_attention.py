"""Attention by segments equals attention under a dense mask that says, token by token, who may see whom."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trees import TREES, num_tokens, paths_of_tokens, trees

from orpo.engine.attention import attend
from orpo.engine.packing import pair_segments
from orpo.engine.segments import Segments

HEADS, SIZE = 4, 8
SINKS = torch.tensor([-2.0, 0.3, 1.5, 9.0], dtype=torch.float64).requires_grad_()
OPTIONS = {
    "plain": {},
    "scale": {"scale": 0.3},
    "window": {"window": 4},
    "window of one token": {"window": 1},
    "window longer than the micro-batch": {"window": 100},
    "softcap": {"softcap": 0.7},
    "softcap, scale and window": {"softcap": 0.7, "scale": 0.5, "window": 3},
    "sinks": {"sinks_H": SINKS},
    "sinks, scale and window": {"sinks_H": SINKS, "scale": 0.5, "window": 3},
    "sinks and softcap": {"sinks_H": SINKS, "softcap": 0.7},
}


def visible(tree, window=None):
    """[N, N]: whether a query (line) may see a key (column)."""
    paths = paths_of_tokens(tree)
    seen = torch.zeros(len(paths), len(paths), dtype=torch.bool)
    for query, path in enumerate(paths):
        seen[query, path[-(window or len(path)) :]] = True
    return seen


def dense_attention(query, key, value, tree, *, scale=None, window=None, softcap=None, sinks_H=None):
    """As the eager attention of transformers' gpt_oss has it: the sinks are one column more, then dropped."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    score = query @ key.transpose(2, 3) * (SIZE**-0.5 if scale is None else scale)
    if softcap is not None:
        score = softcap * torch.tanh(score / softcap)
    score = score.masked_fill(~visible(tree, window), float("-inf"))
    if sinks_H is not None:
        sinks = sinks_H.to(score.dtype).reshape(1, -1, 1, 1).expand(-1, -1, score.shape[2], -1)
        score = torch.cat([score, sinks], -1)
    return (score.softmax(-1)[..., : key.shape[2]] @ value).transpose(1, 2)


def heads(num_tokens, num_key_heads=HEADS, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (2 * torch.randn(1, number, num_tokens, SIZE, generator=generator, dtype=dtype)).requires_grad_()
        for number in (HEADS, num_key_heads, num_key_heads)
    ]


def assert_same_attention(tree, num_key_heads, options):
    inputs = heads(num_tokens(tree), num_key_heads)
    ours = attend(*inputs, Segments(tree), **options)
    dense = dense_attention(*inputs, tree, **options)
    torch.testing.assert_close(ours, dense, rtol=1e-10, atol=1e-12)
    inputs += [options["sinks_H"]] if "sinks_H" in options else []
    upstream = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1), dtype=ours.dtype)
    for mine, theirs in zip(
        torch.autograd.grad(ours, inputs, upstream), torch.autograd.grad(dense, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("num_key_heads", [4, 2, 1])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_values_and_gradients_equal_a_dense_mask(tree, options, num_key_heads):
    assert_same_attention(tree, num_key_heads, options)


@given(
    trees(),
    st.one_of(st.none(), st.integers(1, 8)),
    st.one_of(st.none(), st.just(0.7)),
)
@settings(max_examples=30)
def test_any_micro_batch_equals_a_dense_mask(tree, window, softcap):
    assert_same_attention(tree, 2, {"window": window, "softcap": softcap})


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_low_precision_is_no_worse_than_the_dense_mask_in_low_precision(options):
    tree = TREES["several pairs"]
    exact = dense_attention(*heads(num_tokens(tree), 2), tree, **options)
    low = [head.detach().bfloat16() for head in heads(num_tokens(tree), 2)]
    ours = attend(*low, Segments(tree), **options)
    assert ours.dtype == torch.bfloat16
    naive = dense_attention(*low, tree, **options)
    assert (ours - exact).abs().max() <= 1.5 * (naive - exact).abs().max() + 1e-3


def test_other_pairs_and_the_other_side_change_nothing():
    tree = pair_segments([(3, 4, 5), (2, 3, 4)])
    inputs = [head.detach() for head in heads(21)]
    before = attend(*inputs, Segments(tree))
    changed = [head.clone() for head in inputs]
    for head in changed:
        head[:, :, 3:7] += 5  # the first pair's chosen side
    after = attend(*changed, Segments(tree))
    moved = (before != after).any(-1).any(-1)[0]
    assert moved.tolist() == [False] * 3 + [True] * 4 + [False] * 14


def test_layers_that_share_segments_may_differ_in_window_and_precision():
    tree = pair_segments([(3, 4, 5)])
    segments = Segments(tree)
    inputs = heads(12)
    for _ in range(2):
        for window in (2, None, 5):
            expected = dense_attention(*inputs, tree, window=window)
            ours = attend(*inputs, segments, window=window)
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
            low = attend(*(head.float() for head in inputs), segments, window=window)
            torch.testing.assert_close(low, expected.float(), rtol=1e-4, atol=1e-5)


def test_output_is_contiguous_with_heads_after_tokens():
    output = attend(*heads(12, 2), Segments(pair_segments([(3, 4, 5)])))
    assert output.shape == (1, 12, HEADS, SIZE)
    assert output.is_contiguous()


@pytest.mark.parametrize("softcap", [None, 0.7])
def test_dropout_keeps_the_mean_and_drops_something(softcap):
    tree = pair_segments([(3, 4, 5)])
    inputs = [head.detach() for head in heads(12)]
    torch.manual_seed(0)
    samples = torch.stack([attend(*inputs, Segments(tree), dropout=0.3, softcap=softcap) for _ in range(600)])
    exact = attend(*inputs, Segments(tree), softcap=softcap)
    assert samples.std(0).mean() > 0.1
    assert (samples.mean(0) - exact).abs().max() < 0.6
