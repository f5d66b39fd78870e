"""The GPU path of attention, on a CPU: plan, gather, kernels' signatures, block masks, choice of backend.

No kernel runs here. `varlen_reference` stands in for one wherever the way to and from it is what is tested.
"""

import logging
import os
import sys

import pytest
import torch
import torch.utils.checkpoint
from hypothesis import given
from hypothesis import strategies as st
from test_attention import dense_attention, visible
from tiny_models import build, mixed_pairs

from orpo.engine import attention, backends
from orpo.engine.attention import Segments, attend
from orpo.engine.backends import CHOICE, REFERENCE, attend_row, choose, disagreement, relative_error
from orpo.engine.flex import BLOCK, FlexKernel, block_mask, padded_length
from orpo.engine.model import prepare_model
from orpo.engine.packing import Run, pack
from orpo.engine.varlen import Case, Options, VarlenKernel, gather_keys, plan_row, varlen_reference
from orpo.errors import ModelError
from orpo.settings.config import Objective

HEADS, SIZE = 4, 8
MIXED = [Run(5, 4, 3), Run(4, 3, 0), Run(12, 10, 1), Run(1, 1, 9)]
CPU = torch.device("cpu")

runs_strategy = st.lists(
    st.builds(Run, st.integers(1, 9), st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=5
)


def heads(runs, num_key_heads=HEADS, dtype=torch.float64, size=SIZE):
    generator = torch.Generator().manual_seed(0)
    num_tokens = sum(map(sum, runs))
    return [
        torch.randn(1, count, num_tokens, size, generator=generator, dtype=torch.float64)
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


@pytest.fixture
def fresh_choice():
    backends._choose.cache_clear()
    yield
    backends._choose.cache_clear()


# Plan and gather


def test_plan_puts_the_prompt_before_the_rejected_answer():
    plan = plan_row([Run(2, 1, 2), Run(1, 2, 0), Run(1, 1, 1)], "cpu")
    assert plan.query_starts.tolist() == [0, 3, 5, 8, 10, 11]
    assert plan.key_starts.tolist() == [0, 3, 7, 10, 12, 14]
    assert plan.gather_K.tolist() == [0, 1, 2, 0, 1, 3, 4, 5, 6, 7, 8, 9, 8, 10]
    assert (plan.max_queries, plan.max_keys) == (3, 4)
    assert plan.query_starts.dtype == plan.key_starts.dtype == torch.int32


def test_keys_stay_where_they_are_without_rejected_answers():
    plan = plan_row([Run(3, 4, 0), Run(1, 1, 0)], "cpu")
    keys = torch.randn(9, 2, 4)
    assert gather_keys(keys, plan) is keys


@given(runs_strategy)
def test_gather_and_its_gradient_are_those_of_an_index(runs):
    plan = plan_row(runs, "cpu")
    keys = torch.randn(sum(map(sum, runs)), 2, 3, dtype=torch.float64, requires_grad=True)
    expected = keys if plan.gather_K is None else keys[plan.gather_K]
    assert_same(gather_keys(keys, plan), expected, [keys])


def test_gradient_of_gather_is_exact_in_half_precision():
    plan = plan_row([Run(40, 3, 5)], "cpu")
    keys = torch.randn(48, 2, 4).bfloat16().requires_grad_()
    gathered = gather_keys(keys, plan)
    weight = torch.randn(gathered.shape).bfloat16()
    (grad,) = torch.autograd.grad(gathered, keys, weight)
    exact = torch.zeros(48, 2, 4).index_add(0, plan.gather_K, weight.float())
    assert torch.equal(grad, exact.bfloat16())


def test_a_row_is_planned_once():
    segments = Segments(MIXED)
    assert segments.plan(CPU) is segments.plan(CPU)


# The reference, and the row through it


@given(
    runs_strategy,
    st.sampled_from([1, 2, 4]),
    st.sampled_from([{}, {"window": 4}, {"window": 1}, {"scale": 0.3}, {"softcap": 0.7, "window": 3}]),
)
def test_row_through_a_varlen_call_equals_a_dense_mask(runs, num_key_heads, options):
    inputs = heads(runs, num_key_heads)
    row = attend_row(REFERENCE, *inputs, plan_row(runs, "cpu"), Options(**options))
    assert_same(row, dense_attention(*inputs, runs, **options), inputs)


@pytest.mark.parametrize("options", [{}, {"window": 5}, {"softcap": 0.5}, {"scale": 0.2, "window": 200}])
def test_attend_is_the_same_by_kernel_and_by_segment(monkeypatch, options):
    inputs = heads(MIXED, 2)
    by_segment, by_kernel = Segments(MIXED), Segments(MIXED)
    expected = attend(*inputs, by_segment, **options)
    monkeypatch.setenv(CHOICE, "reference")
    assert_same(attend(*inputs, by_kernel, **options), expected, inputs)
    assert (by_segment.backend, by_kernel.backend) == ("segments", "reference")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_errs_no_more_by_kernel_than_by_segment(monkeypatch, dtype):
    inputs = heads(MIXED, 2, dtype, size=64)
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    exact = attend(*exact_inputs, Segments(MIXED))
    exact = [exact, *gradients(exact, exact_inputs)]
    by_segment = attend(*inputs, Segments(MIXED))
    by_segment = [by_segment, *gradients(by_segment, inputs)]
    monkeypatch.setenv(CHOICE, "reference")
    by_kernel = attend(*inputs, Segments(MIXED))
    by_kernel = [by_kernel, *gradients(by_kernel, inputs)]
    for ours, theirs, truth in zip(by_kernel, by_segment, exact, strict=True):
        assert relative_error(ours, truth) <= 1.5 * relative_error(theirs, truth)


def test_reference_refuses_heads_and_lengths_that_do_not_fit():
    query, key = torch.zeros(3, 4, 8), torch.zeros(3, 2, 8)
    starts = torch.tensor([0, 3])
    with pytest.raises(ValueError, match="enable_gqa"):
        varlen_reference(query, key, key, starts, starts, 3, 3)
    with pytest.raises(ValueError, match="longest"):
        varlen_reference(query, key, key, starts, starts, 4, 3, enable_gqa=True)


# What each version's signature asks for


def torch_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    assert is_causal and return_aux is None
    window = (-1, 0)
    return varlen_reference(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window_size=window)


def torch_2_11(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):
    assert type(window_size) is tuple  # compared with (-1, 0) to find out whether it is causal
    return varlen_reference(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k,
        scale=scale, window_size=window_size, enable_gqa=True,
    )  # fmt: skip


def torch_2_12(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
    window_size=(-1, -1), enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
):  # fmt: skip
    assert (seqused_k, block_table, num_splits) == (None, None, None)
    return varlen_reference(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k,
        scale=scale, window_size=window_size, enable_gqa=enable_gqa,
    )  # fmt: skip


def flash_attn_2(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
    causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
    return_attn_probs=False, block_table=None,
):  # fmt: skip
    assert causal
    return varlen_reference(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale=softmax_scale,
        window_size=(window_size[0], 0), enable_gqa=True, softcap=softcap, dropout_p=dropout_p,
    )  # fmt: skip


def flash_attn_3(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
    softmax_scale=None, causal=False, qv=None, window_size=(-1, -1), softcap=0.0, num_splits=1,
    deterministic=False,
):  # fmt: skip
    output = flash_attn_2(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=softmax_scale,
        causal=causal, window_size=window_size, softcap=softcap,
    )  # fmt: skip
    return output, "log-sum-exp"


SIGNATURES = {f.__name__: f for f in (torch_2_10, torch_2_11, torch_2_12, flash_attn_2, flash_attn_3)}


@pytest.mark.parametrize("options", [Options(), Options(scale=0.3), Options(window=4), Options(softcap=0.7)])
@pytest.mark.parametrize("num_key_heads", [4, 2])
@pytest.mark.parametrize("signature", SIGNATURES)
def test_each_signature_is_called_rightly_or_not_at_all(signature, num_key_heads, options):
    repeat = signature == "torch_2_10" and num_key_heads != HEADS
    kernel = VarlenKernel(signature, SIGNATURES[signature], repeat_heads=repeat, anywhere=True)
    windowed = options.window is not None
    case = Case(CPU, torch.float64, HEADS, num_key_heads, SIZE, SIZE, windowed, options.softcap)
    refused = kernel.refusal(case)
    lacks_window = signature == "torch_2_10" and windowed
    lacks_softcap = signature.startswith("torch") and options.softcap is not None
    assert (refused is not None) == (lacks_window or lacks_softcap)
    if refused is None:
        inputs = heads(MIXED, num_key_heads)
        plan = plan_row(MIXED, "cpu")
        row, expected = (attend_row(k, *inputs, plan, options) for k in (kernel, REFERENCE))
        assert_same(row, expected, inputs)


def test_dropout_reaches_the_kernel_that_knows_it():
    case = Case(CPU, torch.float64, HEADS, HEADS, SIZE, SIZE, dropout=True)
    assert "dropout" in VarlenKernel("torch", torch_2_12, anywhere=True).refusal(case)
    kernel = VarlenKernel("flash_attn", flash_attn_2, anywhere=True)
    assert kernel.refusal(case) is None
    inputs, plan = heads(MIXED), plan_row(MIXED, "cpu")
    dropped = attend_row(kernel, *inputs, plan, Options(dropout=0.5))
    assert not torch.allclose(dropped, attend_row(kernel, *inputs, plan, Options()))


def test_the_installed_torch_has_a_signature_we_know():
    varlen_attn = pytest.importorskip("torch.nn.attention.varlen").varlen_attn
    kernel = VarlenKernel("varlen", varlen_attn)
    known = {*torch_2_10.__code__.co_varnames, *torch_2_12.__code__.co_varnames}
    assert list(kernel.accepts) and list(SIGNATURES["torch_2_12"].__code__.co_varnames[:7]) == [
        name for name in varlen_attn.__code__.co_varnames[:7]
    ]
    assert kernel.accepts & {"window_size", "is_causal"} and kernel.accepts <= known


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (Case(CPU, torch.bfloat16, 4, 4, 64, 64), "CUDA"),
        (Case(torch.device("cuda"), torch.float32, 4, 4, 64, 64), "half precision"),
        (Case(torch.device("cuda"), torch.bfloat16, 4, 4, 36, 36), "head size"),
        (Case(torch.device("cuda"), torch.bfloat16, 4, 4, 512, 512), "head size"),
        (Case(torch.device("cuda"), torch.bfloat16, 4, 4, 192, 128), "differ in size"),
        (Case(torch.device("cuda"), torch.bfloat16, 4, 4, 64, 64, softcap=50.0), "softcap"),
        (Case(torch.device("cuda"), torch.bfloat16, 4, 4, 64, 64, dropout=True), "dropout"),
    ],
)
def test_kernels_refuse_what_they_cannot_do(case, reason):
    assert reason in VarlenKernel("varlen", torch_2_12).refusal(case)


