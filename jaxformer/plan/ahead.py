"""From an experiment and a topology to what a step would cost there."""

import dataclasses
import math
import pathlib
import re
from typing import Any

import jax

from jaxformer import sharding
from jaxformer.data import stand_in
from jaxformer.errors import InputError
from jaxformer.experiment import Experiment, arguments
from jaxformer.plan import chips
from jaxformer.plan.cost import Cost, cost
from jaxformer.plan.network import Collective
from jaxformer.plan.program import Program
from jaxformer.program import writing
from jaxformer.setup import Setup, check_batch, model_flops, setup


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of HBM on each device. `temporaries` are activations, gradients and parameters
    that were gathered; `program` its own code. Where a program does not fit there is none
    to ask: `temporaries` is then what the compiler says it lacks, or None if it does not.
    """

    parameters: int
    optimizer: int
    average: int
    batch: int
    temporaries: int | None
    program: int
    limit: int

    @property
    def state(self) -> int:
        """What lives from step to step."""
        return self.parameters + self.optimizer + self.average

    @property
    def total(self) -> int | None:
        if self.temporaries is None:
            return None
        return self.state + self.batch + self.temporaries + self.program


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a step of an experiment costs on a slice; `cost` is None where it does not fit.

    `model_flops`: of one step on all chips, forward and twice as much backward, causal
    attention as half: the convention of MFU here and in MaxText.
    """

    topology: str
    chips: int
    mesh: dict[str, int]
    batch_size: int
    accumulate: int
    remat: str | None
    tokens: int | None  # in a batch.
    memory: Memory
    explanation: sharding.Explanation
    model_flops: int | None
    peak: float  # operations a second of all chips.
    cost: Cost | None

    @property
    def fits(self) -> bool:
        return self.cost is not None

    @property
    def mfu(self) -> float | None:
        """Predicted share of the peak, by the model's operations."""
        if self.cost is None or self.model_flops is None:
            return None
        return self.model_flops / (self.cost.seconds * self.peak)

    @property
    def examples_per_second(self) -> float | None:
        return None if self.cost is None else self.batch_size / self.cost.seconds

    @property
    def again(self) -> float | None:
        """Which share of the operations that run is no part of the model's own."""
        if self.cost is None or self.model_flops is None or not self.cost.flops:
            return None
        return 1 - self.model_flops / (self.cost.flops * self.devices)

    @property
    def devices(self) -> int:
        return math.prod(self.mesh.values())

    @property
    def collective_bytes(self) -> int:
        """That a chip sends in a step."""
        return sum(c.bytes for c in self.collectives)

    @property
    def collectives(self) -> tuple[Collective, ...]:
        return () if self.cost is None else self.cost.collectives

    def as_json(self) -> dict[str, Any]:
        """All of it as JSON; rows are the parameters and where each lies."""
        rows = [dataclasses.asdict(row) for row in self.explanation.rows]
        for row in rows:
            row["mesh_axes"] = [list(sharding.mesh_names(m)) for m in row["mesh_axes"]]
        return {
            "topology": self.topology,
            "chips": self.chips,
            "mesh": self.mesh,
            "batch_size": self.batch_size,
            "accumulate": self.accumulate,
            "remat": self.remat,
            "tokens": self.tokens,
            "fits": self.fits,
            "memory": dataclasses.asdict(self.memory) | {"total": self.memory.total},
            "model_flops": self.model_flops,
            "cost": None if self.cost is None else dataclasses.asdict(self.cost),
            "collective_bytes": self.collective_bytes,
            "mfu": self.mfu,
            "examples_per_second": self.examples_per_second,
            "parameters": rows,
        }


