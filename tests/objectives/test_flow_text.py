import jax
import jax.numpy as jnp
import numpy as np

from jaxformer.objectives.flow import Flow
from jaxformer.objectives.flow_text import TextFlow


def test_the_model_is_told_the_text_and_the_loss_is_flows(key):
    batch = {
        "image": jax.random.normal(key, (4, 2, 2, 1)),
        "tokens": jnp.arange(12).reshape(4, 3),
        "label": jnp.zeros(4, jnp.int32),
    }
    seen = []

    def apply(variables, x, t, *text, **options):
        seen.append(text)
        return x * variables["params"]

    objective = TextFlow()
    loss = objective.loss(apply, 0.5, batch, key)[0]
    np.testing.assert_array_equal(seen[0][0], batch["tokens"])
    assert loss == Flow().loss(apply, 0.5, batch, key)[0] and seen[1] == ()
    x, t, tokens = objective.arguments(*(batch[name] for name in objective.inputs))
    assert x.shape == batch["image"].shape and t.shape == (4,)
    np.testing.assert_array_equal(tokens, batch["tokens"])
