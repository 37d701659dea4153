"""The TPU kernels as chips see them: what they hold there, and what libtpu makes of them."""

import re

import jax
import jax.numpy as jnp
import pytest

from evaluate.speed import tpu
from jaxformer.kernels import flash_tpu, flash_tpu_backward
from jaxformer.kernels.case import Case
from jaxformer.layers.attention import Attention
from jaxformer.layers.norm import RMSNorm
from jaxformer.ops.attention import attend
from jaxformer.ops.mask import BlockDiffusion, Causal, Segments, Twice


@pytest.mark.parametrize("T, H, K", [(4096, 128, 16), (2048, 256, 16), (2048, 128, 2)])
def test_keys_of_a_list_leave_a_v5p_room(T, H, K):
    """Of 64 MiB, where this chip, of all, has the least VMEM."""
    q, k = (jax.ShapeDtypeStruct((1, T, n, H), jnp.bfloat16) for n in (16, K))
    lse = jax.ShapeDtypeStruct((1, 16, T), jnp.float32)

    def both(intervals, q, k, lse):
        case = Case(intervals=intervals)
        back = flash_tpu_backward.backward(q, k, k, case, q, lse, q)
        return flash_tpu.forward(q, k, k, case), back

    text = str(jax.make_jaxpr(both)(jnp.zeros((1, 2, T), jnp.int32), q, k, lse))
    limits = [int(n) for n in re.findall(r"vmem_limit_bytes=(\d+)", text)]
    assert len(limits) == 2 and max(limits) <= 64 * 2**20


