"""The GPU path of attention, on a CPU: layout, gather, the kernel's arguments, when it is taken.

Torch's kernel tree on GPUs only. `torch_2_11` and `torch_2_12` stand in for it: the signatures of these
versions, with the arithmetic written out for any device.
"""

import inspect

import pytest
import torch
import torch.utils.checkpoint
from hypothesis import given
from hypothesis import strategies as st
from test_attention import dense_attention
from tiny_models import build, mixed_pairs
from torch.nn.attention.varlen import varlen_attn
from trees import num_tokens, trees

from orpo.engine import attention
from orpo.engine.attention import attend, attend_by_kernel, disagreement, relative_error
from orpo.engine.model import prepare_model
from orpo.engine.packing import Segment, pack, pair_segments
from orpo.engine.segments import Options, Segments, attend_segments
from orpo.engine.varlen import Case, VarlenKernel, gather_keys, kernel_layout
from orpo.settings.config import Objective

HEADS, SIZE = 4, 8
MIXED = (*pair_segments([(5, 4, 3), (4, 3, 0), (12, 10, 1), (1, 1, 9)]), Segment(3, 0, 6), Segment(4, 0, 2))
CPU = torch.device("cpu")


def heads(tree, num_key_heads=HEADS, dtype=torch.float64, size=SIZE):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(1, count, num_tokens(tree), size, generator=generator, dtype=torch.float64)
        .to(dtype)
        .requires_grad_()
        for count in (HEADS, num_key_heads, num_key_heads)
    ]


def gradients(output, inputs):
    weight = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view_as(output).to(output.dtype)
    return torch.autograd.grad(output, inputs, weight)


def assert_same(ours, theirs, inputs):
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    for mine, reference in zip(gradients(ours, inputs), gradients(theirs, inputs), strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-9, atol=1e-11)


def torch_2_12(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
    window_size=(-1, -1), enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
):  # fmt: skip
    """Queries and keys in sequences, the last query aligned with the last key; (-1, 0) is causal."""
    assert (return_aux, seqused_k, block_table, num_splits) == (None,) * 4
    assert type(window_size) is tuple  # compared with (-1, 0) to find out whether it is causal
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    groups = query.shape[1] // key.shape[1]
    assert groups == 1 or enable_gqa
    queries, keys = cu_seq_q.diff().tolist(), cu_seq_k.diff().tolist()
    assert (max(queries), max(keys)) == (max_q, max_k)
    precise = torch.promote_types(query.dtype, torch.float32)
    left, right = (float("inf") if side < 0 else side for side in window_size)
    outputs = []
    for q, k, v in zip(query.split(queries), key.split(keys), value.split(keys), strict=True):
        q_HQD = q.to(precise).transpose(0, 1)
        k_HKD, v_HKD = (x.to(precise).transpose(0, 1).repeat_interleave(groups, 0) for x in (k, v))
        score_HQK = q_HQD @ k_HKD.transpose(1, 2) * (q.shape[-1] ** -0.5 if scale is None else scale)
        own_Q = torch.arange(len(q)) + len(k) - len(q)
        ahead_QK = torch.arange(len(k)) - own_Q[:, None]
        score_HQK = score_HQK.masked_fill((ahead_QK > right) | (ahead_QK < -left), float("-inf"))
        outputs.append((score_HQK.softmax(-1) @ v_HKD).transpose(0, 1).to(query.dtype))
    return torch.empty_like(query).copy_(torch.cat(outputs))  # with the strides of the query, as in torch


def torch_2_11(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):
    return torch_2_12(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k,
        return_aux=return_aux, scale=scale, window_size=window_size, enable_gqa=True,
    )  # fmt: skip


def anywhere(function):
    return VarlenKernel(function, anywhere=True)


def attended_by(kernel, inputs, tree, **options):
    return attend_by_kernel(kernel, *inputs, Segments(tree), Options(**options))


# Plan and gather


def test_the_layout_puts_the_prompt_before_the_rejected_answer():
    layout = kernel_layout(pair_segments([(2, 1, 2), (1, 2, 0), (1, 1, 1)]), "cpu")
    assert layout.query_starts.tolist() == [0, 3, 5, 8, 10, 11]
    assert layout.key_starts.tolist() == [0, 3, 7, 10, 12, 14]
    assert layout.gather_K.tolist() == [0, 1, 2, 0, 1, 3, 4, 5, 6, 7, 8, 9, 8, 10]
    assert (layout.max_queries, layout.max_keys) == (3, 4)
    assert layout.query_starts.dtype == layout.key_starts.dtype == torch.int32


