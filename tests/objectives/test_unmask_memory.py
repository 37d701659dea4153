"""What a step of masked and of block diffusion keeps in memory, compiled and not run."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from jaxformer.models.decoder import Decoder
from jaxformer.objectives.unmask import Unmask


@pytest.mark.parametrize("block", [None, pytest.param(16, marks=pytest.mark.slow)])
def test_no_logits_of_the_whole_text_lie_in_memory_at_once(block, key):
    """V = 128k, of which float32 logits of all tokens are 1 GB."""
    B, T, V = 4, 512, 128 * 1024
    model = Decoder(V, width=32, depth=1, mlp_dim=32, num_heads=2, causal=False)
    batch = {"tokens": jax.ShapeDtypeStruct((B, T), jnp.int32)}
    params = nn.unbox(jax.eval_shape(model.init, key, jnp.zeros((1, T), jnp.int32)))["params"]

    def peak(chunk):
        objective = Unmask(V - 1, block=block, chunk=chunk)

        def loss(params, batch):
            return objective.loss(model.apply, params, batch, key)[0]

        made = jax.jit(jax.grad(loss)).lower(params, batch).compile().memory_analysis()
        return made.temp_size_in_bytes

    logits, table = 4 * B * T * V, 4 * V * 32
    chunked, whole = peak(16), peak(None)
    print(f"\nblock {block}: logits {logits:,} bytes, table {table:,}: "
          f"{chunked:,} chunked, {whole:,} whole")  # fmt: skip
    assert 0 < chunked < logits / 4 and whole > logits