def test_kernels_serve_half_precision_on_a_gpu():
    case = Case(torch.device("cuda"), torch.bfloat16, 32, 8, 128, 128, windowed=True)
    assert VarlenKernel("varlen", torch_2_12).refusal(case) is None
    assert "own" in VarlenKernel("varlen", torch_2_12, repeat_heads=True).refusal(case._replace(key_heads=32))


# Choice


def shifted(*args, window_size=(-1, -1), **options):
    """A kernel that aligns the first query with the first key, as flash-attn did before 2.1."""
    query, key, value, query_starts, key_starts, max_q, _ = args
    keys = key_starts.diff().tolist()
    front = [
        slice(start, start + q) for start, q in zip(key_starts.tolist(), query_starts.diff(), strict=False)
    ]
    key, value = (torch.cat([x[part] for part in front]) for x in (key, value))
    assert len(keys) == len(front)
    return varlen_reference(
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
    kernel = VarlenKernel("right", torch_2_12, anywhere=True)
    assert disagreement(kernel, Case(CPU, dtype, 4, 2, 32, 32, windowed)) is None


def test_a_wrong_alignment_is_found():
    kernel = VarlenKernel("wrong", with_signature(shifted), anywhere=True)
    assert "output" in disagreement(kernel, Case(CPU, torch.bfloat16, 4, 2, 32, 32))


def test_a_window_off_by_one_is_found():
    def wider(*args, window_size=(-1, -1), **options):
        return varlen_reference(*args, window_size=(window_size[0] + 1, 0), **options)

    kernel = VarlenKernel("wrong", with_signature(wider), anywhere=True)
    assert "output" in disagreement(kernel, Case(CPU, torch.bfloat16, 4, 2, 32, 32, windowed=True))


def test_a_wrong_gradient_is_found():
    def detached(query, key, value, *args, **options):
        return varlen_reference(query, key * 0.5 + (key * 0.5).detach(), value, *args, **options)

    kernel = VarlenKernel("wrong", with_signature(detached), anywhere=True)
    assert "gradient in the key" in disagreement(kernel, Case(CPU, torch.float32, 4, 2, 32, 32))


def test_what_fails_the_known_problem_is_passed_over_in_one_line(monkeypatch, caplog, fresh_choice):
    candidates = [
        VarlenKernel("broken", with_signature(no_kernel), anywhere=True),
        VarlenKernel("shifted", with_signature(shifted), anywhere=True),
        VarlenKernel("right", torch_2_12, anywhere=True),
    ]
    monkeypatch.setattr(backends, "installed", lambda: {kernel.name: kernel for kernel in candidates})
    case = Case(CPU, torch.bfloat16, 4, 2, 32, 32)
    with caplog.at_level(logging.WARNING):
        assert backends._choose(case, "auto").name == "right"
        assert backends._choose(case, "auto").name == "right"  # judged once
    assert len(caplog.messages) == 2
    assert "broken" in caplog.messages[0] and "no kernel image" in caplog.messages[0]
    assert not any("\n" in message for message in caplog.messages)


def test_the_known_problem_is_solved_under_autocast_and_without_gradients():
    kernel = VarlenKernel("right", torch_2_12, anywhere=True)
    case = Case(CPU, torch.bfloat16, 4, 4, 16, 16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert disagreement(kernel, case) is None
    with torch.inference_mode():
        assert disagreement(kernel, case) is None


@pytest.mark.parametrize("reentrant", [False, True])
def test_the_known_problem_is_solved_inside_a_checkpointed_layer(reentrant):
    kernel = VarlenKernel("right", torch_2_12, anywhere=True)
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
    assert choose(*heads(MIXED), Options()) is None


def test_segments_can_be_asked_for(monkeypatch):
    monkeypatch.setenv(CHOICE, "segments")
    assert choose(*heads(MIXED), Options()) is None


@pytest.mark.parametrize(("name", "reason"), [("cudnn", "not installed"), ("flex", "CUDA")])
def test_a_named_backend_that_cannot_serve_stops_with_one_line(monkeypatch, fresh_choice, name, reason):
    monkeypatch.setenv(CHOICE, name)
    with pytest.raises(ModelError, match=reason):
        choose(*heads(MIXED), Options())


def test_packages_found_are_tried_in_order(monkeypatch):
    class FlashAttention:
        __version__ = "2.8.3"
        flash_attn_varlen_func = staticmethod(flash_attn_2)

    class FlashAttention3:
        flash_attn_varlen_func = staticmethod(flash_attn_3)

    found = {"flash_attn": FlashAttention, "flash_attn_interface": FlashAttention3}
    monkeypatch.setattr(
        backends.importlib.util, "find_spec", lambda name: name in found or name.startswith("torch") or None
    )
    for name, module in found.items():
        monkeypatch.setitem(sys.modules, name, module)
    names = [backend.name for backend in backends._find()]
    assert names == ["flash_attn_3", "varlen", "varlen_repeat", "flash_attn", "flex"]


def test_a_package_that_cannot_be_imported_is_named_and_passed_over(monkeypatch, caplog, tmp_path):
    (tmp_path / "flash_attn.py").write_text("raise ImportError('undefined symbol: _ZN3c10')")
    monkeypatch.syspath_prepend(tmp_path)
    with caplog.at_level(logging.WARNING):
        names = [backend.name for backend in backends._find()]
    assert "flash_attn" not in names and names[-1] == "flex"
    assert len(caplog.messages) == 1 and "undefined symbol" in caplog.messages[0]


# Precision


def test_autocast_gives_the_kernel_one_half_precision(monkeypatch, fresh_choice):
    """A rotary embedding leaves float32 queries and keys beside bfloat16 values."""
    seen = []

    def recording(query, key, value, *args, **options):
        seen.append((query.dtype, key.dtype, value.dtype, torch.is_autocast_enabled("cpu")))
        return varlen_reference(query, key, value, *args, **options)

    kernel = VarlenKernel("recording", with_signature(recording), anywhere=True)
    monkeypatch.setattr(backends, "installed", lambda: {"recording": kernel})
    monkeypatch.setenv(CHOICE, "recording")
    query, key, value = (x.float() for x in heads(MIXED))
    with torch.autocast("cpu", torch.bfloat16):
        output = attend(query, key, value.bfloat16(), Segments(MIXED))
    assert output.dtype == torch.bfloat16
    assert seen[-1] == (torch.bfloat16,) * 3 + (False,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_probe_tells_the_rounding_of_autocast_from_a_wrong_layout(monkeypatch, dtype):
    model = build("Llama").to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        assert prepare_model(model, Objective()).layout == "shared"
    monkeypatch.setattr(
        attention, "_attend_segments", lambda q, k, v, *_: v.repeat_interleave(2, 1).transpose(1, 2)
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert prepare_model(model, Objective()).layout == "padded"


def test_segments_are_asked_for_unless_a_backend_is_named(monkeypatch):
    with backends.by_segments():
        assert os.environ[CHOICE] == "segments"
    assert CHOICE not in os.environ
    monkeypatch.setenv(CHOICE, "reference")
    with backends.by_segments():
        assert os.environ[CHOICE] == "reference"


# flex_attention


@given(runs_strategy, st.sampled_from([None, 1, 4, 9, 500]))
def test_mask_of_flex_attention_is_the_dense_one(runs, window):
    num_tokens = sum(map(sum, runs))
    mask = block_mask(runs, window, "cpu").mask_mod
    index = torch.arange(num_tokens)
    assert torch.equal(mask(None, None, index[:, None], index), visible(runs, window))


@pytest.mark.parametrize("window", [None, 1, 100, 128, 129, 300])
@pytest.mark.parametrize(
    "runs",
    [
        [Run(300, 200, 310), Run(2, 1, 2), Run(128, 128, 128), Run(257, 3, 0)],
        [Run(1, 1, 1)],
        [Run(BLOCK, BLOCK, BLOCK)],
        [Run(700, 5, 640)],
    ],
)
def test_blocks_of_flex_attention_hold_what_the_mask_shows(runs, window):
    mask = block_mask(runs, window, "cpu")
    num_tokens, length = sum(map(sum, runs)), padded_length(sum(map(sum, runs)))
    allowed = torch.eye(length, dtype=torch.bool)
    index = torch.arange(length)
    allowed[:num_tokens, :num_tokens] = mask.mask_mod(
        None, None, index[:num_tokens, None], index[:num_tokens]
    )
    blocks = allowed.view(length // BLOCK, BLOCK, length // BLOCK, BLOCK)
    some, whole = blocks.any(3).any(1), blocks.all(3).all(1)
    assert torch.equal(mask.to_dense()[0, 0].bool(), some)
    counts = mask.full_kv_num_blocks[0, 0]
    marked = torch.zeros_like(whole)
    for line, (count, order) in enumerate(zip(counts, mask.full_kv_indices[0, 0], strict=True)):
        marked[line, order[:count].long()] = True
    assert torch.equal(marked, whole)
    assert torch.equal(mask.mask_mod(None, None, index[:, None], index)[num_tokens:], allowed[num_tokens:])


@pytest.mark.parametrize("options", [Options(), Options(scale=0.3, window=4), Options(softcap=0.7)])
@pytest.mark.parametrize("num_key_heads", [4, 2])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_forward_equals_the_reference(num_key_heads, options):
    inputs = [x.detach() for x in heads(MIXED, num_key_heads, size=16)]
    plan = plan_row(MIXED, "cpu")
    row, expected = (attend_row(k, *inputs, plan, options) for k in (FlexKernel(compiled=False), REFERENCE))
    torch.testing.assert_close(row, expected, rtol=1e-10, atol=1e-12)


def test_flex_attention_refuses_what_it_cannot_do():
    kernel = FlexKernel()
    case = Case(CPU, torch.float32, 4, 4, 64, 64)
    assert "CUDA" in kernel.refusal(case)
    assert "dropout" in kernel.refusal(case._replace(dropout=True))


def test_rows_are_padded_to_few_lengths():
    lengths = [padded_length(n) for n in range(1, 16385)]
    assert all(p % BLOCK == 0 and n <= p <= max(BLOCK, 1.5 * n + BLOCK) for n, p in enumerate(lengths, 1))
    assert len(set(lengths)) <= 16


# Whole models


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["Llama", "Mistral", "Gemma2", "Qwen3", "GPT2"])
def test_a_model_trains_alike_through_a_varlen_call(monkeypatch, name, checkpointing):
    objective = Objective(beta=0.5)

    def loss_and_gradients():
        model = build(name, attn_implementation="eager").double()
        assert prepare_model(model, objective).layout == "shared"
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        loss = model(batch=pack(mixed_pairs(), objective)).loss
        return [loss, *torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])]

    expected = loss_and_gradients()
    calls = []
    monkeypatch.setenv(CHOICE, "reference")
    monkeypatch.setattr(attention, "attend_row", lambda *row: calls.append(row) or attend_row(*row))
    through_kernel = loss_and_gradients()
    assert calls
    for ours, theirs in zip(through_kernel, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)