def plan(
    experiment: Experiment, topology: str, program: str | pathlib.Path | None = None
) -> Plan:
    """Compiles the training step for a slice of chips that need not be there.

    The data may be elsewhere too, see `jaxformer.data.stand_in`.

    Args:
      experiment: its `mesh` lays the devices out.
      topology: such as "v5p:8x8x8", see `chips.find`.
      program: a file that the compiled program's text is written to.

    Raises:
      InputError: no such topology, a mesh or a batch that does not fit, data of unknown
        shape; all before anything is compiled.
    """
    if program is not None:
        with writing():  # A compile takes minutes: what is wrong with the file is told now.
            pathlib.Path(program).parent.mkdir(parents=True, exist_ok=True)
            pathlib.Path(program).touch()
    there = chips.find(topology)
    batch = stand_in.shapes(experiment.data, experiment.batch_size)
    made = laid_out(experiment, batch, list(there.devices))
    memory = lasting(made, batch, int(there.chip.hbm / there.chip.devices))
    found: Cost | None = None
    if memory.state < memory.limit:  # Else there is nothing to ask the compiler.
        compiled = _compile(made, batch)
        if isinstance(compiled, str):
            memory = dataclasses.replace(memory, temporaries=_lacking(compiled, memory))
        else:
            memory = measured(memory, compiled)
            text = compiled.as_text()
            if program is not None:
                with writing():
                    pathlib.Path(program).write_text(text)
            found = cost(Program(text), made.mesh, there)
    return Plan(
        topology=topology,
        chips=there.chips,
        mesh={name: size for name, size in made.mesh.shape.items() if size > 1},
        batch_size=experiment.batch_size,
        accumulate=experiment.accumulate,
        remat=getattr(experiment.model, "remat", None),
        tokens=math.prod(batch["tokens"].shape) if "tokens" in batch else None,
        memory=memory,
        explanation=made.explanation,
        model_flops=model_flops(experiment, made.inputs),
        peak=there.chip.flops * there.chips,
        cost=found,
    )


def laid_out(experiment: Experiment, batch: dict[str, Any], devices) -> Setup:
    """`setup`, with all that can be wrong before a compile found."""
    missing = [name for name in experiment.objective.inputs if name not in batch]
    if missing:
        raise InputError(
            f"the objective wants {missing[0]!r} of a batch, which has {', '.join(batch)}; "
            "add the transform that makes it"
        )
    made = setup(experiment, arguments(experiment.objective, batch), devices)
    check_batch(experiment, made)
    return made


def lasting(made: Setup, batch: dict[str, Any], limit: int) -> Memory:
    """The memory that needs no compiler to be known; temporaries are None."""
    whole = made.batch_ways
    return Memory(
        parameters=held(made.state.params),
        optimizer=held(made.state.opt_state),
        average=held(made.state.ema),
        batch=sum(math.prod(x.shape) * x.dtype.itemsize for x in batch.values()) // whole,
        temporaries=None,
        program=0,
        limit=limit,
    )


def measured(memory: Memory, compiled: Any) -> Memory:
    """With what the compiler allots for a program, for a TPU or for a CPU."""
    stats = compiled.memory_analysis()
    own = stats.output_size_in_bytes - stats.alias_size_in_bytes
    return dataclasses.replace(
        memory,
        temporaries=stats.temp_size_in_bytes + max(0, own),
        program=stats.generated_code_size_in_bytes,
    )


def held(tree: Any) -> int:
    """Bytes that each device holds of arrays with a place."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )


def _compile(made: Setup, batch: dict[str, Any]) -> Any:
    """The program, or the compiler's words where memory does not suffice."""
    lowered = made.lower(batch)
    with chips.uncached():
        try:
            return lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if (match := re.search(r"Used \S+ of \S+ vmem", str(error))) is not None:
                raise InputError(
                    f"a kernel does not fit the chip's fast memory ({match[0].lower()}); leave "
                    "each chip fewer heads (a greater tensor), or take another chip"
                ) from error
            if "scoped vmem limit" in str(error):
                raise InputError(
                    "a kernel that the compiler joins with a collective does not fit what it "
                    "then gives of the chip's fast memory; set LIBTPU_INIT_ARGS="
                    "--xla_tpu_scoped_vmem_limit_kib=49152, here and where it runs"
                ) from error
            if "RESOURCE_EXHAUSTED" in str(error) or "memory" in str(error):
                return str(error)
            raise


def _lacking(words: str, memory: Memory) -> int | None:
    """Temporaries by what the compiler says that it would use."""
    match = re.search(r"Used ([\d.]+)([KMG]) of [\d.]+[KMG] hbm", words)
    if match is None:
        return None
    used = float(match[1]) * 2 ** {"K": 10, "M": 20, "G": 30}[match[2]]
    return max(0, int(used) - memory.state - memory.batch)
