"""Files of StableHLO: what is in them, and what is too great for one."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from evaluate import stablehlo
from jaxformer.errors import InputError
from jaxformer.models.decoder import Decoder


@pytest.fixture(scope="module")
def decoder():
    model = Decoder(vocab=40, width=64, depth=1, mlp_dim=32, num_heads=1)
    tokens = jnp.arange(32, dtype=jnp.int32).reshape(2, 16)
    return model, nn.unbox(jax.jit(model.init)(jax.random.key(0), tokens))["params"], tokens


def test_a_decoder_gives_what_it_gave(decoder):
    model, params, tokens = decoder
    data = stablehlo.artefact(model, params, [tokens[:1]], batch_size=2)
    held = export.deserialize(bytearray(data))
    expected = jax.jit(model.apply)({"params": params}, tokens)
    np.testing.assert_allclose(jax.jit(held.call)(tokens), expected, atol=1e-6)
    text = str(held.mlir_module())
    assert "tpu_custom_call" in text, "the kernel is chosen where the file is run"


def test_what_is_too_great_is_told(decoder, monkeypatch):
    monkeypatch.setattr(stablehlo, "LIMIT", 1000)
    model, params, tokens = decoder
    with pytest.raises(InputError, match="--export writes models of any size"):
        stablehlo.artefact(model, params, [tokens], batch_size=2)
