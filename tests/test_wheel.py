"""The built wheel, alone: what someone who borrows a function gets."""

import subprocess
import sys
import zipfile

import pytest

from tests.test_floors import ROOT

ALONE = """
import functools, jax, jax.numpy as jnp, optax, jaxformer
assert jaxformer.__file__.startswith({place!r}), jaxformer.__file__
from jaxformer import metrics
from jaxformer.steps import init_state, train_step

def mine(params, x):  # A model that is not of this library.
    return jnp.tanh(x @ params["a"]) @ params["b"]

def loss_fn(params, batch, key):
    logits = mine(params, batch["x"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean(), {{}}

key = jax.random.key(0)
x = jax.random.normal(key, (64, 8))
batch = {{"x": x, "y": (x[:, 0] * x[:, 1] > 0).astype(int)}}
params = {{"a": jax.random.normal(key, (8, 32)) / 3, "b": jnp.zeros((32, 2))}}
tx = optax.adam(1e-2)
state = init_state(params, tx)
step = jax.jit(functools.partial(train_step, loss_fn=loss_fn, tx=tx), donate_argnums=0)
for _ in range(300):
    state, m = step(state, batch, key)
found = metrics.classification(mine(state.params, x), batch["y"])
print("top1", found["top1"].value())
import sys
assert not {{"grain", "orbax", "torch", "tensorflow"}} & set(sys.modules), "borrowed too much"
"""


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    place = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(place)]
    subprocess.run(command, cwd=ROOT.parent, check=True, capture_output=True)
    (wheel,) = place.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(place / "site")
    return place / "site"


def test_the_wheel_holds_the_library_alone(unpacked):
    tops = {p.name.split("-")[0] for p in unpacked.iterdir()}
    assert tops == {"jaxformer"}


def test_metrics_and_steps_train_a_model_that_is_not_ours(unpacked, tmp_path):
    code = ALONE.format(place=str(unpacked))
    environment = {"PYTHONPATH": str(unpacked), "JAX_PLATFORMS": "cpu", "PATH": "/usr/bin:/bin"}
    out = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert out.returncode == 0, out.stderr
    assert float(out.stdout.split()[-1]) > 0.95


def test_importing_jaxformer_costs_nothing_beside_jax():
    code = (
        "import jax, time; t = time.perf_counter(); import jaxformer;"
        "print(1e3 * (time.perf_counter() - t))"
    )
    times = []
    for _ in range(3):
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        times.append(float(out.stdout))
    print(f"import jaxformer: {min(times):.1f} ms after import jax")
    assert min(times) < 50