def test_keys_stay_where_they_are_without_rejected_answers():
    layout = kernel_layout(pair_segments([(3, 4, 0), (1, 1, 0)]), "cpu")
    keys = torch.randn(9, 2, 4)
    assert gather_keys(keys, layout) is keys


@given(trees())
def test_gather_and_its_gradient_are_those_of_an_index(tree):
    layout = kernel_layout(tree, "cpu")
    keys = torch.randn(num_tokens(tree), 2, 3, dtype=torch.float64, requires_grad=True)
    expected = keys if layout.gather_K is None else keys[layout.gather_K]
    assert_same(gather_keys(keys, layout), expected, [keys])


def test_gradient_of_gather_is_exact_in_half_precision():
    layout = kernel_layout((*pair_segments([(40, 3, 5)]), Segment(2, 0, 30), Segment(1, 0, 30)), "cpu")
    keys = torch.randn(51, 2, 4).bfloat16().requires_grad_()
    gathered = gather_keys(keys, layout)
    weight = torch.randn(gathered.shape).bfloat16()
    (grad,) = torch.autograd.grad(gathered, keys, weight)
    exact = torch.zeros(51, 2, 4).index_add(0, layout.gather_K, weight.float())
    assert torch.equal(grad, exact.bfloat16())


def test_a_micro_batch_is_laid_out_once():
    segments = Segments(MIXED)
    assert segments.for_kernel(CPU) is segments.for_kernel(CPU)


# A micro-batch through the kernel


@pytest.mark.parametrize("function", [torch_2_11, torch_2_12])
@given(
    trees(),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([{}, {"window": 4}, {"window": 1}, {"scale": 0.3}, {"scale": 0.5, "window": 3}]),
)
def test_a_row_by_the_kernel_equals_a_dense_mask(function, tree, num_key_heads, options):
    inputs = heads(tree, num_key_heads)
    attended = attended_by(anywhere(function), inputs, tree, **options)
    assert_same(attended, dense_attention(*inputs, tree, **options), inputs)


@pytest.mark.parametrize(
    "options",
    [{}, {"window": 5}, {"softcap": 0.5}, {"scale": 0.2, "window": 200}, {"sinks_H": torch.arange(4.0)}],
    ids=str,
)
def test_attend_is_the_same_by_kernel_and_by_segment(monkeypatch, options):
    inputs = heads(MIXED, 2)
    by_segment, by_kernel = Segments(MIXED), Segments(MIXED)
    expected = attend(*inputs, by_segment, **options)
    monkeypatch.setattr(attention, "KERNEL", anywhere(torch_2_12))
    assert_same(attend(*inputs, by_kernel, **options), expected, inputs)
    assert by_segment.backend == "segments"
    assert ("varlen_attn" in by_kernel.backend) == options.keys().isdisjoint({"softcap", "sinks_H"})


def test_the_output_of_the_kernel_is_contiguous():
    output = attended_by(anywhere(torch_2_12), heads(MIXED), MIXED)
    assert output.shape == (1, num_tokens(MIXED), HEADS, SIZE)
    assert output.is_contiguous()


