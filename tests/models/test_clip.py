"""CLIP, SigLIP and NaFlex by their numbers: sizes, the tree, the contract of contrast."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer import convert
from jaxformer.errors import InputError
from jaxformer.experiment import override
from jaxformer.models import clip, siglip
from jaxformer.models.clip import CLIP, Logits, unit
from jaxformer.models.siglip import NaFlex, SigLIP
from jaxformer.models.vit import Size
from jaxformer.objectives.contrast import Contrast

# Parameters, as transformers counts them.
CLIPS = {
    "B/32": 151_277_313,
    "B/16": 149_620_737,
    "L/14": 427_616_513,
    "L/14@336": 427_944_193,
}
SIGLIPS = {
    ("B/16", 1): 203_155_970,
    ("B/16@256", 1): 203_202_050,
    ("L/16@256", 1): 652_150_786,
    ("So400m/14", 1): 877_415_602,
    ("So400m/14@384", 1): 877_960_498,
    ("B/16", 2): 375_187_970,
    ("L/16@256", 2): 881_526_786,
    ("So400m/14@384", 2): 1_136_008_498,
    ("g/16@256", 2): 1_871_393_906,
    ("B/16@naflex", 2): 375_234_050,
    ("So400m/16@naflex", 2): 1_135_670_962,
}
TINY = {
    "vision": Size(12, 2, 20, 3),
    "text": Size(8, 1, 14, 2),
    "patch": 4,
    "size": (8, 12),
    "vocab": 11,
    "length": 6,
    "channels": 1,
}
MODELS = (CLIP(**TINY, embed=10, end=1), SigLIP(**TINY), NaFlex(**TINY))

# Little is computed here, so that compiling is what takes time.
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
jit = functools.partial(jax.jit, compiler_options=FAST)


def inputs(model, images=2):
    draw = np.random.default_rng(0)
    tokens = jnp.asarray(draw.integers(2, 11, (images, 6)), jnp.int32).at[:, 4].set(1)
    if isinstance(model, NaFlex):
        rows, columns = model.size[0] // model.patch, model.size[1] // model.patch
        patches = draw.normal(size=(images, rows * columns, model.patch**2 * model.channels))
        grids = jnp.tile(jnp.array([[rows, columns]]), (images, 1, 1))
        return jnp.asarray(patches, jnp.float32), grids, tokens
    return jnp.asarray(draw.normal(size=(images, *model.size, model.channels)), "f4"), tokens


def shapes(model):
    return nn.unbox(jax.eval_shape(model.init, jax.random.key(0), *inputs(model, 1)))


def made(model):
    """Parameters drawn by NumPy, which compiles nothing."""
    draw = np.random.default_rng(1)

    def one(p):
        return jnp.asarray(draw.normal(0, 0.3, p.shape), "f4")

    return jax.tree.map(one, shapes(model))


def count(model):
    return sum(p.size for p in jax.tree.leaves(shapes(model)))


@pytest.mark.parametrize("name", CLIPS)
def test_parameter_counts_of_clip(name):
    assert count(clip.named(name)) == CLIPS[name]


@pytest.mark.parametrize(("name", "version"), SIGLIPS)
def test_parameter_counts_of_siglip(name, version):
    assert count(siglip.named(name, version)) == SIGLIPS[name, version]


@pytest.mark.parametrize(
    ("name", "gflop"), [("B/32", 14.78), ("B/16", 41.09), ("L/14", 175.33)]
)
def test_flops_are_those_that_open_clip_counts(name, gflop):
    """Which counts the ends of the towers too."""
    assert clip.flops(clip.named(name)) / 1e9 == pytest.approx(gflop, rel=0.02)


def test_no_named_size_is_untested():
    assert set(CLIPS) == set(clip.SIZES)
    assert {name.split("/")[0] for name, _ in SIGLIPS} == set(siglip.SIZES)
    assert {version for _, version in SIGLIPS} == set(siglip.VOCAB)


def test_a_name_that_is_none_lists_those_that_are():
    with pytest.raises(ValueError, match=r"'B/8' is no CLIP; known are B/32, B/16"):
        clip.named("B/8")
    with pytest.raises(ValueError, match=r"'M/16' is no SigLIP; .*B, L, So400m, g"):
        siglip.named("M/16")
    with pytest.raises(ValueError, match="version=3 must be 1 or 2"):
        siglip.named("B/16", 3)


def test_the_parameter_tree_is_a_public_format():
    paths = {}
    for model in MODELS:
        names = jax.tree.leaves_with_path(shapes(model)["params"])
        paths[type(model)] = {"/".join(k.key for k in path) for path, _ in names}
    block = {f"attention/{n}/{p}" for n in ("query", "key", "value", "out") for p in WEIGHT}
    block |= {f"mlp/{n}/{p}" for n in ("up", "down") for p in WEIGHT}
    norms = {f"{n}/{p}" for n in ("attention_norm", "mlp_norm") for p in ("scale", "bias")}
    both = {f"stack/block/{name}" for name in block | norms}
    both |= {"norm/scale", "norm/bias", "embed/position/embedding"}
    vision = {f"vision/{n}" for n in both | {"embed/patch/kernel"}}
    text = {f"text/{n}" for n in both | {"embed/token/embedding"}}
    own = {"embed/cls/embedding", "embed/norm/scale", "embed/norm/bias", "neck/kernel"}
    own = {f"vision/{n}" for n in own} | {"text/neck/kernel", "logits/scale"}
    assert paths[CLIP] == vision | text | own
    own = {f"pool/{n}" for n in block | {"norm/scale", "norm/bias", "probe/embedding"}}
    own = {f"vision/{n}" for n in own | {"embed/patch/bias"}}
    own |= {"text/neck/kernel", "text/neck/bias", "logits/scale", "logits/bias"}
    assert paths[SigLIP] == vision | text | own == paths[NaFlex]


WEIGHT = ("kernel", "bias")


@pytest.mark.parametrize("model", MODELS, ids=lambda m: type(m).__name__)
def test_what_contrast_asks_for(model, key):
    x, params = inputs(model), made(model)["params"]
    names = ("patches", "grids", "tokens") if isinstance(model, NaFlex) else ("image", "tokens")
    contrast = Contrast("softmax" if isinstance(model, CLIP) else "sigmoid", names)

    def answers(params, *x):
        variables = {"params": params}
        image = model.apply(variables, *x[:-1], method="encode_image")
        text = model.apply(variables, x[-1], method="encode_text")
        found = model.apply(variables, *x, method="encode")
        return (unit(image), unit(text)), model.apply(variables, *x), found

    def loss(params, *x):
        return contrast.loss(model.apply, params, dict(zip(names, x, strict=True)), key)[0]

    alone, logits, found = jit(answers)(params, *x)
    grads = jit(jax.grad(loss))(params, *x)
    image, text, scale, bias = found
    for rows, other in ((image, alone[0]), (text, alone[1])):
        np.testing.assert_allclose(jnp.linalg.norm(rows, axis=-1), 1, atol=1e-6)
        np.testing.assert_allclose(rows, other, atol=1e-6)
    np.testing.assert_allclose(scale, jnp.exp(params["logits"]["scale"]))
    np.testing.assert_array_equal(bias, params["logits"].get("bias", 0))
    np.testing.assert_allclose(logits, scale * image @ text.T + bias, atol=1e-5)
    assert all(jnp.isfinite(g).all() and (g != 0).any() for g in jax.tree.leaves(grads))


def test_where_the_scale_and_the_bias_start(key):
    for model, start in zip(MODELS, ((1 / 0.07, 0), (10, -10), (10, -10)), strict=True):
        towers = model.parts()
        scale, bias = Logits(towers.scale, towers.bias).init_with_output(key)[0]
        np.testing.assert_allclose((scale, bias), start, rtol=1e-6)


def test_overrides_reach_the_numbers_of_both_towers():
    made = override(MODELS[0], "vision.depth=3", "text.width=16", "embed=5", "size=16,24")
    assert (made.vision.depth, made.text.width, made.embed) == (3, 16, 5)
    assert made.size == (16, 24)


@pytest.mark.parametrize("model", MODELS, ids=lambda m: type(m).__name__)
def test_what_numbers_make_is_saved_and_loaded(model, tmp_path):
    """Square images, which is all that transformers can hold."""
    model = override(model, "size=8,8")
    params = made(model)["params"]
    convert.save(tmp_path, model.parts(), params)
    again, read = convert.load(tmp_path)
    assert again == model.parts()
    jax.tree.map(np.testing.assert_array_equal, read, params)


def test_what_transformers_cannot_hold_is_told(tmp_path):
    with pytest.raises(InputError, match="no family can hold this TwoTowers"):
        convert.save(tmp_path, MODELS[0].parts(), made(MODELS[0])["params"])


def test_bad_numbers_are_told(key):
    x = inputs(MODELS[0])
    for change, words in (
        ("patch=5", r"patch=5 must divide size=\(8, 12\)"),
        ("vision.num_heads=5", "num_heads=5 must divide width=12"),
        ("length=5", "texts have 6 tokens; the model has length=5"),
        ("channels=3", "images have 1 channels; the model takes 3"),
    ):
        with pytest.raises(ValueError, match=words):
            override(MODELS[0], change).init(key, *x)


def test_a_row_of_zeros_has_a_gradient():
    grad = jax.grad(lambda x: unit(x).sum())(jnp.zeros((2, 3)))
    assert jnp.isfinite(grad).all()


def test_what_pads_a_text_is_not_seen(key):
    """CLIP: nothing after the end matters. SigLIP: nothing that is not real does."""
    a, b = jnp.array([[4, 5, 1, 0, 0, 0]]), jnp.array([[4, 5, 1, 9, 8, 0]])
    for model, real in ((MODELS[0], None), (MODELS[1], jnp.array([[1, 1, 1, 0, 0, 0]]))):
        v = made(model)
        encode = jit(functools.partial(model.apply, method="encode_text"))
        np.testing.assert_allclose(encode(v, a, real), encode(v, b, real), atol=1e-6)
    assert abs(encode(v, a, None) - encode(v, b, None)).max() > 1e-3
