import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evaluate import latents
from jaxformer.data.latents import Draw
from jaxformer.data.loader import Pipeline
from jaxformer.data.shards import ArrayRecord, write_array_record
from jaxformer.experiment import load


def test_the_scale_gives_the_latents_variance_1(tmp_path):
    """Of the means and of what is drawn about them."""
    draw = np.random.default_rng(0)
    path = str(tmp_path / "x.array_record")
    laws = [
        {
            "image": np.concatenate(
                [3 + 2 * draw.normal(size=(4, 4, 2)), np.full((4, 4, 2), np.log(5.0))], -1
            ).astype(np.float32),
            "label": 0,
        }
        for _ in range(400)
    ]
    write_array_record(path, laws)
    scale = latents.scale(path)
    assert scale == pytest.approx(9**-0.5, rel=0.02)
    source = Pipeline(ArrayRecord(path, 1))
    rng = np.random.default_rng(1)
    drawn = [Draw(scale)(source.source[i], rng)["image"] for i in range(400)]
    assert np.std(drawn) == pytest.approx(1, abs=0.02)


def test_an_autoencoder_writes_an_evals_latents(tmp_path, capsys, monkeypatch, key):
    """In their order, as what a config reads."""
    experiment = load("configs/kl_digits.py")
    small = experiment.model.clone(widths=(4, 4), groups=2)
    params = jax.jit(small.init)(key, jnp.zeros((1, 8, 8, 1)))["params"]
    experiment = dataclasses.replace(experiment, model=small)
    monkeypatch.setattr(latents, "restored", lambda experiment, run: (2, run, params))
    config, other = "configs/kl_digits.py", "configs/vqvae_digits.py"
    file = str(tmp_path / "test.array_record")
    found = {config: experiment, other: load(other)}
    monkeypatch.setattr(latents, "load", lambda path, _: found[path])
    assert latents.main([config, "test", file]) == 0
    assert "360 images at step 2; scale=" in capsys.readouterr().out
    source, digits = ArrayRecord(file, 10), experiment.evals["test"].source
    assert len(source) == 360
    assert [source[i]["label"] for i in range(9)] == [digits[i]["label"] for i in range(9)]
    law = jax.jit(functools.partial(small.apply, method="posterior"))(
        {"params": params}, jnp.asarray(2 * digits[7]["image"][None] - 1)
    )
    wanted = np.concatenate([law.mean, law.log_variance], -1)[0]
    np.testing.assert_allclose(source[7]["image"], wanted, atol=1e-5)
    assert latents.main([config, "pages", file]) == 2
    assert "has no eval 'pages'; it has train, test" in capsys.readouterr().err
    assert latents.main([other, "test", file]) == 2
    assert "VQAutoencoder has no law of latents" in capsys.readouterr().err
