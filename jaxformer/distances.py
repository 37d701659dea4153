"""How far a set of pictures is from another, by the features of an encoder; NumPy, float64.

On the host, and of all rows in their order: the same numbers on any mesh. A distance tells
little by itself. It falls with the number of pictures, and has another size for every encoder,
which is why statistics carry their encoder's name and are refused beside another's. A file
of them (`save`, `load`) carries a hash of its numbers too.
"""

import dataclasses
import hashlib
import math

import numpy as np
from jaxtyping import Float

from jaxformer.errors import InputError

Rows = Float[np.ndarray, "B D"]
Others = Float[np.ndarray, "C D"]
CHUNK = 1024  # rows of a table of distances that are held at once.


@dataclasses.dataclass(frozen=True, eq=False)
class Statistics:
    """Mean `[D]` and unbiased covariance `[D, D]` of `count` features of an encoder.

    `size` is that of the pictures, (rows, columns), where it is known.
    """

    mean: np.ndarray
    covariance: np.ndarray
    count: int
    encoder: str = ""
    size: tuple[int, ...] = ()

    @property
    def digest(self) -> str:
        """Names these numbers: 12 hex digits of a hash, of them to six digits."""
        parts = [np.asarray([self.count]), self.mean, self.covariance]
        text = b"".join(np.char.mod("%.5e", part).tobytes() for part in parts)
        return hashlib.sha256(text + self.encoder.encode()).hexdigest()[:12]


def statistics(features: Rows, encoder: str = "", size: tuple[int, ...] = ()) -> Statistics:
    """Mean and covariance of the rows.

    Raises:
      InputError: fewer than two, or what is not finite.
    """
    x = np.asarray(features, np.float64)
    if len(x) < 2:
        raise InputError(f"{len(x)} pictures have no covariance; draw 2 or more")
    if not np.isfinite(x).all():
        raise InputError("features are not finite; look at the pictures and the encoder")
    mean = x.mean(0)
    off = x - mean
    return Statistics(mean, off.T @ off / (len(x) - 1), len(x), encoder, size)


def frechet(a: Statistics, b: Statistics) -> float:
    """The squared Frechet distance of two normal laws (Heusel et al. 2017, arXiv 1706.08500).

    `|m - n|^2 + tr A + tr B - 2 tr (A B)^(1/2)`. The last trace is the sum of the singular
    values of `A^(1/2) B^(1/2)`, with roots of symmetric matrices: no root of a product, which
    others take by a general `sqrtm` that fails near singular matrices.

    Raises:
      InputError: features of two encoders, or of pictures of two sizes.

    Example:
      >>> x = np.random.default_rng(0).normal(size=(50, 3))
      >>> abs(frechet(statistics(x), statistics(x + 1)) - 3) < 1e-9
      True
    """
    same_encoder(a, b)
    product = root(a.covariance) @ root(b.covariance)
    shared = np.linalg.svd(product, compute_uv=False).sum()
    off = a.mean - b.mean
    return float(off @ off + np.trace(a.covariance) + np.trace(b.covariance) - 2 * shared)


def same_encoder(a: Statistics, b: Statistics) -> None:
    """Raises InputError where two statistics are of different features or sizes of pictures."""
    if a.encoder != b.encoder or len(a.mean) != len(b.mean):
        names = [f"{s.encoder or 'no name'} of {len(s.mean)} numbers" for s in (a, b)]
        raise InputError(
            f"statistics of two encoders, {names[0]} and {names[1]}, are no distance apart; "
            "take both with one encoder"
        )
    if a.size and b.size and a.size != b.size:
        sizes = [" x ".join(map(str, s.size)) for s in (a, b)]
        raise InputError(
            f"statistics of pictures of {sizes[0]} and of {sizes[1]} pixels are no distance "
            "apart; take both of one size"
        )


def root(matrix: np.ndarray) -> np.ndarray:
    """The symmetric root of a symmetric matrix without negative eigenvalues."""
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T


def kernel_distance(x: Rows, y: Others) -> float:
    """The kernel inception distance: MMD^2 with `(x . y / D + 1)^3`, without bias.

    Of all pairs, where Binkowski et al. 2018 (arXiv 1801.01401) take the mean over subsets
    of 1000: that has the same expectation and varies more.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)

    def total(a, b):
        parts = range(0, len(a), CHUNK)
        return sum(((a[i : i + CHUNK] @ b.T / a.shape[1] + 1) ** 3).sum() for i in parts)

    def own(a):
        diagonal = (((a**2).sum(1) / a.shape[1] + 1) ** 3).sum()
        return (total(a, a) - diagonal) / (len(a) * (len(a) - 1))

    return float(own(x) + own(y) - 2 * total(x, y) / (len(x) * len(y)))


def inception_score(probabilities: Float[np.ndarray, "B V"]) -> float:
    """`exp E KL(p(y | x) || p(y))`, from 1 to V (Salimans et al. 2016, arXiv 1606.03498).

    Of all at once: a mean over ten parts is lower.
    """
    p = np.asarray(probabilities, np.float64)
    log = np.log(np.maximum(p, 1e-300))
    marginal = np.log(np.maximum(p.mean(0), 1e-300))
    return float(math.exp((p * (log - marginal)).sum(1).mean()))


def precision_recall(real: Rows, drawn: Others, k: int = 3) -> tuple[float, float]:
    """Of the drawn, how many lie among the real; of the real, how many among the drawn.

    A row lies among others if it is no farther from one of them than that one's `k`-th
    neighbour of its own kind (Kynkäänniemi et al. 2019, arXiv 1904.06991).
    """
    real, drawn = np.asarray(real, np.float64), np.asarray(drawn, np.float64)
    fewest = min(len(real), len(drawn))
    if not 1 <= k < fewest:
        raise InputError(f"k={k} neighbours must be from 1 to {fewest - 1}; take more pictures")

    def radii(x):
        parts = [
            np.partition(apart(x[i : i + CHUNK], x), k, axis=1)[:, k]
            for i in range(0, len(x), CHUNK)
        ]
        return np.concatenate(parts)

    def share(of, among):
        reach = radii(among)
        parts = range(0, len(of), CHUNK)
        inside = [(apart(of[i : i + CHUNK], among) <= reach).any(1).sum() for i in parts]
        return float(sum(inside) / len(of))

    return share(drawn, real), share(real, drawn)


def apart(x: Rows, y: Others) -> Float[np.ndarray, "B C"]:
    """Squared distances of all pairs."""
    return np.maximum((x**2).sum(1)[:, None] + (y**2).sum(1)[None] - 2 * x @ y.T, 0)
