"""CLIP's and SigLIP's files of other years, and configs that cannot be."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jaxformer import convert
from jaxformer.convert.families import FAMILIES
from jaxformer.errors import InputError
from jaxformer.models import clip, siglip
from tests.parity.case import RECORDED


def write(directory, config, tensors):
    (directory / "config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(tensors, directory / "model.safetensors")


def read(name):
    config = json.loads((RECORDED / name / "config.json").read_text())
    return config, safetensors.numpy.load_file(RECORDED / name / "model.safetensors")


def test_a_file_of_2022(tmp_path):
    """Its `text_config` is overruled, and positions are counted in tensors of their own."""
    config, tensors = read("clip")
    config["text_config_dict"] = config["text_config"]
    config["text_config"] = {"hidden_size": 7}
    for tower, count in (("text", 8), ("vision", 10)):
        tensors[f"{tower}_model.embeddings.position_ids"] = np.arange(count)[None]
    write(tmp_path, config, tensors)
    model, params = convert.load(tmp_path)
    expected, same = convert.load(RECORDED / "clip")
    assert model == expected
    jax.tree.map(np.testing.assert_array_equal, params, same)


@pytest.mark.parametrize("name", ["clip_vision", "siglip_text", "siglip2_headless"])
def test_a_tower_without_the_hubs_prefix(name, tmp_path):
    """As transformers 5 saves a tower that it did not load."""
    _, tensors = read(name)
    shutil.copy(RECORDED / name / "config.json", tmp_path)
    bare = {key.partition("_model.")[2]: tensor for key, tensor in tensors.items()}
    safetensors.numpy.save_file(bare, tmp_path / "model.safetensors")
    _, params = convert.load(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, params, convert.load(RECORDED / name)[1])


@pytest.mark.parametrize(
    ("name", "tower"), [("llava", "vision_tower."), ("mllama", "vision_model.")]
)
def test_a_checkpoint_whose_tower_is_missing_is_refused(name, tower, tmp_path):
    """Each of its tensors is told, and none of the rest."""
    config, tensors = read(name)
    rest = {key: tensor for key, tensor in tensors.items() if tower not in key}
    missing = len(tensors) - len(rest)
    write(tmp_path, config, rest)
    with pytest.raises(InputError) as told:
        convert.load(tmp_path)
    first, *lines = str(told.value).splitlines()
    assert f"{missing} tensors are not those of {name}" in first
    assert len(lines) == missing and all(line.startswith(f"- {tower}") for line in lines)


@pytest.mark.parametrize(
    ("kind", "model"),
    [
        ("clip", clip.named("B/32", end=49_407)),
        ("siglip", siglip.named("B/16")),
        ("siglip2", siglip.named("B/16@naflex", vocab=32_000)),
    ],
)
def test_an_empty_config_is_the_base_size(kind, model):
    made, expected = FAMILIES[kind].model({}, set(), jnp.float32), model.parts()
    assert made.vision == expected.vision and made.text == expected.text


@pytest.mark.parametrize(
    ("kind", "config", "words"),
    [
        ("clip", {"text_config": {"eos_token_id": [1, 2]}}, "eos_token_id=.* one number"),
        ("clip", {"vision_config": "large"}, "vision_config must be an object"),
        ("clip", {"vision_config": {"num_attention_heads": 7}}, "must divide hidden_size"),
        ("siglip", {"vision_config": {"image_size": 8}}, "image_size=8 is less than patch"),
        ("siglip2", {"vision_config": {"num_patches": 200}}, "num_patches=200 must be the sq"),
        ("siglip", {"text_config": {"hidden_act": "relu6"}}, "'relu6' is not known"),
    ],
)
def test_configs_that_cannot_be_are_told(kind, config, words):
    with pytest.raises(InputError, match=words):
        FAMILIES[kind].model(config, set(), jnp.float32)
