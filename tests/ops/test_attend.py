"""What `attend` promises beside its numbers: padding, memory, errors, and saying why."""

import functools
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxformer.ops.alibi import Alibi, alibi_slopes
from jaxformer.ops.attention import attend, attend_lse, explain, max_logit, weights
from jaxformer.ops.mask import Causal, Full, Mask, Positions, Prefix, Segments, Spans, Window
from jaxformer.ops.norm import Norm

IDS = jnp.array([[1, 1, 1, 2, 2, 0, 0], [1, 2, 3, 3, 3, 3, 0]])
IMPLS = ("reference", "chunked", "auto")


def arrays(key, T=7, S=7, N=2, K=2, H=8, B=2):
    keys = jax.random.split(key, 3)
    shapes = [(B, T, N, H), (B, S, K, H), (B, S, K, H)]
    return [jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)]


class Unruly(Mask):
    """Rows 0 and 1 see every other of the first five keys."""

    def visible(self, q, k, lengths):
        seen = (q[:, None] < 2) & (k[None] < 5) & (k[None] % 2 == 0)
        return seen[None]

    @property
    def pads(self):
        return True


PADDED = {
    "segments": Segments(IDS),
    "packed causal": Segments(IDS) & Causal(),
    "prefix": Prefix(jnp.array([3, 0])),
    "spans": Spans(jnp.array([[1], [0]]), jnp.array([[3], [7]])),
    "no ranges": Unruly(),
}


@pytest.mark.parametrize("name", PADDED)
@pytest.mark.parametrize("impl", IMPLS)
def test_nan_in_padding_never_leaks(impl, name, key):
    mask = PADDED[name]
    seen = np.broadcast_to(mask.dense(7, 7), (2, 7, 7))
    rows, keys = (jnp.asarray(seen.any(axis)) for axis in (2, 1))
    q, k, v = arrays(key)

    def spoil(x, shown, by):
        return jnp.where(shown[:, :, None, None], x, by)

    def run(by):
        x = spoil(q, rows, by), spoil(k, keys, by), spoil(v, keys, by)
        out, pull = jax.vjp(lambda *x: attend(*x, mask=mask, impl=impl), *x)
        return out, pull(spoil(jnp.ones_like(out), rows, by))

    run = jax.jit(run)
    spoiled, clean = run(jnp.nan), run(0.0)
    chex.assert_trees_all_equal(spoiled, clean)
    assert not np.asarray(spoiled[0])[~np.asarray(rows)].any()
    for grad, shown in zip(spoiled[1], (rows, keys, keys), strict=True):
        assert not np.asarray(grad)[~np.asarray(shown)].any()


