"""How long a program takes: a roofline, and beside it what its compiler thinks.

Each instruction takes what the slowest of two needs: the products of matrices at the
chip's peak, or the bytes that it moves at the bandwidth of HBM. Where the compiler has an
estimate of its own and it is longer, that counts. An attention kernel multiplies at the
share of the peak that its schedule was found to reach. A collective takes what its links
need, and the rest of its computation waits, unless the program runs it beside other work.
Not in it: launches, what hosts do, input, a slow chip.
"""

import dataclasses

from jax.sharding import Mesh

from jaxformer.plan import network
from jaxformer.plan.chips import Slice
from jaxformer.plan.network import Collective
from jaxformer.plan.program import Instruction, Program

# Of the MXU's peak, by head size and length, forward and backward: the final schedules of
# the kernels for v6e, `docs/measured/tpu/attention_kernels.json` (flops by the whole square).
KERNELS = {
    64: {256: (0.14, 0.23), 1024: (0.24, 0.26), 4096: (0.26, 0.27)},
    128: {256: (0.21, 0.37), 1024: (0.44, 0.50), 4096: (0.48, 0.50)},
}


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one step, for each chip. Seconds that its parts would take alone are `mxu`, `hbm`
    and `ici`; the longest is the `roofline`. `seconds` is the prediction.

    `flops` are the products of matrices that run, what is computed again included. `moved`:
    bytes of HBM. `compiler`: seconds by the compiler's estimates alone. `kernels`: seconds
    of attention kernels. `exposed`: seconds that nothing but the links works.
    """

    flops: int
    moved: int
    mxu: float
    hbm: float
    ici: float
    compiler: float
    kernels: float
    exposed: float
    seconds: float
    collectives: tuple[Collective, ...]

    @property
    def roofline(self) -> float:
        return max(self.mxu, self.hbm, self.ici)


def cost(program: Program, mesh: Mesh, there: Slice) -> Cost:
    """What a program for a slice costs on each of its devices."""
    chip = there.chip
    peak, bandwidth = chip.flops / chip.devices, chip.bandwidth / chip.devices
    flops = moved = 0
    busy = compiler = kernels = exposed = 0.0
    collectives: list[Collective] = []
    for where, times in program.walk():
        work = beside = 0.0
        for line in program.computations[where]:
            for inner, kind, place, is_beside in _collectives(line, where, program):
                call = network.collective(inner, kind, place, program, mesh, there)
                beside += call.seconds if is_beside else 0.0
                exposed += 0.0 if is_beside else times * call.seconds
                collectives.append(_often(call, times, is_beside))
            if network.kind_of(line):
                continue
            products, size = program.flops(line, where), program.moved(line, where)
            kernel = line.cost.get("flops", 0)
            flops += times * (products + kernel)
            moved += times * size
            guess = (line.cycles or 0) / chip.clock
            own = kernel / (peak * _share(line, where, program)) if kernel else 0.0
            work += max(products / peak, size / bandwidth, guess, own)
            compiler += times * guess
            kernels += times * own
        busy += times * max(work, beside)
        exposed += times * max(0.0, beside - work)
    found = network.merged(collectives)
    stalls = sum(c.seconds - c.hidden for c in found)
    return Cost(
        flops=flops,
        moved=moved,
        mxu=flops / peak,
        hbm=moved / bandwidth,
        ici=sum(c.seconds for c in found),
        compiler=compiler,
        kernels=kernels,
        exposed=exposed,
        seconds=busy + stalls,
        collectives=found,
    )


def _collectives(line: Instruction, where: str, program: Program):
    """(collective, its kind, its computation, whether other work goes on) in `line`."""
    kind = network.kind_of(line)
    if kind:
        yield line, kind, where, line.opcode.endswith("-start")
    elif line.opcode == "fusion":
        for called in line.calls:
            lines = program.computations[called]
            # One beside the work it is fused with, or one of which a slice is kept.
            works = program.flops(line, where) > 0
            # One that goes on beside a chain of fusions stands in each of them.
            begins = any("AsyncCollectiveStart" in i.rest for i in lines)
            sliced = any(i.is_root and i.opcode == "dynamic-slice" for i in lines)
            for inner in lines:
                for found, kind, place, _ in _collectives(inner, called, program):
                    chained = "chain_id=" in found.rest
                    if chained and not begins:
                        continue
                    kind = "reduce-scatter" if sliced and kind == "all-reduce" else kind
                    yield found, kind, place, works or chained


def _often(call: Collective, times: int, is_beside: bool) -> Collective:
    seconds = times * call.seconds
    hidden = seconds if is_beside else 0.0
    return Collective(call.kind, call.axes, times, times * call.bytes, seconds, hidden)


def _share(line: Instruction, where: str, program: Program) -> float:
    """Of the peak, that an attention kernel reaches: by its nearest that was looked at."""
    statistics = [
        s.sizes
        for s in (*line.shapes, *program.shapes(line, where))
        if s.dtype == "f32" and len(s.sizes) == 4
    ]
    out = line.shapes[0].sizes
    length, heads = out[1] if len(out) == 3 else 1, 1
    for sizes in statistics:  # [B, groups, heads of a group, T]
        if sizes[-1] == length:
            heads = sizes[1] * sizes[2]
    table = KERNELS[128 if out[-1] // heads >= 128 else 64]
    nearest = min(table, key=lambda T: abs(T - length))
    return table[nearest]["backward" in line.name]