def test_a_window_as_long_as_the_longest_segment_is_none(monkeypatch):
    seen = []

    def recording(*args, window_size=(-1, -1), **options):
        seen.append(window_size)
        return torch_2_12(*args, window_size=window_size, **options)

    monkeypatch.setattr(attention, "KERNEL", anywhere(with_signature(recording)))
    for window in (22, 21):  # the longest segment has 12 + 10 tokens
        attend(*heads(MIXED), Segments(MIXED), window=window)
        assert seen[-1] == ((-1, 0) if window == 22 else (20, 0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_errs_no_more_by_kernel_than_by_segment(dtype):
    inputs = heads(MIXED, 2, dtype, size=64)
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    exact = attend(*exact_inputs, Segments(MIXED))
    exact = [exact, *gradients(exact, exact_inputs)]
    by_segment = attend(*inputs, Segments(MIXED))
    by_segment = [by_segment, *gradients(by_segment, inputs)]
    by_kernel = attended_by(anywhere(torch_2_12), inputs, MIXED)
    by_kernel = [by_kernel, *gradients(by_kernel, inputs)]
    for ours, theirs, truth in zip(by_kernel, by_segment, exact, strict=True):
        assert relative_error(ours, truth) <= 1.5 * relative_error(theirs, truth)


@pytest.mark.parametrize("num_key_heads", [4, 2])
def test_the_installed_torch_takes_the_arguments_it_is_given(num_key_heads):
    passed = []

    def bound(*args, **options):
        passed.append(inspect.signature(varlen_attn).bind(*args, **options).arguments)
        return args[0]

    bound.__signature__ = inspect.signature(varlen_attn)
    attended_by(anywhere(bound), heads(MIXED, num_key_heads), MIXED, scale=0.5, window=3)
    assert list(passed[0])[:7] == list(inspect.signature(torch_2_12).parameters)[:7]
    assert (passed[0]["scale"], passed[0]["window_size"]) == (0.5, (2, 0))
    assert passed[0].get("enable_gqa", num_key_heads != HEADS) == (num_key_heads != HEADS)


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (Case(CPU, torch.bfloat16, 4, 4, 64, 64), "CUDA"),
        (Case(torch.device("cuda"), torch.float32, 4, 4, 64, 64), "half precision"),
        (Case(torch.device("cuda"), torch.bfloat16, 4, 4, 36, 36), "head size"),
        (Case(torch.device("cuda"), torch.bfloat16, 4, 4, 512, 512), "head size"),
        (Case(torch.device("cuda"), torch.bfloat16, 4, 4, 192, 128), "differ in size"),
        (Case(torch.device("cuda"), torch.bfloat16, 4, 4, 64, 64, softcap=True), "softcap"),
        (Case(torch.device("cuda"), torch.bfloat16, 4, 4, 64, 64, dropout=True), "dropout"),
        (Case(torch.device("cuda"), torch.bfloat16, 4, 4, 64, 64, sinks=True), "sinks"),
    ],
)
def test_the_kernel_refuses_what_it_cannot_do(case, reason):
    assert reason in VarlenKernel().refusal(case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [64, 256])
def test_the_kernel_serves_half_precision_on_a_gpu(dtype, size):
    case = Case(torch.device("cuda"), dtype, 32, 8, size, size, windowed=True)
    assert VarlenKernel().refusal(case) is None


# When it is taken


def shifted(*args, window_size=(-1, -1), **options):
    """A kernel that aligns the first query with the first key, as flash-attn did before 2.1."""
    query, key, value, query_starts, key_starts, max_q, _ = args
    keys = key_starts.diff().tolist()
    front = [
        slice(start, start + q) for start, q in zip(key_starts.tolist(), query_starts.diff(), strict=False)
    ]
    key, value = (torch.cat([x[part] for part in front]) for x in (key, value))
    assert len(keys) == len(front)
    return torch_2_12(
        query, key, value, query_starts, query_starts, max_q, max_q, window_size=window_size, **options
    )


def with_signature(function):
    def kernel(q, k, v, a, b, m, n, *, scale=None, window_size=(-1, -1), enable_gqa=False):
        return function(q, k, v, a, b, m, n, scale=scale, window_size=window_size, enable_gqa=enable_gqa)

    return kernel


def no_kernel(*args, **options):
    raise RuntimeError("no kernel image is available for execution\nmore")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("windowed", [False, True])
def test_a_right_kernel_solves_the_known_problem(dtype, windowed):
    kernel = anywhere(torch_2_12)
    assert disagreement(kernel, Case(CPU, dtype, 4, 2, 32, 32, windowed)) is None


def test_a_wrong_alignment_is_found():
    kernel = anywhere(with_signature(shifted))
    assert "output" in disagreement(kernel, Case(CPU, torch.bfloat16, 4, 2, 32, 32))


def test_a_window_off_by_one_is_found():
    def wider(*args, window_size=(-1, -1), **options):
        return torch_2_12(*args, window_size=(window_size[0] + 1, 0), **options)

    kernel = anywhere(with_signature(wider))
    assert "output" in disagreement(kernel, Case(CPU, torch.bfloat16, 4, 2, 32, 32, windowed=True))


def test_a_wrong_gradient_is_found():
    def detached(query, key, value, *args, **options):
        return torch_2_12(query, key * 0.5 + (key * 0.5).detach(), value, *args, **options)

    kernel = anywhere(with_signature(detached))
    assert "gradient in the key" in disagreement(kernel, Case(CPU, torch.float32, 4, 2, 32, 32))


def test_what_fails_the_known_problem_is_skipped_in_one_line(monkeypatch, capsys):
    inputs = heads(MIXED)
    monkeypatch.setattr(attention, "KERNEL", anywhere(with_signature(no_kernel)))
    for _ in range(2):  # tried once
        segments = Segments(MIXED)
        attend(*inputs, segments)
        assert segments.backend == "segments"
    (line,) = capsys.readouterr().out.splitlines()
    assert "no kernel image" in line


