"""An encoder-decoder's decoder by the parts of the language model: Whisper's, recorded."""

import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.layers.attention import Attention
from jaxformer.layers.block import CrossBlock, Mlp, Stack
from jaxformer.layers.norm import LayerNorm
from jaxformer.layers.text import LearnedPositions, TokenTable
from jaxformer.models.decoder import LanguageModel
from jaxformer.ops.mask import Segments

F32 = {"dtype": jnp.float32}
FILE = np.load(pathlib.Path(__file__).parent / "cross.npz")
TOKENS, CONTEXT = FILE["in:tokens"], FILE["in:context"]


def model(epsilon=1e-5):
    own, cross = (
        Attention(3, 4, use_bias=True, key_bias=False, parent=None, **F32) for _ in range(2)
    )
    mlp = Mlp(20, use_bias=True, parent=None, **F32)
    block = CrossBlock(own, mlp, LayerNorm, epsilon, cross=cross, parent=None)
    return LanguageModel(
        TokenTable(17, 12, parent=None, **F32),
        Stack(block, 2, parent=None),
        LayerNorm(epsilon, parent=None),
        position=LearnedPositions(9, 12, parent=None),
        length=9,
    )


def params():
    """Whisper's parameters as ours."""

    def layers(name):
        return np.stack([FILE[f"layers.{i}.{name}"] for i in range(2)])

    def norm(name):
        return {"scale": layers(f"{name}.weight"), "bias": layers(f"{name}.bias")}

    def attention(name):
        found = {}
        for ours, theirs in {"query": "q", "key": "k", "value": "v"}.items():
            kernel = layers(f"{name}.{theirs}_proj.weight").swapaxes(1, 2)
            found[ours] = {"kernel": kernel.reshape(2, 12, 3, 4)}
            if ours != "key":
                bias = layers(f"{name}.{theirs}_proj.bias")
                found[ours]["bias"] = bias.reshape(2, 3, 4)
        out = layers(f"{name}.out_proj.weight").swapaxes(1, 2).reshape(2, 3, 4, 12)
        return found | {"out": {"kernel": out, "bias": layers(f"{name}.out_proj.bias")}}

    def linear(name):
        return {
            "kernel": layers(f"{name}.weight").swapaxes(1, 2),
            "bias": layers(f"{name}.bias"),
        }

    return {
        "table": {"embedding": FILE["embed_tokens.weight"]},
        "position": {"position": {"embedding": FILE["embed_positions.weight"]}},
        "norm": {"scale": FILE["layer_norm.weight"], "bias": FILE["layer_norm.bias"]},
        "stack": {
            "block": {
                "attention": attention("self_attn"),
                "attention_norm": norm("self_attn_layer_norm"),
                "cross": attention("encoder_attn"),
                "cross_norm": norm("encoder_attn_layer_norm"),
                "mlp": {"up": linear("fc1"), "down": linear("fc2")},
                "mlp_norm": norm("final_layer_norm"),
            }
        },
    }


def says(context=CONTEXT, **inputs):
    run = jax.jit(model().apply)
    return run({"params": params()}, TOKENS, context=context, **inputs)


def test_the_decoders_parts_are_whispers_decoder():
    shapes = jax.eval_shape(model().init, jax.random.key(0), TOKENS, context=CONTEXT)
    expected = jax.tree.map(lambda x: x.shape, nn.unbox(shapes)["params"])
    assert jax.tree.map(np.shape, params()) == expected
    np.testing.assert_allclose(says(), FILE["out:logits"], rtol=0, atol=1e-5)


def test_what_the_context_mask_hides_is_not_looked_at():
    real = jnp.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    mask = Segments(jnp.ones((2, 7), jnp.int32), real)
    other = CONTEXT.copy()
    other[0, 3:] = 7.0
    np.testing.assert_allclose(
        says(context_mask=mask), says(other, context_mask=mask), rtol=0, atol=1e-5
    )
    np.testing.assert_allclose(
        says(context_mask=mask)[1], FILE["out:logits"][1], rtol=0, atol=1e-5
    )
    assert np.abs(says(context_mask=mask)[0] - FILE["out:logits"][0]).max() > 1e-2


def test_no_token_sees_those_after_it():
    changed = TOKENS.copy()
    changed[:, 4:] = 1
    found = jax.jit(model().apply)({"params": params()}, changed, context=CONTEXT)
    np.testing.assert_allclose(found[:, :4], FILE["out:logits"][:, :4], rtol=0, atol=1e-5)


def test_a_block_without_cross_attention_is_told():
    block = CrossBlock(Attention(3, 4, **F32), Mlp(20, **F32))
    with pytest.raises(ValueError, match="CrossBlock needs cross=Attention"):
        block.init(jax.random.key(0), jnp.ones((1, 2, 12)), context=jnp.ones((1, 3, 12)))
