"""DiT in the original's layout, and what of diffusers' models is refused by name."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy

from jaxformer import convert
from jaxformer.convert import files
from jaxformer.errors import InputError
from jaxformer.models.dit import DiT
from jaxformer.ops.patches import sincos_2d
from jaxformer.ops.timestep import cosines_first
from tests.parity.case import RECORDED


def tensors(directory):
    return {name: x.read() for name, x in files.open_tensors(directory).items()}


def copied(name, target, change):
    """A recorded checkpoint with its config or tensors changed."""
    shutil.copytree(RECORDED / name, target, ignore=shutil.ignore_patterns("gradients"))
    config = json.loads((target / "config.json").read_text())
    change(config)
    (target / "config.json").write_text(json.dumps(config))
    return target


def test_the_original_has_the_same_tensors_under_its_own_names(tmp_path):
    model, params = convert.load(RECORDED / "dit")
    condition = dataclasses.replace(model.condition, features=cosines_first)
    block = dataclasses.replace(model.stack.block, mlp_epsilon=None)
    stack = dataclasses.replace(model.stack, block=block)
    original = dataclasses.replace(model, condition=condition, stack=stack)
    convert.save(tmp_path, original, params)  # The family is found.
    ours, theirs = tensors(tmp_path), tensors(RECORDED / "dit")
    pairs = {
        "x_embedder.proj": "pos_embed.proj",
        "t_embedder.mlp.0": "transformer_blocks.0.norm1.emb.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "transformer_blocks.0.norm1.emb.timestep_embedder.linear_2",
        "final_layer.adaLN_modulation.1": "proj_out_1",
        "final_layer.linear": "proj_out_2",
    }
    for i in range(2):
        pairs |= {
            f"blocks.{i}.{a}": f"transformer_blocks.{i}.{b}"
            for a, b in {
                "adaLN_modulation.1": "norm1.linear",
                "attn.proj": "attn1.to_out.0",
                "mlp.fc1": "ff.net.0.proj",
                "mlp.fc2": "ff.net.2",
            }.items()
        }
    expected = {
        f"{a}.{leaf}": theirs[f"{b}.{leaf}"]
        for a, b in pairs.items()
        for leaf in ("weight", "bias")
    }
    for i in range(2):
        for leaf in ("weight", "bias"):
            rows = [theirs[f"transformer_blocks.{i}.attn1.to_{x}.{leaf}"] for x in "qkv"]
            expected[f"blocks.{i}.attn.qkv.{leaf}"] = np.concatenate(rows)
    label = "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight"
    expected["y_embedder.embedding_table.weight"] = theirs[label]
    expected["pos_embed"] = sincos_2d(4, 4, 12, endpoint=False)[None]
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(ours[name], tensor, name)
    again, same = convert.load(tmp_path)
    assert again == original
    jax.tree.map(np.testing.assert_array_equal, params, same)


def test_a_dit_by_its_numbers_is_saved_as_the_original_has_it(tmp_path, key):
    fields = {"width": 12, "depth": 1, "num_heads": 3, "patch": 2, "num_classes": 3}
    model = DiT(**fields, size=(8, 8), learned_variance=True)
    inputs = (np.zeros((1, 8, 8, 4), np.float32), np.zeros(1, np.float32), np.zeros(1, int))
    params = jax.jit(model.init)(key, *inputs)["params"]
    convert.save(tmp_path, model, params)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "dit"
    assert convert.load(tmp_path)[0] == model.parts()
    with pytest.raises(InputError, match="no family can hold this Denoiser"):
        convert.save(tmp_path, dataclasses.replace(model, rotary=True), params)


def test_a_dit_that_embeds_time_in_each_block_is_refused(tmp_path):
    target = copied("dit", tmp_path / "x", lambda config: None)
    path = target / "diffusion_pytorch_model.safetensors"
    found = safetensors.numpy.load_file(path)
    name = "transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.bias"
    found[name] = found[name] + 1
    safetensors.numpy.save_file(found, path)
    with pytest.raises(InputError, match=f"{name} is no copy of transformer_blocks.0"):
        convert.load(target)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("dit", {"norm_type": "ada_norm"}, "norm_type must be 'ada_norm_zero'"),
        ("dit", {"sample_size": 9}, "patches of 2 images of 9"),
        ("sd3", {"caption_projection_dim": 9}, "caption_projection_dim=9 must be the width 8"),
        ("sd3", {"dual_attention_layers": [1]}, "must be the first ones"),
        ("sd3", {"qk_norm": "layer_norm"}, "qk_norm='layer_norm' must be null or"),
        ("qwen_image", {"zero_cond_t": True}, "zero_cond_t must be false"),
        ("qwen_image", {"axes_dims_rope": [2, 2, 2]}, "must be even and sum to 12"),
        ("qwen_image", {"in_channels": 16}, "in_channels=16 must be out_channels=3 times"),
        ("sd_vae", {"latents_mean": [0.0]}, "latents_mean and latents_std must be null"),
        ("sd_vae", {"down_block_types": ["AttnDownEncoderBlock2D"] * 3}, "down_block_types"),
        ("vq_gan", {"norm_type": "spatial"}, "norm_type must be 'group'"),
    ],
)
def test_what_is_not_known_is_refused_by_name(tmp_path, name, change, message):
    target = copied(name, tmp_path / "x", lambda config: config.update(change))
    with pytest.raises(InputError, match=message):
        convert.load(target)


def test_files_of_diffusers_have_its_names_and_may_be_in_shards(tmp_path):
    model, params = convert.load(RECORDED / "sd3")
    convert.save(tmp_path, model, params, shard_bytes=20_000)
    names = sorted(p.name for p in tmp_path.glob("*.safetensors"))
    assert len(names) > 1
    assert names[0].startswith("diffusion_pytorch_model-00001-of-")
    assert (tmp_path / "diffusion_pytorch_model.safetensors.index.json").is_file()
    again, same = convert.load(tmp_path)
    assert again == model
    jax.tree.map(np.testing.assert_array_equal, params, same)


def test_an_autoencoder_of_an_older_file_is_the_same(tmp_path):
    target = copied("sd_vae", tmp_path / "x", lambda config: None)
    path = target / "diffusion_pytorch_model.safetensors"
    found = safetensors.numpy.load_file(path)
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for new, old in older.items():
        found = {n.replace(f".0.{new}.", f".0.{old}."): x for n, x in found.items()}
    safetensors.numpy.save_file(found, path)
    jax.tree.map(
        np.testing.assert_array_equal,
        convert.load(target)[1],
        convert.load(RECORDED / "sd_vae")[1],
    )
