"""`attend` where others put it: in a vmap, a shard_map or a jit of theirs, with their masks."""

import contextlib
import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from jax.sharding import NamedSharding, PartitionSpec

from jaxformer import sharding
from jaxformer.ops import choose, dense
from jaxformer.ops.attention import attend, explain
from jaxformer.ops.mask import BlockDiffusion, Causal, Mask, Positions, Segments, Twice
from jaxformer.sharding import DATA_PARALLEL, FSDP_TENSOR, make_mesh

B, T, N, H = 4, 6, 2, 8
IDS = jnp.array(
    [[1, 1, 2, 2, 0, 0], [1, 1, 1, 1, 1, 1], [1, 2, 2, 2, 2, 0], [1, 1, 1, 0, 0, 0]]
)
AT = jnp.where(IDS > 0, jnp.arange(T), -1)


@pytest.fixture
def q(key):
    return jax.random.normal(key, (B, T, N, H))


def four():
    """A mesh that is none of ours."""
    auto = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((4,), ("x",), auto, devices=jax.devices()[:4])


def slope(f):
    return jax.grad(lambda q: jnp.sin(f(q)).sum())


KEPT = {
    "positions": Positions(AT, AT),
    "one row of them": Positions(AT[1:2], AT[1:2]),
    "twice": Twice(Positions(AT[:, :3], AT[:, :3])),
}


@pytest.mark.parametrize("name", KEPT)
def test_a_batch_of_batches_under_a_mask_without_ranges(name, q):
    two = jnp.stack([q, q + 1])

    def run(q, impl="auto"):
        return attend(q, q, q, mask=KEPT[name], impl=impl)

    for f in (run, slope(run)):
        expected = jnp.stack([f(x, "reference") if f is run else f(x) for x in two])
        np.testing.assert_allclose(jax.vmap(f)(two), expected, atol=1e-5)


MASKS = {
    "segments": Segments,
    "known": lambda ids: BlockDiffusion(1),
}


@pytest.mark.parametrize("impl", ["auto", "reference", "chunked", "tpu", "gpu"])
@pytest.mark.parametrize("name", ["segments", "known"])
def test_in_a_shard_map_that_watches_what_varies(impl, name, q):
    """As `jax.shard_map` does, unless it is told not to; JAX interprets no kernel in it."""
    mesh, x = four(), PartitionSpec("x")

    def run(q, ids, impl=impl):
        return slope(lambda q: attend(q, q, q, mask=MASKS[name](ids), impl=impl))(q)

    watched = impl not in choose.KERNELS
    cut = jax.shard_map(run, mesh=mesh, in_specs=(x, x), out_specs=x, check_vma=watched)
    expected = run(q, IDS, "reference")
    np.testing.assert_allclose(jax.jit(cut)(q, IDS), expected, atol=1e-4)


def lowered(f, platform, mesh, spec, rules=None) -> str:
    """The program of `f` for devices that are not here, in place of those of `mesh`."""
    lies = NamedSharding(mesh, spec)
    made = jax.jit(f, in_shardings=lies, out_shardings=lies)
    with sharding.use(mesh, rules) if rules else jax.sharding.set_mesh(mesh):
        return exported(made, platform)


