import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evaluate import speculate
from evaluate.speculate import Says, measure, programs
from jaxformer.models.decoder import Decoder
from tests.layers.test_block import randomized

SIZES = {"vocab": 11, "width": 8, "depth": 1, "mlp_dim": 8, "num_heads": 2}


def says(seed):
    model = Decoder(**SIZES)
    drawn = jax.jit(model.init)(jax.random.key(seed), jnp.zeros((1, 4), jnp.int32))
    return Says(model, randomized(drawn, jax.random.key(seed + 1)))


@pytest.mark.slow  # Three programs; that drafts change no text is tested by the samplers.
def test_drafts_say_the_same_and_a_draft_that_is_the_model_is_always_right():
    large = says(0)
    found = programs(large, large, length=16, steps=6, ahead=2)
    prompts = [np.arange(1, 5, dtype=np.int32), np.array([7, 7, 7], np.int32)]
    rows = {row["draft"]: row for row in measure(found, prompts, steps=6, room=10)}
    assert [*rows] == ["no draft", "look-up", "small model"]
    assert all(row["same_text"] == row["prompts"] == 2 for row in rows.values())
    assert rows["no draft"]["tokens_a_look"] == 1 and rows["no draft"]["accepted"] == 0
    # A look takes both guesses and gives one token more.
    assert rows["small model"]["looks"] == 4 and rows["small model"]["tokens_a_look"] == 3
    assert all(row["tokens_per_second"] > 0 for row in rows.values())


def test_a_config_without_prompts_is_told(capsys):
    config = pathlib.Path(speculate.__file__).parents[1] / "configs" / "vit_digits.py"
    assert speculate.main([str(config), "--checkpoint", "none"]) == 2
    assert "has no task that is Completions; add one" in capsys.readouterr().err
