"""The fused head equals full logits under autograd, for every chunk size, and never holds them."""

import weakref
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import log_odds
from tiny_models import mixed_pairs
from torch.utils._python_dispatch import TorchDispatchMode

from orpo.engine.head import Denominators, Head, score_batch
from orpo.engine.logits import logprob_slopes, softmax_minus_target, token_logprobs
from orpo.engine.packing import Role, pack
from orpo.errors import ModelError
from orpo.pairs import TokenizedPair
from orpo.settings.config import Objective

HIDDEN, VOCAB = 6, 97
OBJECTIVE = Objective(preference_weight=0.7, nll_weight=0.9, scale=1.3)
DENOMINATORS = Denominators(nll=41.0, pairs=3.0)
CHUNKS = [(1, 1), (3, 3), (7, 7), (3, 11), (1, 100), (100, 100)]
"""Tokens per chunk, and at most for one pair; the longest response of the pairs has 14."""
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.4},
    "softcap": {"softcap": 1.5},
    "bias, scale and softcap": {"bias": True, "scale": 2.5, "softcap": 1.5},
}


@pytest.fixture(autouse=True)
def _fresh_memory_is_not_a_number():
    """What is read before it is written shows: torch then fills new memory with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def inputs(batch, *, bias=False, dtype=torch.float64, hidden=HIDDEN, vocab=VOCAB, requires_grad=True):
    """Hidden states, vocabulary matrix and bias."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return (
            torch.randn(*shape, generator=generator, dtype=torch.float64)
            .to(dtype)
            .requires_grad_(requires_grad)
        )

    return random(batch.num_tokens, hidden), random(vocab, hidden), random(vocab) if bias else None


def score(tensors, batch, chunk=(100, 100), objective=OBJECTIVE, denominators=DENOMINATORS, **head):
    hidden_ND, weight_VD, bias_V = tensors
    batch = replace(batch, objective=objective)
    head = Head(weight_VD, bias_V, chunk_tokens=chunk[0], max_chunk_tokens=chunk[1], **head)
    return score_batch(hidden_ND, head, batch, denominators)


def full_logits(tensors, batch, objective=OBJECTIVE, denominators=DENOMINATORS, scale=1.0, softcap=None):
    """Loss and log-probabilities by autograd over the logits of every hidden state, pair by pair."""
    hidden_ND, weight_VD, bias_V = tensors
    logits_NV = hidden_ND @ weight_VD.T
    if bias_V is not None:
        logits_NV = logits_NV + bias_V
    logits_NV = scale * logits_NV
    if softcap is not None:
        logits_NV = softcap * torch.tanh(logits_NV / softcap)
    logprob_T = logits_NV.log_softmax(-1)[batch.source_T, batch.target_T]
    nll = -(batch.nll_weight_T.to(logprob_T) * logprob_T).sum() / denominators.nll
    odds, means = logprob_T.new_zeros(()), {}
    for number in range(len(batch.response_lengths)):
        for role in (Role.CHOSEN, Role.REJECTED):
            mine = (batch.pair_T == number) & (batch.role_T == role)
            if mine.any():
                means[number, role] = logprob_T[mine].mean()
        if (number, Role.REJECTED) in means:
            values = []
            for side, role in enumerate((Role.CHOSEN, Role.REJECTED)):
                mean, tokens = means[number, role], batch.response_lengths[number][side]
                reference = 0 if batch.reference_PS is None else batch.reference_PS[number, side]
                values.append(value_of(mean, tokens, reference, objective.compares))
            above = objective.scale * (values[0] - values[1]) - objective.margin
            smoothing = objective.label_smoothing
            wrong = smoothing * torch.log1p(torch.exp(above))
            right = (1 - smoothing) * torch.log1p(torch.exp(-above))
            odds = odds + (right + wrong) / denominators.pairs
    return objective.nll_weight * nll + objective.preference_weight * odds, logprob_T, means


def value_of(mean, tokens, reference, compares):
    """What of a response is compared, as docs/objective.md has it."""
    of = {
        "odds": lambda: log_odds(mean),
        "means": lambda: mean,
        "sums": lambda: tokens * mean,
        "ratios": lambda: tokens * mean - tokens * reference,
    }
    return of[compares]()


