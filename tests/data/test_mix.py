"""Mixup beside big_vision's, and what the classifier makes of its targets."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxformer.data.mix import Mixup
from jaxformer.objectives.classify import Classify

V = 5


def batch(rows=6):
    image = np.random.default_rng(0).random((rows, 4, 4, 1), dtype=np.float32)
    return {"image": image, "label": np.arange(rows, dtype=np.int32) % V}


def test_mixup_is_big_visions():
    """a ~ Beta(p, p); a = max(a, 1 - a); a * x + (1 - a) * roll(x, 1), of both."""
    before, shares = batch(), []
    for seed in range(50):
        after = Mixup(0.2, V)(before, np.random.default_rng(seed))
        a = np.random.default_rng(seed).beta(0.2, 0.2)
        a = max(a, 1 - a)
        for name, x in (("image", before["image"]), ("target", np.eye(V)[before["label"]])):
            expected = a * x + (1 - a) * np.roll(x, 1, axis=0)
            np.testing.assert_allclose(after[name], expected, atol=1e-6)
        assert after["image"].dtype == after["target"].dtype == np.float32
        shares.append(a)
    assert min(shares) >= 0.5 and max(shares) > 0.99  # So alpha 0.2 leaves most rows be.


def test_the_loss_of_mixed_targets_is_the_mix_of_losses(key):
    """Cross-entropy is linear in its targets, with and without smoothing."""
    after = Mixup(1.0, V)(batch(), np.random.default_rng(3))
    keep = after["target"][1, 1]  # Rows 0 and 5 are of one class.
    assert 0.5 < keep < 0.999
    logits = jax.random.normal(key, (6, V))

    def loss(objective, **targets):
        made = {"image": logits} | {n: jnp.asarray(x) for n, x in targets.items()}
        return objective.loss(lambda variables, x, **_: x, {}, made, key)[0]

    for link in ("softmax", "sigmoid"):
        for smoothing in (0.0, 0.1):
            objective = Classify(smoothing, link=link)
            label = after["label"]
            own, other = (loss(objective, label=x) for x in (label, np.roll(label, 1)))
            mixed = loss(objective, label=label, target=after["target"])
            np.testing.assert_allclose(mixed, keep * own + (1 - keep) * other, rtol=1e-5)
