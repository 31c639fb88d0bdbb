"""What a program compiled for TPU does, read from its text: cycles, kernels and collectives of one execution.

The compiler writes its own estimate of the cycles on every fusion; loops multiply it. Kernels of ours carry none.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

import numpy as np

_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
BYTES = {"pred": 1, "bf16": 2, "f16": 2, "f8e4m3fn": 1, "f8e5m2": 1} | {
    f"{kind}{bits}": bits / 8 for kind in "fsu" for bits in (4, 8, 16, 32, 64)
}
_ARRAY = re.compile(r"\b([a-z]+\d+[a-z\d]*|pred)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(ENTRY )?%([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = (.*)$")
_METADATA = re.compile(r"kernel_metadata=\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\}")
_OPERATION = re.compile(r" ([\w\-]+)\((.*)$")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """One kind of communication at one place of the program, as each device sees it.

    Attributes:
      kind: "all-gather", "all-reduce" and so on.
      bytes: of the result, each time.
      executions: how often it runs.
      group: the devices that one of them talks with, itself included; numbers in the order of the mesh.
      overlapped: the device computes meanwhile.
      between_slices: it goes over the data centre's network, between the same devices of all slices.
      where: the operation of the model that it belongs to.
    """

    kind: str
    bytes: float
    executions: int
    group: tuple[int, ...]
    overlapped: bool
    where: str
    between_slices: bool = False

    def received(self, size: int) -> float:
        """Bytes that each of `size` devices receives, each time: all of the result but its own part, which is what a
        scatter leaves; a sum that all get is a scatter and a gather."""
        parts = {"all-reduce": 2 * (size - 1) / size, "reduce-scatter": size - 1, "collective-permute": 1}
        return self.bytes * parts.get(self.kind, (size - 1) / size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """What one device does in one execution.

    Attributes:
      matmul_cycles, other_cycles: the compiler's estimate for fusions with and without a matrix product.
      kernels: executions of each Pallas kernel; their cycles are in neither.
      collectives: the communication, largest first.
    """

    matmul_cycles: float
    other_cycles: float
    kernels: Mapping[str, int]
    collectives: tuple[Collective, ...]


@dataclasses.dataclass(frozen=True)
class Instruction:
    """`%name = type operation(rest`, the rest being operands and attributes."""

    name: str
    type: str
    operation: str
    rest: str

    @property
    def operands(self) -> list[str]:
        """Names of what it is applied to."""
        depth = 1
        for i, letter in enumerate(self.rest):
            depth += (letter == "(") - (letter == ")")
            if depth == 0:
                return re.findall(r"%([\w.\-]+)", self.rest[:i])
        raise ValueError(f"{self.name} has no end: {self.rest[:80]}")

    def attribute(self, pattern: str, default: str = "") -> str:
        """The group of `pattern` in what follows the name of the operation."""
        match = re.search(pattern, self.rest)
        return match[1] if match else default


def read(text: str) -> Program:
    """The program of `compiled.as_text()`."""
    computations, entry = parse(text)
    return _Reader(computations).program(entry)


class _Reader:
    """Goes through a program from its entry, and counts."""

    def __init__(self, computations: dict[str, list[Instruction]]) -> None:
        self._computations = computations
        self._cycles = {True: 0.0, False: 0.0}
        self._kernels: dict[str, int] = {}
        self._collectives: dict[tuple[str, str], Collective] = {}

    def program(self, entry: str) -> Program:
        """What was counted, starting from the computation `entry`."""
        self._walk(entry, 1, entry)
        collectives = sorted(self._collectives.values(), key=lambda c: -c.bytes * c.executions)
        return Program(
            matmul_cycles=self._cycles[True],
            other_cycles=self._cycles[False],
            kernels=self._kernels,
            collectives=tuple(collectives),
        )

    def _walk(self, computation: str, times: int, path: str) -> None:
        for x in self._computations[computation]:
            if cycles := x.attribute(r'"estimated_cycles":"(\d+)"'):
                self._cycles[self._multiplies(x)] += int(cycles) * times
            if x.operation == "while":
                body, trips = x.attribute(r"body=%([\w.\-]+)"), self._trips(x.attribute(r"condition=%([\w.\-]+)"))
                self._walk(body, times * trips, f"{path}/{body}")
            elif x.operation in ("call", "conditional"):  # every branch counts
                for called in re.findall(r"%([\w.\-]+)", x.attribute(r"(?:to_apply=|branch_computations=\{)([^}]*)")):
                    if called in self._computations:
                        self._walk(called, times, path)
            elif "tpu_custom_call" in x.rest and x.operation == "custom-call":
                kernel = re.sub(r"[.\d]+$", "", x.name)
                self._kernels[kernel] = self._kernels.get(kernel, 0) + times
            self._communicate(x, times, path)

    def _communicate(self, x: Instruction, times: int, path: str) -> None:
        inside = [x, *self._inside(x)] if x.operation in ("fusion", "async-start") else [x]
        overlapped = x.operation.endswith("-start") or any("AsyncCollective" in each.rest for each in inside[1:])
        # The compiler's form of a reduce-scatter: a sum of which a device keeps its part, padded to whole tiles.
        scattered = x.attribute(r"calls=%(all-reduce-scatter)")
        for each in inside:
            # Between slices the host of each device does the rest: the program only sends and receives.
            sent = each.attribute(r'_xla_megascale_transfer_type="(\w+)"') if each.operation == "send" else ""
            kind = sent.lower().replace("_", "-") or each.operation.removesuffix("-start")
            if kind not in _KINDS and not sent:
                continue
            where, group = each.attribute(r'op_name="([^"]*)"'), _group(each.rest)
            # One collective can be spread over several fusions, which share its channel; outside of fusions, different
            # ones can share a channel, too.
            key = path, each.name if each is x else each.attribute(r"channel_id=(\d+)", each.name) + where
            known = self._collectives.get(key)
            self._collectives[key] = Collective(
                kind="reduce-scatter" if scattered else kind,
                bytes=_result_bytes(x if scattered else each, len(group)),
                executions=times,
                group=group,
                overlapped=overlapped or bool(known and known.overlapped),
                where=where,
                between_slices=bool(sent),
            )

    def _inside(self, x: Instruction) -> Iterator[Instruction]:
        for each in self._computations.get(x.attribute(r"calls=%([\w.\-]+)"), []):
            yield each
            yield from self._inside(each)

    def _multiplies(self, x: Instruction) -> bool:
        return any(each.operation in ("convolution", "dot") for each in (x, *self._inside(x)))

    def _trips(self, condition: str) -> int:
        """How often a loop runs: the one constant that its condition compares with."""
        instructions = [x for each in self._computations[condition] for x in (each, *self._inside(each))]
        constants = [re.match(r"(\d+)\)", x.rest) for x in instructions if x.operation == "constant"]
        return max((int(match[1]) for match in constants if match), default=1)


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """The instructions of each computation, and the name of the first that runs."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", None
    # What describes a kernel may have lines of its own, some of which look like the end of a computation.
    for line in _METADATA.sub("", text).splitlines():
        if head := _COMPUTATION.match(line):
            current = computations[head[2]] = []
            entry = head[2] if head[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (found := _INSTRUCTION.match(line)):
            kind, rest = _split_type(found[2])
            if operation := _OPERATION.match(rest):
                current.append(Instruction(found[1], kind, operation[1], operation[2]))
    return computations, entry


def _split_type(text: str) -> tuple[str, str]:
    """The type that an instruction starts with, which has no space unless it is a tuple, and the rest."""
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if letter == " " and depth == 0:
            return text[:i], text[i:]
    return text, ""


def _result_bytes(x: Instruction, group: int) -> float:
    total = sum(
        BYTES.get(dtype, 0) * math.prod(int(size) for size in sizes.split(",") if size)
        for dtype, sizes in _ARRAY.findall(x.type)
    )
    # A started one has its operand in its type, beside the result.
    return total * {"all-gather-start": group / (group + 1), "collective-permute-start": 0.5}.get(x.operation, 1)


def _group(rest: str) -> tuple[int, ...]:
    """The first of the groups of devices, in any of the notations of HLO; empty where all devices are one group."""
    if match := re.search(r"(?:replica_groups=\{|source_target_pairs=\{)\{([\d,]+)\}", rest):
        return _sizes(match[1])
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        dims, order = _sizes(match[2]), _sizes(match[3]) if match[3] else None
        ids = np.arange(math.prod(dims)).reshape(dims).transpose(order)
        return tuple(ids.reshape(_sizes(match[1]))[0].tolist())
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", rest):
        axes = {name: int(size) for name, size in re.findall(r"('\w+')=(\d+)", match[1])}
        ids = np.arange(math.prod(axes.values())).reshape(tuple(axes.values()))
        index = []
        for name, size in axes.items():
            part = re.search(rf"{name}(?::\((\d+)\)(\d+))?(?:,|$)", match[2])
            if not part:
                index.append([0])
            elif part[1]:  # the middle one of the three parts of an axis
                inner = size // (int(part[1]) * int(part[2]))
                index.append([i * inner for i in range(int(part[2]))])
            else:
                index.append(range(size))
        return tuple(ids[np.ix_(*index)].ravel().tolist())
    return ()


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))
