"""A compiled program read as text: its products, its memory traffic and its collectives, loops counted by their trips.

XLA's own `cost_analysis` counts the body of a loop once, and says nothing of collectives. Here each computation counts as
often as its callers run it. The number of trips is what the program says (`known_trip_count`), or else the constant with
which the loop's condition compares its counter; a loop that has neither counts once and is named in `unknown_loops`. Both
branches of a conditional count.
"""

import functools
import math
import re
from dataclasses import dataclass, field

import numpy as np

BITS = {"pred": 8, "bf16": 16, "token": 0, "opaque": 0}
SHAPE = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?")
INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)$")
COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{\s*$")
COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute", "ragged-all-to-all")
CALLED = re.compile(r"(?:calls|to_apply|condition|body|true_computation|false_computation)=%?([\w.\-]+)")
# These move nothing by themselves, or their work is that of what they call.
FREE = set(
    "parameter constant tuple get-tuple-element bitcast while conditional call after-all partition-id iota broadcast "
    "opt-barrier send recv".split()
)


@dataclass
class Instruction:
    """One line of a computation."""

    name: str
    kind: str
    type: str
    rest: str  # operands and attributes, as written
    operands: list[str]
    root: bool


@dataclass
class Program:
    """Computations by name; `entry` is the first to run."""

    computations: dict[str, list[Instruction]] = field(default_factory=dict)
    entry: str = ""

    @functools.cached_property
    def types(self) -> dict[str, dict[str, str]]:
        return {name: {i.name: i.type for i in body} for name, body in self.computations.items()}


@dataclass(frozen=True)
class Collective:
    """One collective of the program: bytes that a device sends each time, and how often it runs."""

    kind: str
    axes: tuple[str, ...]  # mesh axes along which devices exchange; "dcn": between slices
    bytes: float
    times: float
    groups: tuple[tuple[int, ...], ...] = ()  # devices that exchange with one another, as places in the mesh; pairs


def parse(text: str) -> Program:
    """The text of an HLO module, as `compiled.as_text()` gives it."""
    program, current = Program(), None
    for line in text.splitlines():
        if header := COMPUTATION.match(line):
            current = program.computations.setdefault(header[2], [])
            program.entry = header[2] if header[1] else program.entry
        elif (match := INSTRUCTION.match(line)) and current is not None:
            root, name, kind, rest = match[1], match[2], match[4], match[5]
            operands = re.findall(r"%([\w.\-]+)", rest[: _closing(rest)])
            current.append(Instruction(name, kind, match[3], rest, operands, bool(root)))
    return program


def _closing(text: str) -> int:
    """Where the parenthesis closes that was opened before `text`."""
    depth = 1
    for position, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return position
    return len(text)


def size(type_text: str, memory: bool = False) -> float:
    """Bytes of a type; with `memory`, only of what lies in the device's main memory and not in one of its caches."""
    total = 0.0
    for kind, dims, layout in SHAPE.findall(type_text):
        if memory and re.search(r"S\([1-9]", layout or ""):
            continue
        digits = re.search(r"\d+", kind.removeprefix("bf"))
        bits = BITS.get(kind, int(digits[0]) if digits else 0)
        total += math.prod(dims_of(dims)) * max(bits, 4 if bits else 0) / 8
    return total


def dims_of(text: str) -> list[int]:
    """`4,8` to [4, 8]."""
    return [int(n) for n in text.split(",") if n]


# ---------------------------------------------------------------------------------------------------------------- loops
def runs(program: Program) -> tuple[dict[str, float], set[str], list[str]]:
    """(how often each computation runs, those that are parts of fusions, loops whose trips are unknown)."""
    times: dict[str, float] = dict.fromkeys(program.computations, 0.0)
    fused, unknown = set(), []
    order = _callers_first(program)
    times[program.entry] = 1.0
    for name in order:
        for instruction in program.computations[name]:
            trips = 1.0
            if instruction.kind == "while":
                known = trip_count(program, name, instruction)
                trips = known or 1.0
                if known is None and times[name]:
                    unknown.append(instruction.name)
            for called in callees(instruction):
                if called in times:
                    times[called] += times[name] * trips
                    if instruction.kind not in ("while", "conditional", "call", "async-start") or name in fused:
                        fused.add(called)
    return times, fused, unknown


def callees(instruction: Instruction) -> list[str]:
    """The computations that an instruction names."""
    names = CALLED.findall(instruction.rest)
    for group in re.findall(r"(?:branch_computations|called_computations)=\{([^}]*)\}", instruction.rest):
        names += re.findall(r"%?([\w.\-]+)", group)
    return names


def _callers_first(program: Program) -> list[str]:
    seen, order = set(), []

    def visit(name):
        stack = [(name, iter([c for i in program.computations[name] for c in callees(i)]))]
        seen.add(name)
        while stack:
            current, rest = stack[-1]
            for called in rest:
                if called in program.computations and called not in seen:
                    seen.add(called)
                    stack.append((called, iter([c for i in program.computations[called] for c in callees(i)])))
                    break
            else:
                order.append(current)
                stack.pop()

    visit(program.entry)
    return order[::-1]


def trip_count(program: Program, caller: str, loop: Instruction) -> float | None:
    """Trips of a `while`, or None."""
    if known := re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', loop.rest):
        return float(known[1])
    condition = program.computations.get(re.search(r"condition=%?([\w.\-]+)", loop.rest)[1], [])
    by_name = {i.name: i for i in condition}
    tests = [i for i in condition if i.kind == "compare" or (i.root and i.kind == "fusion")]
    if len(tests) != 1:
        return None
    values = [_constant(by_name.get(name)) for name in tests[0].operands]
    limits = [v for v in values if v is not None]
    if len(limits) != 1 or "direction=GT" in tests[0].rest:
        return None
    start = _start(program, caller, loop, by_name, tests[0])
    return max(float(limits[0] - start + ("direction=LE" in tests[0].rest)), 0.0)


def _constant(instruction: Instruction | None) -> int | None:
    if instruction is None or instruction.kind != "constant":
        return None
    match = re.match(r"(-?\d+)\)", instruction.rest)
    return int(match[1]) if match else None


def _start(program: Program, caller: str, loop: Instruction, by_name: dict, test: Instruction) -> int:
    """Where the counter of a loop begins; 0 when that is not written out."""
    counters = [by_name[n] for n in test.operands if n in by_name and by_name[n].kind == "get-tuple-element"]
    index = re.search(r"index=(\d+)", counters[0].rest) if counters else None
    outer = {i.name: i for i in program.computations[caller]}
    initial = outer.get(loop.operands[0]) if loop.operands else None
    if not index or initial is None or initial.kind != "tuple":
        return 0
    value = outer.get(initial.operands[int(index[1])])
    while value is not None and value.kind in ("copy", "bitcast") and value.operands:
        value = outer.get(value.operands[0])
    return _constant(value) or 0


# ------------------------------------------------------------------------------------------------------------- products
def products(program: Program, times: dict[str, float]) -> float:
    """FLOPs of a device in `dot` and `convolution`; kernels (custom calls) are not seen."""
    total = 0.0
    for name, body in program.computations.items():
        if times[name]:
            types = program.types[name]
            for instruction in body:
                if instruction.kind == "dot":
                    total += times[name] * _dot(instruction, types)
                elif instruction.kind == "convolution":
                    total += times[name] * _convolution(instruction, types)
    return total


def _shape(type_text: str) -> list[int]:
    return dims_of(SHAPE.search(type_text)[2])


def _dot(instruction: Instruction, types: dict[str, str]) -> float:
    contracted = dims_of(re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest)[1])
    left = _shape(types[instruction.operands[0]])
    return 2.0 * math.prod(_shape(instruction.type)) * math.prod(left[d] for d in contracted)