def test_a_layer_of_another_shape_is_tried_again(monkeypatch):
    def few_heads_only(*args, **options):
        assert args[0].shape[1] == args[1].shape[1], "no groups"
        return torch_2_12(*args, **options)

    monkeypatch.setattr(attention, "KERNEL", anywhere(with_signature(few_heads_only)))
    grouped, own = Segments(MIXED), Segments(MIXED)
    attend(*heads(MIXED, 2), grouped)
    attend(*heads(MIXED), own)
    assert grouped.backend == "segments" and "varlen_attn" in own.backend


def test_the_known_problem_is_solved_under_autocast_and_without_gradients():
    kernel = anywhere(torch_2_12)
    case = Case(CPU, torch.bfloat16, 4, 4, 16, 16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert disagreement(kernel, case) is None
    with torch.inference_mode():
        assert disagreement(kernel, case) is None


@pytest.mark.parametrize("reentrant", [False, True])
def test_the_known_problem_is_solved_inside_a_checkpointed_layer(reentrant):
    kernel = anywhere(torch_2_12)
    found = []

    def layer(x):
        if not found:
            found.append(disagreement(kernel, Case(CPU, torch.float32, 4, 4, 16, 16)))
        return x.exp()

    x = torch.ones(3, requires_grad=True)
    torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=reentrant).sum().backward()
    assert found == [None]
    torch.testing.assert_close(x.grad, x.exp().detach())


def test_a_cpu_attends_by_segment():
    segments = Segments(MIXED)
    attend(*(x.bfloat16() for x in heads(MIXED, size=64)), segments)
    assert segments.backend == "segments"


def test_dropout_goes_by_segment(monkeypatch):
    monkeypatch.setattr(attention, "KERNEL", anywhere(torch_2_12))
    segments = Segments(MIXED)
    dropped = attend(*heads(MIXED), segments, dropout=0.5)
    assert segments.backend == "segments"
    assert not torch.allclose(dropped, attend(*heads(MIXED), segments))


# Precision


def test_autocast_gives_the_kernel_one_half_precision(monkeypatch):
    """A rotary embedding leaves float32 queries and keys next to bfloat16 values."""
    seen = []

    def recording(query, key, value, *args, **options):
        seen.append((query.dtype, key.dtype, value.dtype, torch.is_autocast_enabled("cpu")))
        return torch_2_12(query, key, value, *args, **options)

    monkeypatch.setattr(attention, "KERNEL", anywhere(with_signature(recording)))
    query, key, value = (x.float() for x in heads(MIXED))
    with torch.autocast("cpu", torch.bfloat16):
        output = attend(query, key, value.bfloat16(), Segments(MIXED))
    assert output.dtype == torch.bfloat16
    assert seen[-1] == (torch.bfloat16,) * 3 + (False,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_probe_tells_the_rounding_of_autocast_from_a_wrong_layout(monkeypatch, dtype):
    model = build("Llama").to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        assert prepare_model(model).layout == "shared"
    monkeypatch.setattr(
        attention, "attend_segments", lambda q, k, v, *_: v.repeat_interleave(2, 1).transpose(1, 2)
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert prepare_model(model).layout == "padded"


def test_under_autocast_a_slightly_wrong_layout_is_found_in_full_precision(monkeypatch):
    def slightly_larger(*args):
        return 1.001 * attend_segments(*args)

    monkeypatch.setattr(attention, "attend_segments", slightly_larger)
    with torch.autocast("cpu", torch.bfloat16):
        assert prepare_model(build("Llama")).layout == "padded"


# Whole models


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["Llama", "Mistral", "Gemma2", "Qwen3", "GPT2"])
def test_a_model_trains_the_same_by_the_kernel(monkeypatch, name, checkpointing):
    objective = Objective(preference_weight=0.5)

    def loss_and_gradients():
        model = build(name, attn_implementation="eager").double()
        assert prepare_model(model).layout == "shared"
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        loss = model(batch=pack(mixed_pairs(), objective)).loss
        return [loss, *torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])]

    expected = loss_and_gradients()
    calls = []

    def counted(*args, **options):
        calls.append(args)
        return torch_2_12(*args, **options)

    monkeypatch.setattr(attention, "KERNEL", anywhere(with_signature(counted)))
    through_kernel = loss_and_gradients()
    assert bool(calls) == (name != "Gemma2")  # soft-capped scores go by segments
    for ours, theirs in zip(through_kernel, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)