def traced(kind, fn, *arguments) -> str:
    """The program of `fn` for a kind of chip; None: for one that is not told."""
    device = jax.sharding.AbstractDevice(kind, 1, "tpu") if kind else None
    mesh = jax.sharding.AbstractMesh((1,), ("chip",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        return str(jax.make_jaxpr(fn)(*arguments))


CHIPS = {"TPU v5": 64, "TPU v5 lite": 128, "TPU v6 lite": 128, "TPU v4": 16, None: 64}


@pytest.mark.parametrize("kind", CHIPS)
def test_a_kernel_holds_what_its_chip_has(kind):
    """16 heads of 72 lie side by side, and all of their 4,096 keys where a chip has 64 MiB."""
    q = jax.ShapeDtypeStruct((1, 4096, 16, 72), jnp.bfloat16)
    text = traced(kind, lambda q: flash_tpu.forward(q, q, q, Case()), q)
    limits = [int(n) / 2**20 for n in re.findall(r"vmem_limit_bytes=(\d+)", text)]
    if CHIPS[kind] < 64:
        assert len(limits) > 1  # The keys in parts.
    else:
        assert len(limits) == 1 and 57 < limits[0] <= CHIPS[kind]


# HBM bytes of a layer in X, the bytes of `[B, T, D]`. Forward, each of four products reads
# and writes one, attention reads three and writes one: 12, and 0.25 of weights in bfloat16,
# less what stays on the chip.
BUDGET = {"forward": 10.5, "both": 42.0}
LAYERS = [
    pytest.param("forward", True, "v5e"),
    pytest.param("forward", True, "v5p"),
    pytest.param("forward", True, "v6e"),
    pytest.param("forward", False, "v5e", marks=pytest.mark.slow),
    pytest.param("forward", False, "v5p", marks=pytest.mark.slow),
    pytest.param("forward", False, "v6e", marks=pytest.mark.slow),
    *(
        pytest.param("both", fused, chip, marks=pytest.mark.slow)
        for fused in (False, True)
        for chip in tpu.TOPOLOGIES
    ),
]


@pytest.mark.parametrize("what, fused, chip", LAYERS)
def test_a_layer_moves_few_bytes(what, chip, fused):
    count_bytes(what, chip, fused, 64)


@pytest.mark.slow
def test_a_layer_whose_heads_fill_no_lanes_moves_few_bytes():
    """All 16 heads are in one step, which written out would take minutes to compile."""
    count_bytes("both", "v6e", True, 72)


@pytest.mark.slow
@pytest.mark.parametrize("T, H", [(256, 128), (4096, 64), (4096, 128)])
def test_a_layer_of_another_length_moves_few_bytes(T, H):
    count_bytes("forward", "v6e", True, H, T)


def count_bytes(what, chip, fused, H, T=1024):
    N = 1024 // H if H > 72 else 16
    layer = Attention(num_heads=N, head_dim=H, qk_norm=RMSNorm if fused else None)
    x = jax.ShapeDtypeStruct((16_384 // T, T, N * H), jnp.bfloat16)
    angles = jax.ShapeDtypeStruct((1, T, H // 2), jnp.float32) if fused else None
    weights = jax.eval_shape(layer.init, jax.random.key(0), x, angles=angles)
    weights = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, x.dtype), weights)

    def forward(weights, x, angles):
        return layer.apply(weights, x, angles=angles)

    def both(weights, x, angles, d_y):
        y, back = jax.vjp(lambda *some: forward(*some, angles), weights, x)
        return y, back(d_y)

    fn, more = (forward, ()) if what == "forward" else (both, (x,))
    program = tpu.compile_for(tpu.TOPOLOGIES[chip], fn, weights, x, angles, *more)
    traffic = tpu.moved_bytes(program)
    kernels = {name.split(".")[0] for _, _, name in traffic.rows if "flash" in name}
    assert kernels == {"flash_forward"} | ({"flash_backward"} if fn is both else set())
    assert not traffic.loops
    assert traffic.bytes <= BUDGET[what] * x.size * 2, traffic.rows[:9]


def test_one_query_compiles_for_a_chip():
    """As where a probe reads an image, or a token is made: no kernel takes it."""
    q = jax.ShapeDtypeStruct((2, 1, 2, 64), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((2, 256, 2, 64), jnp.bfloat16)

    def both(q, k, v):
        return jax.grad(lambda *x: attend(*x).astype(jnp.float32).sum(), (0, 1, 2))(q, k, v)

    program = tpu.compile_for(tpu.TOPOLOGIES["v5e"], both, q, k, k)
    assert "tpu_custom_call" not in program.as_text()


@pytest.mark.slow
def test_eight_queries_to_a_key_fit_a_chip_where_documents_are_packed():
    """As of a decoder of 70B: two key heads of a step would take more VMEM than there is."""
    q = jax.ShapeDtypeStruct((1, 4096, 16, 128), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((1, 4096, 2, 128), jnp.bfloat16)
    ids = jax.ShapeDtypeStruct((1, 4096), jnp.int32)

    def both(q, k, v, ids):
        def total(*x):
            return attend(*x, mask=Causal() & Segments(ids, ids)).astype(jnp.float32).sum()

        return jax.grad(total, (0, 1, 2))(q, k, v)

    program = tpu.compile_for(tpu.TOPOLOGIES["v5p"], both, q, k, k, ids)
    assert "flash_backward" in program.as_text()


UNEVEN = {  # T, query heads, key heads, head size, and whether each head has a bias
    "a last part of no eight": (4097, 16, 16, 72, False),
    "the same of a bias": (577, 16, 16, 72, True),
    "48 heads of queries to a key": (2048, 48, 1, 128, False),
    "a bias of 25 heads": (577, 25, 25, 64, True),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", UNEVEN)
def test_what_fills_a_v5p_compiles_for_it(name):
    """Forward and backward: its 64 MiB hold some of the keys, or of the queries."""
    T, N, K, H, biased = UNEVEN[name]
    q, k = (jax.ShapeDtypeStruct((1, T, n, H), jnp.bfloat16) for n in (N, K))
    bias = jax.ShapeDtypeStruct((1, N, T, T), jnp.float32) if biased else None

    def both(q, k, v, bias):
        def total(*x):
            return attend(*x[:3], bias=x[3]).astype(jnp.float32).sum()

        return jax.grad(total, (0, 1, 2, 3) if biased else (0, 1, 2))(q, k, v, bias)

    program = tpu.compile_for(tpu.TOPOLOGIES["v5p"], both, q, k, k, bias).as_text()
    assert "flash_forward" in program and "flash_backward" in program


def test_more_than_a_chip_holds_is_no_kernels():
    """500 heads of queries to a key, of which even 128 queries are too many."""
    q, k = (jax.ShapeDtypeStruct((1, 1024, n, 128), jnp.float32) for n in (500, 1))
    with pytest.raises(NotImplementedError, match="500 heads a step and 512 keys need"):
        jax.eval_shape(lambda q, k: flash_tpu.forward(q, k, k, Case()), q, k)


@pytest.mark.slow
def test_block_diffusion_of_packed_documents_is_the_kernels():
    """Forward and backward, on the chip with the least VMEM."""
    q = jax.ShapeDtypeStruct((1, 4096, 8, 128), jnp.bfloat16)
    ids = jax.ShapeDtypeStruct((1, 2048), jnp.int32)

    def both(q, k, v, ids):
        def total(*x):
            mask = BlockDiffusion(32) & Twice(Segments(ids))
            return attend(*x, mask=mask).astype(jnp.float32).sum()

        return jax.grad(total, (0, 1, 2))(q, k, v)

    program = tpu.compile_for(tpu.TOPOLOGIES["v5p"], both, q, q, q, ids).as_text()
    assert "flash_forward" in program and "flash_backward" in program


@pytest.mark.parametrize("kind, calls", [("TPU v6 lite", 1), ("TPU v5", 2)])
def test_gradients_of_uneven_heads_need_few_parts(kind, calls):
    """Of 4,096 keys in 16 heads of 72, which astride are half of what windows hold."""
    q = jax.ShapeDtypeStruct((1, 4096, 16, 72), jnp.bfloat16)
    lse = jax.ShapeDtypeStruct((1, 16, 4096), jnp.float32)

    def back(q, lse):
        return flash_tpu_backward.backward(q, q, q, Case(), q, lse, q)

    assert traced(kind, back, q, lse).count("vmem_limit_bytes=") == calls


@pytest.mark.parametrize("T", [2048, 4096])
@pytest.mark.parametrize("heads", [1, 8])
def test_a_bias_counts_where_keys_are_cut_in_parts(T, heads):
    """A block of it, and backward of its gradient, is held for all keys."""
    q = jax.ShapeDtypeStruct((1, T, 8, 64), jnp.bfloat16)
    bias = jax.ShapeDtypeStruct((1, heads, T, T), jnp.float32)
    lse = jax.ShapeDtypeStruct((1, 8, T), jnp.float32)

    def both(q, bias, lse):
        back = flash_tpu_backward.backward(q, q, q, Case(bias=bias), q, lse, q)
        return flash_tpu.forward(q, q, q, Case(bias=bias)), back

    text = traced("TPU v5", both, q, bias, lse)
    limits = [int(n) for n in re.findall(r"vmem_limit_bytes=(\d+)", text)]
    assert max(limits) <= 64 * 2**20 and (len(limits) > 2) == (T * heads > 2048)
