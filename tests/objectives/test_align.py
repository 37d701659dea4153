import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.errors import InputError
from jaxformer.models.aligned_dit import AlignedDiT
from jaxformer.models.dit import DiT
from jaxformer.objectives.align import Aligned, apart
from jaxformer.objectives.condition import Classes
from jaxformer.objectives.flow import Flow
from tests.layers.test_block import randomized

FIELDS = {"channels": 1, "num_classes": 3, "label_dropout": 0.0}
FLOW = Flow(Classes(3))


def test_tokens_that_point_the_same_way_are_not_apart():
    x = jax.random.normal(jax.random.key(0), (2, 3, 4))
    np.testing.assert_allclose(apart(x, 7 * x), 0, atol=1e-6)
    np.testing.assert_allclose(apart(x, -x), 2, atol=1e-6)
    turned = x.at[0].set(-x[0])
    np.testing.assert_allclose(apart(x, turned), [2, 0], atol=1e-6)


@pytest.mark.slow
def test_a_dit_learns_both_and_early_blocks_alone_learn_to_align(key):
    model = AlignedDiT(16, 3, 2, 2, **FIELDS, seen=5, align_at=1, projector=8)
    objective = Aligned(FLOW)
    seen = jax.random.normal(key, (4, 4, 5))
    batch = {"image": jax.random.normal(key, (4, 4, 4, 1)), "label": jnp.arange(4) % 3}
    arguments = objective.arguments(*(batch[n] for n in objective.inputs))
    params = randomized(jax.jit(model.init)(key, *arguments), key)
    plain = dict(params)
    plain.pop("project")
    # Nothing but the projector is new: the same tree as two stacks of a DiT.
    assert set(plain) == {"embed", "condition", "first", "stack", "norm", "head"}
    made = jax.jit(functools.partial(model.apply, method="align"))
    out, tokens = made({"params": params}, *arguments)
    np.testing.assert_allclose(out, model.apply({"params": params}, *arguments), atol=1e-5)
    assert tokens.shape == seen.shape

    @jax.jit
    def slopes(params):
        def one(name, params):
            loss = objective if name == "both" else FLOW
            value, found = loss.loss(model.apply, params, batch | {"seen": seen}, key)
            return value if name != "apart" else found["apart"]

        both, flow = (jax.grad(functools.partial(one, n))(params) for n in ("both", "flow"))
        return jax.tree.map(lambda a, b: jnp.abs(a - b).max(), both, flow), one("both", params)

    moved, value = slopes(params)
    assert np.isfinite(value) and float(moved["project"]["out"]["kernel"]) > 0
    for name in ("first", "embed"):
        assert max(map(float, jax.tree.leaves(moved[name]))) > 1e-6, name
    for name in ("stack", "head"):
        assert max(map(float, jax.tree.leaves(moved[name]))) < 1e-6, name
    assert set(objective.measure(model.apply, params, batch, key)) == {"loss"}
    assert objective.reading == FLOW.reading and objective.classes == FLOW.classes


def test_what_cannot_be_is_told():
    source = types.SimpleNamespace(source=types.SimpleNamespace(num_classes=3))
    with pytest.raises(InputError, match="DiT has no tokens to align; take an AlignedDiT"):
        Aligned(FLOW).check(DiT(16, 2, 2, 2, **FIELDS), source)
    with pytest.raises(ValueError, match="align_at=2 must be a layer, from 1 to"):
        AlignedDiT(16, 2, 2, 2, **FIELDS, align_at=2).parts()
