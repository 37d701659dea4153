"""Distillation: what a student is to learn from a teacher, example by example.

Each function gives one number an example, in float32, for the caller to weigh and to
average; no gradient flows into the teacher. DeiT's losses, for one, with labels `y`:

    (1 - a) * cross_entropy(cls, y) + a * hard(dist, teacher)         # a = 1/2
    (1 - a) * cross_entropy(cls, y) + a * soft(dist, teacher, 3.0)    # a = 0.1
"""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float


def soft(
    student: Float[Array, "*B V"], teacher: Float[Array, "*B V"], temperature: float = 1.0
) -> Float[Array, "*B"]:
    """KL divergence in nats from the teacher's softened distribution, times temperature^2.

    Hinton et al. 2015 (arXiv:1503.02531); the factor keeps gradients as large at any
    temperature. Hinton's cross-entropy is this plus the teacher's entropy, which has no
    gradient. (DeiT's code divides by the number of classes too; its paper does not.)

    Args:
      student: logits.
      teacher: logits; -inf where it rules a class out.
      temperature: what both are divided by; above 1 it shows what the teacher finds
        unlikely.

    Raises:
      ValueError: a temperature that is not positive.

    Example:
      >>> logits = jnp.arange(3.0)
      >>> float(soft(logits, logits, 2.0))
      0.0
    """
    if temperature <= 0:
        raise ValueError(f"temperature={temperature} must be above 0; 1 leaves logits be")
    t = jax.lax.stop_gradient(teacher.astype(jnp.float32)) / temperature
    log_p = jax.nn.log_softmax(t)
    log_q = jax.nn.log_softmax(student.astype(jnp.float32) / temperature)
    p = jnp.exp(log_p)
    # Classes that are ruled out: 0 * -inf is none of the sum.
    terms = jnp.where(p > 0, p * (log_p - log_q), 0)
    return temperature**2 * terms.sum(-1)


def hard(student: Float[Array, "*B V"], teacher: Float[Array, "*B V"]) -> Float[Array, "*B"]:
    """Cross-entropy in nats against the teacher's first choice.

    Touvron et al. 2021 (DeiT, arXiv:2012.12877).

    Args:
      student: logits.
      teacher: logits, or whatever is greatest for its choice.
    """
    student = student.astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(student, teacher.argmax(-1))


def cosine(student: Float[Array, "*B D"], teacher: Float[Array, "*B D"]) -> Float[Array, "*B"]:
    """One minus the cosine between features, 0 to 2; 1 where one of them is zero.

    Args:
      student: features, brought to the teacher's width by the caller.
      teacher: features.
    """
    teacher = jax.lax.stop_gradient(teacher.astype(jnp.float32))
    return optax.cosine_distance(student.astype(jnp.float32), teacher, epsilon=1e-16)


def mean_squared(
    student: Float[Array, "*B D"], teacher: Float[Array, "*B D"]
) -> Float[Array, "*B"]:
    """Mean over the features of their squared difference; arguments as of `cosine`.

    Romero et al. 2015 (FitNets, arXiv:1412.6550).
    """
    teacher = jax.lax.stop_gradient(teacher.astype(jnp.float32))
    return ((student.astype(jnp.float32) - teacher) ** 2).mean(-1)