def _convolution(instruction: Instruction, types: dict[str, str]) -> float:
    """As the TPU compiler writes products: batch dimensions are windows, of which few positions hold an input."""
    left, right, out = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.rest).groups()
    shapes = [_shape(types[name]) for name in instruction.operands[:2]] + [_shape(instruction.type)]
    sizes = [dict(zip(labels, shape, strict=True)) for labels, shape in zip((left, right, out), shapes, strict=True)]
    window = re.search(r"window=\{([^}]*)\}", instruction.rest)
    settings = dict(item.split("=") for item in window[1].split()) if window else {}
    positions = 1.0
    for axis in sorted(label for label in out if label.isdigit()):
        number = {key: settings[key].split("x")[int(axis)] for key in settings}
        low = int(number.get("pad", "0_0").split("_")[0])
        steps = (int(number.get(key, 1)) for key in ("stride", "rhs_dilate", "lhs_dilate"))
        positions *= _valid(sizes[0][axis], sizes[1][axis], sizes[2][axis], low, *steps)
    return 2.0 * sizes[1]["i"] * sizes[2]["f"] * sizes[2]["b"] * positions


@functools.cache
def _valid(inputs: int, window: int, outputs: int, low: int, stride: int, spread: int, gap: int) -> int:
    """Pairs of output and window positions that meet an input, not padding nor a gap between inputs."""
    starts, total = np.arange(outputs) * stride - low, 0
    for offset in range(window):
        at = starts + offset * spread
        total += int(np.sum((at >= 0) & (at <= (inputs - 1) * gap) & (at % gap == 0)))
    return total


