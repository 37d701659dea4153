"""A program's text, read: against sums made by hand."""

import numpy as np
import pytest

from jaxformer import sharding
from jaxformer.plan import chips, network
from jaxformer.plan.cost import cost
from jaxformer.plan.program import Program

# ruff: noqa: E501
# A loop of three rounds that slices a stack of kernels, multiplies, and replaces a row.
LOOP = """HloModule step
%picked (p0: bf16[3,64,128], p1: s32[]) -> bf16[1,64,128] {
  %p0 = bf16[3,64,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %p1 = s32[]{:T(128)} parameter(1)
  %zero = s32[] constant(0)
  ROOT %slice = bf16[1,64,128]{2,1,0:T(8,128)(2,1)} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,64,128}
}
%multiply (p0.1: bf16[4,16,64], p1.1: bf16[3,64,128], p2.1: s32[]) -> bf16[4,16,128] {
  %p0.1 = bf16[4,16,64]{2,1,0:T(8,128)(2,1)} parameter(0)
  %p1.1 = bf16[3,64,128]{2,1,0:T(8,128)(2,1)} parameter(1)
  %p2.1 = s32[]{:T(128)} parameter(2)
  %inner = bf16[1,64,128]{2,1,0:T(8,128)(2,1)} fusion(%p1.1, %p2.1), kind=kLoop, calls=%picked
  %flat = bf16[64,128,1]{1,0,2:T(8,128)(2,1)} bitcast(%inner)
  ROOT %product = bf16[4,16,128]{2,1,0:T(8,128)(2,1)} convolution(%p0.1, %flat), window={size=1}, dim_labels=0bf_io0->0bf
}
%replace (p0.2: f32[3,64,128], p1.2: f32[1,64,128], p2.2: s32[]) -> f32[3,64,128] {
  %p0.2 = f32[3,64,128]{2,1,0:T(8,128)} parameter(0)
  %p1.2 = f32[1,64,128]{2,1,0:T(8,128)} parameter(1)
  %p2.2 = s32[]{:T(128)} parameter(2)
  %nought = s32[] constant(0)
  ROOT %new = f32[3,64,128]{2,1,0:T(8,128)} dynamic-update-slice(%p0.2, %p1.2, %p2.2, %nought, %nought)
}
%body (carry: (s32[], bf16[4,16,64], bf16[3,64,128], f32[3,64,128], f32[1,64,128])) -> (s32[]) {
  %carry = (s32[]{:T(128)}, bf16[4,16,64]{2,1,0:T(8,128)(2,1)}, /*index=2*/bf16[3,64,128]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%carry), index=0
  %x = bf16[4,16,64]{2,1,0:T(8,128)(2,1)} get-tuple-element(%carry), index=1
  %stack = bf16[3,64,128]{2,1,0:T(8,128)(2,1)} get-tuple-element(%carry), index=2
  %sums = f32[3,64,128]{2,1,0:T(8,128)} get-tuple-element(%carry), index=3
  %row = f32[1,64,128]{2,1,0:T(8,128)} get-tuple-element(%carry), index=4
  %y = bf16[4,16,128]{2,1,0:T(8,128)(2,1)} fusion(%x, %stack, %i), kind=kOutput, calls=%multiply, backend_config={"estimated_cycles":"2500"}
  %put = f32[3,64,128]{2,1,0:T(8,128)} fusion(%sums, %row, %i), kind=kLoop, calls=%replace
  ROOT %next = (s32[]) tuple(%i)
}
%condition (carry.1: (s32[])) -> pred[] {
  %carry.1 = (s32[]{:T(128)}) parameter(0)
  %bound = s32[]{:T(128)} constant(3)
  %j = s32[]{:T(128)} get-tuple-element(%carry.1), index=0
  ROOT %less = pred[] compare(%j, %bound), direction=LT
}
ENTRY %main (x.1: f32[]) -> f32[] {
  %x.1 = f32[]{:T(128)} parameter(0)
  %all = (s32[]{:T(128)}, bf16[4,16,64]{2,1,0:T(8,128)(2,1)}) tuple(%x.1)
  %loop = (s32[]{:T(128)}, bf16[4,16,64]{2,1,0:T(8,128)(2,1)}) while(%all), condition=%condition, body=%body
  ROOT %out = f32[]{:T(128)} add(%x.1, %x.1)
}
"""


