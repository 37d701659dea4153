"""Large recipes build, have the parameters of the originals, and train what they name."""

import math
import pathlib

import flax.linen as nn
import jax
import pytest

from jaxformer.data import stand_in
from jaxformer.experiment import arguments, load

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
# LLaVA 1.5 as published has the tower's last layer and norm too, which it does not use, and
# 63 more rows of its table and its head; PaliGemma is as transformers counts it.
LLAVA = 7_063_427_072 - 12_596_224 - 2_048 - 2 * 63 * 4096
RECIPES = {
    "llava_7b": (LLAVA, 20_979_712),
    "llava_7b_instruct": (LLAVA, 20_979_712 + 6_738_423_808),
    "paligemma_3b": (2_923_466_480, 2_923_466_480),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_builds_and_trains_what_it_names(name):
    experiment = load(CONFIGS / f"{name}.py")
    batch = stand_in.shapes(experiment.data, experiment.batch_size)
    objective, key = experiment.objective, jax.random.key(0)

    def init(key, *inputs):
        return experiment.model.init(key, *inputs)["params"]

    boxed = jax.eval_shape(init, key, *arguments(objective, batch))
    params, (total, trains) = nn.unbox(boxed), RECIPES[name]
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(params)) == total
    tx = experiment.optimizer.make(nn.get_partition_spec(boxed), experiment.steps)
    state = jax.eval_shape(tx.init, params)
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(state) if x.ndim) == 2 * trains

    def loss(params, batch, key):
        return objective.loss(experiment.model.apply, params, batch, key)[0]

    assert jax.eval_shape(loss, params, batch, key).shape == ()
    shapes = (x.shape[1:] for x in arguments(objective, batch))
    assert experiment.flops(experiment.model, *shapes) > 2 * batch["tokens"].shape[1] * 2e9