# --------------------------------------------------------------------------------------------------------------- memory
def traffic(program: Program, times: dict[str, float], fused: set[str]) -> float:
    """Bytes that a device reads from and writes to its main memory: operands and results of what is not fused.

    A slice of a large array counts as the slice, when reading and when updating in place. What lies in a cache is free.
    """
    total = 0.0
    for name, body in program.computations.items():
        if name in fused or not times[name]:
            continue
        types = program.types[name]
        for i in body:
            if i.kind in FREE or i.kind.endswith("-done") or i.kind.removesuffix("-start") in COLLECTIVES:
                continue
            total += times[name] * _touched(program, i, types)
    return total


def _touched(program: Program, i: Instruction, types: dict[str, str]) -> float:
    if i.kind.endswith("-start"):  # a copy or slice between main memory and a cache
        return size(i.type.split(", ")[-2] if i.kind == "slice-start" else types.get(i.operands[0], ""), memory=False)
    reads = [size(types.get(name, ""), memory=True) for name in i.operands]
    writes = size(i.type, memory=True)
    if i.kind in ("dynamic-slice", "gather", "slice"):
        return 2 * writes
    if i.kind == "dynamic-update-slice":
        return 2 * size(types.get(i.operands[1], ""))
    if i.kind == "fusion" and (called := callees(i)) and called[0] in program.computations:
        inner = program.computations[called[0]]
        for part in inner:
            if part.kind == "parameter" and (at := int(part.rest.split(")")[0])) < len(reads):
                users = [user for user in inner if part.name in user.operands]
                if users and all(u.kind in ("dynamic-slice", "gather") and u.operands[0] == part.name for u in users):
                    reads[at] = min(reads[at], sum(size(u.type) for u in users))
                elif into := [u for u in users if u.kind == "dynamic-update-slice" and u.operands[0] == part.name]:
                    update = size(program.types[called[0]].get(into[0].operands[1], ""))
                    writes = max(writes - size(part.type), 0.0) + update
                    reads[at] = 0.0
    return sum(reads) + writes


