import numpy as np
import pytest

from jaxformer.data.statistics import load, save
from jaxformer.distances import (
    Statistics,
    frechet,
    inception_score,
    kernel_distance,
    precision_recall,
    root,
    statistics,
)
from jaxformer.errors import InputError

RNG = np.random.default_rng(0)
X = RNG.normal(size=(300, 5)) @ RNG.normal(size=(5, 5))


def covariance(size, rank):
    half = RNG.normal(size=(size, rank))
    return half @ half.T


def test_a_set_is_at_no_distance_from_itself():
    few = statistics(X[:4])  # Of rank 3, in 5 dimensions.
    for s in (statistics(X), few):
        assert abs(frechet(s, s)) < 1e-10 * np.trace(s.covariance)
    assert abs(kernel_distance(X, X + 0.0)) < 0.5 * kernel_distance(X, X + 1)
    assert precision_recall(X, X) == (1.0, 1.0)


def test_normal_laws_that_commute_have_a_closed_form():
    turn = np.linalg.qr(RNG.normal(size=(6, 6)))[0]
    a, b = RNG.uniform(0, 4, 6), RNG.uniform(0, 4, 6)
    m, n = RNG.normal(size=(2, 6))
    first = Statistics(m, turn * a @ turn.T, 9)
    second = Statistics(n, turn * b @ turn.T, 9)
    wanted = ((m - n) ** 2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert frechet(first, second) == pytest.approx(wanted, rel=1e-10)
    assert frechet(second, first) == pytest.approx(wanted, rel=1e-10)


@pytest.mark.parametrize("rank", [5, 2])
def test_other_normal_laws_have_the_root_of_the_product(rank):
    """tr (A B)^(1/2) by the eigenvalues of the product itself, also where it is singular."""
    a, b = covariance(5, rank), covariance(5, 5)
    values = np.linalg.eigvals(a @ b)
    wanted = np.trace(a) + np.trace(b) - 2 * np.sqrt(np.maximum(values.real, 0)).sum()
    zero = np.zeros(5)
    found = frechet(Statistics(zero, a, 9), Statistics(zero, b, 9))
    assert found == pytest.approx(wanted, rel=1e-6)
    np.testing.assert_allclose(root(a) @ root(a), a, atol=1e-9)


def test_statistics_and_their_names():
    s = statistics(X, "vit")
    np.testing.assert_allclose(s.covariance, np.cov(X.T), rtol=1e-10)
    assert s.count == 300 and len(s.digest) == 12
    assert statistics(X * (1 + 1e-12), "vit").digest == s.digest
    assert len({s.digest, statistics(X).digest, statistics(X[:299], "vit").digest}) == 3


def test_a_file_holds_statistics_and_whose_they_are(tmp_path):
    s = statistics(X, "vit", (8, 9))
    save(tmp_path / "a", s)
    again = load(tmp_path / "a")
    np.testing.assert_array_equal(again.covariance, s.covariance)
    np.testing.assert_array_equal(again.mean, s.mean)
    assert (again.count, again.encoder, again.size) == (300, "vit", (8, 9))
    assert again.digest == s.digest


def changed(path, **arrays):
    with np.load(path) as file:
        held = {name: file[name] for name in file.files}
    with open(path, "wb") as file:
        np.savez(file, **(held | arrays))


def test_a_file_of_others_or_with_other_numbers_is_refused(tmp_path):
    save(tmp_path / "a", statistics(X, "vit"))
    changed(tmp_path / "a", count=301)
    with pytest.raises(InputError, match="are not those of its hash"):
        load(tmp_path / "a")
    np.savez(tmp_path / "b.npz", mu=X, sigma=X)
    with pytest.raises(InputError, match="holds mu, sigma, where statistics have count, cov"):
        load(tmp_path / "b.npz")
    (tmp_path / "c").write_bytes(b"no file of arrays")
    for name in ("c", "d"):
        with pytest.raises(InputError, match=f"{name}: holds no statistics"):
            load(tmp_path / name)


def test_the_kernel_distance_is_a_mean_over_pairs():
    x, y = X[:7], X[7:12]

    def k(a, b):
        return (a @ b / 5 + 1) ** 3

    own = [np.mean([k(a, b) for i, a in enumerate(z) for j, b in enumerate(z) if i != j])
           for z in (x, y)]  # fmt: skip
    wanted = sum(own) - 2 * np.mean([k(a, b) for a in x for b in y])
    assert kernel_distance(x, y) == pytest.approx(wanted, rel=1e-10)
    # Of two sets of one law it is 0 on the mean, which a biased one is not.
    draws = [kernel_distance(*RNG.normal(size=(2, 30, 4))) for _ in range(200)]
    assert abs(np.mean(draws)) < 4 * np.std(draws) / np.sqrt(200)


def test_the_inception_score_runs_from_one_to_the_classes():
    assert inception_score(np.full((20, 4), 0.25)) == pytest.approx(1)
    assert inception_score(np.eye(4).repeat(5, 0)) == pytest.approx(4)
    assert inception_score(np.eye(4)[[0, 0, 1, 1]]) == pytest.approx(2)


def test_precision_and_recall_tell_what_is_wrong():
    real = np.concatenate([RNG.normal(size=(200, 2)), RNG.normal(size=(200, 2)) + 20])
    one_mode = RNG.normal(size=(200, 2))
    precision, recall = precision_recall(real, one_mode)
    assert precision > 0.95 and 0.4 < recall < 0.52
    precision, recall = precision_recall(one_mode, real)
    assert recall > 0.95 and 0.4 < precision < 0.52
    # By hand: radii of 0, 1, 3 with k=1 are 1, 1, 2.
    line, drawn = np.array([[0.0], [1.0], [3.0]]), np.array([[-1.5], [5.0], [2.1]])
    assert precision_recall(line, drawn, k=1)[0] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: frechet(statistics(X, "a"), statistics(X, "b")), "a of 5 numbers and b of 5"),
        (lambda: frechet(statistics(X), statistics(X[:, :3])), "of 5 numbers and no name of 3"),
        (
            lambda: frechet(statistics(X, "a", (8, 8)), statistics(X, "a", (9, 8))),
            "pictures of 8 x 8 and of 9 x 8 pixels",
        ),
        (lambda: statistics(X[:1]), "1 pictures have no covariance"),
        (lambda: statistics(X * np.nan), "features are not finite"),
        (lambda: precision_recall(X[:3], X), "k=3 neighbours must be from 1 to 2"),
    ],
)
def test_what_cannot_be_is_told(make, message):
    with pytest.raises(InputError, match=message):
        make()