def gradients(loss, tensors):
    wanted = [tensor for tensor in tensors if tensor is not None and tensor.requires_grad]
    return torch.autograd.grad(loss, wanted)


def sharing_pairs():
    """Three answers of one prompt, best against each; a prompt that begins alike; a later turn; one apart."""
    prompt, best = [5, 6, 7], [8, 9, 10, 11]
    return [
        TokenizedPair(prompt, best, [12, 13]),
        TokenizedPair(prompt, best, [14]),
        TokenizedPair(prompt, [12, 13], [14]),
        TokenizedPair([5, 6, 7, 15], [16], [17, 18, 19]),
        TokenizedPair([*prompt, *best, 20], [21, 22], []),
        TokenizedPair([30], [31], [32, 33, 34, 35]),
    ]


PACKED = {
    "shared": {"pairs": mixed_pairs()},
    "padded": {"pairs": mixed_pairs(), "layout": "padded"},
    "tree": {"pairs": sharing_pairs(), "share_from": 1},
    "tree, in another order": {"pairs": sharing_pairs()[::-2] + sharing_pairs()[::2], "share_from": 1},
}


@pytest.mark.parametrize("packed", PACKED.values(), ids=PACKED)
@pytest.mark.parametrize("chunk", CHUNKS, ids=str)
@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
def test_loss_logprobs_and_gradients_equal_full_logits(options, chunk, packed):  # peers 40
    pairs = packed["pairs"]
    batch = pack(objective=OBJECTIVE, **packed)
    assert (batch.distinct is None) == ("share_from" not in packed)
    options = dict(options)
    tensors = inputs(batch, bias=options.pop("bias", False))
    loss, sums = score(tensors, batch, chunk, **options)
    expected, logprob_T, means = full_logits(tensors, batch, **options)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for number in range(batch.num_pairs):
        torch.testing.assert_close(sums.chosen_logprob_P[number], means[number, Role.CHOSEN])
        rejected = means.get((number, Role.REJECTED), torch.zeros((), dtype=torch.float64))
        torch.testing.assert_close(sums.rejected_logprob_P[number], rejected)
        mine = batch.pair_T == number
        weight_T = batch.nll_weight_T[mine].double()
        torch.testing.assert_close(sums.nll_sum_P[number], -(weight_T * logprob_T[mine]).sum())
        assert sums.nll_weight_P[number].item() == pytest.approx(weight_T.sum().item())
    assert sums.has_rejected_P.tolist() == [bool(pair.rejected) for pair in pairs]
    for ours, exact in zip(gradients(3 * loss, tensors), gradients(3 * expected, tensors), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
def test_gradients_are_central_differences_of_the_loss(options):
    batch = pack([TokenizedPair([1, 2], [3, 0], [2]), TokenizedPair([4], [1], [3, 3])], OBJECTIVE)
    options = dict(options)
    tensors = inputs(batch, bias=options.pop("bias", False), hidden=3, vocab=5)
    wanted = [tensor for tensor in tensors if tensor is not None]
    slopes = gradients(score(tensors, batch, (2, 2), **options)[0], tensors)
    step = 1e-5
    with torch.no_grad():
        for tensor, slope in zip(wanted, slopes, strict=True):
            for index, expected in zip(range(tensor.numel()), slope.flatten(), strict=True):
                values = []
                for move in (step, -2 * step, step):
                    tensor.view(-1)[index] += move
                    values.append(score(tensors, batch, **options)[0])
                torch.testing.assert_close(
                    expected, (values[0] - values[1]) / (2 * step), rtol=1e-6, atol=1e-8
                )


sides = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=6)