def exported(made, platform, mesh=None) -> str:
    checks = [jax.export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")]
    export = jax.export.export(made, platforms=[platform], disabled_checks=checks)
    shape = jax.ShapeDtypeStruct((4, 256, 4, 64), jnp.bfloat16)
    with jax.sharding.use_abstract_mesh(mesh) if mesh else contextlib.nullcontext():
        return export(shape).mlir_module()


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_a_mask_without_data_under_a_mesh_that_is_set(kind, q):
    axes = (getattr(jax.sharding.AxisType, kind),)
    mesh = jax.make_mesh((4,), ("x",), axes, devices=jax.devices()[:4])
    cut = PartitionSpec("x")
    run = functools.partial(attend, mask=Causal())
    with jax.sharding.set_mesh(mesh):
        x = jax.device_put(q, NamedSharding(mesh, cut))
        found = jax.jit(jax.shard_map(run, in_specs=cut, out_specs=cut))(x, x, x)
    np.testing.assert_allclose(found, run(q, q, q), atol=1e-5)


KERNEL = {"tpu": "tpu_custom_call", "cuda": "triton"}


@pytest.mark.parametrize("platform", KERNEL)
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")  # jax 0.12.
@pytest.mark.parametrize("checked", [True, False])
def test_a_kernel_lies_in_such_a_shard_map(platform, checked):
    chip = {"tpu": ("TPU v6 lite", 1, "tpu"), "cuda": ("NVIDIA H200", None, "gpu")}[platform]
    mesh, x = four().abstract_mesh, PartitionSpec("x")
    mesh = mesh.update(abstract_device=jax.sharding.AbstractDevice(*chip))
    f = slope(lambda q: attend(q, q, q, mask=Causal()).astype(jnp.float32))
    cut = jax.shard_map(f, mesh=mesh, in_specs=x, out_specs=x, check_vma=checked)
    assert KERNEL[platform] in exported(jax.jit(cut), platform, mesh)


@pytest.mark.parametrize("platform", KERNEL)
def test_arrays_on_several_devices_that_nobody_cuts_are_left_to_xla(platform):
    mesh = four()
    with pytest.warns(UserWarning, match="arrays lie on several devices; cut them by"):
        text = lowered(lambda q: attend(q, q, q), platform, mesh, PartitionSpec("x"))
    assert KERNEL[platform] not in text


@pytest.mark.parametrize(
    ("mesh", "rules"),
    [
        ("expert=4", FSDP_TENSOR),
        ("seq=4", DATA_PARALLEL),
        ("tensor=4", sharding.without(FSDP_TENSOR, ("act_heads",))),
    ],
)
def test_a_mesh_that_cuts_no_axis_of_attention_has_kernels_too(mesh, rules):
    made = make_mesh(mesh, jax.devices()[:4])
    with warnings.catch_warnings(action="error"):
        text = lowered(lambda q: attend(q, q, q), "tpu", made, PartitionSpec(), rules)
    assert "tpu_custom_call" in text


class PerRow(Mask):
    """Of each row of the batch the first keys, so many as are known before compiling."""

    lengths: tuple[int, ...] = struct.field(pytree_node=False)

    def visible(self, q, k, lengths):
        return jnp.broadcast_to(self._seen(k), (len(self.lengths), q.size, k.size))

    def ranges(self, q, S):
        return [(0, jnp.broadcast_to(jnp.array(self.lengths)[:, None], (B, q.size)))]

    def _seen(self, k):
        return k[None, None] < jnp.array(self.lengths)[:, None, None]


@pytest.mark.parametrize("impl", ["auto", "tpu", "gpu"])
def test_a_mask_whose_rows_differ_and_are_no_data(impl, q):
    mask = PerRow((2, 5, 6, 1))
    expected = attend(q, q, q, mask=mask, impl="reference")
    np.testing.assert_allclose(attend(q, q, q, mask=mask, impl=impl), expected, atol=1e-5)


@pytest.mark.parametrize("impl", ["auto", "reference", "chunked", "tpu", "gpu"])
def test_a_row_that_a_bias_hides_is_empty(impl, q):
    bias = jnp.zeros((1, 1, T, T)).at[..., 2, :].set(-jnp.inf)

    def run(q):
        return attend(q, q, q, bias=bias, impl=impl)

    assert (run(q)[:, 2] == 0).all() and jnp.isfinite(slope(run)(q)).all()


def test_float32_is_not_cut_to_less_by_xla():
    """Where the platform's own choice would be bfloat16."""
    q = jax.ShapeDtypeStruct((1, 1, 2, 8), jnp.float32)
    f = jax.jit(functools.partial(attend, impl="reference"))
    text = jax.export.export(f, platforms=["tpu"])(q, q, q).mlir_module()
    assert text.count("stablehlo.dot_general") == text.count("HIGHEST, HIGHEST") == 2


def test_the_gradient_of_a_bias_is_made_where_it_is_asked_for(q, monkeypatch, unchecked):
    """It is as large as all logits, and no compiler takes it out of a kernel."""
    asked = []

    def backward(q, k, v, case, *rest, interpret):
        asked.append(case.learns_bias)
        return dense.backward(q, k, v, case, *rest)

    kernel = choose.Kernel(lambda *x, interpret: dense.forward(*x), backward, "tpu")
    monkeypatch.setitem(choose.KERNELS, "stub", kernel)
    monkeypatch.setattr(choose, "IMPLS", (*choose.IMPLS, "stub"))

    def loss(q, bias, impl):
        return jnp.sin(attend(q, q, q, bias=bias, impl=impl)).sum()

    bias = jax.random.normal(jax.random.key(1), (1, N, T, T))
    for of in (0, 1, (0, 1)):
        found, expected = (jax.grad(loss, of)(q, bias, i) for i in ("stub", "reference"))
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)
    assert asked == [False, True]  # The last is a program that is there already.


@pytest.mark.parametrize("impl", ["tpu", "gpu"])
def test_a_kernel_without_that_gradient_has_the_others(impl, q):
    bias = jax.random.normal(jax.random.key(1), (1, N, T, T))

    def grad(impl):
        return slope(lambda q: attend(q, q, q, bias=bias, mask=Causal(), impl=impl))(q)

    np.testing.assert_allclose(grad(impl), grad("reference"), atol=1e-5)


def test_one_dtype_of_all_three_or_another_who_computes_it():
    q = jnp.zeros((1, 8, 2, 8), jnp.bfloat16)
    k = q.astype(jnp.float32)
    for impl in ("tpu", "gpu"):
        with pytest.raises(NotImplementedError, match="needs one dtype, got bfloat16, float32"):
            attend(q, k, k, impl=impl)


def test_explain_knows_a_gpu_by_either_name():
    shape = (1, 512, 4, 64)
    cuda, gpu = (explain(shape, shape, platform=name) for name in ("cuda", "gpu"))
    assert cuda == gpu
    with pytest.raises(ValueError, match="platform='rocm' must be one of"):
        explain(shape, shape, platform="rocm")


def test_a_bias_that_all_share_and_no_one_learns_is_not_repeated():
    """Of five times two rows: neither it nor a gradient of it."""
    x = jax.random.normal(jax.random.key(0), (5, 2, 6, 2, 8))
    bias = jax.random.normal(jax.random.key(1), (1, 2, 6, 6))

    def run(x, impl="auto"):
        return jax.grad(lambda x: attend(x, x, x, bias=bias, impl=impl).sum())(x)

    found = jax.jit(jax.vmap(run))(x)
    expected = jnp.stack([run(row, "reference") for row in x])
    np.testing.assert_allclose(found, expected, atol=1e-5)
    text = str(jax.make_jaxpr(jax.vmap(run))(x))
    assert "attention_backward" in text and "f32[10,2,6,6]" not in text
