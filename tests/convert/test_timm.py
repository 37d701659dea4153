import dataclasses

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from jaxformer.convert import engine, load, save
from jaxformer.convert.timm import TIMM
from jaxformer.convert.timm_names import ARCHITECTURES, arguments
from jaxformer.errors import InputError
from jaxformer.models.vit import ViT

# What timm 1.0.31 counts without a classifier: one name of each size and kind.
COUNTS = {
    "deit3_base_patch16_224": 85_816_320,
    "deit3_huge_patch14_224": 630_845_440,
    "deit3_large_patch16_224": 303_349_760,
    "deit3_medium_patch16_224": 38_336_512,
    "deit3_small_patch16_224": 21_674_496,
    "deit_base_patch16_224": 85_798_656,
    "deit_small_patch16_224": 21_665_664,
    "deit_tiny_patch16_224": 5_524_416,
    "vit_base_patch14_dinov2": 86_579_712,
    "vit_base_patch14_reg4_dinov2": 86_582_016,
    "vit_base_patch16_clip_224": 85_799_424,
    "vit_base_patch16_clip_quickgelu_224": 85_799_424,
    "vit_base_patch16_gap_224": 85_797_120,
    "vit_base_patch16_reg4_gap_256": 85_846_272,
    "vit_base_patch16_siglip_224": 92_884_224,
    "vit_base_patch16_siglip_gap_224": 85_797_120,
    "vit_base_patch8_224": 85_807_872,
    "vit_betwixt_patch16_gap_256": 59_731_840,
    "vit_betwixt_patch16_reg1_gap_256": 59_755_520,
    "vit_betwixt_patch16_reg4_gap_256": 59_757_440,
    "vit_betwixt_patch32_clip_224": 61_083_520,
    "vit_giant_patch14_224": 1_011_202_432,
    "vit_giant_patch14_clip_224": 1_011_203_840,
    "vit_giant_patch14_dinov2": 1_136_479_232,
    "vit_giant_patch14_reg4_dinov2": 1_136_483_840,
    "vit_giant_patch16_gap_224": 1_011_368_576,
    "vit_giantopt_patch16_siglip_256": 1_163_168_256,
    "vit_giantopt_patch16_siglip_gap_256": 1_134_838_272,
    "vit_gigantic_patch14_224": 1_842_775_680,
    "vit_gigantic_patch14_clip_224": 1_842_777_344,
    "vit_gigantic_patch14_clip_quickgelu_224": 1_842_777_344,
    "vit_huge_patch14_224": 630_764_800,
    "vit_huge_patch14_clip_224": 630_766_080,
    "vit_huge_patch14_clip_quickgelu_224": 630_766_080,
    "vit_huge_patch14_gap_224": 630_762_240,
    "vit_large_patch14_224": 303_178_752,
    "vit_large_patch14_clip_224": 303_179_776,
    "vit_large_patch14_clip_quickgelu_224": 303_179_776,
    "vit_large_patch14_dinov2": 304_367_616,
    "vit_large_patch14_reg4_dinov2": 304_370_688,
    "vit_large_patch16_siglip_256": 315_956_224,
    "vit_large_patch16_siglip_gap_256": 303_361_024,
    "vit_little_patch16_reg1_gap_256": 22_194_048,
    "vit_little_patch16_reg4_gap_256": 22_195_008,
    "vit_medium_patch16_clip_224": 38_325_248,
    "vit_medium_patch16_gap_240": 38_332_416,
    "vit_medium_patch16_reg1_gap_256": 38_367_232,
    "vit_medium_patch16_reg4_gap_256": 38_368_768,
    "vit_mediumd_patch16_reg4_gap_256": 63_596_032,
    "vit_small_patch14_dinov2": 22_056_192,
    "vit_small_patch14_reg4_dinov2": 22_057_344,
    "vit_small_patch8_224": 21_670_272,
    "vit_so150m2_patch16_reg1_gap_256": 135_226_560,
    "vit_so150m_patch16_reg4_gap_256": 133_234_560,
    "vit_so150m_patch16_reg4_map_256": 140_584_064,
    "vit_so400m_patch14_siglip_224": 427_680_704,
    "vit_so400m_patch14_siglip_gap_224": 412_442_352,
    "vit_tiny_patch16_224": 5_524_416,
    "vit_wee_patch16_reg1_gap_256": 13_165_568,
    "vit_xsmall_patch16_clip_224": 8_145_920,
}