@given(
    pairs=st.lists(
        st.builds(TokenizedPair, sides, sides, st.one_of(sides, st.just([]))), min_size=1, max_size=4
    ),
    chunk=st.integers(1, 12),
    slack=st.integers(0, 5),
    objective=st.builds(
        Objective,
        preference_weight=st.sampled_from([0.0, 0.5]),
        nll_weight=st.sampled_from([0.0, 1.0]),
        scale=st.sampled_from([0.5, 1.0]),
        compares=st.sampled_from(["odds", "means", "sums", "ratios"]),
        margin=st.sampled_from([0.0, 0.7]),
        label_smoothing=st.sampled_from([0.0, 0.2]),
        nll_on=st.sampled_from(["full", "response"]),
        nll_reduction=st.sampled_from(["token", "pair"]),
    ),
)
@settings(max_examples=60)
def test_any_row_any_chunk_and_any_objective_equal_full_logits(pairs, chunk, slack, objective):
    reference_PS = -3 * torch.rand(len(pairs), 2, generator=torch.Generator().manual_seed(0))
    batch = replace(pack(pairs, objective), reference_PS=reference_PS)
    tensors = inputs(batch)
    loss, scores = score(tensors, batch, (chunk, chunk + slack), objective)
    torch.testing.assert_close(scores.rejected_reference_P, reference_PS[:, 1].double())
    expected, _, _ = full_logits(tensors, batch, objective)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-9)  # pair weights such as 1/3 are float32
    for ours, exact in zip(
        gradients(loss, tensors), gradients(expected + 0 * tensors[0].sum(), tensors), strict=True
    ):
        torch.testing.assert_close(ours, exact, rtol=1e-6, atol=1e-9)


def test_ratios_without_a_reference_are_refused_before_they_train():
    objective = Objective(compares="ratios")
    batch = pack(mixed_pairs(), objective)
    with pytest.raises(ModelError, match="no log-probs of a reference model"):
        score(inputs(batch), batch, objective=objective)
    with torch.no_grad():
        _, scores = score(inputs(batch), batch, objective=objective)
    assert scores.chosen_reference_P.isnan().all() and not scores.chosen_logprob_P.isnan().any()


def test_losses_of_rows_add_up_to_the_loss_of_the_step():  # peers 6
    pairs = mixed_pairs()
    whole = pack(pairs, OBJECTIVE)
    hidden_ND, weight_VD, _ = inputs(whole)
    expected, _ = score((hidden_ND, weight_VD, None), whole)
    lengths = [len(pair) for pair in pairs]
    total = 0.0
    for pair, hidden in zip(pairs, hidden_ND.split(lengths), strict=True):
        total += score((hidden, weight_VD, None), pack([pair], OBJECTIVE))[0]
    torch.testing.assert_close(total, expected)
    trained = (hidden_ND, weight_VD)
    torch.testing.assert_close(gradients(total, trained), gradients(expected, trained))


@pytest.mark.parametrize("chunk", CHUNKS, ids=str)
def test_without_gradients_the_values_are_the_same(chunk):
    batch = pack(mixed_pairs(), OBJECTIVE)
    tensors = inputs(batch, bias=True)
    expected_loss, expected = score(tensors, batch)
    with torch.no_grad():
        loss, sums = score(tensors, batch, chunk)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected_loss.detach())
    for ours, theirs in zip(sums, expected, strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True)


def test_sums_carry_no_gradient():
    batch = pack(mixed_pairs(), OBJECTIVE)
    _, sums = score(inputs(batch), batch)
    assert not any(value.requires_grad for value in sums)


@pytest.mark.parametrize("trained", range(3), ids=["hidden", "weight", "bias"])
def test_only_what_is_trained_gets_a_gradient(trained):  # peers 34
    batch = pack(mixed_pairs(), OBJECTIVE)
    tensors = inputs(batch, bias=True)
    expected = gradients(full_logits(tensors, batch)[0], tensors)[trained]
    frozen = [tensor.detach().requires_grad_(number == trained) for number, tensor in enumerate(tensors)]
    for chunk in CHUNKS:
        loss, _ = score(frozen, batch, chunk)
        torch.testing.assert_close(gradients(loss, frozen), (expected,))


def test_an_empty_row_has_zero_loss_and_zero_gradients():
    batch = pack([TokenizedPair([1, 2], [3, 4], [5])], OBJECTIVE, empty=True)
    tensors = inputs(batch, bias=True)
    loss, _ = score(tensors, batch)
    assert loss.item() == 0
    assert all(gradient.abs().max() == 0 for gradient in gradients(loss, tensors))


