"""Muon by whole layers: who takes which, and what then travels over a mesh."""

import collections
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxformer import sharding
from jaxformer.optim import Constant, Muon
from jaxformer.sharding import FSDP_TENSOR, make_mesh, shardings_like
from tests.test_muon import AXES, FLOAT32, SIZES, close


@pytest.mark.parametrize("mesh", ["data=8", "fsdp=4,tensor=2", "data=2,fsdp=2,expert=2"])
def test_each_device_takes_some_layers_whole(mesh):
    """Two layers, so that some devices have none; nothing is gathered but whole results."""
    attention, moe = AXES["blocks"]["attention"], AXES["blocks"]["moe"]
    axes = {"query": attention["query"], "out": attention["out"], "down": moe["down"]}
    axes = {name: {"kernel": leaf["kernel"]} for name, leaf in axes.items()}
    sizes = SIZES | {"expert": 4}
    rng = np.random.default_rng(15)
    params = jax.tree.map(
        lambda spec: jnp.asarray(rng.normal(size=[sizes[a] for a in spec]), jnp.float32),
        axes,
        is_leaf=lambda x: isinstance(x, P),
    )
    tx = Muon(Constant(0.1), newton_schulz=FLOAT32).make(axes, 10)
    state = tx.init(params)
    alone, _ = jax.jit(tx.update)(params, state, params)

    on = make_mesh(mesh)
    boxes = jax.tree.map(
        lambda spec: NamedSharding(on, sharding.spec(spec, FSDP_TENSOR)),
        axes,
        is_leaf=lambda x: isinstance(x, P),
    )
    places = (boxes, shardings_like(state, boxes, on), boxes)
    counts = []
    for rules in ((), FSDP_TENSOR):
        update = jax.jit(tx.update, in_shardings=places, out_shardings=places[:2])
        with sharding.use(on, rules):
            compiled = update.lower(params, state, params).compile()
        updates, _ = compiled(*jax.device_put((params, state, params), places))
        close(updates, alone, atol=1e-6)
        found = re.findall(r" (all-gather|all-to-all|collective-permute)\(", compiled.as_text())
        counts.append(collections.Counter(found))
        jax.clear_caches()
    before, after = counts
    print(f"\n{mesh}: {dict(before)}, by layers {dict(after)}")
    ways = on.shape["fsdp"] * on.shape["tensor"]
    assert after["all-gather"] <= 3 and after["collective-permute"] == 0
    assert ways == 1 or after.total() < before.total() / 2
    assert (after["all-to-all"] > 0) == (ways > 1)