# ---------------------------------------------------------------------------------------------------------- collectives
def collectives(program: Program, times: dict[str, float], mesh_shape: dict[str, int]) -> list[Collective]:
    """What the devices of a mesh {axis: size} exchange. A collective that is spread over several fusions counts once.

    With several slices the mesh is that of one: the compiler numbers devices within their slice.
    """
    found, chained = [], {}
    for name, body in program.computations.items():
        for i in body:
            kind = i.kind.removesuffix("-start")
            if kind not in COLLECTIVES or not times[name]:
                continue
            groups = device_groups(i.rest, math.prod(mesh_shape.values()))
            each = sum(size(program.types[name].get(operand, "")) for operand in i.operands)
            if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"  # a fusion that keeps its own part of the sum
            moved = each * _share(kind, groups)
            item = Collective(kind, axes_of(groups, mesh_shape), moved, times[name], tuple(map(tuple, groups)))
            chain = re.search(r'chain_id="(\d+)"', i.rest)
            if chain:
                key = (chain[1], kind, re.search(r"channel_id=(\d+)", i.rest)[1])
                if key not in chained or chained[key].times < item.times:
                    chained[key] = item
            else:
                found.append(item)
    return [c for c in found + list(chained.values()) if c.bytes]


def between_slices(program: Program, times: dict[str, float], slices: int) -> list[Collective]:
    """What the devices of `slices` slices exchange over the data-centre network, under the axis "dcn".

    The TPU compiler makes of a collective that crosses slices one within each slice, which `collectives` sees, and a
    transfer from host to host, written as a `send` that names the collective it is part of.
    """
    found = []
    for name, body in program.computations.items():
        for i in body:
            if i.kind == "send" and times[name] and (kind := re.search(r'megascale_transfer_type="(\w+)"', i.rest)):
                kind = {"ONE_TO_ONE": "collective-permute"}.get(kind[1], kind[1].lower().replace("_", "-"))
                sent = size(program.types[name].get(i.operands[0], "")) * _share(kind, [list(range(slices))])
                found.append(Collective(kind, ("dcn",), sent, times[name]))
    return found


def _share(kind: str, groups: list[list[int]]) -> float:
    """Bytes that a device sends, over the bytes of its operand."""
    n = max((len(g) for g in groups), default=1)
    if kind == "collective-permute":
        return 1.0
    return {"all-gather": n - 1.0, "all-reduce": 2 * (n - 1) / n}.get(kind, (n - 1) / n)


def device_groups(attributes: str, devices: int) -> list[list[int]]:
    """Devices that exchange with one another, in any of the notations; a permutation gives its pairs."""
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", attributes):
        return [dims_of(pair) for pair in re.findall(r"\{([\d,]*)", pairs[1] + "}")]
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        ids = np.arange(math.prod(dims_of(iota[3]))).reshape(dims_of(iota[3]))
        return ids.transpose(dims_of(iota[4]) if iota[4] else None).reshape(int(iota[1]), int(iota[2])).tolist()
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\](?:[^{,]*) \{([^}]*)\}", attributes):
        sizes = dict((name, int(n)) for name, n in re.findall(r"'(\w+)'=(\d+)", named[1]))
        if math.prod(sizes.values()) == devices and "(" not in named[2]:
            chosen = [list(sizes).index(name) for name in re.findall(r"'(\w+)'", named[2])]
            others = [axis for axis in range(len(sizes)) if axis not in chosen]
            ids = np.arange(devices).reshape(list(sizes.values())).transpose(others + chosen)
            return ids.reshape(-1, math.prod(list(sizes.values())[axis] for axis in chosen)).tolist()
    if listed := re.search(r"replica_groups=\{(\{.*?\})\}", attributes):
        return [dims_of(group) for group in re.findall(r"\{([\d,]*)\}", listed[1])]
    return [list(range(devices))]


def axes_of(groups: list[list[int]], mesh_shape: dict[str, int]) -> tuple[str, ...]:
    """The mesh axes along which the devices of a group differ."""
    used = set()
    for group in groups:
        places = np.asarray(np.unravel_index(group, tuple(mesh_shape.values())))
        used |= {name for name, row in zip(mesh_shape, places, strict=True) if len(set(row.tolist())) > 1}
    return tuple(name for name in mesh_shape if name in used)
