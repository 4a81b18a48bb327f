"""What a compiled program sends between devices, read out of its text (XLA's HLO).

`collectives(text, mesh)` lists every all-gather, all-reduce, reduce-scatter, all-to-all and collective-permute with the
mesh axes that it spans, its bytes and how often it runs: that of a block runs once per layer of a scanned model.
"""

import itertools
import math
import re
from dataclasses import dataclass

import numpy as np
from jax.sharding import Mesh

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "c64": 64, "c128": 128}  # others end in their number of bits


@dataclass(frozen=True)
class Collective:
    """One communication between devices.

    Attributes:
      kind: one of `KINDS`.
      axes: of the mesh, along which the devices that talk to each other lie; empty where they are some of those only.
      devices: that talk to each other.
      shapes: of the whole arrays, such as "f32[64,256]": gathered, summed, or exchanged.
      num_bytes: of these.
      times: that it runs in one step.
      in_loop: whether it is inside a loop, such as that over the layers.
      op_name: where it comes from in the program.
    """

    kind: str
    axes: tuple[str, ...]
    devices: int
    shapes: tuple[str, ...]
    num_bytes: int
    times: int
    in_loop: bool
    op_name: str

    @property
    def sent_bytes(self) -> float:
        """What one device sends each time, in a ring: (n - 1) / n of the array, twice that for a sum everywhere."""
        if self.kind == "collective-permute":
            return float(self.num_bytes)
        passes = 2 if self.kind == "all-reduce" else 1
        return passes * self.num_bytes * (self.devices - 1) / self.devices


def collectives(text: str, mesh: Mesh) -> list[Collective]:
    """The collectives of a compiled program, in the order of its text.

    Args:
      text: `compiled.as_text()`.
      mesh: that it was compiled for.
    """
    bodies = _computations(text)
    times = _times(bodies)
    found: dict[str, Collective] = {}
    for name, lines in bodies.items():
        for line in lines:
            match = re.search(rf"%?([\w.-]+) = (.*?) ({'|'.join(KINDS)})(-start)?\(", line)
            if match and name in times:
                # TPU programs spread one collective over several fusions, which share its channel.
                channel = re.search(r"channel_id=(\d+)", line)
                key = channel[0] if channel else f"{name}/{match[1]}"
                # A sum of which each device keeps its part is a reduce-scatter; TPU programs say so by this name.
                kind = "reduce-scatter" if name.startswith("all-reduce-scatter") else match[3]
                found.setdefault(key, _collective(kind, bool(match[4]), match[2], line, times[name], mesh))
    return list(found.values())