def test_a_loop_counts_by_its_rounds_and_a_stack_by_its_slice():
    program = Program(LOOP)
    assert list(program.walk()) == [("main", 1), ("body", 3)]
    lines = {line.name: line for line in program.computations["body"]}
    assert program.flops(lines["y"], "body") == 2 * 4 * 16 * 64 * 128
    x, kernel, y = 4 * 16 * 128 * 2, 64 * 128 * 2, 4 * 16 * 128 * 2  # x fills 128 lanes.
    assert program.moved(lines["y"], "body") == x + kernel + y + 4
    row = 64 * 128 * 4
    assert program.moved(lines["put"], "body") == row + row + 4, "the stack stays in place"
    assert lines["y"].cycles == 2500


@pytest.mark.parametrize(
    ("out", "left", "right", "rest", "flops"),
    [
        # [4, 64, 32] by a kernel [32, 8, 16]: the 8 heads are a window over padding.
        (
            "bf16[4,64,8,16]",
            "bf16[4,64,1,32]",
            "bf16[8,32,16,1]",
            "window={size=1x8 pad=0_0x7_7 rhs_reversal=0x1}, dim_labels=0b1f_1io0->0b1f",
            2 * 4 * 64 * 8 * 16 * 32,
        ),
        # A gradient that sums over a window of the batch.
        (
            "bf16[32,48,1]",
            "bf16[4,64,32]",
            "bf16[4,64,48]",
            "window={size=4}, dim_labels=0fb_0io->bf0",
            2 * 4 * 64 * 32 * 48,
        ),
        # A patch embedding, as it is: [2, 8, 8, 3] in patches of 4.
        (
            "f32[2,2,2,16]",
            "f32[2,8,8,3]",
            "f32[4,4,3,16]",
            "window={size=4x4 stride=4x4}, dim_labels=b01f_01io->b01f",
            2 * 2 * 4 * 16 * 48,
        ),
    ],
)
def test_products_with_padding_are_not_counted(out, left, right, rest, flops):
    text = (
        f"ENTRY %main (a: {left}, b: {right}) -> {out} {{\n  %a = {left} parameter(0)\n"
        f"  %b = {right} parameter(1)\n  ROOT %c = {out} convolution(%a, %b), {rest}\n}}\n"
    )
    program = Program(text)
    (line,) = [i for i in program.computations["main"] if i.opcode == "convolution"]
    assert program.flops(line, "main") == flops


@pytest.mark.parametrize(
    ("text", "first", "count"),
    [
        ("replica_groups=[2,4]<=[8], u", [0, 1, 2, 3], 2),
        ("replica_groups=[4,2]<=[2,4]T(1,0), u", [0, 4], 4),
        ("replica_groups={{0,2},{1,3},{4,6},{5,7}}, u", [0, 2], 4),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}, u", [0, 1, 2, 3], 2),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}, u", [0, 4], 4),
        ("replica_groups=mesh['a'=8] {'a':(2)2}, u", [0, 2], 4),
        ("replica_groups={}, u", list(range(8)), 1),
        (
            "source_target_pairs={{0,1},{1,2},{2,3},{3,0},{4,5},{5,6},{6,7},{7,4}}",
            [0, 1, 2, 3],
            2,
        ),
    ],
)
def test_groups_in_each_of_their_spellings(text, first, count):
    groups = network.read_groups(text, 8)
    assert groups[0].tolist() == first and len(groups) == count
    assert sorted(groups.reshape(-1).tolist()) == list(range(8))


def gather(mesh, there, groups, kind="all-gather"):
    """Of 64 MiB, gathered or whatever else."""
    text = (
        f"ENTRY %main (a: bf16[1024,1024]) -> bf16[1024,32768] {{\n"
        f"  %a = bf16[1024,1024] parameter(0)\n"
        f"  ROOT %c = bf16[1024,32768] {kind}(%a), replica_groups={groups}, dimensions={{0}}\n}}\n"
    )
    program = Program(text)
    (line,) = [i for i in program.computations["main"] if i.opcode == kind]
    return network.collective(line, kind, "main", program, mesh, there)


