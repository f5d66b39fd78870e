"""Micro-batches as trees of segments, and the slow, obvious reading of one: the path of every token."""

from hypothesis import strategies as st

from orpo.engine.packing import Segment, pair_segments

TREES = {
    "one pair": pair_segments([(5, 4, 3)]),
    "one token everywhere": pair_segments([(1, 1, 1)]),
    "several pairs": pair_segments([(3, 4, 6), (1, 1, 9), (12, 10, 1), (2, 5, 5)]),
    "no rejected side": pair_segments([(4, 3, 0)]),
    "some without a rejected side": pair_segments([(4, 3, 0), (2, 2, 4), (1, 3, 0)]),
    "pairs of equal lengths": pair_segments([(3, 4, 5), (3, 4, 5), (4, 3, 5)]),
    "four answers": (Segment(9), Segment(4, 0, 5), Segment(2, 0, 5), Segment(6, 0, 5)),
    "a common beginning": (Segment(12), Segment(3, 0, 8), Segment(7, 0, 6), Segment(2, 2, 9)),
    "a path of many segments": (Segment(4), Segment(3, 0, 4), Segment(5, 1, 7), Segment(1, 2, 12)),
    "trees that alternate": (
        Segment(4),
        Segment(3),
        Segment(2, 0, 3),
        Segment(2, 1, 1),
        Segment(1, 2, 5),
    ),
}


@st.composite
def trees(draw):
    """Any tree of a few short segments."""
    tree, lengths = [], []
    for number in range(draw(st.integers(1, 6))):
        trunk = draw(st.integers(-1, number - 1))
        shared = draw(st.integers(1, lengths[trunk])) if trunk >= 0 else 0
        tree.append(Segment(draw(st.integers(1, 6)), trunk, shared))
        lengths.append(shared + tree[-1].tokens)
    return tuple(tree)


def num_tokens(tree):
    """Tokens of a micro-batch."""
    return sum(segment.tokens for segment in tree)


def paths_of_tokens(tree):
    """For every token the indices of the tokens that it may read, in order, its own last."""
    read, ends = [], []  # of every token, and of every segment's last token
    for tokens, trunk, shared in tree:
        path = ends[trunk][:shared] if trunk >= 0 else []
        for _ in range(tokens):
            path = [*path, len(read)]
            read.append(path)
        ends.append(path)
    return read
