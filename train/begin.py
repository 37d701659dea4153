"""With what a run begins: the state of its last checkpoint that is whole, or a new one."""

import jax
import jax.numpy as jnp

from jaxformer import checkpoint, hosts
from jaxformer.errors import InputError
from jaxformer.experiment import Experiment, differences
from jaxformer.setup import Setup
from jaxformer.steps import TrainState


def begin(
    experiment, made, folder, described, data, say=print
) -> tuple[TrainState, jax.Array, int]:
    """The state, the run's key and the step of the last checkpoint that is whole, or new ones.

    Those after it are set aside, and `say` is told.
    """
    whole = made.state.step.sharding
    key = jax.jit(jax.random.key, static_argnums=0, out_shardings=whole)(experiment.seed)
    saved = checkpoint.steps(folder)
    if saved:
        return newest(experiment, made, folder, saved, described, data, key, say)
    return _filled(experiment, made, made.init(key)), key, 0


def newest(experiment, made, folder, saved, described, data, key, say):
    """What `begin` gives, of the last of the steps `saved` that is whole."""
    while True:
        *earlier, step = saved
        try:
            return *_restored(experiment, made, folder, step, described, data, key), step
        except checkpoint.Damaged as error:
            if not earlier:  # To begin anew is for a person to say.
                raise
            say(f"warning: {error}; it is set aside, and step {earlier[-1]} is taken")
            if jax.process_index() == 0:
                checkpoint.set_aside(folder, step)
            hosts.meet("set aside")
            saved = earlier


def _filled(experiment: Experiment, made: Setup, state: TrainState) -> TrainState:
    """The first state, with the parameters that the experiment starts from."""
    for part in experiment.start:
        params = part.read(state.params, made.mesh, made.rules)
        ema = None if state.ema is None else jax.tree.map(jnp.copy, params)
        state = state.replace(params=params, ema=ema)
    return state


def _restored(experiment, made, folder, step, described, data, key):
    """The state and the run's key as they were saved at a step of the same run."""
    lines = differences(checkpoint.read_experiment(folder, step), described)
    if lines:
        raise InputError(
            f"{folder}: step {step} is of another experiment; choose another --workdir, or "
            "take the changes back (- in the checkpoint, + now):\n" + "\n".join(lines)
        )
    if step > experiment.steps:
        raise InputError(
            f"{folder}: the run is at step {step}, beyond steps={experiment.steps}; choose "
            "more steps or another --workdir"
        )
    whole = made.state.step.sharding
    data_key = jax.eval_shape(jax.random.key_data, key)
    data_key = jax.ShapeDtypeStruct(data_key.shape, data_key.dtype, sharding=whole)
    found = checkpoint.restore(folder, step, {"state": made.state, "key": data_key}, data)
    return found["state"], jax.random.wrap_key_data(found["key"])
