import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.data.images import Flip
from jaxformer.data.latents import Draw, Mean, write_latents
from jaxformer.data.loader import Pipeline, eval_batches, train_batches
from jaxformer.data.shards import ArrayRecord
from jaxformer.errors import InputError
from jaxformer.models.vae import KLAutoencoder

TINY = {"widths": (4, 4), "depth": 1, "channels": 1, "latent": 2, "groups": 2, "looks": False}


@dataclasses.dataclass(frozen=True)
class Few:
    """Ten images of noise."""

    num_classes: int = 10

    def __len__(self):
        return 10

    def __getitem__(self, index):
        image = np.random.default_rng(index).normal(size=(4, 6, 1)).astype(np.float32)
        return {"image": image, "label": index, "source": f"few[{index}]"}


def test_what_is_cached_is_what_the_encoder_says(tmp_path, key):
    model = KLAutoencoder(**TINY, scale=0.5, shift=0.25)
    path = str(tmp_path / "latents.array_record")
    images = np.stack([Few()[i]["image"] for i in range(10)])
    params = jax.jit(model.init)(key, images[:4])["params"]
    assert write_latents(path, Pipeline(Few()), model, params, batch_size=4) == 10

    @jax.jit
    def run(images):
        given = {"params": params}
        return model.apply(given, images, method="encode"), model.apply(
            given, images, method="posterior"
        )

    latents, law = run(images)
    source = ArrayRecord(path, 10)
    (batch,) = eval_batches(Pipeline(source, (Mean(0.5, 0.25),)), batch_size=10)
    np.testing.assert_allclose(batch["image"], latents, atol=1e-5)
    np.testing.assert_array_equal(batch["label"], np.arange(10))

    stream = train_batches(Pipeline(source, (Draw(0.5, 0.25),)), batch_size=10, seed=0)
    drawn = [next(stream) for _ in range(60)]
    stream.close()
    order = [np.argsort(b["label"]) for b in drawn]
    found = np.stack([b["image"][rows] for b, rows in zip(drawn, order, strict=True)])
    deviation = 0.5 * jnp.exp(law.log_variance / 2)
    np.testing.assert_allclose(found.mean(0), latents, atol=0.6 * float(deviation.max()))
    np.testing.assert_allclose(found.std(0) / deviation, 1, atol=0.4)


def test_what_holds_no_law_is_refused():
    with pytest.raises(InputError, match=r"few\[3\]: holds no law of latents; write the file"):
        Draw(1.0)(Few()[3], np.random.default_rng(0))


def test_a_pipeline_that_draws_is_refused(tmp_path, key):
    with pytest.raises(InputError, match="evaluation has no random"):
        write_latents(str(tmp_path / "x"), Pipeline(Few(), (Flip(),)), KLAutoencoder(), {})
