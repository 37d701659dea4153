"""Activations by their exact definitions; the names say which of two one gets."""

import functools

import jax

gelu = functools.partial(jax.nn.gelu, approximate=False)
gelu_tanh = functools.partial(jax.nn.gelu, approximate=True)
silu = jax.nn.silu
