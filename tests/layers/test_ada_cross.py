"""A block of DiT that hears a text, beside diffusers' blocks of Stable Diffusion and PixArt."""

import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.layers.attention import Attention
from jaxformer.layers.block import Mlp
from jaxformer.layers.norm import BareLayerNorm
from jaxformer.layers.timestep import AdaCrossBlock
from jaxformer.ops.activation import gelu, gelu_tanh
from jaxformer.ops.mask import Segments

F32 = {"dtype": jnp.float32, "parent": None}
FILE = np.load(pathlib.Path(__file__).parent / "ada_cross.npz")
ONE = 1.2784645427610738  # x * sigmoid(x) of it is 1.
MASK = Segments(jnp.ones((2, 6), jnp.int32), jnp.asarray(FILE["real"], jnp.int32))


class Same(nn.Module):
    """No norm, which PixArt has before its cross-attention."""

    def __call__(self, x):
        return x


def pixart_norm(epsilon, name):
    return Same(name=name) if name == "cross_norm" else BareLayerNorm(epsilon, name=name)


def block(name):
    bias = name == "pixart"
    own, cross = (Attention(3, 4, use_bias=bias, out_bias=True, **F32) for _ in range(2))
    if name == "sd":
        mlp = Mlp(48, gelu, gated=True, use_bias=True, **F32)
        return AdaCrossBlock(own, mlp, epsilon=1e-5, cross=cross)
    mlp = Mlp(48, gelu_tanh, use_bias=True, **F32)
    return AdaCrossBlock(own, mlp, pixart_norm, 1e-6, cross=cross)


def linear(name):
    found = {"kernel": FILE[f"{name}.weight"].T}
    return found | ({"bias": FILE[f"{name}.bias"]} if f"{name}.bias" in FILE else {})


def attention(name):
    def split(part):
        found = linear(f"{name}.to_{part}")
        return {k: x.reshape(*x.shape[:-1], 3, 4) for k, x in found.items()}

    out = linear(f"{name}.to_out.0")
    found = {ours: split(ours[0]) for ours in ("query", "key", "value")}
    return found | {"out": out | {"kernel": out["kernel"].reshape(3, 4, 12)}}


def params(name):
    """Theirs as ours: weights of a norm are a modulation that heeds nothing."""
    up = linear(f"{name}.ff.net.0.proj")
    mlp = {"up": up, "down": linear(f"{name}.ff.net.2")}
    if name == "sd":  # The values first, then what gates them.
        for part, half in (("up", 0), ("gate", 1)):
            mlp[part] = {k: np.split(x, 2, -1)[half] for k, x in up.items()}
        norms = ((FILE[f"sd.norm{i}.bias"], FILE[f"sd.norm{i}.weight"] - 1) for i in (1, 2, 3))
        bias = np.stack([part for norm in norms for part in (*norm, np.ones(12))])
        kernel = np.zeros((2, 9, 12))
    else:
        told, table = FILE["told"].reshape(2, 6, 12), FILE["pixart.scale_shift_table"]
        bias = np.concatenate([table[:3], np.zeros((2, 12)), np.ones((1, 12)), table[3:]])
        kernel = np.concatenate([told[:, :3], np.zeros((2, 3, 12)), told[:, 3:]], 1)
    found = {
        "attention": attention(f"{name}.attn1"),
        "cross": attention(f"{name}.attn2"),
        "mlp": mlp,
        "modulation": {"linear": {"kernel": kernel, "bias": bias}},
    }
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), found)


def says(name, text=FILE["text"], mask=MASK):
    condition = ONE * jnp.eye(2)[:, None]  # Which row it is.
    options = {"condition": condition, "context": text, "context_mask": mask}
    return jax.jit(block(name).apply)({"params": params(name)}, FILE["x"], **options)


@pytest.mark.parametrize("name", ["sd", "pixart"])
def test_it_is_diffusers_block(name):
    shapes = jax.eval_shape(
        block(name).init, jax.random.key(0), FILE["x"], condition=jnp.ones((2, 1, 2)),
        context=FILE["text"],
    )  # fmt: skip
    expected = jax.tree.map(lambda x: x.shape, nn.unbox(shapes)["params"])
    assert jax.tree.map(np.shape, params(name)) == expected
    np.testing.assert_allclose(says(name), FILE[f"{name}:out"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["sd", "pixart"])
def test_padding_and_the_order_of_words_are_noticed(name):
    other = FILE["text"].copy()
    other[1, [0, 4]] = 9.0  # Padding of the second text.
    np.testing.assert_allclose(says(name, other), FILE[f"{name}:out"], rtol=0, atol=1e-5)
    assert np.abs(says(name, mask=None)[1] - FILE[f"{name}:out"][1]).max() > 1e-3
    assert np.abs(says(name, FILE["text"][::-1]) - FILE[f"{name}:out"]).max() > 1e-2
