"""What a program costs on a TPU, without a TPU: compiled ahead of time, and read.

    program = next(programs([Job("v6e", fn, arguments)]))

libtpu compiles for chips that are not there. From the final program come the HBM bytes
that every instruction moves, tile padding included; from the final schedule of each
Pallas kernel its cycles, and the bytes that its own copies move, blocks read again
included (`evaluate.speed.bundles`). `cost_analysis()` is no such ruler: it counts inside
of fusions, and knows nothing of a Pallas kernel. Not seen: waiting for memory, and what a
loop of XLA's repeats; `Traffic.loops` tells of those.

libtpu takes its flags when it is loaded, once a process, so that schedules are made in a
process of their own; several may run at once.
"""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator

import jax
import numpy as np
from jax.experimental import topologies
from jax.extend import core
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from evaluate.speed import bundles
from jaxformer.plan import chips
from jaxformer.plan.program import SHAPE, physical_bytes

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
KINDS = {"v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite"}
CORES = {"v5e": 1, "v5p": 2, "v6e": 1}
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", **chips.ENVIRONMENT}
# The final passes alone: a thirtieth of what libtpu would write.
FLAGS = (
    "--xla_jf_dump_to={} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=^final"
)
USE = "final_hlo-static-per-bundle-utilization.txt"

_LINE = re.compile(r"\s*(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)")
_VMEM = re.compile(r'"used_scoped_memory_configs":\[\{"memory_space":"1",.*?"size":"(\d+)"')
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"}
_LOOPS = {"while", "call", "conditional"}


@dataclasses.dataclass(frozen=True)
class Traffic:
    """HBM bytes of a program; `rows` are (bytes, opcode, name), the largest first.

    `loops`: instructions that hold others, of which each counts once or not at all. `vmem`:
    the bytes of it that each Pallas kernel uses.
    """

    bytes: int
    rows: list[tuple[int, str, str]]
    loops: list[str]
    vmem: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Job:
    """`fn(*arguments)` for a chip; arguments are shapes, or arrays where values steer.

    What steers a kernel is made of integers: the lengths and lists of tiles of a mask.
    """

    chip: str
    fn: Callable
    arguments: tuple


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled job. `memory`: bytes of arguments, output and temporaries."""

    traffic: Traffic
    memory: dict[str, int]
    kernels: list[bundles.Kernel]
    runs: list[bundles.Run | str]  # of each kernel, or why it cannot be told.

    @property
    def moved(self) -> int:
        """HBM bytes, those of kernels by what their copies move where that is known."""
        total = self.traffic.bytes
        once = {name: size for size, _, name in self.traffic.rows}
        for kernel, run in zip(self.kernels, self.runs, strict=True):
            if isinstance(run, bundles.Run):
                total += run.moved - once.get(kernel.name, 0)
        return total

    @property
    def cycles(self) -> int | None:
        """Of all kernels; None if one cannot be told."""
        runs = [r for r in self.runs if isinstance(r, bundles.Run)]
        return sum(r.cycles for r in runs) if runs and len(runs) == len(self.runs) else None


def compile_for(topology: str, fn: Callable, *arguments):
    """Compiles `fn` for one chip of a topology such as "v6e:2x2"."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = Mesh(np.array(devices[:1]), ("chip",))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # A kernel asks what chip it is.
        jitted = jax.jit(fn, in_shardings=NamedSharding(mesh, PartitionSpec()))
        lowered = jitted.lower(*arguments)
    with chips.uncached():
        return lowered.compile()


def moved_bytes(program) -> Traffic:
    """HBM bytes of every instruction's operands and results, once each.

    Args:
      program: what `compile_for` gives, or its text.
    """
    text = program if isinstance(program, str) else program.as_text()
    sizes: dict[str, int] = {}
    rows, loops, vmem = [], [], {}
    entry = text[text.index("\nENTRY") :]
    idle = _for_the_next_run(entry)
    for line in entry.splitlines():
        match = _LINE.match(line)
        if match is None:
            continue
        name, made, opcode, rest = match.groups()
        shapes = [physical_bytes(m) for m in SHAPE.finditer(made)]
        sizes[name] = sum(shapes)
        if opcode in _FREE or opcode.endswith("-done") or name in idle:
            continue
        if opcode in _LOOPS:
            loops.append(name)
        if opcode == "custom-call":  # Which may go on over some lines.
            begun = entry.index(line)
            if used := _VMEM.search(entry, begun, entry.find("\n  %", begun + len(line))):
                vmem[name] = int(used.group(1))
        read = sum(sizes.get(o, 0) for o in re.findall(r"%([\w.\-]+)", rest.split("), ")[0]))
        if opcode == "copy-start":  # gives (copy, original, context)
            written = shapes[0]
        elif opcode == "slice-start":  # gives (original, slice, context) and reads the slice
            written, read = shapes[1], _size(list(SHAPE.finditer(made))[1])
        else:
            written = 0 if opcode.endswith("-start") else sizes[name]
        rows.append((read + written, opcode, name))
    return Traffic(sum(r[0] for r in rows), sorted(rows, reverse=True), loops, vmem)