def test_parts_of_the_keys_are_merged_by_their_logsumexp(key):
    q, k, v = arrays(key)

    def parts(q, k, v):
        (a, lse_a), (b, lse_b) = (
            attend_lse(q, k[:, s], v[:, s]) for s in (slice(3), slice(3, 7))
        )
        whole = jnp.logaddexp(lse_a, lse_b)
        a, b = (
            x * jnp.exp(lse - whole).swapaxes(1, 2)[..., None]
            for x, lse in ((a, lse_a), (b, lse_b))
        )
        return a + b

    found, expected = (
        jax.jit(jax.value_and_grad(lambda *x, f=f: jnp.sin(f(*x)).sum(), (0, 1, 2)))(q, k, v)
        for f in (parts, attend)
    )
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("transform", ["grad", "jvp"])
@pytest.mark.parametrize("impl", ["chunked", "auto"])
def test_memory_does_not_grow_with_the_square(impl, transform):
    def bytes_at(length, impl):
        x = jax.ShapeDtypeStruct((1, length, 1, 16), jnp.float32)

        def run(q, k, v):
            f = lambda q, k, v: attend(q, k, v, impl=impl).sum()  # noqa: E731
            if transform == "grad":
                return jax.grad(f, (0, 1, 2))(q, k, v)
            return jax.jvp(f, (q, k, v), (k, v, q))

        compiled = jax.jit(run).lower(x, x, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = bytes_at(2048, impl), bytes_at(8192, impl)
    assert long < 4.5 * short, "four times the length, at most four times the memory"
    assert bytes_at(8192, "reference") > 8192 * 8192 * 4
    assert long < 8192 * 8192 * 4 / 16


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_an_accelerator_without_its_kernel_says_so_and_holds_few_logits(platform):
    x = jax.ShapeDtypeStruct((1, 1024, 1, 16), jnp.float32)

    def lowered(impl):
        f = lambda *x: attend(*x, mask=Unruly(), impl=impl).sum()  # noqa: E731
        grad = jax.jit(jax.grad(f, (0, 1, 2)))
        return jax.export.export(grad, platforms=[platform])(x, x, x).mlir_module()

    name = {"cuda": "gpu"}.get(platform, platform)
    told = f"attend on {platform}: chunked;.* not {name}: Unruly has no intervals"
    with pytest.warns(UserWarning, match=told):
        text = lowered("auto")
    assert "1024x1024x" in lowered("reference") and "1024x1024x" not in text


def test_lengths_do_not_compile_anew(key):
    q, k, v = arrays(key)
    compiled = []

    @jax.jit
    def run(mask):
        compiled.append(1)
        return attend(q, k, v, mask=mask)

    for n in range(4):
        run(Prefix(jnp.array([n, 7 - n])))
    assert len(compiled) == 1


def test_weights_are_what_attend_weighs_by(key):
    """In rows that sum to 1, or to 0 where nothing is seen; keys shared by heads."""
    q, k, v = (
        jax.random.normal(n, (2, 6, heads, 8))
        for n, heads in zip(jax.random.split(key, 3), (4, 2, 2), strict=True)
    )
    mask = Causal() & Segments(jnp.array([[1, 1, 1, 2, 2, 2], [1, 2, 2, 2, 0, 0]]))
    turn = jax.random.normal(key, (1, 6, 4))
    options = {"mask": mask, "angles": turn, "bias": jax.random.normal(key, (1, 4, 6, 6))}
    found = weights(q, k, **options)
    assert found.shape == (2, 4, 6, 6)
    y = jnp.einsum("BNTS,BSNH->BTNH", found, jnp.repeat(v, 2, 2))
    np.testing.assert_allclose(y, attend(q, k, v, **options), atol=1e-5)
    total = jnp.ones((2, 4, 6)).at[1, :, 4:].set(0)
    np.testing.assert_allclose(found.sum(-1), total, atol=1e-6)


def test_max_logit(key):
    q, k, _ = arrays(key, N=4)
    logits = np.einsum("btngh,bsnh->bngts", q.reshape(2, 7, 2, 2, 8), k) / 8**0.5
    found = max_logit(q, k, mask=Causal())
    seen = np.tril(np.ones((7, 7), bool))
    expected = np.where(seen, logits, -np.inf).max((0, 3, 4)).reshape(4)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    norm = (Norm(jnp.full(8, 2.0)), Norm(jnp.full(8, 3.0)))
    unit = max_logit(q, q, norm=norm, scale=1.0)  # A vector of length sqrt(8) with itself.
    np.testing.assert_allclose(unit, np.full(4, 2 * 3 * 8.0), rtol=1e-4)


def test_alibi_slopes_are_the_papers():
    np.testing.assert_allclose(alibi_slopes(8), [2.0**-i for i in range(1, 9)])
    np.testing.assert_allclose(alibi_slopes(16)[:2], [2**-0.5, 2**-1.0])
    expected = [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3]
    np.testing.assert_allclose(alibi_slopes(6), expected)
    assert alibi_slopes(1).tolist() == [2.0**-8]


def test_explain_says_who_and_why():
    shape = (2, 197, 12, 64)
    ask = functools.partial(explain, shape, shape)
    assert ask(platform="cpu") == "forward: reference\nbackward: reference"
    assert "chunked" in explain((1, 4096, 2, 64), (1, 4096, 2, 64), platform="cpu")
    assert ask(impl="chunked") == "forward: chunked\nbackward: chunked"
    assert "T=197, S=197 below 1024" in ask(platform="cuda")
    long = functools.partial(explain, (2, 2048, 4, 64), (2, 2048, 4, 64), platform="cuda")
    assert "a mask that is not causal" in long(mask=Causal() & Causal(1))
    assert "bias" in long(bias=Alibi(jnp.ones(4)))
    assert long() == "forward: cudnn\nbackward: cudnn", "as a GPU would, and not this machine"
    assert "gpu; not cudnn: cuDNN gives no logsumexp" in long(lse=True)


BAD = {
    "rank": ({"q": (2, 7, 8)}, r"q has shape \(2, 7, 8\) and must be \[B, T, heads, H\]"),
    "heads": ({"q": (2, 7, 3, 8)}, "q has 3 heads, which must be a multiple of the 2 of k"),
    "head size": ({"q": (2, 7, 2, 4)}, "must agree in batch and head size"),
    "values": ({"v": (2, 6, 2, 8)}, "must have one shape"),
    "bias": ({"bias": jnp.zeros((2, 2, 7, 6))}, r"must broadcast to \(2, 2, 7, 7\)"),
    "slopes": (
        {"bias": Alibi(jnp.zeros(3))},
        r"Alibi.slopes has shape \(3,\) and must be \(2,",
    ),
    "impl": ({"impl": "flash"}, "impl='flash' must be one of auto, reference"),
    "mask": (
        {"mask": Segments(IDS[:, :5])},
        r"Segments.q_ids has shape \(2, 5\) and must be \[B, 7\]",
    ),
    "rows of a mask": ({"mask": Prefix(jnp.arange(3))}, "mask has 3 rows and must have 1 or 2"),
    "torn segments": ({"mask": Segments(IDS.at[0, 6].set(1))}, "must stand side by side"),
    "norm": ({"norm": (Norm(jnp.ones(4)), None)}, r"norm: the scale for q has shape \(4,\)"),
    "one norm": ({"norm": Norm(jnp.ones(8))}, "norm must be a pair"),
    "angles": (
        {"angles": jnp.zeros((1, 7, 8))},
        r"angles for q have shape \(1, 7, 8\) and must",
    ),
    "scale": ({"scale": jnp.ones(8)}, "scale must be a number"),
    "softcap": ({"softcap": 0.0}, "softcap must be a number above 0, got 0.0"),
    "infinite softcap": ({"softcap": jnp.inf}, "softcap must be a number above 0, got inf"),
    "no scale": ({"scale": float("nan")}, "scale must be a number, got nan"),
    "nothing": ({"k": (2, 0, 2, 8), "v": (2, 0, 2, 8)}, "must have one of each at least"),
    "an array for a mask": ({"mask": jnp.ones((7, 7), bool)}, "must be one of ops.mask; of an"),
    "half of the angles": ({"angles": (jnp.zeros((1, 7, 4)), None)}, "or a pair of them, got"),
    "a bias that is a mask": (
        {"bias": jnp.ones((1, 1, 7, 7), bool)},
        "bias is bool and must be of floating point",
    ),
    "epsilon": ({"norm": (Norm(jnp.ones(8), epsilon=0.0), None)}, "epsilon=0.0 for q must be"),
    "an offset a row": (
        {"mask": lambda: Causal(jnp.arange(7))},
        "must be one integer for all rows",
    ),
    "a window's": (
        {"mask": lambda: Window(1, 1, jnp.arange(7))},
        "must be one integer for all rows",
    ),
    "half a token": (
        {"mask": lambda: Prefix(3.5)},
        r"Prefix.length is float32 of shape \(\) and must",
    ),
    "spans of one row": (
        {"mask": lambda: Spans(jnp.arange(2), jnp.arange(2))},
        r"Spans.start \(2,\) and Spans.stop \(2,\) must both be \[B, n\]",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_names_the_argument_and_the_rule(name, unchecked):
    changes, message = BAD[name]
    given = [jnp.zeros(changes.get(n, (2, 7, 2, 8))) for n in "qkv"]
    # A function makes what not even its own type takes.
    makes = lambda v: isinstance(v, types.FunctionType)  # noqa: E731
    options = {n: v() if makes(v) else v for n, v in changes.items() if n not in "qkv"}
    with pytest.raises(ValueError, match=message):
        attend(*given, **options)


def test_numbers_and_lists_are_told_from_arrays(unchecked):
    q = jnp.zeros((2, 7, 2, 8))
    with pytest.raises(ValueError, match="q is int32 and must be of floating point"):
        attend(q.astype(int), q, q)
    with pytest.raises(ValueError, match="k has shape list and must be"):
        attend(q, [1.0], q)


FAR = {
    "window": (Window(3, 2**31 - 1), Window(3, None)),
    "causal": (Causal(2**31 - 1), Full()),
    "prefix": (Prefix(2**31), Full()),
    "as data": (Causal(jnp.array(2**31 - 1)), Full()),
}


@pytest.mark.parametrize("name", FAR)
def test_what_is_very_far_is_everything(name, key):
    for impl in ("auto", "reference"):
        found, expected = (attend(*arrays(key), mask=m, impl=impl) for m in FAR[name])
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_row_whose_bias_leaves_no_key_weighs_nothing(key):
    q, k, _ = arrays(key)
    T, S = q.shape[1], k.shape[1]
    bias = jnp.zeros((1, 1, T, S)).at[0, 0, 1].set(-jnp.inf)
    found = weights(q, k, bias=bias)
    assert not found[:, :, 1].any() and np.allclose(found[:, :, 0].sum(-1), 1)


def test_ids_and_positions_are_of_rows_and_of_as_many_as_queries(unchecked):
    q = jnp.zeros((2, 7, 2, 8))
    with pytest.raises(
        ValueError, match=r"Segments.q_ids has shape \(7,\) and must be \[B, 7\]"
    ):
        attend(q, q, q, mask=Segments(IDS[0]))
    three = Positions(jnp.zeros((3, 7), int), jnp.zeros((3, 7), int))
    for f in (attend, functools.partial(attend, impl="reference")):
        with pytest.raises(ValueError, match="mask has 3 rows and must have 1 or 2"):
            f(q, q, q, mask=three)
    for f in (weights, max_logit):
        with pytest.raises(ValueError, match="mask has 3 rows and must have 1 or 2"):
            f(q, q, mask=three)
    with pytest.raises(ValueError, match="takes an array, and this is an Alibi"):
        weights(q, q, bias=Alibi(alibi_slopes(2)))


@pytest.mark.parametrize(
    ("impl", "options", "message"),
    [
        ("cudnn", {}, "cuDNN runs on cuda alone"),
        ("tpu", {"mask": Unruly()}, "Unruly has no intervals"),
        ("gpu", {"mask": Unruly()}, "Unruly has no intervals"),
    ],
)
def test_a_named_impl_means_this_or_fail(impl, options, message, key):
    with pytest.raises(NotImplementedError, match=message):
        jax.eval_shape(functools.partial(attend, impl=impl, **options), *arrays(key))
