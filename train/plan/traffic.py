"""What a program compiled for TPU moves to and from HBM, read from its text.

The compiler notes where every array lives, so that each instruction tells what it reads and writes there. The bytes
that it counts itself have more: what never leaves VMEM, and of a row that is looked up or written the seven beside it.
Fusions are taken to read an operand once, as theirs are taken by the compiler, too.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

from train.plan.hlo import BYTES, Instruction, parse

_ARRAY = re.compile(r"\b([a-z]+\d+[a-z\d]*|pred)\[([\d,]*)\](?:\{([^}]*)\})?")
# They move nothing, or what they say is counted where it is used.
_FREE = {"parameter", "constant", "bitcast", "tuple", "get-tuple-element", "after-all"}
_PARTS = {"gather", "slice", "dynamic-slice"}  # read as much as they make
_UPDATES = {"scatter": 2, "dynamic-update-slice": 1}  # write in place; which operand it is that they write


def hbm_bytes(text: str) -> float:
    """Bytes that one execution of `compiled.as_text()` reads from HBM and writes to it, without those of kernels.

    Raises ValueError if the program has loops or branches: what they do is only known when they run.
    """
    computations, entry = parse(text)
    return _Reader(computations, entry).total()


@dataclasses.dataclass(frozen=True)
class _Array:
    bytes: float
    in_hbm: bool


class _Reader:
    def __init__(self, computations: Mapping[str, Sequence[Instruction]], entry: str) -> None:
        self._computations, self._entry = computations, computations[entry]
        self._types = {x.name: x.type for x in self._entry}

    def total(self) -> float:
        return sum(map(self._moved, self._entry))

    def _moved(self, x: Instruction) -> float:
        if x.operation in ("while", "conditional", "call"):
            raise ValueError(f"{x.name} may run any number of times")
        # Kernels fetch what they need; the other one only gives a name to what was copied in parts.
        kernel = x.operation == "custom-call" and ("tpu_custom_call" in x.rest or "ConcatBitcast" in x.rest)
        if x.operation in _FREE or x.operation.endswith("-done") or kernel:
            return 0
        if x.operation == "slice-start":  # (what is cut, the part, a semaphore)
            part = _arrays(x.type)[1]
            return part.bytes * (1 + part.in_hbm)
        if x.operation.endswith("-start"):  # (result, operand, …)
            return _in_hbm(x.type)
        return self._computed(x)

    def _computed(self, x: Instruction) -> float:
        """Of an instruction or a fusion, which may read parts of its operands, or write in one of them."""
        inside, names, types = [x], x.operands, self._types
        if x.operation == "fusion":
            inside = self._computations[x.attribute(r"calls=%([\w.\-]+)")]
            numbers = {int(each.rest.split(")")[0]): each.name for each in inside if each.operation == "parameter"}
            names, types = [numbers[i] for i in range(len(names))], {each.name: each.type for each in inside}
        moved, in_place = 0.0, 0.0
        for operand, name in zip(x.operands, names, strict=True):
            whole = _in_hbm(self._types[operand])
            read = written = 0.0
            for use, first in _uses(inside, name) if whole else []:
                kind = use.operation if first else ""
                if kind in _UPDATES:  # of parts of tiles, which are read, too
                    written += _size(types[use.operands[_UPDATES[kind]]])
                else:
                    read += _size(use.type) if kind in _PARTS else whole
            moved += min(read + written, whole) + written
            in_place += whole if written else 0
        return moved + max(0, _in_hbm(x.type) - in_place)


def _uses(inside: Sequence[Instruction], name: str) -> list[tuple[Instruction, bool]]:
    """What uses an array in the end, and whether as its first operand; a bitcast is no use."""
    found = []
    for x in inside:
        operands = x.operands
        if name in operands:
            found += _uses(inside, x.name) if x.operation == "bitcast" else [(x, operands.index(name) == 0)]
    return found


def _arrays(kind: str) -> list[_Array]:
    """The arrays of a type; those that are not in HBM have another place in their layout, such as S(1)."""
    return [
        _Array(BYTES.get(dtype, 0) * math.prod(int(size) for size in sizes.split(",") if size), "S(" not in layout)
        for dtype, sizes, layout in _ARRAY.findall(kind)
    ]


def _size(kind: str) -> float:
    return sum(array.bytes for array in _arrays(kind))


def _in_hbm(kind: str) -> float:
    return sum(array.bytes for array in _arrays(kind) if array.in_hbm)
