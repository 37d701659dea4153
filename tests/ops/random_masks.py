"""Masks as hypothesis draws them: every leaf of the algebra, and what joins them."""

import operator

import jax.numpy as jnp
from hypothesis import strategies as st

from jaxformer.ops.mask import BlockDiffusion, Causal, Full, Prefix, Segments, Spans, Window


def random_masks(T: int, S: int, B: int = 2) -> st.SearchStrategy:
    """Masks of `B` rows, of up to four leaves, for `T` queries and `S` keys."""
    index = st.integers(-3, max(T, S) + 3)

    def rows(width, values):
        row = st.lists(values, min_size=width, max_size=width)
        return st.lists(row, min_size=B, max_size=B).map(lambda x: jnp.array(x, jnp.int32))

    # Sorted ids stand side by side; 0 may stand between.
    ids = lambda n: rows(n, st.integers(0, 4)).map(lambda x: jnp.sort(x, axis=1))  # noqa: E731
    leaves = [
        st.just(Full()),
        st.builds(Causal, index),
        st.builds(Window, st.none() | st.integers(0, 4), st.none() | st.integers(0, 4)),
        rows(1, index).map(lambda x: Prefix(x[:, 0])),
        st.builds(Segments, ids(T), ids(S)),
        st.builds(Spans, rows(2, index), rows(2, index)),
    ]
    if T == S and T % 2 == 0:
        leaves.append(st.builds(BlockDiffusion, st.integers(1, T)))
    join = st.sampled_from([operator.and_, operator.or_])
    return st.recursive(
        st.one_of(leaves),
        lambda m: st.builds(lambda f, a, b: f(a, b), join, m, m),
        max_leaves=4,
    )
