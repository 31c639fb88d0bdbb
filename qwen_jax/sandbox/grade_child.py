"""Both sides of `grade`, inside their sandboxes. Run with -c and one argument, "program" or "checker".

The checker asks on descriptor 6 and hears on 5, the program the other way round: JSON, after its length in 8 bytes,
little end first. A value that is not JSON's own is an object that says what it is. Objects of the program's own stay
there and have a number here, with which the checker can call their methods; nothing else is theirs to decide.
"""

from __future__ import annotations

import builtins
import json
import os
import sys
import traceback
import types
from typing import Any

_COLLECTIONS = {"tuple": tuple, "set": set, "frozenset": frozenset}
_LINE = 300  # characters


def serve() -> None:
    """The program's side: runs it as a module, then calls of its functions."""
    source = sys.stdin.buffer.read().decode("utf-8")
    sys.modules["program"] = module = types.ModuleType("program")
    exec(compile(source, "program.py", "exec", dont_inherit=True), module.__dict__)
    objects: list[Any] = [module]
    while (request := _read()) is not None:
        number, names, args, kwargs = request
        try:
            function = objects[number]
            for name in names:
                function = getattr(function, name)
            value = function(*unpack(args, objects), **unpack(kwargs, objects))
            answer = {"value": pack(value, objects)}
        except Exception as error:
            answer = {"raised": type(error).__name__, "args": pack(list(error.args), objects)}
        _write(6, answer)


def check() -> None:
    """The checker's side: runs it, and gives the verdict on descriptor 4."""
    text = sys.stdin.buffer.read().decode("utf-8")
    verdict = {"nonce": text[:32], "reason": "ok", "detail": "", "ended": False}
    source = text[32:]
    sys.modules["program"] = _Program("program")
    try:
        exec(compile(source, "checker", "exec", dont_inherit=True), {"__name__": "__main__"})
    except BaseException as error:
        verdict |= {"reason": "error", "detail": _detail(error, source), "ended": isinstance(error, ProgramEnded)}
    _write(4, verdict)


class ProgramEnded(BaseException):
    """There is nobody to call any more. Not an Exception, which a checker might expect the program to raise."""


class Remote:
    """Something on the program's side: what is found by `names` from object `number`, of which 0 is the module."""

    def __init__(self, number: int, names: tuple[str, ...] = ()) -> None:
        self._number, self._names = number, names

    def __getattr__(self, name: str) -> Remote:
        if name.startswith("__"):
            raise AttributeError(name)
        return Remote(self._number, (*self._names, name))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            _write(6, [self._number, self._names, pack(list(args), None), pack(kwargs, None)])
            answer = _read()
        except BrokenPipeError:
            answer = None
        if answer is None:
            raise ProgramEnded("the program ended")
        if "raised" in answer:
            name, args = answer["raised"], unpack(answer["args"], None)
            kind = getattr(builtins, name, None)
            if isinstance(kind, type) and issubclass(kind, Exception):
                raise kind(*args)
            raise RuntimeError(name, *args)
        return unpack(answer["value"], None)

    def _refuse(self, other: object = None) -> bool:
        raise TypeError("an object of the program's own can be called; want a plain value to compare or test")

    __bool__ = __eq__ = __ne__ = _refuse


class _Program(types.ModuleType):
    def __getattr__(self, name: str) -> Remote:
        return getattr(Remote(0), name)


def pack(value: Any, objects: list[Any] | None) -> Any:
    """What JSON can say of a value; of one that is not plain, its number in `objects`, if there are any."""
    if value is None or isinstance(value, bool | float | str):
        return value
    if isinstance(value, int):
        return value if -(2**63) <= value < 2**63 else {"int": hex(value)}  # decimals have a limit on digits
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, bytes | bytearray):
        return {"bytes": value.hex()}
    if isinstance(value, dict):
        return {"dict": [[pack(key, objects), pack(part, objects)] for key, part in value.items()]}
    if isinstance(value, list):
        return [pack(part, objects) for part in value]
    for name, kind in _COLLECTIONS.items():
        if isinstance(value, kind):
            return {name: [pack(part, objects) for part in value]}
    if isinstance(value, Remote) and not value._names:
        return {"object": value._number}
    if objects is None:
        raise TypeError(f"a {type(value).__name__} cannot be given to the program; want plain values")
    objects.append(value)
    return {"object": len(objects) - 1}


def unpack(packed: Any, objects: list[Any] | None) -> Any:
    """The value that `pack` packed, made anew; one of `objects`, or what stands for it. Raises ValueError if none."""
    if isinstance(packed, list):
        return [unpack(part, objects) for part in packed]
    if not isinstance(packed, dict):
        return packed
    [(kind, content)] = packed.items()
    if kind == "dict":
        return {unpack(key, objects): unpack(part, objects) for key, part in content}
    if kind in _COLLECTIONS:
        return _COLLECTIONS[kind](unpack(part, objects) for part in content)
    if kind == "object":
        return Remote(int(content)) if objects is None else objects[content]
    if kind == "int":
        return int(content, 16)
    if kind == "complex":
        return complex(*content)
    if kind == "bytes":
        return bytes.fromhex(content)
    raise ValueError(f"no kind of value: {kind}")


def _detail(error: BaseException, source: str) -> str:
    """In one line, what the checker raised; where it says nothing, the line that did."""
    message = str(error)
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "checker"]
    if not message and lines:
        message = source.split("\n")[(lines[-1] or 1) - 1]
    return " ".join(f"{type(error).__name__}: {message}".split())[:_LINE]


def _read() -> Any:
    """The next message on descriptor 5; None if there is none."""
    size = int.from_bytes(_read_exactly(8), "little")
    message = _read_exactly(size)
    return json.loads(message) if message and len(message) == size else None


def _read_exactly(size: int) -> bytes:
    data = bytearray()
    while len(data) < size and (piece := os.read(5, min(size - len(data), 1 << 20))):
        data += piece
    return bytes(data)


def _write(descriptor: int, message: Any) -> None:
    text = json.dumps(message).encode()
    data = memoryview(len(text).to_bytes(8, "little") + text)
    while data:
        data = data[os.write(descriptor, data) :]


if sys.argv[1] == "program":
    serve()
else:
    check()
