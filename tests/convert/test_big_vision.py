"""ViTs of big_vision, beside its definition written in NumPy and float64."""

import dataclasses
import functools
import io
import math
import pickle
import zipfile

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxformer.convert import engine
from jaxformer.convert.big_vision import load_npz, save_npz
from jaxformer.errors import InputError
from jaxformer.layers.embed import SincosPosition
from jaxformer.layers.pool import First
from jaxformer.models.vit import ViT
from jaxformer.ops.activation import gelu, gelu_tanh
from jaxformer.ops.patches import sincos_2d
from tests.parity.case import edit

# Little is computed here, so that compiling is what takes time.
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
jit = functools.partial(jax.jit, compiler_options=FAST)
TINY = {"width": 24, "depth": 2, "mlp_dim": 40, "num_heads": 3, "patch": 4, "num_classes": 5}
TINY |= {"activation": gelu_tanh, "size": (8, 12)}
IMAGES = np.random.default_rng(2).normal(size=(2, 8, 12, 3))
# Pools, positions, and whether a tanh layer follows.
KINDS = {
    "tok": {"pool": "tok", "rep_size": 20},
    "gap": {"pool": "gap", "positions": "sincos"},
    "map": {"pool": "map"},
}
SHAPES = {
    "LayerNorm_0/scale": "D",
    "LayerNorm_0/bias": "D",
    **{f"MultiHeadDotProductAttention_0/{n}/kernel": "DNH" for n in ("query", "key", "value")},
    **{f"MultiHeadDotProductAttention_0/{n}/bias": "NH" for n in ("query", "key", "value")},
    "MultiHeadDotProductAttention_0/out/kernel": "NHD",
    "MultiHeadDotProductAttention_0/out/bias": "D",
    "MlpBlock_0/Dense_0/kernel": "DF",
    "MlpBlock_0/Dense_0/bias": "F",
    "MlpBlock_0/Dense_1/kernel": "FD",
    "MlpBlock_0/Dense_1/bias": "D",
}


def checkpoint(kind, scale=1.0):
    """Tensors under big_vision's names, every one random; activations of size `scale`."""
    options, draw = KINDS[kind], np.random.default_rng(1)
    letters = {"D": 24, "N": 3, "H": 8, "F": 40, "P": options.get("rep_size", 24), "V": 5}
    letters |= {"p": 4, "C": 3, "T": 6, "1": 1, "E": options.get("rep_size") or 24}
    shapes = {"embedding/kernel": "ppCD", "embedding/bias": "D"}
    blocks = ["Transformer/encoderblock_0", "Transformer/encoderblock_1"]
    for block in blocks + ["MAPHead_0"] * (kind == "map"):
        shapes |= {f"{block}/{name}": shape for name, shape in SHAPES.items()}
    for block in blocks:
        shapes |= {f"{block}/LayerNorm_1/{name}": "D" for name in ("scale", "bias")}
    shapes |= {f"Transformer/encoder_norm/{name}": "D" for name in ("scale", "bias")}
    shapes |= {"head/kernel": "EV", "head/bias": "V"}
    shapes |= {"pos_embedding": "1TD"} if options.get("positions") != "sincos" else {}
    shapes |= {"cls": "11D"} if kind == "tok" else {}
    shapes |= {"MAPHead_0/probe": "11D"} if kind == "map" else {}
    if "rep_size" in options:
        shapes |= {"pre_logits/kernel": "DP", "pre_logits/bias": "P"}
    found = {}
    for name, text in shapes.items():
        shape = [letters[c] for c in text]
        fan = math.prod(shape[:-1]) if "out" in name or text[0] != "D" else shape[0]
        x = draw.normal(size=shape) * (fan**-0.5 if name.endswith("kernel") else 0.3)
        x += 1.0 if name.endswith("scale") else 0.0
        quiet = ("embedding", "cls", "out/", "Dense_1")
        found[name] = (x * (scale if any(n in name for n in quiet) else 1.0)).astype("float32")
    return found


