"""What is compiled here is computed a few times, so that compiling is what takes time."""

import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def quick_to_compile():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
