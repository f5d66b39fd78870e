"""A micro-batch scores exactly the tokens it should, each from exactly its own context, in every layout."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from reference import nll_targets
from tiny_models import mixed_pairs
from trees import num_tokens, paths_of_tokens

from orpo.engine.packing import Role, Segment, find_sharing, pack
from orpo.engine.planning import _cut, plan_step
from orpo.pairs import TokenizedPair
from orpo.settings.config import Objective

LAYOUTS = ["shared", "packed", "padded"]
ids = st.lists(st.integers(0, 3), min_size=1, max_size=5)


@st.composite
def tokenized_pairs(draw):
    prompt, chosen = draw(ids), draw(ids)
    rejected = draw(st.one_of(ids, st.just([])))
    chosen_context = draw(st.integers(0, len(chosen) - 1))
    cuts = sorted(draw(st.sets(st.integers(0, len(prompt) + chosen_context), max_size=4)))
    return TokenizedPair(
        prompt,
        chosen,
        rejected,
        chosen_context=chosen_context,
        rejected_context=draw(st.integers(0, len(rejected) - 1)) if rejected else 0,
        assistant_spans=tuple(zip(cuts[::2], cuts[1::2], strict=False)),
    )


def expected_scores(pairs, objective):
    """(pair, role, ids before the target, target, weight), how often each; written out one side at a time."""
    scores = Counter()
    for number, pair in enumerate(pairs):
        chosen = (*pair.prompt, *pair.chosen)
        response_start = len(pair.prompt) + pair.chosen_context
        targets = nll_targets(pair, objective.nll_on)
        weight = 1.0 if objective.nll_reduction == "token" else 1 / len(targets)
        for t in targets:
            role = Role.CHOSEN if t >= response_start else Role.CONTEXT
            scores[number, role, chosen[:t], chosen[t], round(weight, 6)] += 1
        rejected = (*pair.prompt, *pair.rejected)
        for t in range(len(pair.prompt) + pair.rejected_context, len(rejected)):
            scores[number, Role.REJECTED, rejected[:t], rejected[t], 0.0] += 1
    return scores


def read_by(batch):
    """For every flattened position, the ids that it may read, its own last: the definition of each layout."""
    ids_BN = batch.input_ids_BN.tolist()
    if batch.attention_mask_BN is not None:
        kept = batch.attention_mask_BN.sum(1).tolist()
        return [tuple(line[: n + 1]) if n < k else None for line, k in zip(ids_BN, kept, strict=True)
                for n in range(len(line))]  # fmt: skip
    (sequence,) = ids_BN
    assert num_tokens(batch.tree) == len(sequence)
    return [tuple(sequence[n] for n in path) for path in paths_of_tokens(batch.tree)]


def actual_scores(batch):
    read = read_by(batch)
    columns = (batch.pair_T, batch.role_T, batch.source_T, batch.target_T, batch.nll_weight_T)
    return Counter(
        (pair, role, read[source], target, round(weight, 6))
        for pair, role, source, target, weight in zip(*(column.tolist() for column in columns), strict=True)
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("nll_reduction", ["token", "pair"])
@pytest.mark.parametrize("nll_on", ["full", "response", "assistant"])
@given(pairs=st.lists(tokenized_pairs(), min_size=1, max_size=3))
@settings(max_examples=20)
def test_scored_tokens_are_those_of_the_twin(nll_on, nll_reduction, layout, pairs):  # peers 10, 15, 17, 28
    objective = Objective(nll_on=nll_on, nll_reduction=nll_reduction)
    for share_from in (None, 1, 3) if layout == "shared" else (None,):
        batch = pack(pairs, objective, layout=layout, share_from=share_from)
        assert actual_scores(batch) == expected_scores(pairs, objective)


@pytest.mark.parametrize("layout", LAYOUTS)
@given(pairs=st.lists(tokenized_pairs(), min_size=1, max_size=3))
@settings(max_examples=20)
def test_a_position_counts_the_tokens_read_before_it(layout, pairs):
    batch = pack(pairs, Objective(), layout=layout, share_from=1)
    positions = batch.position_ids_BN.flatten().tolist()
    for position, read in zip(positions, read_by(batch), strict=True):
        assert read is None or position == len(read) - 1


@given(pairs=st.lists(tokenized_pairs(), min_size=1, max_size=3))
@settings(max_examples=20)
def test_pairs_for_themselves_store_every_token_once(pairs):
    batch = pack(pairs, Objective(), share_from=None)
    stored = [token for pair in pairs for token in (*pair.prompt, *pair.chosen, *pair.rejected)]
    assert batch.input_ids_BN.tolist() == [stored]
    assert batch.num_tokens == sum(map(len, pairs))
    assert batch.attention_mask_BN is None


RANKED = ([1, 2, 3], [[4, 5], [6], [7, 8, 9], [6, 5]])
"""A prompt and its answers, best first."""


def ranked_pairs(prompt=RANKED[0], answers=RANKED[1]):
    """Every answer against every worse one."""
    return [TokenizedPair(prompt, a, b) for n, a in enumerate(answers) for b in answers[n + 1 :]]


def test_answers_of_one_prompt_are_stored_once():
    batch = pack(ranked_pairs(), Objective())
    assert batch.input_ids_BN.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 9, 6, 5]]
    assert batch.tree == (Segment(5), Segment(1, 0, 3), Segment(3, 0, 3), Segment(2, 0, 3))
    assert batch.position_ids_BN.tolist() == [[0, 1, 2, 3, 4, 3, 3, 4, 5, 3, 4]]


def test_an_answer_given_to_another_prompt_is_stored_again():
    pairs = [
        TokenizedPair([1, 2], [4], [5]),
        TokenizedPair([1, 3], [4], [5]),
        TokenizedPair([1], [2, 4], [5]),
    ]
    assert pack(pairs, Objective(), share_from=4).num_tokens == 12


def test_beginnings_are_shared_from_a_number_of_tokens_on():
    pairs = [TokenizedPair([1, 2, 3, 4, 5], [6], [7]), TokenizedPair([1, 2, 3, 8], [6], [7])]
    assert pack(pairs, Objective(), share_from=3).tree[2:] == (Segment(2, 0, 3), Segment(1, 2, 4))
    assert pack(pairs, Objective(), share_from=4).tree[2:] == (Segment(5), Segment(1, 2, 4))


def test_a_later_turn_continues_the_answer_of_an_earlier_one():
    pairs = [TokenizedPair([1, 2], [3, 4], [5]), TokenizedPair([1, 2, 3, 4, 6], [7], [8])]
    batch = pack(pairs, Objective(), share_from=4)
    assert batch.tree == (Segment(4), Segment(1, 0, 2), Segment(2, 0, 4), Segment(1, 2, 5))


def test_the_beginning_of_an_answer_is_not_shared_with_another_answer():
    pairs = [TokenizedPair([1, 2], [3, 4], []), TokenizedPair([1, 2], [3, 4, 5], [])]
    assert pack(pairs, Objective(), share_from=1).tree == (Segment(4), Segment(3, 0, 2))


def test_a_trunk_is_the_segment_that_stores_what_is_shared():
    pairs = [TokenizedPair([1, 2, 3, *rest], [9], []) for rest in ([4], [5], [6])]
    tree = pack(pairs, Objective(), share_from=3).tree
    assert tree == (Segment(5), Segment(2, 0, 3), Segment(2, 0, 3))


@given(pairs=st.lists(tokenized_pairs(), min_size=1, max_size=6), share_from=st.integers(1, 4))
@settings(max_examples=60)
def test_what_pairs_share_is_found_in_the_order_in_which_they_share_the_most(pairs, share_from):
    assume(all(pair.chosen != pair.rejected for pair in pairs))
    sharing = find_sharing(pairs, share_from)
    assert sorted(sharing.order) == list(range(len(pairs)))
    in_order = [pairs[i] for i in sharing.order]
    lengths = np.array([(len(p.prompt), len(p.chosen), len(p.rejected)) for p in pairs])
    plan = plan_step(lengths, num_ranks=1, tokens_per_micro_batch=10**6, sharing=sharing)
    assert len(plan[0]) == 1
    units = _cut(range(len(pairs)), lengths.tolist(), sharing)
    together = [[pairs[i] for i in unit.pairs] for unit in units]
    stored = [pack(some, Objective(), share_from=share_from).num_tokens for some in together]
    assert stored == [unit.tokens for unit in units]
    sides = [(*pair.prompt, *pair.chosen) for pair in in_order]
    for number, side in enumerate(sides):
        alike = [alike_from_start(side, other) for other in sides[:number]]
        assert max(alike, default=0) == (alike[-1] if alike else 0)


def alike_from_start(side, other):
    same = [a == b for a, b in zip(side, other, strict=False)]
    return same.index(False) if False in same else len(same)


@given(pairs=st.lists(tokenized_pairs(), min_size=1, max_size=5))
@settings(max_examples=60)
def test_distinct_tokens_are_those_with_one_place_and_clusters_hold_all_of_theirs(pairs):
    batch = pack(pairs, Objective(), share_from=1)
    if batch.distinct is None:
        return
    first_U, of_T, clusters = batch.distinct.first_U, batch.distinct.of_T, batch.distinct.clusters
    read = paths_of_tokens(batch.tree)
    paths = [tuple(read[source]) for source in batch.source_T.tolist()]
    keys = list(zip(paths, batch.target_T.tolist(), strict=True))
    for of, key in zip(of_T.tolist(), keys, strict=True):
        assert key == keys[first_U[of]]
    assert (first_U.diff() > 0).all()
    scored = distinct = 0
    for more_scored, more in clusters:
        own = of_T[scored : scored + more_scored]
        assert (own.min().item(), own.max().item() + 1) == (distinct, distinct + more)
        scored, distinct = scored + more_scored, distinct + more
    assert scored == sum(map(sum, batch.response_lengths))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_responses_come_first_pair_by_pair_and_context_last(layout):
    batch = pack(mixed_pairs(), Objective(), layout=layout)
    roles, of_pair = batch.role_T.tolist(), batch.pair_T.tolist()
    num_scored = sum(map(sum, batch.response_lengths))
    expected = [
        (number, role)
        for number, lengths in enumerate(batch.response_lengths)
        for role, length in zip((Role.CHOSEN, Role.REJECTED), lengths, strict=True)
        for _ in range(length)
    ]
    assert list(zip(of_pair, roles, strict=True))[:num_scored] == expected
    assert set(roles[num_scored:]) == {Role.CONTEXT}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("nll_on", ["full", "response", "assistant"])
def test_one_position_is_scored_for_each_response_token(layout, nll_on):  # peers 16
    pairs = mixed_pairs()
    batch = pack(pairs, Objective(nll_on=nll_on), layout=layout)
    for number, pair in enumerate(pairs):
        responses = (pair.chosen[pair.chosen_context :], pair.rejected[pair.rejected_context :])
        assert batch.response_lengths[number] == tuple(map(len, responses))
        for role, response in zip((Role.CHOSEN, Role.REJECTED), responses, strict=True):
            mine = (batch.pair_T == number) & (batch.role_T == role)
            assert batch.target_T[mine].tolist() == list(response)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("token", [0, 2])
def test_a_token_that_looks_like_padding_is_scored_like_any_other(layout, token):  # peers 15, 17, 39
    looks_padded = TokenizedPair([token] * 3, [token] * 4, [token] * 2)
    batch = pack([looks_padded, TokenizedPair([5] * 6, [6] * 6, [7])], Objective(), layout=layout)
    weights = batch.nll_weight_T[batch.pair_T == 0].tolist()
    assert sorted(weights) == [0.0] * 2 + [1.0] * 6
    assert batch.response_lengths[0] == (4, 2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_predicts_the_first_token(layout):
    batch = pack([TokenizedPair([9], [8], [7]), TokenizedPair([6], [5], [4])], Objective(), layout=layout)
    assert sorted(batch.target_T.tolist()) == [4, 5, 7, 8]


def test_an_assistant_span_that_starts_at_the_first_token_leaves_that_token_out():
    pair = TokenizedPair([5, 6, 7, 8], [9], [10], assistant_spans=((0, 2),))
    batch = pack([pair], Objective(nll_on="assistant"))
    assert batch.target_T.tolist() == [9, 10, 6]


def test_the_last_prompt_token_predicts_the_first_token_of_both_responses():
    batch = pack([TokenizedPair([1, 2, 3], [4, 5], [6, 7, 8])], Objective(nll_on="response"))
    assert batch.source_T.tolist() == [2, 3, 2, 5, 6]
    assert batch.target_T.tolist() == [4, 5, 6, 7, 8]


def test_turns_of_their_own_are_read_but_not_part_of_the_response():
    pair = TokenizedPair([1], [2, 3, 4], [5, 6, 7, 8], chosen_context=2, rejected_context=3)
    batch = pack([pair], Objective(nll_on="response"))
    assert batch.target_T.tolist() == [4, 8]
    assert batch.source_T.tolist() == [2, 6]


def test_an_odds_ratio_alone_scores_no_context():
    batch = pack([TokenizedPair([1, 2, 3], [4], [5])], Objective(nll_weight=0.0))
    assert batch.target_T.tolist() == [4, 5]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_beta_zero_runs_no_rejected_side_unless_asked(layout):
    pairs = mixed_pairs()
    batch = pack(pairs, Objective(preference_weight=0.0), layout=layout)
    assert Role.REJECTED not in batch.role_T.tolist()
    assert batch.num_preferences == 0
    assert batch.num_pairs == len(pairs)
    num_read = sum(read is not None for read in read_by(batch))
    assert num_read == sum(len(pair.prompt) + len(pair.chosen) for pair in pairs)
    asked = pack(pairs, Objective(preference_weight=0.0), layout=layout, score_rejected=True)
    assert asked.num_preferences == 4


@pytest.mark.parametrize("nll_on", ["full", "response", "assistant"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_counts_of_a_micro_batch_are_those_of_its_pairs(layout, nll_on):
    pairs = mixed_pairs()
    tokens = pack(pairs, Objective(nll_on=nll_on), layout=layout)
    assert tokens.num_pairs == 5
    assert tokens.num_preferences == 4  # one pair has no rejected side
    assert tokens.nll_weight == sum(len(nll_targets(pair, nll_on)) for pair in pairs)
    assert tokens.nll_weight_T.sum().item() == tokens.nll_weight
    per_pair = pack(pairs, Objective(nll_on=nll_on, nll_reduction="pair"), layout=layout)
    assert per_pair.nll_weight == pytest.approx(5)
    assert per_pair.nll_weight_T.sum().item() == pytest.approx(5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_empty_micro_batch_is_computed_and_weighs_nothing(layout):
    batch = pack([TokenizedPair([1, 2], [3, 4], [5])], Objective(), layout=layout, empty=True)
    assert batch.num_tokens >= 4
    assert (batch.num_pairs, batch.num_preferences, batch.nll_weight) == (0, 0, 0.0)
    assert len(batch.target_T) > 0
    assert batch.nll_weight_T.abs().sum() == 0
    assert Role.REJECTED not in batch.role_T.tolist()


def test_padding_is_on_the_right_hidden_and_never_a_source():
    batch = pack(mixed_pairs(), Objective(), layout="padded")
    mask = batch.attention_mask_BN
    assert (mask.diff(dim=1) <= 0).all()
    assert mask.flatten()[batch.source_T].all()
    assert mask.sum(1).max() == mask.shape[1]


def test_packed_pairs_have_a_segment_for_each_side():
    pairs = mixed_pairs()
    tree = pack(pairs, Objective(), layout="packed").tree
    expected = [Segment(len(p.prompt) + len(side)) for p in pairs for side in (p.chosen, p.rejected) if side]
    assert list(tree) == expected


def test_index_is_the_place_in_the_data_set():
    pairs = mixed_pairs()
    assert pack(pairs, Objective()).index == (0, 1, 2, 3, 4)
    assert pack(pairs, Objective(), index=[7, 3, 9, 1, 4]).index == (7, 3, 9, 1, 4)


def test_moving_a_micro_batch_keeps_everything_else():
    batch = pack(mixed_pairs(), Objective(), layout="padded", index=[4, 3, 2, 1, 0])
    moved = batch.to("meta")
    tensors = [value for name in type(batch).__slots__ if torch.is_tensor(value := getattr(moved, name))]
    assert len(tensors) == 8
    assert all(tensor.device.type == "meta" for tensor in tensors)
    assert (moved.index, moved.nll_weight, moved.num_preferences) == (batch.index, batch.nll_weight, 4)
