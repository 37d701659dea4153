"""Cycles and HBM traffic of a TPU kernel: its final schedule, with the control flow executed.

A TPU core issues one bundle of instructions a cycle, in order. libtpu writes a kernel's
final bundles as text; the scalar unit alone decides which of them run, and how often. So
it is enough to execute the scalar instructions (counters, tests, branches), and every
loop over the grid, loop inside of the kernel and `pl.when` is counted as it will run,
whatever the kernel's author meant. What is not counted: waiting for memory.

What the scalars of a kernel's operands are (lists of tiles, lengths) may be given; a branch
on something that is not known raises `Unknown`.
"""

import bisect
import collections
import dataclasses
import re
from collections.abc import Callable, Mapping

import numpy as np

UNITS = ("MXU", "XLU", "VALU", "EUP", "VLOAD", "VSTORE")
GRANULE = 32  # bytes; what a copy counts in.
DELAY = 4  # bundles after a branch that still run.

_BUNDLE = re.compile(r"^ *(?:0x[0-9a-f]+|0) +(?:[A-Z]{2})?:?((?: >+)*) *\{", re.M)
_TARGET = re.compile(r"Start(?:/End empty)? region (\d+)")
_ENDED = re.compile(r"End region (\d+)")
_INSTRUCTION = re.compile(r"%([\w]+) = ([a-z][\w.]*) ?(.*)", re.S)
_PREDICATE = re.compile(r"^\((!?)(%\w+)(?:, [^)]*)?\),? ?|(?<=\]) \((!?)(%\w+)\)$")
_REGISTER = re.compile(r"_([sp]\d+)$")


class Unknown(Exception):
    """A branch depends on what only a run of the whole program would tell."""


@dataclasses.dataclass(frozen=True)
class Region:
    """Bundles in a row at one depth of loops; `share` of each unit's slots is in use."""

    first: int
    bundles: int
    depth: int
    share: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Run:
    """What one call of a kernel costs on one core.

    `cycles`: bundles issued. `moved`: HBM bytes read and written, every copy as often as
    it is started. `share`: of the slots of each unit over the whole call. `counts`: how
    often each bundle ran.
    """

    cycles: int
    moved: int
    share: dict[str, float]
    counts: np.ndarray


@dataclasses.dataclass(frozen=True)
class Kernel:
    """The final schedule of one kernel; `use` is slots used `[bundle, unit]`."""

    name: str
    text: str = dataclasses.field(repr=False)
    use: np.ndarray = dataclasses.field(repr=False)
    capacity: np.ndarray = dataclasses.field(repr=False)

    def regions(self) -> list[Region]:
        """The kernel in program order, cut where loops and guarded parts begin."""
        bundles = list(_BUNDLE.finditer(self.text))
        label = [re.match(r" *\S+ +[A-Z]{2}", m.group()) is not None for m in bundles]
        depth = [m.group(1).count(">") for m in bundles]
        starts = [
            i for i in range(len(bundles)) if i == 0 or label[i] or depth[i] > depth[i - 1]
        ]
        ends = [*starts[1:], len(bundles)]
        return [
            Region(a, b - a, depth[a], _share(self.use[a:b].sum(0), self.capacity, b - a))
            for a, b in zip(starts, ends, strict=True)
        ]

    def run(
        self, scalars: Mapping[int, np.ndarray] | None = None, core: int = 0, limit=20_000_000
    ) -> Run:
        """Executes the control flow.

        Args:
          scalars: values of operands that steer it, by the operand's index.
          core: which of a chip's cores; v5p has two.
          limit: of executed bundles with a scalar instruction in them.

        Raises:
          Unknown: a branch, or a copy, depends on a value that is not known.
          NotImplementedError: an instruction of control that this does not know.
        """
        counts, moved = _Machine(_parse(self.text), scalars or {}, core).execute(limit)
        cycles = int(counts.sum())
        share = _share((self.use * counts[:, None]).sum(0), self.capacity, cycles)
        return Run(cycles, moved, share, counts)


