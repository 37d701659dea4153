"""A compiled program as text, read: its computations, loops, products and bytes."""

import dataclasses
import functools
import json
import math
import re
from collections.abc import Iterator

_BITS = {"pred": 8, "bf16": 16, "f8e4m3fn": 8, "f8e5m2": 8} | {
    f"{kind}{bits}": bits for kind in "suf" for bits in (2, 4, 8, 16, 32, 64)
}
SHAPE = re.compile(
    r"\b(pred|bf16|f8e4m3fn|f8e5m2|[suf]\d+)\[([\d,]*)\](?:\{([\d,]*)(?::([^}]*))?\})?"
)
_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_NAME = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")
_OPERAND = re.compile(r"%([\w.\-]+)")
# What moves nothing by itself.
FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all",
    "partition-id", "replica-id", "opt-barrier",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Shape:
    """An array of `dtype` and `sizes`; `bytes` of HBM, tile padding included."""

    dtype: str
    sizes: tuple[int, ...]
    bytes: int

    @property
    def data(self) -> int:
        """Bytes of what it holds, wherever it lies."""
        return math.prod(self.sizes) * _BITS[self.dtype] // 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a program: `rest` is all that stands behind its operands."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    rest: str
    inside: str  # what stands between the operands' parentheses.
    is_root: bool

    @functools.cached_property
    def calls(self) -> tuple[str, ...]:
        """The computations that it runs, a loop's condition left out."""
        found = re.findall(
            r"(?:calls|body|to_apply|true_computation|false_computation)=%?([\w.\-]+)",
            self.rest,
        )
        branches = re.search(r"branch_computations=\{([^}]*)\}", self.rest)
        return (*found, *(_OPERAND.findall(branches.group(1)) if branches else ()))

    @functools.cached_property
    def cycles(self) -> int | None:
        """The compiler's own estimate, where it has made one."""
        match = re.search(r'"estimated_cycles":"(\d+)"', self.rest)
        cycles = int(match.group(1)) if match else 0
        return cycles if 0 < cycles < 2**53 else None  # Near 2^63 stands for unknown.

    @property
    def cost(self) -> dict[str, int]:
        """What a kernel says of itself: its `flops`, if anything."""
        match = re.search(r'"cost_estimate":(\{[^}]*\})', self.rest)
        return {k: int(v) for k, v in json.loads(match.group(1)).items()} if match else {}


