"""Two normal laws in the plane, and all that a perfect model knows of them."""

import jax
import jax.numpy as jnp
import numpy as np

WEIGHTS = np.array([0.3, 0.7])
MEANS = np.array([[-1.5, 0.5], [1.0, -0.5]])
VARIANCES = np.array([[0.09, 0.25], [0.16, 0.04]])  # Along the axes.
MEAN = WEIGHTS @ MEANS
COVARIANCE = np.diag(WEIGHTS @ VARIANCES) + np.einsum(
    "k,ki,kj->ij", WEIGHTS, MEANS - MEAN, MEANS - MEAN
)


def data(x, a, s):
    """What is expected of the data, given `x = a data + s noise`; a and s are `[B]`."""
    a, s = a[:, None, None], s[:, None, None]
    means, variances = jnp.asarray(MEANS, x.dtype)[None], jnp.asarray(VARIANCES, x.dtype)[None]
    wide, off = a**2 * variances + s**2, x[:, None] - a * means
    log = jnp.log(jnp.asarray(WEIGHTS, x.dtype))[None] - 0.5 * (
        off**2 / wide + jnp.log(wide)
    ).sum(-1)
    each = means + a * variances / wide * off
    return (jax.nn.softmax(log)[..., None] * each).sum(1)


def judge(x):
    """Mean, covariance and the share of the first law, of rows."""
    x = np.asarray(x, np.float64)
    return x.mean(0), np.cov(x.T), (x[:, 0] < -0.4).mean()


def differs(x) -> float:
    """The worst of those against the truth, in standard errors of so many rows."""
    mean, covariance, share = judge(x)
    n = len(x)
    of_mean = np.abs(mean - MEAN) / np.sqrt(np.diag(COVARIANCE) / n)
    scale = np.sqrt(np.outer(np.diag(COVARIANCE), np.diag(COVARIANCE)) * 2 / n)
    of_covariance = np.abs(covariance - COVARIANCE) / scale
    of_share = np.abs(share - WEIGHTS[0]) / np.sqrt(WEIGHTS.prod() / n)
    return max(of_mean.max(), of_covariance.max(), of_share)