@pytest.mark.parametrize("name", COUNTS)
def test_a_name_stands_for_what_timm_makes_of_it(name):
    pixels = name.rsplit("_", 1)[1]
    size = int(pixels) if pixels.isdecimal() else 518
    config = {"architecture": name, "pretrained_cfg": {"input_size": [3, size, size]}}
    model = TIMM.model(config, set(), jnp.float32)
    shapes = engine.flat(nn.unbox(engine.boxed_params(TIMM, model)))
    assert sum(x.size for x in shapes.values()) == COUNTS[name]
    engine.uses(TIMM, model, shapes)  # Covers all of them.


def test_no_known_name_is_untested():
    found = [arguments(name) for name in COUNTS]
    assert None not in found
    assert len(found) == len(ARCHITECTURES)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"architecture": "resnet50"}, r"architecture 'resnet50' is not known; known are deit"),
        ({"architecture": ["a"]}, r"architecture \['a'\] is not known"),
        ({"model_args": {"qk_norm": True}}, "model_args has qk_norm; not known here"),
        (
            {"model_args": {"act_layer": "relu"}},
            "act_layer='relu' is not known; known are gelu",
        ),
        ({"model_args": {"global_pool": "max"}}, "global_pool='max' must be 'token'"),
        ({"model_args": {"num_heads": 5}}, "num_heads=5 must divide embed_dim=384"),
        (
            {"model_args": {"img_size": 8}},
            r"patch_size=16 must be no more than img_size=\(8, 8\)",
        ),
    ],
)
def test_a_config_that_is_not_known_says_why(wrong, message):
    config = {"architecture": "vit_small_patch16_224", "num_classes": 5, **wrong}
    with pytest.raises(InputError, match=message):
        TIMM.model(config, {"head.weight"}, jnp.float32)


def test_what_a_config_need_not_say():
    """Sizes are by the name, the image by how it was trained, said at the top or below."""
    config = {"architecture": "vit_so400m_patch14_siglip_384", "num_classes": 0}
    trained = {"input_size": [3, 384, 384], "fixed_input_size": True}
    models = [
        TIMM.model(config | more, set(), jnp.float32)
        for more in ({"pretrained_cfg": trained}, trained)
    ]
    assert models[0] == models[1]
    assert models[0].embed.position.shape == (27, 27)  # Of 378 pixels.
    model = TIMM.model({"architecture": "deit3_small_patch16_384"}, set(), jnp.float32)
    assert model.embed.position.shape == (14, 14) and model.embed.channels == 3


def test_a_model_of_ours_is_saved_and_loaded(tmp_path, key):
    """With an MLP whose width, as a multiple of the model's, rounds down to one less."""
    assert int(28 * (61 / 28)) == 60
    model = ViT(28, 2, 61, 7, 4, 5, size=(8, 12), layer_scale=0.1).parts()
    shapes = jax.eval_shape(model.init, key, jnp.zeros((1, 8, 12, 3)))["params"]
    params = jax.tree.map(
        lambda x: jnp.arange(x.size, dtype=x.dtype).reshape(x.shape), nn.unbox(shapes)
    )
    with pytest.raises(InputError, match="timm cannot hold this Encoder"):
        save(tmp_path, model, params, kind="timm")  # timm resizes with antialias.
    position = dataclasses.replace(model.embed.position, antialias=True)
    embed = dataclasses.replace(model.embed, channels=3, position=position)
    model = dataclasses.replace(model, embed=embed)
    save(tmp_path, model, params, kind="timm")
    again, found = load(tmp_path)
    assert again.stack.block.mlp.width == 61
    chex.assert_trees_all_equal(found, params)
