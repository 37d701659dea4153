import functools

import jax
import jax.numpy as jnp
import pytest

from evaluate.edits import edits, error_rates
from evaluate.reading import Reading, read
from evaluate.report import table
from evaluate.run import Trained, check
from jaxformer import metrics, sharding
from jaxformer.data.images import Normalize
from jaxformer.data.loader import Pipeline
from jaxformer.data.pages import IMAGE, VOCAB, Pages, Read, decode
from jaxformer.errors import InputError
from jaxformer.experiment import load, override
from jaxformer.layers.block import Chain
from jaxformer.layers.connect import Merge, Project
from jaxformer.models.decoder import Decoder
from jaxformer.models.vit import ViT
from jaxformer.models.vlm import VLM
from tests.data.texts import Texts
from tests.layers.test_block import randomized


def test_edits_are_the_fewest():
    @functools.cache
    def fewest(a, b):
        if not a or not b:
            return len(a) + len(b)
        change = fewest(a[1:], b[1:]) + (a[0] != b[0])
        return min(change, fewest(a[1:], b) + 1, fewest(a, b[1:]) + 1)

    words = ["kitten", "sitting", "", "a", "abcabc", "cab", "\u00e9"]
    for a in words:
        for b in words:
            assert edits(a, b) == fewest(a, b)
    assert edits(["a", "b", "c", "d"], ["a", "c", "e"]) == 2


def test_rates_are_of_the_true_text_and_add_up():
    read, truth = ["a cat", "", "x = 1"], ["a bat", "no", "x = 1"]
    whole = error_rates(read, truth)
    found = {name: (m.sum, m.count) for name, m in whole.items()}
    assert found == {"cer": (3, 12), "wer": (2, 6), "exact": (1, 3)}
    parts = [error_rates(read[:1], truth[:1]), error_rates(read[1:], truth[1:])]
    assert metrics.merge(*parts) == whole
    assert table(3, {"all": whole})  # As `python -m evaluate` prints it.
    assert error_rates(["much too long"], ["a"])["cer"].value() == 13


@pytest.mark.slow  # Compiles a program or two.
def test_a_page_is_read_by_what_is_likeliest():
    model = VLM(
        ViT(8, 1, 12, 2, 12, 0, size=(12, 24), pool="gap"),
        Chain((Merge((1, 2), (1, 2)), Project(12))),
        Decoder(vocab=VOCAB, width=12, depth=1, mlp_dim=16, num_heads=2),
        IMAGE,
    )
    test = Pipeline(Pages(Texts(("abcd" * 5,)), 1, 4), (Normalize(), Read(1)))
    tokens, images = jnp.full((1, 5), 3), jnp.zeros((1, 1, 12, 24, 1))
    params = randomized(
        jax.jit(model.init)(jax.random.key(0), tokens, images), jax.random.key(1)
    )
    mesh = sharding.make_mesh(devices=jax.devices()[:2])
    trained = Trained(model.apply, params, mesh, sharding.DATA_PARALLEL, 4, model)
    texts, truth = read(trained, test)
    assert truth == ["abcd"] * 5 and len(set(texts)) == 1
    row, apply = jnp.full((1, 5), IMAGE), jax.jit(model.apply)
    images = Read(1)(Normalize()(test.source[0]))["images"][None]
    for at in range(4):
        seen = jnp.where(jnp.arange(5) > at, 5, row)
        logits = apply({"params": params}, seen, jnp.asarray(images))
        row = row.at[0, at + 1].set(int(logits[0, at].argmax()))
    assert texts[0] == decode(row[0, 1:])
    assert Reading(test).run(trained) == error_rates(texts, truth)


def test_a_pipeline_that_does_not_read_is_refused():
    experiment = override(load("configs/vlm_page.py"), "evals={}")
    task = Reading(Pipeline(Pages(Texts(("abcd",)), 1, 4), (Normalize(),)))
    experiment.tasks["pages"] = task
    with pytest.raises(InputError, match="the transforms end in Normalize, and not in Read"):
        check(experiment)
