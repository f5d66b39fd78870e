"""Every pair once, B pairs a step, equally many micro-batches on every rank, within the budget, balanced."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import mixed_pairs

from orpo.engine.packing import find_sharing, pack
from orpo.engine.planning import Sharing, pair_cost, pair_tokens, plan_epoch, plan_step
from orpo.pairs import TokenizedPair
from orpo.settings.config import Objective

LAYOUTS = ["shared", "packed", "padded"]


@st.composite
def steps(draw):
    """Lengths of the pairs of a step, and a way to spread them."""
    num_pairs = draw(st.integers(1, 40))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    longest = draw(st.sampled_from([2, 20, 60]))
    lengths = generator.integers([1, 1, 0], longest + 1, (num_pairs, 3))
    lengths[:, 2] *= generator.random(num_pairs) < 0.7  # the others train the NLL alone
    return {
        "lengths": lengths,
        "num_ranks": draw(st.integers(1, 5)),
        "tokens_per_micro_batch": draw(st.integers(2, 400)),
        "layout": draw(st.sampled_from(LAYOUTS)),
    }


def spread(step):
    return plan_step(
        step["lengths"],
        num_ranks=step["num_ranks"],
        tokens_per_micro_batch=step["tokens_per_micro_batch"],
        layout=step["layout"],
    )


def batch_tokens(step, batch):
    """Tokens of a micro-batch, padding included, by writing its sides out."""
    chosen = [[1] * (prompt + chosen) for prompt, chosen, _ in step["lengths"][list(batch)]]
    rejected = [[1] * (prompt + rejected) for prompt, _, rejected in step["lengths"][list(batch)] if rejected]
    if step["layout"] == "padded":
        return len(chosen + rejected) * max(map(len, chosen + rejected))
    tokens = sum(map(len, chosen + rejected))
    shared = sum(prompt for prompt, _, rejected in step["lengths"][list(batch)] if rejected)
    return tokens - shared if step["layout"] == "shared" else tokens


def rank_loads(step, plan):
    cost = pair_cost(step["lengths"], step["layout"])
    return [sum(cost[i] for batch in rank if not batch.empty for i in batch.pairs) for rank in plan]


@given(steps())
def test_every_pair_of_a_step_is_in_exactly_one_micro_batch(step):
    planned = [i for rank in spread(step) for batch in rank if not batch.empty for i in batch.pairs]
    assert sorted(planned) == list(range(len(step["lengths"])))


@given(steps())
def test_every_rank_runs_the_same_number_of_micro_batches(step):
    plan = spread(step)
    assert len(plan) == step["num_ranks"]
    assert len({len(rank) for rank in plan}) == 1
    assert len(plan[0]) >= 1


@given(steps())
def test_a_micro_batch_keeps_to_its_budget_unless_it_is_one_overlong_pair(step):
    for batch in (batch for rank in spread(step) for batch in rank):
        assert len(batch.pairs) == 1 or batch_tokens(step, batch.pairs) <= step["tokens_per_micro_batch"]


def test_the_widest_side_sets_the_width_of_a_padded_micro_batch():
    lengths = np.array([[1, 9, 9], [15, 5, 0]])  # two lines of 10 and one of 20: 60 tokens together
    step = {"lengths": lengths, "num_ranks": 1, "layout": "padded"}
    assert len(spread({**step, "tokens_per_micro_batch": 59})[0]) == 2
    assert len(spread({**step, "tokens_per_micro_batch": 60})[0]) == 1


@given(steps())
def test_no_rank_is_without_a_pair_while_another_has_two(step):
    per_rank = [sum(len(batch.pairs) for batch in rank if not batch.empty) for rank in spread(step)]
    assert min(per_rank) >= 1 or max(per_rank) <= 1


@given(steps())
def test_an_empty_micro_batch_stands_only_where_none_can_be_split(step):
    for rank in spread(step):
        if any(batch.empty for batch in rank):
            assert all(len(batch.pairs) == 1 for batch in rank)


def test_a_rank_short_of_micro_batches_splits_one_rather_than_run_an_empty_one():
    lengths = np.array([[11, 1, 1], [9, 1, 1], [9, 1, 1], [1, 1, 0], [1, 1, 0], [1, 1, 0]])
    step = {"lengths": lengths, "num_ranks": 2, "tokens_per_micro_batch": 20, "layout": "shared"}
    split, whole = [[batch.pairs for batch in rank] for rank in spread(step)]
    assert sorted(whole) == [(1,), (2,)]
    assert sorted(split) == [(0,), (3, 4, 5)]
    assert not any(batch.empty for rank in spread(step) for batch in rank)


@given(steps())
def test_an_empty_micro_batch_costs_as_little_as_the_shortest_pair_of_the_step(step):
    tokens = pair_tokens(step["lengths"], step["layout"])
    for batch in (batch for rank in spread(step) for batch in rank if batch.empty):
        assert [tokens[i] for i in batch.pairs] == [min(tokens)]


@given(steps())
def test_ranks_differ_by_at_most_the_costliest_pair(step):
    loads = rank_loads(step, spread(step))
    assert max(loads) - min(loads) <= max(pair_cost(step["lengths"], step["layout"])) + 1e-9


@given(steps())
def test_no_two_micro_batches_of_one_rank_alone_would_fit_into_one(step):
    (rank,) = spread({**step, "num_ranks": 1})
    for one, other in itertools.combinations(rank, 2):
        assert batch_tokens(step, (*one.pairs, *other.pairs)) > step["tokens_per_micro_batch"]


@given(steps())
def test_micro_batches_of_a_rank_differ_by_a_pair_at_most_where_the_budget_has_room_for_it(step):
    tokens = pair_tokens(step["lengths"], "packed")
    for rank in spread({**step, "layout": "packed"}):
        loads = [sum(tokens[list(batch.pairs)]) * (not batch.empty) for batch in rank]
        if np.mean(loads) + max(tokens) <= step["tokens_per_micro_batch"]:
            assert max(loads) - min(loads) <= max(tokens)


def test_where_filling_makes_shorter_micro_batches_than_dealing_they_stay_filled():
    lengths = np.array([[1, 1, 4], [1, 1, 4], [1, 1, 2], [1, 1, 2], [1, 1, 2]])  # 6, 6, 4, 4 and 4 tokens
    (rank,) = plan_step(lengths, num_ranks=1, tokens_per_micro_batch=14)
    assert sorted(sum(lengths[list(batch.pairs)].sum(1)) for batch in rank) == [12, 12]


def test_two_micro_batches_are_of_equal_length_rather_than_one_full_and_one_short():
    lengths = np.array([[10, 10, 10]] * 8)
    step = {"lengths": lengths, "num_ranks": 1, "tokens_per_micro_batch": 180, "layout": "shared"}
    assert [len(batch.pairs) for batch in spread(step)[0]] == [4, 4]  # and not 6 and 2


@given(steps())
def test_a_plan_is_a_function_of_the_lengths(step):
    assert spread(step) == spread({**step, "lengths": step["lengths"].copy()})


def test_real_lengths_are_balanced_within_two_percent():
    generator = np.random.default_rng(0)
    lengths = generator.lognormal((4.8, 5.5, 5.5), 0.6, (512, 3)).astype(int) + 1
    for start in range(0, 512, 64):
        step = {
            "lengths": lengths[start : start + 64],
            "num_ranks": 4,
            "tokens_per_micro_batch": 8192,
            "layout": "shared",
        }
        loads = rank_loads(step, spread(step))
        assert max(loads) <= 1.02 * np.mean(loads)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_planned_tokens_are_the_tokens_of_the_packed_micro_batch(layout):
    pairs = mixed_pairs()
    lengths = np.array([(len(p.prompt), len(p.chosen), len(p.rejected)) for p in pairs])
    planned = [pack([pair], Objective(), layout=layout).num_tokens for pair in pairs]
    assert pair_tokens(lengths, layout).tolist() == planned
    step = {"lengths": lengths, "layout": layout}
    for batch in itertools.combinations(range(len(pairs)), 3):
        assert (
            batch_tokens(step, batch)
            == pack([pairs[i] for i in batch], Objective(), layout=layout).num_tokens
        )


def test_cost_counts_the_tokens_attended_to():
    short, long = np.array([[10, 10, 10]]), np.array([[1000, 1000, 1000]])
    assert pair_cost(long)[0] > 100 * pair_cost(short)[0]
    # Prompt and chosen see half of their 200 tokens on average; rejected the prompt and half of itself.
    seen = 200 * 100 + 50 * (120 + 25)
    assert pair_cost(np.array([[120, 80, 50]]))[0] == pytest.approx(250 + seen / 4096)


def test_a_prompt_is_paid_twice_where_it_is_not_shared_and_once_without_a_rejected_side():
    lengths = np.array([[100, 10, 5], [100, 10, 0]])
    assert pair_tokens(lengths, "shared").tolist() == [115, 110]
    assert pair_tokens(lengths, "packed").tolist() == [215, 110]
    assert pair_tokens(lengths, "padded").tolist() == [220, 110]


@st.composite
def sharing_steps(draw):
    """Pairs of a step of which many begin alike or have an answer in common."""
    prompts = [tuple(draw(st.lists(st.integers(0, 1), min_size=1, max_size=12))) for _ in range(3)]
    answers = [(2,), (3, 4), (5, 6, 7), (3, 4, 8, 9, 10, 11)]
    pairs = [
        TokenizedPair(draw(st.sampled_from(prompts)), *draw(st.permutations(answers))[:2])
        for _ in range(draw(st.integers(1, 20)))
    ]
    return pairs, draw(st.integers(1, 4)), draw(st.integers(10, 200))


@given(sharing_steps())
def test_pairs_that_share_are_planned_once_each_and_within_the_budget(step):
    pairs, num_ranks, budget = step
    sharing = find_sharing(pairs, 3)
    lengths = np.array([(len(p.prompt), len(p.chosen), len(p.rejected)) for p in pairs])
    plan = plan_step(lengths, num_ranks=num_ranks, tokens_per_micro_batch=budget, sharing=sharing)
    planned = [i for rank in plan for batch in rank if not batch.empty for i in batch.pairs]
    assert sorted(planned) == list(range(len(pairs)))
    assert len({len(rank) for rank in plan}) == 1
    for batch in (batch for rank in plan for batch in rank if len(batch.pairs) > 1):
        together = [pairs[i] for i in batch.pairs]
        assert pack(together, Objective(), share_from=3).num_tokens <= budget


def test_pairs_that_share_come_into_one_micro_batch():
    lengths = np.array([[100, 10, 10]] * 12)
    sharing = Sharing(
        [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11],
        [0, 100, 100] * 4,
        [(4 * n, 4 * n + m) for n in range(4) for m in (1, 2, 3)],
    )
    plan = plan_step(lengths, num_ranks=1, tokens_per_micro_batch=300, sharing=sharing)
    assert [batch.pairs for batch in plan[0]] == [(0, 4, 8, 2, 6, 10), (1, 5, 9, 3, 7, 11)]
    two = plan_step(lengths, num_ranks=2, tokens_per_micro_batch=300, sharing=sharing)
    assert [[batch.pairs for batch in rank] for rank in two] == [
        [(0, 4, 8, 2, 6, 10)], [(1, 5, 9, 3, 7, 11)]
    ]  # fmt: skip


def test_what_all_pairs_of_a_step_share_is_dealt_evenly_to_the_ranks():
    lengths, sharing = (
        np.array([[520, 60, 70]] * 16),
        Sharing(range(16), [0] + [500] * 15, [(2 * n, 2 * n + 1) for n in range(16)]),
    )
    plan = plan_step(lengths, num_ranks=4, tokens_per_micro_batch=4096, sharing=sharing)
    assert [[len(batch.pairs) for batch in rank] for rank in plan] == [[4]] * 4


@given(st.lists(st.integers(0, 9), min_size=1, max_size=40), st.integers(1, 6))
def test_pairs_of_a_prompt_come_together_and_others_where_they_would(prompts, per_step):
    _, prompts = np.unique(prompts, return_inverse=True)
    settings = {"seed": 3, "epoch": 1}
    order = np.concatenate(plan_epoch(len(prompts), per_step, prompts=prompts, **settings))
    assert sorted(order.tolist()) == list(range(len(prompts)))
    runs = [list(same) for _, same in itertools.groupby(prompts[order].tolist())]
    pieces = sum(-(-count // per_step) for count in np.bincount(prompts))
    assert len(runs) <= pieces
    plain = np.concatenate(plan_epoch(len(prompts), per_step, **settings))
    alone = np.arange(len(prompts))
    assert (
        np.concatenate(plan_epoch(len(alone), per_step, prompts=alone, **settings)).tolist() == plain.tolist()
    )
    firsts = list(dict.fromkeys(prompts[order].tolist()))
    assert firsts == list(dict.fromkeys(prompts[plain].tolist()))


def test_no_more_pairs_of_a_prompt_come_together_than_a_step_has():
    prompts = np.repeat([0, 1], 20)
    order = np.concatenate(plan_epoch(40, 4, seed=0, epoch=0, prompts=prompts))
    runs = [len(list(same)) for _, same in itertools.groupby(prompts[order].tolist())]
    assert len(runs) > 4 and all(length % 4 == 0 for length in runs)


@given(st.integers(1, 60), st.integers(1, 20), st.integers(0, 5), st.booleans())
def test_an_epoch_has_every_pair_exactly_once(num_pairs, pairs_per_step, epoch, shuffle):
    epoch_steps = plan_epoch(num_pairs, pairs_per_step, seed=3, epoch=epoch, shuffle=shuffle)
    assert sorted(np.concatenate(epoch_steps).tolist()) == list(range(num_pairs))


@given(st.integers(0, 60), st.integers(1, 20), st.booleans())
def test_a_step_has_the_pairs_asked_for_unless_it_is_the_last(num_pairs, size, drop_last):
    sizes = [len(step) for step in plan_epoch(num_pairs, size, seed=3, epoch=0, drop_last=drop_last)]
    full, rest = divmod(num_pairs, size)
    assert sizes == [size] * full + [rest] * (rest > 0 and not drop_last)


def test_an_epoch_is_a_function_of_seed_and_epoch():
    def order(seed, epoch):
        return np.concatenate(plan_epoch(50, 8, seed=seed, epoch=epoch)).tolist()

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


def test_without_shuffling_pairs_keep_their_order():
    assert np.concatenate(plan_epoch(10, 4, seed=0, epoch=1, shuffle=False)).tolist() == list(range(10))
