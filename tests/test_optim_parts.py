"""What trains is named; the rest has no state and stays as it is, to the bit."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.errors import InputError
from jaxformer.optim import AdamW, Constant, Muon, NewtonSchulz, Parts
from jaxformer.steps import init_state, train_step
from tests.models import test_vlm


@functools.cache
def axes():
    images = jnp.zeros((1, 1, 4, 8, 3))
    init = functools.partial(test_vlm.MODEL.init, jax.random.key(0))
    boxed = jax.eval_shape(init, jnp.full((1, 4), 3), images)["params"]
    return nn.get_partition_spec(boxed)


def state_bytes(recipe):
    params = test_vlm.params()
    state = jax.eval_shape(recipe.make(axes(), 100).init, params)
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state) if x.ndim)


def bytes_of(params):
    return sum(x.nbytes for x in jax.tree.leaves(params))


ADAMW = AdamW(rate=Constant(1e-3))
MUON = Muon(rate=Constant(1e-3), newton_schulz=NewtonSchulz(dtype="float32"))


@pytest.mark.parametrize("names", [("connector",), ("connector", "language")])
def test_there_is_state_for_what_trains_alone(names):
    params = test_vlm.params()
    trained = bytes_of({name: params[name] for name in names})
    assert state_bytes(Parts(ADAMW, names)) == 2 * trained < state_bytes(ADAMW)
    assert state_bytes(ADAMW) == 2 * bytes_of(params)
    print(f"{names}: {2 * trained} of {state_bytes(ADAMW)} bytes")


@pytest.mark.parametrize(
    "recipe", [ADAMW, pytest.param(MUON, marks=pytest.mark.slow)], ids=["adamw", "muon"]
)
def test_what_does_not_train_is_bitwise_the_same_after_100_steps(recipe):
    names = ("connector", "language/norm")
    model, params, parts = test_vlm.MODEL, test_vlm.params(), Parts(recipe, names)
    tokens = jnp.array([[1, 1, 3, 4, 5], [1, 1, 6, 7, 8]])
    images = jax.random.normal(jax.random.key(5), (2, 1, 4, 8, 3))

    def loss(params, batch, key):
        logits = model.apply({"params": params}, *batch)[:, :-1]
        logs = jax.nn.log_softmax(logits)
        return -jnp.take_along_axis(logs, tokens[:, 1:, None], 2).mean(), {}

    tx = parts.make(axes(), 100)
    step = functools.partial(train_step, loss_fn=parts.stopped(loss), tx=tx)

    @jax.jit
    def run(state):
        def one(state, _):
            state, metrics = step(state, (tokens, images), jax.random.key(0))
            return state, metrics["loss"]

        return jax.lax.scan(one, state, None, 100)

    state, losses = run(init_state(params, tx))
    moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), state.params, params)
    assert all(jax.tree.leaves((moved["connector"], moved["language"]["norm"])))
    rest = (moved["vision"], moved["language"]["stack"], moved["language"]["table"])
    assert not any(jax.tree.leaves(rest)) and losses[-1] < losses[0]


def test_a_stopped_loss_asks_for_no_other_gradient():
    loss = Parts(ADAMW, ("a",)).stopped(lambda params: params["a"] * params["b"]["c"])
    grads = jax.grad(loss)({"a": 2.0, "b": {"c": 3.0}})
    assert grads == {"a": 3.0, "b": {"c": 0.0}}


def test_a_name_that_no_parameter_has_is_refused():
    with pytest.raises(
        InputError, match="under 'conector'; there are connector, language, vis"
    ):
        Parts(ADAMW, ("conector",)).make(axes(), 100)