def test_a_row_that_scores_nothing_has_zero_gradients():
    batch = pack(mixed_pairs(), OBJECTIVE)
    tensors = inputs(batch, bias=True)
    names = ("target_T", "source_T", "pair_T", "role_T", "nll_weight_T")
    nothing = replace(batch, response_lengths=(), **{name: getattr(batch, name)[:0] for name in names})
    loss, _ = score(tensors, nothing)
    assert all(gradient.abs().max() == 0 for gradient in gradients(loss, tensors))


@pytest.mark.parametrize("pairs", [0.0, 4.0])
def test_a_row_without_preferences_trains_the_nll_alone(pairs):
    batch = pack([TokenizedPair([1, 2], [3, 4], []), TokenizedPair([5], [6], [])], OBJECTIVE)
    denominators = Denominators(nll=10.0, pairs=pairs)
    tensors = inputs(batch)
    loss, sums = score(tensors, batch, denominators=denominators)
    expected, logprob_T, _ = full_logits(tensors, batch, denominators=denominators)
    torch.testing.assert_close(loss, -0.9 * logprob_T.sum() / 10)
    torch.testing.assert_close(gradients(loss, tensors), gradients(expected, tensors))
    assert sums.rejected_logprob_P.tolist() == [0, 0]
    assert sums.has_rejected_P.tolist() == [False, False]


def test_beta_zero_is_the_negative_log_likelihood_even_where_rejected_sides_are_run():
    objective = Objective(preference_weight=0.0)
    batch = pack(mixed_pairs(), objective, score_rejected=True)
    tensors = inputs(batch)
    loss, sums = score(tensors, batch, objective=objective)
    nll = -full_logits(tensors, batch, objective)[1][batch.role_T != Role.REJECTED].sum() / DENOMINATORS.nll
    torch.testing.assert_close(loss, nll)
    torch.testing.assert_close(gradients(loss, tensors), gradients(nll, tensors))
    assert (sums.rejected_logprob_P < 0).sum() == 4


@pytest.mark.parametrize("sides", [([1], [1]), ([1], [2]), ([2], [1]), ([2], [2])], ids=str)
def test_answers_the_model_is_certain_of_give_finite_gradients(sides):  # peers 2
    batch = pack([TokenizedPair([0], *sides)], OBJECTIVE)
    hidden_ND = torch.tensor([[0.0, 90.0, -90.0]] * 3).requires_grad_()
    tensors = (hidden_ND, torch.eye(3).requires_grad_(), None)
    loss, sums = score(tensors, batch)
    assert sums.chosen_logprob_P.item() == pytest.approx(0 if sides[0] == [1] else -180, abs=1e-30)
    assert torch.isfinite(loss)
    assert all(torch.isfinite(gradient).all() for gradient in gradients(loss, tensors))


@pytest.mark.parametrize("compiled_form", [False, True])
@pytest.mark.parametrize("offset", [0.0, 30.0])
@pytest.mark.parametrize("size", [300, 32_000, 151_936])
@pytest.mark.parametrize("distance", [1e-7, 1e-6, 1e-5, 1e-4, 2.5e-3, 0.02, 0.3, 5.0, 60.0, 120.0])
def test_a_nearly_certain_answer_keeps_its_digits(distance, size, offset, compiled_form):
    """1e-7 is what float32 cannot tell from 0 next to 1; the slopes of the target and of the others count.

    torch's own softmax of 151,936 logits is 1e-4 off where one of them dominates.
    """
    draw = torch.Generator().manual_seed(0)
    logits_TV = torch.randn(9, size, generator=draw) + offset
    target_T = torch.randint(0, size, (9,), generator=draw)
    others_T = logits_TV.scatter(1, target_T[:, None], float("-inf")).double().logsumexp(1)
    wanted_T = others_T - torch.tensor(distance, dtype=torch.float64).expm1().log()
    logits_TV.scatter_(1, target_T[:, None], wanted_T.float()[:, None])
    exact_TV = logits_TV.double().requires_grad_()
    exact_T = exact_TV.log_softmax(1).gather(1, target_T[:, None])[:, 0]
    (slope_TV,) = torch.autograd.grad(exact_T.sum(), exact_TV)
    exact_T = exact_T.detach()
    if compiled_form:
        found = token_logprobs.function(logits_TV, target_T)
        logprob_T = found[0]
        ours_TV = logprob_slopes.function(logits_TV, *found, target_T, None, torch.float32)
    else:
        ours_TV = logits_TV.clone()
        logprob_T, total_T = softmax_minus_target(ours_TV, target_T[:, None])
        ours_TV /= total_T[:, None]
    hit_T1 = target_T[:, None]
    expected_T1, found_T1 = -slope_TV.gather(1, hit_T1), ours_TV.gather(1, hit_T1).double()
    errors = (
        ((logprob_T.double() - exact_T) / exact_T).abs().max().item(),
        ((found_T1 - expected_T1) / expected_T1).abs().max().item(),
        ((ours_TV + slope_TV).norm() / slope_TV.norm()).item(),
    )
    assert max(errors) < 1e-6, errors