def test_a_collective_takes_what_the_links_of_its_group_carry():
    there = chips.find("v5p:4x4x4")
    mesh = sharding.make_mesh("data=4,fsdp=16", list(there.devices))
    groups = "[4,16]<=[64]"
    found = gather(mesh, there, groups)
    assert found.axes == ("fsdp",) and found.bytes == 2**26 * 15 // 16
    # Two rings of four, of two links each.
    np.testing.assert_allclose(found.seconds, found.bytes / (4 * 100e9))
    across = gather(mesh, there, "[16,4]<=[4,16]T(1,0)")
    assert across.axes == ("data",)
    np.testing.assert_allclose(across.seconds, across.bytes / (2 * 100e9))
    reduced = gather(mesh, there, groups, "all-reduce")
    assert reduced.bytes == 2 * 2**21 * 15 // 16, "each byte goes out twice"


# An all-gather that begins in one fusion, goes on beside a product, and ends in a third.
CHAIN = """HloModule step
%begin (a: bf16[1,64]) -> bf16[16,64] {
  %a = bf16[1,64]{1,0} parameter(0)
  %g = bf16[16,64]{1,0} all-gather(%a), channel_id=1, dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %started = bf16[16,64]{1,0} custom-call(%g), custom_call_target="AsyncCollectiveStart"
}
%beside (b: bf16[1,64], c: bf16[64,64]) -> bf16[1,64] {
  %b = bf16[1,64]{1,0} parameter(0)
  %c = bf16[64,64]{1,0} parameter(1)
  %g.1 = bf16[16,64]{1,0} all-gather(%b), channel_id=1, dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %dot = bf16[1,64]{1,0} dot(%b, %c), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
%finish (d: bf16[1,64]) -> bf16[16,64] {
  %d = bf16[1,64]{1,0} parameter(0)
  %g.2 = bf16[16,64]{1,0} all-gather(%d), channel_id=1, dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %done = bf16[16,64]{1,0} custom-call(%g.2), custom_call_target="AsyncCollectiveDone"
}
ENTRY %main (x: bf16[1,64], y: bf16[64,64]) -> bf16[16,64] {
  %x = bf16[1,64]{1,0} parameter(0)
  %y = bf16[64,64]{1,0} parameter(1)
  %f = bf16[16,64]{1,0} fusion(%x), kind=kCustom, calls=%begin
  %p = bf16[1,64]{1,0} fusion(%x, %y), kind=kOutput, calls=%beside
  ROOT %out = bf16[16,64]{1,0} fusion(%p), kind=kCustom, calls=%finish
}
"""


def test_a_collective_beside_a_chain_of_fusions_is_one():
    there = chips.find("v5e:4x4")
    mesh = sharding.make_mesh("data=16", list(there.devices))
    (found,) = cost(Program(CHAIN), mesh, there).collectives
    assert (found.kind, found.calls, found.bytes) == ("all-gather", 1, 15 * 64 * 2)
    assert found.hidden == found.seconds > 0


def test_a_shift_is_along_the_axes_that_it_crosses():
    there = chips.find("v5p:4x4x4")
    mesh = sharding.make_mesh("data=4,fsdp=16", list(there.devices))
    for step, axes in ((5, ("data", "fsdp")), (16, ("data",))):
        pairs = ",".join(f"{{{i},{i + step}}}" for i in range(64 - step))
        text = (
            "ENTRY %main (a: bf16[8,128]) -> bf16[8,128] {\n"
            "  %a = bf16[8,128] parameter(0)\n  ROOT %c = bf16[8,128] "
            f"collective-permute(%a), source_target_pairs={{{pairs}}}\n}}\n"
        )
        program = Program(text)
        (line,) = [i for i in program.computations["main"] if "permute" in i.opcode]
        found = network.collective(line, "collective-permute", "main", program, mesh, there)
        assert found.axes == axes


def test_a_line_is_half_as_fast_as_a_ring():
    there = chips.find("v5e:4x4")  # too short to close.
    mesh = sharding.make_mesh("data=4,fsdp=4", list(there.devices))
    found = gather(mesh, there, "[4,4]<=[16]")
    np.testing.assert_allclose(found.seconds, found.bytes / 50e9)
