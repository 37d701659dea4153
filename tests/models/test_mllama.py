from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.layers.block import Stack
from jaxformer.layers.tiles import RATIOS, PaddingApart, Served, TileEmbed, counts
from jaxformer.models.mllama import neighbours
from tests.parity.cases import CASES
from tests.parity.test_parity import jit, load


@pytest.mark.parametrize(
    ("tokens", "segments", "seen"),
    [
        ([5, 1, 5, 1, 1, 5], None, ["00", "11", "11", "22", "23", "23"]),
        ([1, 1, 5, 5, 1, 5], [1, 1, 1, 2, 2, 0], ["11", "12", "12", "00", "33", "00"]),
        ([5, 1, 1, 1, 5, 5], [1, 1, 2, 2, 2, 3], ["00", "11", "22", "23", "23", "00"]),
    ],
)
def test_images_side_by_side_are_seen_together(tokens, segments, seen):
    given = None if segments is None else jnp.array([segments])
    found = neighbours(jnp.array([tokens]) == 1, given)
    np.testing.assert_array_equal(found[0], [[int(c) for c in pair] for pair in seen])


def test_who_sees_whom():
    ones = jnp.array([[0, 1, 1, 2]])
    served = Served(ones, jnp.array([[0, 1, 2, 2]]), jnp.array([[1, 0, 2]]))
    np.testing.assert_array_equal(
        served.dense(4, 3)[0].astype(int), [[1, 1, 1], [1, 0, 0], [1, 0, 1], [0, 0, 1]]
    )
    apart = PaddingApart(jnp.array([[True, False, False]]))
    np.testing.assert_array_equal(
        apart.dense(3, 3)[0].astype(int), [[1, 1, 1], [1, 0, 0], [1, 0, 0]]
    )
    assert counts(RATIOS, jnp.arange(9)).tolist() == [1, 1, 2, 3, 4, 2, 4, 3, 4]


@pytest.mark.slow
def test_text_is_the_language_model_alone_and_shut_gates_let_no_image_in():
    """Exactly: layers that see are left out, or add nothing."""
    inputs, _ = CASES["mllama"].answers()
    loaded: Any = load("mllama")
    model, params = loaded
    run = jit(model.apply)
    given = [jnp.asarray(inputs[name]) for name in ("tokens", "images", "ratios")]
    text = run({"params": params}, given[0])

    first, _ = model.language.stack.block.parts
    alone = model.language.clone(stack=Stack(first.clone(), 2))
    own = {"block": params["language"]["stack"]["block"]["parts_0"]}
    expected = jit(alone.apply)({"params": params["language"] | {"stack": own}}, given[0])
    np.testing.assert_array_equal(text, expected)

    def shut(path, x):
        return x * 0 if any("gate" in k.key and k.key != "gate" for k in path) else x

    closed = {"params": jax.tree.map_with_path(shut, params)}
    np.testing.assert_array_equal(run(closed, *given), text)
    assert jnp.abs(run({"params": params}, *given) - text).max() > 1e-2


def test_tiles_that_do_not_fit_are_refused():
    embed = TileEmbed(4, 12, 8, 3, ((1, 1),))
    with pytest.raises(ValueError, match="images of 2 tiles of"):
        embed.init(jax.random.key(0), jnp.zeros((1, 2, 8, 8, 3)), jnp.ones(1, jnp.int32))