@pytest.mark.parametrize("role", [Role.CHOSEN, Role.REJECTED])
def test_gradients_keep_their_digits_where_one_of_many_tokens_dominates(role):
    """A chosen answer that is nearly certain, and a rejected one beside a token that is."""
    size, certain = 151_936, torch.tensor(2.5e-3, dtype=torch.float64)
    objective = replace(OBJECTIVE, preference_weight=0.0)
    batch = pack([TokenizedPair([0], [1], [2])], OBJECTIVE)
    batch = replace(batch, nll_weight_T=(batch.role_T == role).float())
    weight_VD = torch.randn(size, 1, generator=torch.Generator().manual_seed(0))
    weight_VD[1] = float("-inf")
    weight_VD[1] = weight_VD.double().logsumexp(0) - certain.expm1().log()
    hidden_ND = torch.ones(batch.num_tokens, 1)
    gradient, exact = (
        torch.autograd.grad(
            function((hidden_ND.to(dtype), weight, None), batch, objective=objective)[0], weight
        )
        for function, dtype in ((score, torch.float32), (full_logits, torch.float64))
        for weight in [weight_VD.to(dtype).requires_grad_()]
    )
    assert (gradient[0] - exact[0]).norm() / exact[0].norm() < 1e-6


@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_low_precision_is_no_worse_than_full_logits_in_that_precision(dtype, options):
    batch = pack(mixed_pairs(), OBJECTIVE)
    options = dict(options)
    bias = options.pop("bias", False)
    low = inputs(batch, bias=bias, dtype=dtype)
    exact_tensors = [None if tensor is None else tensor.detach().double().requires_grad_() for tensor in low]
    exact, _, _ = full_logits(exact_tensors, batch, **options)
    naive, _, _ = full_logits(low, batch, **options)
    loss, _ = score(low, batch, (7, 11), **options)
    assert loss.dtype == torch.float32
    resolution = torch.finfo(dtype).eps
    assert abs(loss - exact) <= abs(naive - exact) + resolution * abs(exact)
    for ours, theirs, right in zip(
        gradients(loss, low), gradients(naive, low), gradients(exact, exact_tensors), strict=True
    ):
        assert ours.dtype == dtype
        assert (ours - right).norm() <= (theirs - right).norm() + 2 * resolution * right.norm()


def test_autocast_computes_in_bf16_and_returns_float32_gradients():
    batch = pack(mixed_pairs(), OBJECTIVE)
    tensors = inputs(batch, bias=True, dtype=torch.float32)
    exact, _, _ = full_logits(tensors, batch)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = score(tensors, batch, (7, 7))
        naive, _, _ = full_logits(tensors, batch)
    assert loss.dtype == torch.float32
    assert loss != exact
    assert abs(loss - exact) <= abs(naive - exact) + 1e-2
    for ours, theirs, right in zip(
        gradients(loss, tensors), gradients(naive, tensors), gradients(exact, tensors), strict=True
    ):
        assert ours.dtype == torch.float32
        assert (ours - right).norm() <= (theirs - right).norm() + 1e-2 * right.norm()


class MemoryPeak(TorchDispatchMode):
    """Largest tensor made, and most bytes alive together, counted by storage."""

    def __init__(self):
        super().__init__()
        self.largest = self.alive = self.peak = 0
        self.known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.count(tensor)
        return result

    def count(self, tensor):
        storage, size = tensor.untyped_storage(), tensor.untyped_storage().nbytes()
        if id(storage) in self.known:
            return
        self.known.add(id(storage))
        weakref.finalize(storage, self.forget, id(storage), size)
        self.largest = max(self.largest, size)
        self.alive += size
        self.peak = max(self.peak, self.alive)

    def forget(self, key, size):
        self.known.discard(key)
        self.alive -= size


