"""Keys in parts: what each is handed. That they add up is in `tests/ops/test_attend.py`."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.kernels import parts
from jaxformer.kernels.case import Case, Gradients, Known


@pytest.mark.parametrize(
    ("S", "most"), [(1, 512), (512, 512), (513, 512), (4096, 1500), (7, 3)]
)
def test_parts_cover_the_keys_once(S, most):
    found = parts.cut(S, most)
    assert [i for part in found for i in range(S)[part.where]] == list(range(S))
    assert all(part.keys <= part.size <= max(most, 512) for part in found)


def test_one_part_is_handed_the_case_itself():
    """With all that is known of its mask, which a part of it would lose."""
    intervals = np.array([[[0, 0], [1, 2]]], np.int32)
    case = Case(intervals=jnp.asarray(intervals), known=Known(intervals[0]), scale=1.0)
    x = jnp.ones((1, 2, 1, 32))
    seen = []

    def forward(q, k, v, case, part):
        seen.append(case)
        return x, x

    def backward(case, part, before):
        seen.append(case)
        return Gradients(x, x, x, None, None, None, None, None), None

    whole = parts.cut(2, 512)
    parts.forward(forward, x, x, x, case, whole)
    parts.backward(backward, case, whole)
    assert all(one is case for one in seen) and len(seen) == 2
