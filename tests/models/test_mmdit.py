import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.models.mmdit import SIZES, MMDiT, flops, named
from jaxformer.ops.rotary import centered_places
from tests.models.test_dit import moved

# diffusers' counts of the parameters of these configs; of its first three, with the table
# of positions, which is none to it.
COUNTS = {
    "sd3-medium": 2_028_328_000 + 192**2 * 1536,
    "sd3.5-medium": 2_243_171_520 + 384**2 * 1536,
    "sd3.5-large": 8_056_627_520 + 192**2 * 2432,
    "qwen-image": 20_430_401_088,
}
SD3 = {
    "depth": 2,
    "num_heads": 2,
    "head_dim": 4,
    "channels": 3,
    "text_width": 5,
    "pooled_width": 7,
    "table": 8,
    "base": 4,
}
QWEN = {**SD3, "head_dim": 12, "pooled_width": None, "table": None, "axes": (2, 4, 6)}
KINDS = {"sd3": SD3, "qwen": {**QWEN, "qk_norm": True}}
LETTERS = {**QWEN, "vocab": 6}


def given(key, rows=4, columns=6, pooled=None):
    x = jax.random.normal(key, (2, rows, columns, 3))
    text = jax.random.normal(jax.random.key(9), (2, 3, 5))
    pooled = pooled and jax.random.normal(jax.random.key(8), (2, pooled))
    return x, jnp.array([0.25, 1.0]), text, pooled


def shapes(model, *inputs):
    return nn.unbox(jax.eval_shape(model.init, jax.random.key(0), *inputs))["params"]


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name):
    model = named(name)
    pooled = model.pooled_width and jnp.zeros((1, model.pooled_width))
    text = jnp.zeros((1, 2, model.text_width))
    tree = shapes(model, jnp.zeros((1, 4, 4, 16)), jnp.zeros(1), text, pooled)
    assert sum(x.size for x in jax.tree.leaves(tree)) == COUNTS[name]


def test_no_named_size_is_untested():
    assert COUNTS.keys() == SIZES.keys()


def test_a_name_that_is_none_lists_those_that_are():
    with pytest.raises(ValueError, match=r"'flux' is no MMDiT; known are sd3-medium"):
        named("flux")


@pytest.mark.parametrize("kind", [pytest.param("sd3", marks=pytest.mark.slow), "qwen"])
def test_it_starts_at_zero_and_learns_from_text_padding_left_out(kind, key):
    model = MMDiT(**KINDS[kind])
    x, t, text, pooled = given(key, pooled=model.pooled_width)
    real = jnp.array([[True, True, False], [True, True, True]])
    params = nn.unbox(jax.jit(model.init)(key, x, t, text, pooled, real))["params"]

    @jax.jit
    def run(params, text):
        def out(params, text):
            return model.apply({"params": params}, x, t, text, pooled, real)

        _, back = jax.vjp(out, params, text)
        return out(params, text), *back(jnp.ones_like(x))

    assert not run(params, text)[0].any()
    out, grads, of_text = run(moved(params, key), text)
    assert out.shape == x.shape
    seen = np.abs(of_text).max(-1) > 0
    np.testing.assert_array_equal(seen, real)
    for path, grad in jax.tree.leaves_with_path(grads):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        idle = ("key/bias" in name and kind == "sd3") or "position" in name
        idle |= "parts_1/block/text_attention/query" in name  # Whose answers nobody reads.
        if not idle:
            assert np.abs(grad).max() > 0, name


def test_letters_are_told_apart(key):
    model = MMDiT(**LETTERS)
    x, t, *_ = given(key)
    letters = jnp.array([[0, 3, 5], [1, 1, 2]])
    params = nn.unbox(jax.jit(model.init)(key, x, t, letters))["params"]
    run = jax.jit(lambda p, letters: model.apply({"params": p}, x, t, letters))
    params = moved(params, key)
    far = np.abs(run(params, letters) - run(params, letters.at[1, 2].set(4))).max((1, 2, 3))
    assert far[0] == 0 and far[1] > 1e-4


def test_rows_and_columns_count_from_the_middle_and_text_is_on_the_diagonal():
    image, text = centered_places(3, 4, 2)
    np.testing.assert_array_equal(image[0], 0)
    np.testing.assert_array_equal(image[1].reshape(3, 4)[:, 0], [-2, -1, 0])
    np.testing.assert_array_equal(image[2].reshape(3, 4)[0], [-2, -1, 0, 1])
    np.testing.assert_array_equal(text, [[2, 3]] * 3)


def test_a_larger_image_goes_on_around_a_smaller_one():
    small, large = centered_places(2, 4, 1)[0], centered_places(4, 8, 1)[0]
    within = large.reshape(3, 4, 8)[:, 1:3, 2:6].reshape(3, -1)
    np.testing.assert_array_equal(small, within)


def test_flops_are_those_of_the_matrices():
    """Each kernel is used once for a token of its stream, or once for a condition."""
    for fields in (SD3, QWEN, {**SD3, "own_layers": 1}):
        model = MMDiT(**fields)
        x, t, text, pooled = given(jax.random.key(0), pooled=model.pooled_width)
        total, T, S = 0, 6, 3
        for path, leaf in jax.tree.leaves_with_path(shapes(model, x, t, text, pooled)):
            keys = [k.key for k in path]
            if keys[-1] != "kernel":
                continue
            tokens = 1 if "condition" in keys or ("linear" in keys and keys[0] != "text") else T
            tokens = (
                S if keys[0] == "text" or any(k.startswith("text_") for k in keys) else tokens
            )
            tokens = 1 if "condition" in keys or "text_modulation" in keys else tokens
            total += tokens * leaf.size
        width = model.num_heads * model.head_dim
        total += model.depth * 2 * (T + S) ** 2 * width + model.own_layers * 2 * T**2 * width
        assert flops(model, (4, 6, 3), S) == 2 * total


@pytest.mark.parametrize(
    ("fields", "change", "message"),
    [
        ({**QWEN, "axes": (2, 2, 2)}, {}, r"axes=\(2, 2, 2\) must sum to head_dim=12"),
        ({**SD3, "own_layers": 2}, {}, "own_layers=2 must be below depth=2"),
        (SD3, {"rows": 18}, "9 x 3 patches are more than the table"),
        (SD3, {"pooled": None}, "takes a pooled vector"),
        (QWEN, {"pooled": 7}, "takes no pooled vector"),
        ({**SD3, "text_width": 6}, {}, "vectors of 5 numbers; the model takes 6"),
    ],
)
def test_what_does_not_fit_is_refused(fields, change, message, key):
    change = {"pooled": fields["pooled_width"], **change}
    with pytest.raises(ValueError, match=message):
        shapes(MMDiT(**fields), *given(key, **change))
