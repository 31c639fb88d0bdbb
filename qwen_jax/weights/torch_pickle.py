"""Reads the pickle in a file of torch.save as the data it is: nothing is imported, nothing is called by name.

A pickle is a program for a small stack machine. This is that machine with the opcodes of protocol 2 that torch.save
writes for a dictionary of tensors; each global name it may mention means a function or value of this module. The rest
of the language is refused. Every opcode adds at most one value, so the limit on opcodes is one on memory; values are
compared and walked only where their type is known, so nesting and sharing cost nothing.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import pickletools
import struct
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np

from qwen_jax.weights.tensors import TensorInfo, quoted

MAX_OPCODES = 250_000  # 7,000 tensors; a published file has some hundreds
MAX_NAME_BYTES = 200  # of a module and a name in it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Storage:
    """A flat array of the archive: `size` elements in the record `data/KEY`."""

    key: str
    dtype: np.dtype
    size: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A view of a storage; `offset` and `strides` count elements, and all elements lie inside the storage."""

    info: TensorInfo
    storage: Storage
    offset: int
    strides: tuple[int, ...]


def parse_state(data: bytes) -> dict[str, StoredTensor]:
    """The tensors of a state dict by name, in its order. Raises ValueError, in a clause, for anything else."""
    machine = _Machine()
    try:
        state = machine.run(data)
    except (IndexError, KeyError, struct.error):  # no such value on the stack or in the memo, or the pickle is cut
        raise ValueError("its pickle is malformed") from None
    if not isinstance(state, dict):
        raise ValueError(f"it holds a value of type {type(state).__name__}, not a dictionary of tensors")
    for name, value in state.items():
        if not isinstance(value, StoredTensor):
            raise ValueError(f"{quoted(name)} is of type {type(value).__name__}, not a tensor")
    return state


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Function:
    """A function that a pickle may call, with exactly so many arguments; it checks their types itself."""

    call: Callable[..., Any]
    num_arguments: int


class _Machine:
    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._outer: list[list[Any]] = []  # the stacks below each MARK
        self._memo: dict[int, Any] = {}

    def run(self, data: bytes) -> Any:
        """What the pickle leaves on the stack."""
        position = 0
        for _ in range(MAX_OPCODES):
            code = data[position : position + 1]
            if code == b"." and position == len(data) - 1 and not self._outer and len(self._stack) == 1:
                return self._stack.pop()
            if code not in _OPCODES:
                raise ValueError(f"its pickle has {_described(code)} at byte {position}, where none is expected")
            read, step = _OPCODES[code]
            argument, position = read(data, position + 1)
            step(self, argument)
        raise ValueError(f"its pickle has over {MAX_OPCODES} opcodes")

    def protocol(self, version: int) -> None:
        if version != 2:
            raise ValueError(f"its pickle has protocol {version}, and torch.save writes 2")

    def mark(self, _: None) -> None:
        self._outer.append(self._stack)
        self._stack = []

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def append(self, _: None) -> None:
        value = self._stack.pop()
        _checked(self._stack[-1], list).append(value)

    def appends(self, _: None) -> None:
        values = self._since_mark()
        _checked(self._stack[-1], list).extend(values)

    def set_item(self, _: None) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._store([key], [value])

    def set_items(self, _: None) -> None:
        items = self._since_mark()
        self._store(items[::2], items[1::2])

    def put(self, number: int) -> None:
        self._memo[number] = self._stack[-1]

    def get(self, number: int) -> None:
        self._stack.append(self._memo[number])

    def mention(self, name: str) -> None:
        if name not in _GLOBALS:
            raise ValueError(f"it needs {quoted(name)}, which is not allowed")
        self._stack.append(_GLOBALS[name])

    def reduce(self, _: None) -> None:
        arguments, function = self._stack.pop(), _checked(self._stack.pop(), _Function)
        self._stack.append(function.call(*_checked(arguments, tuple, length=function.num_arguments)))

    def build(self, _: None) -> None:
        """Attributes of a state dict, such as the versions of modules: they say nothing about tensors."""
        _checked(self._stack.pop(), dict)
        _checked(self._stack[-1], collections.OrderedDict)

    def refer(self, _: None) -> None:
        kind, dtype, key, location, size = _checked(self._stack.pop(), tuple, length=5)
        if _checked(kind, str) != "storage":
            raise ValueError(f"it refers to a {quoted(kind)}, not to a storage")
        _checked(location, str)
        self._stack.append(Storage(key=_checked(key, str), dtype=_checked(dtype, np.dtype), size=_checked(size, int)))

    def collect(self, _: None) -> None:
        values = self._since_mark()
        self._stack.append(tuple(values))

    def collect_last(self, count: int) -> None:
        values = [self._stack.pop() for _ in range(count)]
        self._stack.append(tuple(reversed(values)))

    def _since_mark(self) -> list[Any]:
        values, self._stack = self._stack, self._outer.pop()
        return values

    def _store(self, keys: list[Any], values: list[Any]) -> None:
        target = _checked(self._stack[-1], dict)
        for key, value in zip(keys, values, strict=True):
            if type(key) is not str:
                raise ValueError(f"it has a name of type {type(key).__name__}, not text")
            target[key] = value


def _checked(value: Any, kind: type, *, length: int | None = None) -> Any:
    """`value`, if it is a `kind`; a bool is no int."""
    if not isinstance(value, kind) or type(value) is bool:
        raise ValueError(f"its pickle has type {type(value).__name__} where type {kind.__name__} is expected")
    if length is not None and len(value) != length:
        raise ValueError(f"its pickle has {len(value)} values where {length} are expected")
    return value