def _collective(kind: str, start: bool, shape: str, line: str, times: tuple[int, bool], mesh: Mesh) -> Collective:
    shapes = re.findall(r"(\w+\[[\d,]*\])", shape)
    if start and kind == "all-gather":  # returns its operands and its results
        shapes = shapes[len(shapes) // 2 :]
    elif start and kind == "collective-permute":
        shapes = shapes[1:2]
    groups = _groups(line)
    size = sum(map(_bytes, shapes))
    if kind == "reduce-scatter" and f" {kind}" in line:  # its result is a part
        size *= len(groups[0])
    op_name = re.search(r'op_name="([^"]*)"', line)
    return Collective(
        kind=kind,
        axes=_axes(kind, groups, mesh),
        devices=len(groups[0]),
        shapes=tuple(shapes),
        num_bytes=size,
        times=times[0],
        in_loop=times[1],
        op_name=op_name[1] if op_name else "",
    )


def _computations(text: str) -> dict[str, list[str]]:
    """Name of a computation -> its lines; the entry's name is "ENTRY"."""
    bodies: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.-]+) .*\{$", line)
        if head and not line.startswith("HloModule"):
            lines = bodies["ENTRY" if head[1] else head[2]] = []
        else:
            lines.append(line)
    return bodies


def _times(bodies: dict[str, list[str]]) -> dict[str, tuple[int, bool]]:
    """Computation -> how often it runs, and whether inside a loop; a loop of unknown length counts once."""
    times = {"ENTRY": (1, False)}
    waiting = ["ENTRY"]
    while waiting:
        name = waiting.pop()
        for line in bodies[name]:
            is_loop = " while(" in line
            runs = (times[name][0] * (_trips(line, bodies) if is_loop else 1), times[name][1] or is_loop)
            for called in set(re.findall(r"%([\w.-]+)", _after_operands(line))) & bodies.keys():
                if runs > times.get(called, (0, False)):
                    times[called] = runs
                    waiting.append(called)
    return times


def _trips(line: str, bodies: dict[str, list[str]]) -> int:
    """How often a loop runs, as XLA noted it or counted from 0 up to the constant in its condition; 1 if unclear."""
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', line):
        return int(known[1])
    condition, body = (bodies[re.search(rf"{which}=%?([\w.-]+)", line)[1]] for which in ("condition", "body"))  # type: ignore[index]
    compare = re.search(r"compare\(%([\w.-]+), %([\w.-]+)\), direction=LT", "\n".join(condition))
    if compare is None:
        return 1
    end, place = _constant(condition, compare[2]), re.search(r"index=(\d+)", _definition(condition, compare[1]))
    if end is None or place is None:
        return 1
    results = re.findall(r"%([\w.-]+)", next(x for x in body if x.startswith("  ROOT")).rpartition(" tuple(")[2])
    steps = re.findall(r"%([\w.-]+)", _definition(body, results[int(place[1])]).partition("add(")[2].partition(")")[0])
    step = next((found for name in steps if (found := _constant(body, name)) is not None), 1)
    return -(-end // step)


def _definition(lines: list[str], name: str) -> str:
    """The right side of the line that defines a name."""
    return next((x.partition(" = ")[2] for x in lines if x.strip().removeprefix("ROOT ").startswith(f"%{name} = ")), "")


def _constant(lines: list[str], name: str) -> int | None:
    """The value of a name that is a constant."""
    value = re.search(r"[su]32\[\]\S* constant\((\d+)\)", _definition(lines, name))
    return int(value[1]) if value else None


def _after_operands(line: str) -> str:
    """The attributes of an instruction: `calls=`, `body=`, `to_apply=` and so on."""
    return line.partition("), ")[2]


def _groups(line: str) -> list[list[int]]:
    """The groups of devices that talk to each other; XLA writes them in four ways."""
    if pairs := re.search(r"source_target_pairs=\{(\{[^=]*?\})\}", line):
        moved = [pair for pair in _braces(pairs[1]) if pair[0] != pair[1]]
        return moved or [[0]]
    if listed := re.search(r"replica_groups=\{(\{[^=]*?\})\}", line):
        return _braces(listed[1])
    if counted := re.search(r"replica_groups=(\[[^ ]*?\]<=\[[\d,]*\](?:T\([\d,]*\))?)", line):
        return _iota(counted[1]).tolist()
    if named := re.search(r"replica_groups=mesh\[([^]]*)\](?:, device_ids=\((.*?\]\S*?)\))? \{([^}]*)\}", line):
        return _named_groups(*named.groups())
    return [[0]]


def _braces(text: str) -> list[list[int]]:
    return [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", text)]


def _iota(text: str) -> np.ndarray:
    """Reads `[4,2]<=[2,2,2]T(2,1,0)`: 0, 1, ... in a shape, its axes exchanged, in another shape."""
    shape, _, source = text.partition("<=")
    dims, _, order = source.partition("T")
    ids = np.arange(math.prod(_numbers(dims))).reshape(_numbers(dims))
    return (ids.transpose(_numbers(order)) if order else ids).reshape(_numbers(shape))


def _named_groups(axes: str, device_ids: str | None, spanned: str) -> list[list[int]]:
    """Reads `mesh['a'=2,'b'=4], device_ids=([2,4]T(1,0)) {'b'}`; part of an axis is written `'b':(1)2`."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", axes)}
    parts = {
        name: (int(before or 1), int(size or sizes[name]))
        for name, before, size in re.findall(r"'([^']*)'(?::\((\d+)\)(\d+))?", spanned)
    }
    shape, across = [], []  # every axis as what is before the part, the part, and what is after it
    for name, size in sizes.items():
        before, part = parts.get(name, (1, 1))
        across.append(len(shape) + 1)
        shape += [before, part, size // before // part]
    total = math.prod(sizes.values())
    ids = _iota(f"[{total}]<={device_ids}") if device_ids else np.arange(total)
    return np.moveaxis(ids.reshape(shape), across, range(-len(across), 0)).reshape(-1, _spanned(parts)).tolist()


def _spanned(parts: dict[str, tuple[int, int]]) -> int:
    return math.prod(part for _, part in parts.values())


def _numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def _axes(kind: str, groups: list[list[int]], mesh: Mesh) -> tuple[str, ...]:
    """The mesh axes along which the members of the groups differ, where the groups are all devices along these."""
    coordinates = np.stack(np.unravel_index(np.arange(mesh.size), mesh.devices.shape), -1)
    differ = np.zeros(len(mesh.axis_names), bool)
    for a, b in itertools.chain.from_iterable(map(itertools.pairwise, groups)):
        differ |= coordinates[a] != coordinates[b]
    axes = tuple(name for name, d in zip(mesh.axis_names, differ) if d)
    if kind == "collective-permute":
        return axes
    return axes if math.prod(mesh.shape[axis] for axis in axes) == len(groups[0]) else ()


def _bytes(shape: str) -> int:
    dtype, _, dims = shape.rstrip("]").partition("[")
    bits = BITS[dtype] if dtype in BITS else int(re.sub(r"^\D+|\D.*$", "", dtype[1:]) or 8)
    return math.prod(_numbers(dims)) * bits // 8