def _for_the_next_run(entry: str) -> set[str]:
    """Copies that nobody here reads.

    An argument that lies in VMEM at the start of a program, and not to its end, is
    fetched once more at the end: instead of at the start of the program's next run (XLA's
    memory space assignment, "end of program cross program prefetch").
    """
    pairs = dict(re.findall(r"%([\w.\-]+) = \S.* copy-done\(%([\w.\-]+)\)", entry))
    return {
        begun
        for done, begun in pairs.items()
        if not re.search(rf"%{re.escape(done)}\b(?! =)", entry)
    }


def _size(shape: re.Match) -> int:
    """Bytes of an array wherever it lies, as if it were in HBM."""
    plain = SHAPE.search(re.sub(r"S\(\d+\)", "", shape.group(0)))
    assert plain is not None
    return physical_bytes(plain)


def programs(jobs: Iterable[Job]) -> Iterator[Program | str]:
    """Compiles jobs one after the other; gives a program of each, or why there is none."""
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as alive:
        folder = pathlib.Path(scratch)
        process = None
        for job in jobs:
            try:
                (folder / "exported").write_bytes(_export(job))
            except Exception as error:  # Whatever a kernel cannot do is a row of the table.
                yield _reason(error)
                continue
            if process is None or process.poll() is not None:
                process = alive.enter_context(_start(folder))
            assert process.stdin and process.stdout
            process.stdin.write(TOPOLOGIES[job.chip] + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
            if not answer:
                yield f"libtpu ended with status {process.wait()}"
                continue
            found = json.loads(answer)
            yield _read(job, folder, found) if "memory" in found else found["error"]


def steering(job: Job) -> list[tuple[str, dict[int, np.ndarray]]]:
    """Each Pallas kernel's name and those of its integer operands that can be known.

    Only what they depend on is computed, on this machine.
    """
    flat, tree = jax.tree.flatten(job.arguments)
    jaxpr = jax.make_jaxpr(lambda *flat: job.fn(*jax.tree.unflatten(tree, flat)))(*flat)
    kernels: list[tuple[str, dict[int, np.ndarray]]] = []
    _follow(jaxpr.jaxpr, jaxpr.consts, [functools.partial(_given, x) for x in flat], kernels)
    return kernels


def _given(x):
    if isinstance(x, jax.ShapeDtypeStruct):
        raise bundles.Unknown(f"an argument of shape {x.shape}")
    return x


def _follow(jaxpr, consts, inputs, kernels) -> list[Callable]:
    """Notes the kernels of a jaxpr; gives its outputs, to be computed when asked for."""
    given = [functools.partial(_given, c) for c in consts]
    variables = [*jaxpr.constvars, *jaxpr.invars]
    held: dict = dict(zip(variables, [*given, *inputs], strict=True))

    def reader(atom):
        known = isinstance(atom, core.Literal)
        return functools.partial(_given, atom.val) if known else held[atom]

    for eqn in jaxpr.eqns:
        ins = [reader(a) for a in eqn.invars]
        inner, name = None, eqn.primitive.name
        if name == "cond":
            try:
                inner = eqn.params["branches"][int(ins[0]())]
                ins = ins[1:]
            except bundles.Unknown:
                inner = None
        elif name not in ("pallas_call", "scan", "while"):
            inner = _inner(eqn)
        if name == "pallas_call":
            kernels.append((_kernel_name(eqn), _integers(eqn, ins)))
        if inner is not None and len(inner.jaxpr.invars) == len(ins):
            outs = _follow(inner.jaxpr, inner.consts, ins, kernels)
        else:
            once = functools.cache(functools.partial(_evaluate, eqn, tuple(ins)))
            outs = [lambda once=once, i=i: once()[i] for i in range(len(eqn.outvars))]
        held |= dict(zip(eqn.outvars, outs, strict=True))
    return [reader(a) for a in jaxpr.outvars]


def _inner(eqn):
    """The jaxpr that a call calls, or None."""
    for value in eqn.params.values():
        if isinstance(value, core.ClosedJaxpr):
            return value
        if isinstance(value, core.Jaxpr):
            return core.ClosedJaxpr(value, ())
    return None


def _evaluate(eqn, ins):
    if eqn.primitive.name == "pallas_call":
        raise bundles.Unknown("what a kernel gives")
    if eqn.primitive.name == "platform_index":
        return [next(i for i, p in enumerate(eqn.params["platforms"]) if p and "tpu" in p)]
    known = zip(eqn.invars, ins, strict=True)
    values = {atom: read() for atom, read in known if not isinstance(atom, core.Literal)}
    about = core.DebugInfo("steering", eqn.primitive.name, None, None)
    alone = core.Jaxpr((), list(values), eqn.outvars, [eqn], debug_info=about)
    return core.jaxpr_as_fun(core.ClosedJaxpr(alone, ()))(*values.values())


def _kernel_name(eqn) -> str:
    info = eqn.params.get("name_and_src_info") or eqn.params.get("name")
    return getattr(info, "name", str(info))


def _integers(eqn, ins) -> dict[int, np.ndarray]:
    known = {}
    for i, (atom, value) in enumerate(zip(eqn.invars, ins, strict=True)):
        if np.issubdtype(atom.aval.dtype, np.integer) and atom.aval.size < 2**20:
            try:
                known[i] = np.asarray(value())
            except bundles.Unknown:
                continue
    return known


def _export(job: Job) -> bytes:
    """The program, lowered for TPUs, for another process to compile."""
    flat, tree = jax.tree.flatten(job.arguments)
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in flat]

    def fn(*flat):
        return jax.tree.leaves(job.fn(*jax.tree.unflatten(tree, flat)))

    device = jax.sharding.AbstractDevice(KINDS[job.chip], CORES[job.chip], "tpu")
    mesh = jax.sharding.AbstractMesh((1,), ("chip",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        return bytes(jax.export.export(jax.jit(fn), platforms=["tpu"])(*shapes).serialize())


def _start(folder: pathlib.Path) -> subprocess.Popen:
    root = str(pathlib.Path(__file__).parents[2])
    environment = os.environ | ENVIRONMENT
    environment["LIBTPU_INIT_ARGS"] = " ".join(
        [os.environ.get("LIBTPU_INIT_ARGS", ""), FLAGS.format(folder / "dump")]
    ).strip()
    environment["PYTHONPATH"] = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-m", "evaluate.speed.tpu", str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        text=True,
    )


def _read(job: Job, folder: pathlib.Path, found: dict) -> Program:
    """What the other process has left in `folder`."""
    traffic = moved_bytes((folder / "hlo").read_text())
    names = {name for _, opcode, name in traffic.rows if opcode == "custom-call"}
    kernels = []
    for path in sorted((folder / "dump").glob("*-final_bundles.txt")):
        match = re.fullmatch(r"(\d+-(.*))-\d+-final_bundles.txt", path.name)
        if match and match.group(2) in names:
            used = [p for p in path.parent.iterdir() if p.name.startswith(match.group(1) + "-")]
            use = next(p for p in used if p.name.endswith(USE))
            kernels.append(bundles.read(match.group(2), path.read_text(), use.read_text()))
    try:
        steers = steering(job)
    except Exception as error:  # Then a kernel that needs them says so.
        steers = [(_reason(error), {})]
    runs = []
    for kernel in kernels:
        mine = next((s for s in steers if s[0] == re.sub(r"\.\d+$", "", kernel.name)), None)
        if mine is not None:
            steers.remove(mine)
        try:
            runs.append(bundles.on_cores(kernel, mine[1] if mine else {}, CORES[job.chip]))
        except (bundles.Unknown, NotImplementedError) as error:
            runs.append(_reason(error))
    return Program(traffic, found["memory"], kernels, runs)


def _reason(error: Exception) -> str:
    """One line of an error."""
    text = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {text[0][:200]}"


def _serve(folder: pathlib.Path) -> None:
    """Compiles `folder/exported` for each topology that standard input names."""
    for line in sys.stdin:
        shutil.rmtree(folder / "dump", ignore_errors=True)
        (folder / "dump").mkdir()
        try:
            program = jax.export.deserialize(bytearray((folder / "exported").read_bytes()))
            shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in program.in_avals]
            compiled = compile_for(line.strip(), program.call, *shapes)
            (folder / "hlo").write_text(compiled.as_text() or "")
            stats = compiled.memory_analysis()
            names = ("argument", "output", "temp", "generated_code")
            found = {"memory": {n: getattr(stats, f"{n}_size_in_bytes") for n in names}}
        except Exception as error:  # The asker prints it.
            found = {"error": _reason(error)}
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    _serve(pathlib.Path(sys.argv[1]))