def _rebuild_tensor(
    storage: Any, offset: Any, shape: Any, strides: Any, requires_grad: Any, hooks: Any
) -> StoredTensor:
    _checked(storage, Storage)
    if _checked(hooks, collections.OrderedDict):
        raise ValueError("a tensor has hooks, which are code")
    numbers = (offset, *_checked(shape, tuple), *_checked(strides, tuple))
    if len(shape) != len(strides) or min(_checked(number, int) for number in numbers) < 0:
        raise ValueError("a tensor has offset, shape and strides that do not go together")
    info = TensorInfo(shape=shape, dtype=storage.dtype)
    if info.nbytes:
        last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        if last >= storage.size:
            raise ValueError(f"a tensor reaches to element {last} of a storage that has {storage.size}")
        if math.prod(shape) > storage.size:  # an expanded tensor; nothing on disk backs its size
            raise ValueError("a tensor repeats the elements of its storage")
    return StoredTensor(info=info, storage=storage, offset=offset, strides=strides)


def _rebuild_parameter(tensor: Any, requires_grad: Any, hooks: Any) -> StoredTensor:
    if _checked(hooks, collections.OrderedDict):
        raise ValueError("a parameter has hooks, which are code")
    return _checked(tensor, StoredTensor)


def _described(code: bytes) -> str:
    names = {opcode.code.encode("latin-1"): opcode.name for opcode in pickletools.opcodes}
    return f"the opcode {names[code]}" if code in names else f"the bytes {code}"


def _nothing(data: bytes, position: int) -> tuple[None, int]:
    return None, position


def _number(layout: str) -> Callable[[bytes, int], tuple[Any, int]]:
    number = struct.Struct(layout)
    return lambda data, position: (number.unpack_from(data, position)[0], position + number.size)


def _long(data: bytes, position: int) -> tuple[int, int]:
    digits, end = _counted(data, position + 1, data[position])
    return int.from_bytes(digits, "little", signed=True), end


def _text(data: bytes, position: int) -> tuple[str, int]:
    text, end = _counted(data, position + 4, int.from_bytes(data[position : position + 4], "little"))
    return text.decode("utf-8"), end


def _counted(data: bytes, position: int, count: int) -> tuple[bytes, int]:
    if position + count > len(data):
        raise ValueError(f"its pickle is cut in the argument at byte {position}")
    return data[position : position + count], position + count


def _two_lines(data: bytes, position: int) -> tuple[str, int]:
    """Module and name, with a space between."""
    lines = data[position : position + MAX_NAME_BYTES].split(b"\n", 2)
    if len(lines) < 3:
        raise ValueError(f"its pickle has a name without an end at byte {position}")
    module, name, _ = lines
    return f"{module.decode('utf-8')} {name.decode('utf-8')}", position + len(module) + len(name) + 2


# Module and name.
_GLOBALS: Mapping[str, _Function | np.dtype] = MappingProxyType(
    {
        "collections OrderedDict": _Function(call=collections.OrderedDict, num_arguments=0),
        "torch._utils _rebuild_tensor_v2": _Function(call=_rebuild_tensor, num_arguments=6),
        "torch._utils _rebuild_parameter": _Function(call=_rebuild_parameter, num_arguments=3),
        "torch FloatStorage": np.dtype("<f4"),
        "torch HalfStorage": np.dtype("<f2"),
        "torch BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
        "torch DoubleStorage": np.dtype("<f8"),
        "torch LongStorage": np.dtype("<i8"),
        "torch IntStorage": np.dtype("<i4"),
        "torch ShortStorage": np.dtype("<i2"),
        "torch CharStorage": np.dtype(np.int8),
        "torch ByteStorage": np.dtype(np.uint8),
        "torch BoolStorage": np.dtype(np.bool_),
    }
)
_OPCODES: Mapping[bytes, tuple[Callable[[bytes, int], tuple[Any, int]], Callable[[_Machine, Any], None]]] = (
    MappingProxyType(
        {
            b"\x80": (_number("<B"), _Machine.protocol),
            b"(": (_nothing, _Machine.mark),
            b"N": (_nothing, _Machine.push),
            b"\x88": (_nothing, lambda machine, _: machine.push(True)),
            b"\x89": (_nothing, lambda machine, _: machine.push(False)),
            b"J": (_number("<i"), _Machine.push),
            b"K": (_number("<B"), _Machine.push),
            b"M": (_number("<H"), _Machine.push),
            b"\x8a": (_long, _Machine.push),
            b"G": (_number(">d"), _Machine.push),
            b"X": (_text, _Machine.push),
            b")": (_nothing, lambda machine, _: machine.push(())),
            b"]": (_nothing, lambda machine, _: machine.push([])),
            b"}": (_nothing, lambda machine, _: machine.push({})),
            b"t": (_nothing, _Machine.collect),
            b"\x85": (_nothing, lambda machine, _: machine.collect_last(1)),
            b"\x86": (_nothing, lambda machine, _: machine.collect_last(2)),
            b"\x87": (_nothing, lambda machine, _: machine.collect_last(3)),
            b"a": (_nothing, _Machine.append),
            b"e": (_nothing, _Machine.appends),
            b"s": (_nothing, _Machine.set_item),
            b"u": (_nothing, _Machine.set_items),
            b"q": (_number("<B"), _Machine.put),
            b"r": (_number("<I"), _Machine.put),
            b"h": (_number("<B"), _Machine.get),
            b"j": (_number("<I"), _Machine.get),
            b"c": (_two_lines, _Machine.mention),
            b"R": (_nothing, _Machine.reduce),
            b"b": (_nothing, _Machine.build),
            b"Q": (_nothing, _Machine.refer),
        }
    )
)