def read(name: str, bundles: str, utilisation: str) -> Kernel:
    """A kernel from the two texts that libtpu writes about it."""
    head, rows = utilisation.split("== UTILIZATION:\n")
    names, capacity = head.strip().splitlines()[-2:]
    columns = [[n.strip() for n in names.split(",")].index(unit) for unit in UNITS]
    use = np.array([[int(n) for n in row.split()] for row in rows.splitlines() if row.strip()])
    count = len(_BUNDLE.findall(bundles))
    if len(use) != count:
        raise ValueError(f"{name}: {count} bundles but {len(use)} rows of utilisation")
    return Kernel(name, bundles, use[:, columns], np.array(capacity.split(), int)[columns])


def on_cores(kernel: Kernel, scalars: Mapping[int, np.ndarray], cores: int) -> Run:
    """A run on a chip: the cycles of its slowest core, the bytes of all."""
    runs = [kernel.run(scalars, core) for core in range(cores)]
    slowest = max(runs, key=lambda run: run.cycles)
    return dataclasses.replace(slowest, moved=sum(run.moved for run in runs))


def _share(used, capacity, cycles):
    return {
        u: float(n / (c * max(cycles, 1)))
        for u, n, c in zip(UNITS, used, capacity, strict=True)
    }


@dataclasses.dataclass(frozen=True)
class _Address:
    """Somewhere in an operand of the kernel (in granules), or in scalar memory (in words)."""

    base: str
    offset: int = 0


@dataclasses.dataclass(frozen=True)
class _Step:
    """One scalar instruction: where the result goes, what is done, and when."""

    operation: str
    to: str | None
    inputs: tuple
    text: str
    predicate: tuple[str, bool] | None  # (register, the value that lets it happen)


def _parse(text: str) -> tuple[list[list[_Step]], dict[int, int]]:
    """Scalar instructions of every bundle, and the bundle at which each region begins."""
    marks = list(_BUNDLE.finditer(text))
    bundles, targets, after = [], {}, {}
    for i, (a, b) in enumerate(zip(marks, [*marks[1:], None], strict=True)):
        body = text[a.end() : b.start() if b else len(text)]
        for region in _TARGET.findall(body):
            targets[int(region)] = i
        for region in _ENDED.findall(body):  # what comes after it may be left unmarked.
            after.setdefault(int(region) + 1, i + 1)
        body = re.sub(r"/\* kRem \*/", ", 1", body)  # which of the two a division gives.
        body = re.sub(r"/\*.*?\*/", "", body, flags=re.S)
        steps = [_step(part) for part in body.split(";;")]
        bundles.append([s for s in steps if s is not None])
    return bundles, after | targets


def _step(text: str) -> _Step | None:
    """One instruction, or None for one that the scalar unit's path does not depend on."""
    found = _INSTRUCTION.search(text)
    if found is None:
        return None
    name, operation, rest = found.groups()
    register = _REGISTER.search(name)
    control = operation.startswith(("sbr", "scall", "sret", "sst", "sdivrem", "dma"))
    if not (register or control) or operation == "dma.done.wait":
        return None
    rest = re.sub(r"^\[thread:[^\]]*\] *", "", rest.split("}")[0].strip())
    predicate = None
    if match := _PREDICATE.search(rest):
        sign, held = match.group(1, 2) if match.group(2) else match.group(3, 4)
        predicate = (_name(held), not sign)
        rest = rest[: match.start()] + rest[match.end() :]
    inputs = tuple(_operand(a.strip()) for a in rest.split(","))
    return _Step(operation, register and register.group(1), inputs, rest, predicate)


def _name(text: str) -> str:
    """The register of `%s12_s3`; a value that has none keeps its name."""
    found = _REGISTER.search(text.lstrip("!%"))
    return found.group(1) if found else text.lstrip("!%")


def _operand(text: str) -> "str | int | _Address":
    if match := re.fullmatch(r"\[?#allocation(\d+)(?:_spill)?\]?", text):
        return _Address(match.group(1))
    if text.startswith("$"):
        return int(text[1:], 0)
    if re.fullmatch(r"-?\d+", text):
        return _signed(int(text))
    return ("!" if text.startswith("!") else "") + _name(text)


def _signed(value: int) -> int:
    return (value + 2**31) % 2**32 - 2**31


def _unsigned(value: int) -> int:
    return value % 2**32