class Program:
    """The computations of a program by name; `entry` is the one that runs."""

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        lines: list[Instruction] = []
        for line in text.splitlines():
            if line and not line[0].isspace():
                head = _HEAD.match(line)
                if head:
                    lines = self.computations.setdefault(head.group(2), [])
                    self.entry = head.group(2) if head.group(1) else self.entry
            elif (made := _instruction(line)) is not None:
                lines.append(made)
        self._named = {
            name: {i.name: i for i in lines} for name, lines in self.computations.items()
        }
        self._users: dict[str, dict[str, list[Instruction]]] = {}
        self._parameters: dict[str, dict[int, Instruction]] = {}
        for name, lines in self.computations.items():
            users = self._users.setdefault(name, {})
            for i in lines:
                for operand in dict.fromkeys(i.operands):
                    users.setdefault(operand, []).append(i)
            self._parameters[name] = {
                int(i.inside): i for i in lines if i.opcode == "parameter"
            }

    def walk(self) -> Iterator[tuple[str, int]]:
        """Every computation that runs on its own, and how often; not those of fusions."""
        yield from self._walk(self.entry, 1)

    def _walk(self, name: str, times: int) -> Iterator[tuple[str, int]]:
        yield name, times
        for line in self.computations[name]:
            if line.opcode == "while":
                for body in line.calls:
                    yield from self._walk(body, times * self.trips(line))
            elif line.opcode in ("call", "conditional", "async-start"):
                for called in line.calls:
                    yield from self._walk(called, times)

    def trips(self, loop: Instruction) -> int:
        """How often a loop goes round: the bound that its condition compares with."""
        known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest)
        if known:
            return int(known.group(1))
        condition = re.search(r"condition=%?([\w.\-]+)", loop.rest)
        lines = self.computations.get(condition.group(1), []) if condition else []
        bounds = [
            int(line.inside)
            for line in lines
            if line.opcode == "constant" and line.inside.isdecimal()
        ]
        return max([1, *bounds])

    def flops(self, line: Instruction, where: str) -> int:
        """Of the products of matrices in an instruction, those it calls included."""
        if line.opcode == "convolution":
            return _convolution(line, [self._shape(o, where) for o in line.operands[:2]])
        if line.opcode == "dot":
            return _dot(line, self._shape(line.operands[0], where))
        if line.opcode != "fusion":
            return 0
        return sum(self.flops(i, c) for c in line.calls for i in self.computations[c])

    def moved(self, line: Instruction, where: str) -> int:
        """HBM bytes that an instruction reads and writes, what it slices by the slice."""
        if line.opcode in FREE or line.opcode.endswith("-done"):
            return 0
        if line.opcode in ("while", "call", "conditional", "async-start"):
            return 0
        if line.opcode == "fusion":
            return self._fused(line, where)
        made = sum(s.bytes for s in line.shapes)
        read = [self._shape(o, where) for o in line.operands]
        if line.opcode in ("dynamic-slice", "slice", "gather"):
            return 2 * made
        if line.opcode == "dynamic-update-slice":
            return 2 * read[1].bytes if len(read) > 1 and read[1] else made
        if line.opcode in ("copy-start", "slice-start"):
            return 2 * max((s.bytes for s in line.shapes[:1]), default=0)
        if line.opcode.endswith("-start"):
            return 0
        return made + sum(s.bytes for s in read if s)

    def _fused(self, line: Instruction, where: str) -> int:
        """Of a fusion: what is only sliced counts by its slices, read or replaced."""
        called = line.calls[0]
        total = 0
        for number, operand in enumerate(line.operands):
            size = self._shape(operand, where)
            if size is not None and size.bytes:
                total += min(size.bytes, self._read(called, number))
        root = next(i for i in self.computations[called] if i.is_root)
        parts = root.operands if root.opcode == "tuple" else (root.name,)
        if len(parts) != len(line.shapes):  # A fusion of fusions, or a sort.
            return total + sum(s.bytes for s in line.shapes)
        return total + sum(
            min(s.bytes, self._written(called, part)) if s.bytes else 0
            for s, part in zip(line.shapes, parts, strict=True)
        )

    def _read(self, called: str, number: int) -> int:
        """Bytes that a computation looks at of its parameter of that number."""
        parameter = self._parameters[called][number]
        whole = sum(s.bytes or s.data for s in parameter.shapes)
        return self._used(called, parameter.name, whole)

    def _used(self, called: str, name: str, whole: int) -> int:
        total = 0
        for user in self._users[called].get(name, ()):
            if user.opcode in ("dynamic-slice", "slice", "gather"):
                total += sum(s.data for s in user.shapes)
            elif user.opcode == "bitcast":
                total += self._used(called, user.name, whole)
            elif user.opcode == "fusion":
                total += self._read(user.calls[0], user.operands.index(name))
            elif user.opcode != "dynamic-update-slice" or user.operands[0] != name:
                return whole
        return min(total, whole)

    def _written(self, called: str, name: str) -> int:
        """Bytes that a computation writes of a result: a part, where one is replaced."""
        made = self._named[called][name]
        if made.opcode == "bitcast":
            return self._written(called, made.operands[0])
        if made.opcode == "dynamic-update-slice":
            part = self._shape(made.operands[1], called)
            return part.data if part else made.shapes[0].data
        if made.opcode == "fusion" and len(made.shapes) == 1:
            inner = made.calls[0]
            return self._written(
                inner, next(i.name for i in self.computations[inner] if i.is_root)
            )
        return max((s.bytes or s.data) for s in made.shapes)

    def _shape(self, operand: str, where: str) -> Shape | None:
        """Of an operand that is one array."""
        made = self._named[where].get(operand)
        return made.shapes[0] if made is not None and len(made.shapes) == 1 else None

    def shapes(self, line: Instruction, where: str) -> list[Shape]:
        """Of all operands that are arrays."""
        found = (self._shape(o, where) for o in line.operands)
        return [shape for shape in found if shape is not None]