def measure(num_pairs, side, chunk, *, frozen=False, train=True, softcap=None):
    """Peak over forward and backward, for a head with much more vocabulary than anything else."""
    pairs = [TokenizedPair([1] * side, [2] * side, [3] * side)] * num_pairs
    batch = pack(pairs, OBJECTIVE, share_from=None)
    hidden_ND, weight_VD, _ = inputs(batch, dtype=torch.float32, hidden=4, vocab=2000)
    weight_VD.requires_grad_(not frozen)
    with MemoryPeak() as memory, torch.set_grad_enabled(train):
        loss, _ = score((hidden_ND, weight_VD, None), batch, chunk, softcap=softcap)
        if train:
            loss.backward()
    return memory


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("train", [True, False])
def test_memory_does_not_grow_with_tokens_times_vocabulary(train, softcap):  # peers 11, 34
    logits = 4 * 2000
    few = measure(10, 5, (10, 16), train=train, softcap=softcap)
    many = measure(80, 5, (10, 16), train=train, softcap=softcap)
    assert few.largest == many.largest == 10 * logits
    assert many.peak - few.peak < 0.2 * 70 * 10 * logits  # far less than the logits of seventy pairs more
    assert many.peak < 6 * 16 * logits


def test_a_chunk_takes_in_no_pair_that_does_not_fit():
    assert measure(10, 5, (16, 32)).largest == 16 * 4 * 2000  # of context tokens; a second pair would make 20


@pytest.mark.parametrize("train", [True, False])
def test_a_pair_longer_than_a_chunk_is_cut_too(train):  # peers 34
    logits = 4 * 2000
    long = measure(1, 200, (10, 16), train=train)
    assert long.largest <= 16 * logits
    assert long.peak < 6 * 16 * logits


def test_a_frozen_vocabulary_matrix_costs_no_gradient_memory():  # peers 34
    weight = 4 * 2000 * 4
    trained, frozen = measure(4, 2, (1, 1)), measure(4, 2, (1, 1), frozen=True)
    assert trained.peak - frozen.peak >= weight


def test_sft_takes_no_more_chunks_than_its_tokens_need():
    """Nothing waits for a whole pair there, and a product of few tokens costs as much as one of many."""
    batch = pack(mixed_pairs(), Objective(preference_weight=0.0))
    tensors = inputs(batch)
    sizes = []
    plain = torch.mm

    def counted(left, right, **more):
        sizes.append(len(left))
        return plain(left, right, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "mm", counted)
        score(tensors, batch, (5, 9), Objective(preference_weight=0.0))
    tokens = len(batch.target_T)
    assert sum(sizes) == tokens and len(sizes) == -(-tokens // 5) and max(sizes) - min(sizes) <= 1


def test_a_loss_that_is_scaled_scales_its_gradients():
    """As gradient scaling and averages over ranks do; a factor of 1 is the usual one, and skipped."""
    batch = pack(mixed_pairs(), OBJECTIVE)
    tensors = inputs(batch, bias=True)
    once = gradients(score(tensors, batch)[0], tensors)
    for factor in (1.0, -3.0):
        scaled = gradients(factor * score(tensors, batch)[0], tensors)
        torch.testing.assert_close(scaled, tuple(factor * one for one in once))


def test_denominators_divide_the_two_terms():
    batch = pack(mixed_pairs(), OBJECTIVE)
    tensors = inputs(batch)

    def loss(objective, nll, pairs):
        return score(tensors, batch, objective=objective, denominators=Denominators(nll, pairs))[0].item()

    nll_only, odds_only = replace(OBJECTIVE, preference_weight=0.0), replace(OBJECTIVE, nll_weight=0.0)
    assert loss(nll_only, 10, 1) == pytest.approx(loss(nll_only, 1, 7) / 10)
    assert loss(odds_only, 1, 10) == pytest.approx(loss(odds_only, 7, 1) / 10)
    assert loss(OBJECTIVE, 3, 5) == pytest.approx(loss(nll_only, 3, 5) + loss(odds_only, 3, 5))