_COMPARE: dict[str, Callable] = {
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
}
_ARITHMETIC: dict[str, Callable] = {
    "sadd": lambda a, b: a + b,
    "ssub": lambda a, b: a - b,
    "smul": lambda a, b: a * b,
    "sand": lambda a, b: a & b,
    "sor": lambda a, b: a | b,
    "sxor": lambda a, b: a ^ b,
    "smin": min,
    "smax": max,
    "sshll": lambda a, b: a << (b & 31),
    "sshra": lambda a, b: a >> (b & 31),
    "sshrl": lambda a, b: _unsigned(a) >> (b & 31),
}


class _Machine:
    """The scalar unit: registers, its memory, and where it stands."""

    def __init__(self, parsed, scalars: Mapping[int, np.ndarray], core: int):
        self.bundles, self.targets = parsed
        self.operands = {f"operand {i}": _words(s) for i, s in scalars.items()}
        self.registers: dict[str, int | bool | _Address | None] = {}
        # Allocation 0 is where a chip of two cores keeps which one this is.
        self.memory: dict[_Address, int | bool | _Address | None] = {_Address("0"): core}
        self.divided: collections.deque = collections.deque()
        self.moved = 0

    def execute(self, limit: int) -> tuple[np.ndarray, int]:
        """How often each bundle ran, and the HBM bytes that were moved."""
        total = len(self.bundles)
        busy = [i for i, steps in enumerate(self.bundles) if steps]
        change = np.zeros(total + 1, int)  # of the count, from one bundle to the next.
        entered = at = 0
        end, onward = total - 1, total  # the last bundle before a jump, and where to.
        while True:
            index = bisect.bisect_left(busy, at)
            while index < len(busy) and busy[index] <= end:
                limit -= 1
                if limit < 0:
                    raise Unknown("the kernel did not end within the limit of bundles")
                target = self._issue(self.bundles[busy[index]])
                if target is not None:
                    if onward < total:
                        raise NotImplementedError("a branch in the shadow of a branch")
                    end, onward = busy[index] + DELAY, self.targets[target]
                index += 1
            change[entered] += 1
            change[end + 1] -= 1
            if onward == total:
                return np.cumsum(change)[:total], self.moved
            entered = at = onward
            end, onward = total - 1, total

    def _issue(self, steps: list[_Step]) -> int | None:
        """Runs one bundle: all read before any writes. Gives a branch's region."""
        target, writes = None, []
        for step in steps:
            allowed = True
            if step.predicate is not None:
                register, wanted = step.predicate
                held = self.registers.get(register)
                allowed = None if held is None else bool(held) == wanted
            family = step.operation.split(".")[0]
            if family == "sbr":
                if step.operation != "sbr.rel":
                    raise NotImplementedError(f"the branch {step.operation}")
                if allowed is None:
                    raise Unknown(f"a branch on {step.predicate}: {step.text.strip()}")
                if allowed:
                    target = int(step.text.split("$region")[1].split()[0])
            elif family in ("scall", "sret"):
                raise NotImplementedError(f"the call {step.operation}")
            elif family == "dma":
                self._copy(step, allowed)
            elif family == "sst":
                address = self._address(step.text)
                if address is not None and allowed is not False:
                    value = self._value(step.inputs[-1]) if allowed else None
                    writes.append((self.memory, address, value))
            elif family == "sdivrem":
                self._divide(step)
            elif step.to is not None and family != "sphi":
                if allowed is False:
                    continue
                value = self._compute(family, step) if allowed else None
                if value is not _SAME:
                    writes.append((self.registers, step.to, value))
        for where, key, value in writes:
            where[key] = value
        return target

    def _value(self, operand: "str | int | _Address"):
        if not isinstance(operand, str):
            return operand
        if operand.startswith("!"):
            value = self.registers.get(operand[1:])
            return None if value is None else not value
        return self.registers.get(operand)

    def _address(self, text: str) -> _Address | None:
        """The word of scalar memory that `[smem:[#allocation4 + %s8]]` is."""
        found = re.match(r"\[smem:\[?([^\]]*?)\]", text.replace("[#", "#"))
        parts = (
            [self._value(_operand(p)) for p in found.group(1).split(" + ")] if found else [None]
        )
        address, *offsets = parts
        known = [o for o in offsets if isinstance(o, int)]
        if isinstance(address, _Address) and len(known) == len(offsets):
            return _Address(address.base, address.offset + sum(known))
        return None

    def _compute(self, family: str, step: _Step):
        if family == "sld":
            address = self._address(step.text)
            return None if address is None else self.memory.get(address)
        if family == "inlined_call_operand":
            name = "operand " + re.findall(r"index: (\d+)", step.text)[0]
            if step.text.startswith("<no memory space>"):  # one word, in the register itself.
                return self.operands.get(name, [None])[0]
            return _Address(name)
        if family == "spop":
            return self.divided.popleft() if self.divided else None
        if family == "int_to_ptr":
            return _SAME if step.inputs[0] == step.to else self._value(step.inputs[0])
        values = [self._value(i) for i in step.inputs]
        if family == "smov":
            return values[0]
        if family in ("por", "pnand", "pand", "pnor", "pxor", "pneg", "pmov"):
            return _logic(family, values)
        if family == "scalar_select":
            which, yes, no = values
            return None if which is None else yes if which else no
        address, by = values[0], values[-1]
        if isinstance(address, _Address) and isinstance(by, int):
            if family == "scalar_lea":
                return _Address(address.base, address.offset + by)
            if family == "sshll":  # from rows of 512 bytes to granules.
                return _Address(address.base, address.offset << by)
        if not all(isinstance(v, int) for v in values):
            return None
        if family == "scmp":
            _, how, kind = step.operation.split(".")[:3]
            if kind == "u32":
                values = [_unsigned(v) for v in values]
            return _COMPARE[how](*values)
        if family in _ARITHMETIC and len(values) == 2:
            if step.operation.endswith("u32") and family in ("smin", "smax"):
                values = [_unsigned(v) for v in values]
            return _signed(int(_ARITHMETIC[family](*values)))
        return None

    def _divide(self, step: _Step) -> None:
        """Quotient and remainder, or the last alone, for later instructions to fetch."""
        a, b = (self._value(i) for i in step.inputs[:2])
        if isinstance(a, int) and isinstance(b, int) and b:
            self.divided.extend([a % b] if len(step.inputs) > 2 else [a // b, a % b])
        else:
            self.divided.extend([None] * (4 - len(step.inputs)))

    def _copy(self, step: _Step, allowed: bool | None) -> None:
        """Counts a copy from or to HBM; one into scalar memory brings the scalars."""
        match = re.fullmatch(r"dma\.(\w+)_to_(\w+)", step.operation)
        if match is None:
            raise NotImplementedError(f"the copy {step.operation}")
        if allowed is False:
            return
        source, granules, to = (self._value(i) for i in step.inputs[:3])
        if allowed is None or not isinstance(granules, int):
            raise Unknown(f"a copy on {step.predicate} of {step.inputs[1]} granules")
        if match.group(2) == "smem" and isinstance(to, _Address):
            words: list[int | None] = [None] * (granules * GRANULE // 4)
            if isinstance(source, _Address):
                start = source.offset * GRANULE // 4
                held = self.operands.get(source.base, [])[start : start + len(words)]
                words[: len(held)] = held
            for i, word in enumerate(words):
                self.memory[_Address(to.base, to.offset + i)] = word
        if "hbm" in match.groups():
            self.moved += GRANULE * granules


_SAME = object()


def _logic(family: str, values: list):
    """Three-valued: what is settled by one side is known."""
    if family in ("pneg", "pmov"):
        value = values[0]
        return None if value is None else (not value) == (family == "pneg")
    if family == "pxor":
        return None if None in values else values[0] != values[1]
    negated, absorbing = family in ("pnand", "pnor"), family in ("por", "pnor")
    if absorbing in [v for v in values if v is not None]:
        result = absorbing
    elif None in values:
        return None
    else:
        result = not absorbing
    return result != negated


def _words(array: np.ndarray) -> list[int]:
    """An array as it lies in scalar memory, in words of 32 bits.

    Rows are padded to 128 words; of narrow types, two or four rows share one.
    """
    array = np.atleast_2d(np.asarray(array))
    if array.dtype == bool:
        array = array.astype(np.int32)
    shared = 4 // array.dtype.itemsize
    *lead, rows, width = array.shape
    spare = [(0, 0)] * len(lead) + [(0, -rows % shared), (0, -width % 128)]
    array = np.pad(array, spare)
    array = array.reshape(-1, shared, array.shape[-1]).swapaxes(1, 2)
    return [int(w) for w in np.ascontiguousarray(array).reshape(-1).view(np.int32)]