def _instruction(line: str) -> Instruction | None:
    head = _NAME.match(line)
    if head is None:
        return None
    start = head.end()
    stop = _closing(line, start) if line[start] == "(" else line.find(" ", start)
    opens = line.find("(", stop)
    if opens < 0:
        return None
    closes = _closing(line, opens)
    inside = line[opens + 1 : closes - 1]
    return Instruction(
        name=head.group(2),
        opcode=line[stop:opens].strip(),
        shapes=tuple(_shape(m) for m in SHAPE.finditer(line[start:stop])),
        operands=tuple(_OPERAND.findall(inside)),
        rest=line[closes:],
        inside=inside,
        is_root=bool(head.group(1)),
    )


def _closing(line: str, start: int) -> int:
    """Behind the parenthesis that closes the one at `start`."""
    depth = 0
    for i in range(start, len(line)):
        if line[i] == "(":
            depth += 1
        elif line[i] == ")":
            depth -= 1
            if not depth:
                return i + 1
    return len(line)


def _shape(match: re.Match) -> Shape:
    sizes = tuple(int(d) for d in match.group(2).split(",") if d)
    return Shape(match.group(1), sizes, physical_bytes(match))


def physical_bytes(shape: re.Match) -> int:
    """Bytes of an array as it lies in HBM, padded to whole tiles; 0 if it lies elsewhere."""
    kind, dims, order, layout = shape.groups()
    sizes = [int(d) for d in dims.split(",") if d]
    if layout and re.search(r"S\(\d+\)", layout):
        return 0
    tile = re.search(r"T\((\d+)(?:,(\d+))?\)", layout or "")
    if tile and sizes:
        minor = [int(i) for i in order.split(",")]
        for axis, n in zip(minor, [int(t) for t in tile.groups()[::-1] if t], strict=False):
            sizes[axis] = math.ceil(sizes[axis] / n) * n
    return math.prod(sizes) * _BITS[kind] // 8


def _dot(line: Instruction, left: Shape | None) -> int:
    match = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", line.rest)
    if left is None or match is None:
        return 0
    summed = math.prod(left.sizes[int(d)] for d in match.group(1).split(",") if d)
    return 2 * math.prod(line.shapes[0].sizes) * summed


def _convolution(line: Instruction, read: list[Shape | None]) -> int:
    """Two for each product that is not with padding."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", line.rest)
    left, right = read
    if labels is None or left is None or right is None:
        return 0
    ins, kernel, outs = labels.groups()
    made = line.shapes[0].sizes
    window = _window(line.rest, sum(c.isdigit() for c in ins))
    pairs = 1
    for d, part in enumerate(window):
        at = [names.index(str(d)) for names in (ins, kernel, outs)]
        pairs *= _pairs(left.sizes[at[0]], made[at[2]], **part)
    groups = re.search(r"batch_group_count=(\d+)", line.rest)
    rows = made[outs.index("b")] * made[outs.index("f")]
    summed = right.sizes[kernel.index("i")]
    return 2 * rows * summed * pairs // (int(groups.group(1)) if groups else 1)


def _window(rest: str, dims: int) -> list[dict[str, int]]:
    text = re.search(r"window=\{([^}]*)\}", rest)
    given = dict(p.split("=") for p in text.group(1).split()) if text else {}

    def numbers(name: str, default: str) -> list[str]:
        return given[name].split("x") if name in given else [default] * dims

    pads = [p.split("_") for p in numbers("pad", "0_0")]
    return [
        {
            "size": int(size),
            "low": int(low),
            "stride": int(stride),
            "dilate": int(d),
            "hole": int(h),
        }
        for size, (low, _), stride, d, h in zip(
            numbers("size", "1"),
            pads,
            numbers("stride", "1"),
            numbers("lhs_dilate", "1"),
            numbers("rhs_dilate", "1"),
            strict=True,
        )
    ]


def _pairs(read: int, made: int, *, size: int, low: int, stride: int, dilate: int, hole: int):
    """How often an element of the window meets one of the array, along one dimension."""
    count = 0
    for tap in range(size):
        # Places: i * stride + tap * hole - low = j * dilate, 0 <= j < read, 0 <= i < made.
        for i in range(made) if max(stride, dilate) > 1 else ():
            place = i * stride + tap * hole - low
            count += place % dilate == 0 and 0 <= place // dilate < read
        if max(stride, dilate) == 1:
            shift = tap * hole - low
            count += max(0, min(made, read - shift) - max(0, -shift))
    return count
