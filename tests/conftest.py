"""Every test sees 8 CPU devices, strict shapes and a compilation cache."""

import importlib.metadata
import os
import pathlib

os.environ["JAX_PLATFORMS"] = "cpu"  # also where a TPU's library is installed.
# Tests compile more than they compute: LLVM's optimizer costs them more than it gives, and
# so do the newer fusions, of which only jax 0.10 can do without; who names them has them.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_backend_optimization_level=0",
        "--xla_cpu_use_fusion_emitters=false"
        if importlib.metadata.version("jax").startswith("0.10.")
        and "fusion_emitters" not in os.environ.get("XLA_FLAGS", "")
        else "",
    ]
).strip()

import jax
import jaxtyping
import pytest

CACHE = pathlib.Path(__file__).parent.parent / ".jax_cache"

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


SLOW = frozenset((pathlib.Path(__file__).parent / "slow.txt").read_text().splitlines())


def pytest_addoption(parser):
    parser.addoption(
        "--one-of-each", action="store_true", help="one case of each test that is not slow"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Cases that `slow.txt` names are slow: those that took longest, with others like them."""
    for item in items:
        if item.nodeid in SLOW:
            item.add_marker(pytest.mark.slow)
    if config.getoption("one_of_each"):
        quick = [item for item in items if not item.get_closest_marker("slow")]
        first = {}
        for item in quick:
            first.setdefault((item.path, item.cls, item.originalname), item)
        config.hook.pytest_deselected(items=list(set(items) - set(first.values())))
        items[:] = first.values()


@pytest.fixture(scope="module", autouse=True)
def forget():
    """Compiled programs of a file are gone after it: thousands of them fill the memory."""
    yield
    jax.clear_caches()


@pytest.fixture
def key():
    return jax.random.key(0)


@pytest.fixture
def unchecked():
    """Without the tests' own check of shapes and types: what a user meets."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
