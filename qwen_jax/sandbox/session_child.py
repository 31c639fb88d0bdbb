"""The interpreter of `session`, inside the sandbox: runs cells from descriptor 3 and answers each on 4.

Run with -c, so that there is no file of it. Its one argument is the number of characters that a value may have.
"""

from __future__ import annotations

import ast
import io
import json
import linecache
import os
import sys
import traceback
import types


def main() -> None:
    most = int(sys.argv.pop())
    process = os.getpid()
    sys.modules["__main__"] = module = types.ModuleType("__main__")  # the cells' own, where pickle finds their classes
    assert isinstance(sys.stdout, io.TextIOWrapper)
    sys.stdout.reconfigure(line_buffering=True)  # so that a cell that is ended has said what it said
    _write(json.dumps([True, None]).encode())  # here it begins
    number = 0
    while (cell := _read()) is not None:
        number += 1
        ok, value = True, None
        try:
            value = _run(cell, f"<cell {number}>", module.__dict__)
        except BaseException as error:
            ok = False
            _show(error)
        sys.stdout.flush()
        if os.getpid() != process:
            os._exit(0)  # a child that the cell has forked and let return
        _write(json.dumps([ok, value if value is None else value[:most]]).encode())


def _run(cell: bytes, name: str, namespace: dict) -> str | None:
    """Runs a cell; repr of its last line, if that is an expression that is not None."""
    text = cell.decode("utf-8")
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    body = ast.parse(text, name).body
    value = None
    last = body[-1] if body else None
    rest = body[:-1] if isinstance(last, ast.Expr) else body
    exec(compile(ast.Module(rest, []), name, "exec", dont_inherit=True), namespace)
    if isinstance(last, ast.Expr):
        value = eval(compile(ast.Expression(last.value), name, "eval", dont_inherit=True), namespace)
    return None if value is None else repr(value)


def _show(error: BaseException) -> None:
    """Writes a traceback without the frames of this file."""
    frames = error.__traceback__
    while frames is not None and not frames.tb_frame.f_code.co_filename.startswith("<cell "):
        frames = frames.tb_next
    sys.stderr.write("".join(traceback.format_exception(type(error), error, frames)))


def _read() -> bytes | None:
    header = _read_exactly(8)
    return _read_exactly(int.from_bytes(header, "little")) if len(header) == 8 else None


def _read_exactly(size: int) -> bytes:
    data = b""
    while len(data) < size and (piece := os.read(3, size - len(data))):
        data += piece
    return data


def _write(answer: bytes) -> None:
    data = len(answer).to_bytes(8, "little") + answer
    while data:
        data = data[os.write(4, data) :]


main()