def definition(p, images, kind):
    """What big_vision's `models/vit.py` says, of tensors by its names."""
    p = {name: x.astype(np.float64) for name, x in p.items()}

    def dense(x, name):
        return x @ p[f"{name}/kernel"] + p[f"{name}/bias"]

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
        return x * p[f"{name}/scale"] + p[f"{name}/bias"]

    def attention(x, context, name):
        def project(x, part):
            kernel = p[f"{name}/{part}/kernel"]
            return np.einsum("btd,dnh->bnth", x, kernel) + p[f"{name}/{part}/bias"][:, None]

        q, k, v = project(x, "query"), project(context, "key"), project(context, "value")
        logits = np.einsum("bnth,bnsh->bnts", q, k) / np.sqrt(q.shape[-1])
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        y = np.einsum("bnts,bnsh->btnh", weights, v)
        return np.einsum("btnh,nhd->btd", y, p[f"{name}/out/kernel"]) + p[f"{name}/out/bias"]

    def mlp(x, name):
        x = dense(x, f"{name}/Dense_0")
        x = x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
        return dense(x, f"{name}/Dense_1")

    B, Y, X, C = images.shape
    x = images.reshape(B, Y // 4, 4, X // 4, 4, C).swapaxes(2, 3)
    x = np.einsum("byxpqc,pqcd->byxd", x, p["embedding/kernel"]) + p["embedding/bias"]
    x = x.reshape(B, -1, x.shape[-1])
    if "pos_embedding" in p:
        x = x + p["pos_embedding"]
    else:
        omega = 1 / 10_000 ** (np.arange(6) / 5)
        rows, columns = (n.reshape(-1, 1) * omega for n in np.mgrid[:2, :3])
        waves = [np.sin(columns), np.cos(columns), np.sin(rows), np.cos(rows)]
        x = x + np.concatenate(waves, 1)
    if "cls" in p:
        x = np.concatenate([np.repeat(p["cls"], B, 0), x], 1)
    for block in ("Transformer/encoderblock_0", "Transformer/encoderblock_1"):
        y = norm(x, f"{block}/LayerNorm_0")
        x = x + attention(y, y, f"{block}/MultiHeadDotProductAttention_0")
        x = x + mlp(norm(x, f"{block}/LayerNorm_1"), f"{block}/MlpBlock_0")
    x = norm(x, "Transformer/encoder_norm")
    if kind == "map":
        probe = np.repeat(p["MAPHead_0/probe"], B, 0)
        x = attention(probe, x, "MAPHead_0/MultiHeadDotProductAttention_0")
        x = x + mlp(norm(x, "MAPHead_0/LayerNorm_0"), "MAPHead_0/MlpBlock_0")
        x = x[:, 0]
    else:
        x = x[:, 0] if kind == "tok" else x.mean(1)
    x = np.tanh(dense(x, "pre_logits")) if "pre_logits/bias" in p else x
    return dense(x, "head")


def write(path, tensors, lead="params/", savez=np.savez):
    savez(path, **{lead + name: x for name, x in tensors.items()})
    return path


def stacked(tensors):
    """The layout of big_vision's `scan=True`."""
    zero, one = ("Transformer/encoderblock_0/", "Transformer/encoderblock_1/")
    found = {n: x for n, x in tensors.items() if zero not in n and one not in n}
    return found | {
        n.replace("block_0", "block"): np.stack([x, tensors[n.replace(zero, one)]])
        for n, x in tensors.items()
        if zero in n
    }


def answer(model, params):
    return jit(model.apply)({"params": params}, jnp.asarray(IMAGES, jnp.float32))


@pytest.mark.parametrize("scanned", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_its_definition(kind, scanned, tmp_path):
    tensors = checkpoint(kind)
    file = write(tmp_path / "a.npz", stacked(tensors) if scanned else tensors)
    model, params = load_npz(file, ViT(**TINY, **KINDS[kind]))
    expected = definition(tensors, IMAGES, kind)
    np.testing.assert_allclose(answer(model, params), expected, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_its_gradients_are_those_of_the_definition(kind, tmp_path):
    """Along one direction of each tensor, by differences in float64."""
    tensors, draw = checkpoint(kind), np.random.default_rng(4)
    directions = {n: draw.normal(size=x.shape).astype("float32") for n, x in tensors.items()}
    weights = draw.normal(size=(2, 5))
    model, params = load_npz(write(tmp_path / "a.npz", tensors), ViT(**TINY, **KINDS[kind]))
    _, along = load_npz(write(tmp_path / "b.npz", directions), model)

    def total(params):
        return (
            model.apply({"params": params}, jnp.asarray(IMAGES, jnp.float32)) * weights
        ).sum()

    grads = engine.flat(jit(jax.grad(total))(params))
    ours = sum(jnp.vdot(grads[n], x) for n, x in engine.flat(along).items())

    def moved(step):
        near = {n: x.astype(np.float64) + step * directions[n] for n, x in tensors.items()}
        return (definition(near, IMAGES, kind) * weights).sum()

    theirs = (moved(1e-6) - moved(-1e-6)) / 2e-6
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)


class FixedSincos(SincosPosition):
    """Frequencies that stop one short of the last, as MAE's."""

    def __call__(self, y, x):
        return jnp.asarray(sincos_2d(y, x, self.width, endpoint=False))


WRONG = {
    "exact gelu": ("tok", 1.0, "stack.block.mlp.activation", gelu),
    "epsilon": ("tok", 1e-2, "stack.block.epsilon", 1e-5),
    "last epsilon": ("gap", 1e-2, "norm.epsilon", 1e-5),
    "no tanh": ("tok", 1.0, "neck", None),
    "first of all tokens": ("gap", 1.0, "pool", First()),
    "MAE's sines": ("gap", 1.0, "embed.position", FixedSincos(24)),
    "epsilon in the pool": ("map", 1e-2, "pool.epsilon", 1e-5),
    "exact gelu in the pool": ("map", 1.0, "pool.mlp.activation", gelu),
}


@pytest.mark.parametrize("fact", WRONG)
def test_one_wrong_fact_is_noticed(fact, tmp_path):
    kind, scale, path, value = WRONG[fact]
    tensors = checkpoint(kind, scale)
    model, params = load_npz(write(tmp_path / "a.npz", tensors), ViT(**TINY, **KINDS[kind]))
    expected = definition(tensors, IMAGES, kind)
    np.testing.assert_allclose(answer(model, params), expected, atol=1e-5)
    if path == "neck":
        value = Linear(model.rep_size)
    wrong = edit(model.parts(), path, value)
    assert abs(answer(wrong, params) - expected).max() > 2e-5


class Linear(nn.Module):
    """A tanh layer without its tanh."""

    width: int

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.width, name="linear")(x)


@pytest.mark.parametrize("scanned", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_is_what_was_loaded(kind, scanned, tmp_path):
    tensors = checkpoint(kind)
    model, params = load_npz(write(tmp_path / "a.npz", tensors), ViT(**TINY, **KINDS[kind]))
    save_npz(tmp_path / "b.npz", model, params, scanned=scanned)
    expected = stacked(tensors) if scanned else tensors
    with np.load(tmp_path / "b.npz", allow_pickle=False) as found:
        assert {n.removeprefix("params/") for n in found} == expected.keys()
        for name, x in expected.items():
            np.testing.assert_array_equal(found[f"params/{name}"], x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scanned", [False, True])
def test_the_model_is_told_by_its_tensors(kind, scanned, tmp_path):
    tensors = checkpoint(kind)
    if "pos_embedding" in tensors:  # Of a square.
        tensors["pos_embedding"] = np.ones((1, 9, 24), "float32")
    tensors = stacked(tensors) if scanned else tensors
    model, _ = load_npz(write(tmp_path / "a.npz", tensors))
    size = None if kind == "gap" else (12, 12)
    assert model == ViT(**TINY | {"size": size} | KINDS[kind])


def test_what_came_before_big_vision(tmp_path):
    """Names of google-research/vision_transformer; its class token has a position."""
    tensors = checkpoint("tok")
    older = {
        n.replace("MlpBlock_0", "MlpBlock_3")
        .replace("MultiHeadDotProductAttention_0", "MultiHeadDotProductAttention_1")
        .replace("LayerNorm_1", "LayerNorm_2"): x
        for n, x in tensors.items()
    }
    draw, grid = np.random.default_rng(6), older.pop("pos_embedding")
    own = draw.normal(size=(1, 1, 24)).astype("float32")
    older["Transformer/posembed_input/pos_embedding"] = np.concatenate([own, grid], 1)
    model = ViT(**TINY, pool="cls", rep_size=20)
    _, params = load_npz(write(tmp_path / "a.npz", older, ""), model)
    tensors["cls"] = tensors["cls"] + own
    expected = definition(tensors, IMAGES, "tok")
    np.testing.assert_allclose(answer(model, params), expected, atol=1e-5)
    older["Transformer/posembed_input/pos_embedding"] = np.ones((1, 10, 24), "float32")
    told, _ = load_npz(write(tmp_path / "b.npz", older, ""))
    assert told == dataclasses.replace(model, size=(12, 12))


FILES = {
    "params": ("params/", np.savez, np.asarray),
    "flax optimizer": ("opt/target/", np.savez, np.asarray),
    "bare": ("", np.savez, np.asarray),
    "fortran": ("params/", np.savez, np.asfortranarray),
    "compressed": ("params/", np.savez_compressed, np.asarray),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_tower_of_any_file(kind, tmp_path):
    tensors, (lead, savez, lay) = checkpoint("map"), FILES[kind]
    both = {f"{lead}img/{n}": lay(x) for n, x in tensors.items()}
    both |= {f"{lead}txt/embedding/kernel": np.ones(3), "opt/state/step": np.ones(())}
    file = write(tmp_path / "a.npz", both, "", savez)
    model, params = load_npz(file, ViT(**TINY, **KINDS["map"]), tower="img")
    expected = definition(tensors, IMAGES, "map")
    np.testing.assert_allclose(answer(model, params), expected, atol=1e-5)


def test_bfloat16_as_numpy_keeps_it(tmp_path):
    tensors = {n: x.astype(ml_dtypes.bfloat16) for n, x in checkpoint("map").items()}
    file = write(tmp_path / "a.npz", {n: x.view("V2") for n, x in tensors.items()})
    model, params = load_npz(file, ViT(**TINY, **KINDS["map"]))
    exact = {n: x.astype("float32") for n, x in tensors.items()}
    expected = definition(exact, IMAGES, "map")
    np.testing.assert_allclose(answer(model, params), expected, atol=1e-5)


class Evil:
    def __reduce__(self):
        return print, ("unpickled",)


def test_bad_files_are_refused(tmp_path, capsys):
    tensors, file = checkpoint("map"), tmp_path / "a.npz"
    model = ViT(**TINY, **KINDS["map"])
    write(file, tensors | {"cls": np.array([Evil()], dtype=object)})
    with pytest.raises(InputError, match=r"cls.npy holds Python objects, which are refused"):
        load_npz(file, model)
    file.write_bytes(pickle.dumps(tensors))
    with pytest.raises(InputError, match=r"is no whole \.npz of arrays"):
        load_npz(file, model)
    whole = write(file, tensors).read_bytes()
    for cut in (100, len(whole) // 2, len(whole) - 10):
        file.write_bytes(whole[:cut])
        with pytest.raises(InputError, match=r"is no whole \.npz of arrays"):
            load_npz(file, model)
    with pytest.raises(InputError, match=r"is no whole \.npz of arrays"):
        load_npz(tmp_path / "none.npz", model)
    with zipfile.ZipFile(file, "w") as archive:
        data = io.BytesIO()
        np.save(data, np.ones((4, 4, 3, 24), "float32"))
        archive.writestr("embedding/kernel.npy", data.getvalue()[:-8])
    with pytest.raises(InputError, match=r"embedding/kernel.npy is not as long as it says"):
        load_npz(file, model)
    assert capsys.readouterr().out == ""


def test_what_does_not_fit_is_told_together(tmp_path):
    tensors, file = checkpoint("map"), tmp_path / "a.npz"
    model = ViT(**TINY, **KINDS["map"])
    del tensors["head/bias"]
    tensors |= {"extra": np.ones(2), "head/kernel": tensors["head/kernel"].T}
    with pytest.raises(InputError) as error:
        load_npz(write(file, tensors), model)
    for line in (
        "- head/bias: missing",
        "+ extra: unknown",
        "~ head/kernel: has shape (5, 24), not (24, 5) (transposed?)",
    ):
        assert line in str(error.value)
    with pytest.raises(InputError, match="holds no ViT at 'img'"):
        load_npz(file, tower="img")
    with pytest.raises(InputError, match=r"6 positions are no square grid\); give one"):
        load_npz(write(file, checkpoint("map")))
    sizeless = functools.partial(ViT, **TINY | {"size": None})
    with pytest.raises(InputError, match="learned positions are of no size; give it one"):
        load_npz(file, sizeless(pool="map"))
