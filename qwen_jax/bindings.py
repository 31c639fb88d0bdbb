"""Gin-like text onto frozen dataclasses: strict, typed, and every value knows where it was written.

    include "base.gin"          # first in a file, so that what follows overrides it
    LR = 3e-4                   # a macro: a name in capitals
    optim = @AdamW              # one class of the field's declared union
    optim.peak_lr = %LR         # one field
    data.files = ("a.jsonl",    # a value goes on while a bracket is open
                  "b.jsonl")
    stages.1.steps = 100        # of a tuple of sections, which are numbered from 1

The dataclasses are the schema. Values are Python literals: no name is imported and nothing is evaluated. Every
mistake is a ConfigError that begins with `file:line:` (or `--set path=value:`).
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import difflib
import os
import re
import sys
import types
import typing
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from qwen_jax.errors import ConfigError, FileError

T = TypeVar("T")
MAX_BYTES = 1_000_000  # of one file; a real config has a few thousand

_MISSING = dataclasses.MISSING
_UNIONS = (types.UnionType, typing.Union)
_INCLUDE = re.compile(r"""include\s*(?P<quote>["'])(?P<file>[^"']+)(?P=quote)""")
_BINDING = re.compile(r"(?P<path>[A-Za-z_]\w*(?:\.\w+)*)\s*=(?!=)\s*(?P<text>.+)", re.ASCII | re.DOTALL)
# An unclosed string runs to the end of its line; were it no token, a line full of quotes would take quadratic time.
_TOKEN = re.compile(r""" "(?:\\.|[^"\\])*(?:"|\\?$) | '(?:\\.|[^'\\])*(?:'|\\?$) | [#()\[\]{}] """, re.VERBOSE)


@dataclasses.dataclass(frozen=True)
class Binding:
    """One `path = text` as written, and where: `configs/sft.gin:12` or `--set path=text`."""

    path: str
    text: str
    where: str


_Located = list[tuple[list[str], Binding]]  # bindings, each with its path below some section


def read(file: Path) -> list[Binding]:
    """The bindings of a config file in the order they apply: those of its includes, then its own.

    Raises FileError where `file` itself cannot be read, ConfigError for a mistake in it or in its includes.
    """
    return _read(Path(file), (), "")


def parse_set(assignments: Sequence[str]) -> list[Binding]:
    """The bindings of `--set path=value` options, each in the grammar of a config line; the last of a path wins."""
    bindings = {}
    for assignment in assignments:
        where = f"--set {' '.join(assignment.split()):.80}"
        match = _BINDING.fullmatch(assignment.strip())
        if not match:
            raise ConfigError(f"{where}: expected path=value, as in --set optim.peak_lr=3e-4")
        bindings[match["path"]] = Binding(match["path"], match["text"], where)
    return sorted(bindings.values(), key=_depth)


def _depth(binding: Binding) -> int:
    """Sorts `optim = @AdamW` before `optim.peak_lr = 1`: the order of lines within one file has no meaning."""
    return binding.path.count(".")


def _read(file: Path, includers: tuple[Path, ...], where: str) -> list[Binding]:
    """As `read`, for a file that the last of `includers` includes at `where`."""
    if os.path.realpath(file) in map(os.path.realpath, includers):
        raise ConfigError(f"{where}: include cycle: {' -> '.join(map(str, (*includers, file)))}")
    try:
        statements = list(_statements(file))
    except OSError as error:
        what = f"cannot read {str(file)!r}: {error.strerror}; give the path of a .gin file"
        raise (ConfigError(f"{where}: {what}") if where else FileError(what)) from error
    included: list[Binding] = []
    own: dict[str, Binding] = {}
    for number, statement in statements:
        where = f"{file}:{number}"
        if match := _INCLUDE.fullmatch(statement):
            if own:
                raise ConfigError(f"{where}: include comes before the first binding, so that this file overrides it")
            included += _read(file.parent / match["file"], (*includers, file), where)
        elif match := _BINDING.fullmatch(statement):
            if first := own.get(match["path"]):
                raise ConfigError(f"{where}: {first.path} is already bound at {first.where}; keep one of the two")
            own[match["path"]] = Binding(match["path"], match["text"], where)
        else:
            raise ConfigError(f'{where}: expected `path = value` or `include "file.gin"`, got {statement!r:.80}')
    return included + sorted(own.values(), key=_depth)


def _statements(file: Path) -> Iterator[tuple[int, str]]:
    """(number of the first line, text) of each statement, without comments, bracketed lines joined."""
    with open(file, "rb") as stream:
        data = stream.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{file}:1: larger than {MAX_BYTES} bytes; a config is a short text file")
    try:
        lines = re.split(r"\r\n?|\n", data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}:{data[: error.start].count(10) + 1}: not UTF-8 text: {error.reason}") from None
    parts: list[str] = []
    first = depth = 0
    for number, line in enumerate(lines, 1):
        end, first = len(line), first if depth else number
        for token in _TOKEN.finditer(line):
            if token[0] == "#":
                end = token.start()
                break
            depth += (token[0] in "([{") - (token[0] in ")]}")
        parts.append(line[:end].strip())
        if depth <= 0:
            if statement := " ".join(parts).strip():
                yield first, statement
            parts, depth = [], 0
    if depth:
        raise ConfigError(f"{file}:{first}: a bracket opened here is never closed")


def resolve(schema: type[T], bindings: Iterable[Binding]) -> tuple[T, dict[str, str]]:
    """The config that the bindings make of a dataclass, and where each bound path got its value.

    Later bindings override earlier ones; another class for a section forgets what was bound for the old class.
    Fields that are not bound keep their default.
    """
    bindings = list(bindings)
    macros = {b.path: b for b in bindings if b.path.isupper() and "." not in b.path}
    used = {b.text[1:] for b in bindings if b.text.startswith("%")}
    for name, macro in macros.items():
        _value(macro, Any)
        if name not in used:
            raise ConfigError(f"{macro.where}: nothing uses the macro %{name}{_nearest(name, used)}")
    located: _Located = []
    for b in bindings:
        if b.text.startswith("%"):
            if b.text[1:] not in macros:
                raise ConfigError(f"{b.where}: no macro {b.text:.80}{_nearest(b.text[1:], macros)}")
            macro = macros[b.text[1:]]
            b = Binding(b.path, macro.text, f"{b.where}: {b.text} of {macro.where}")
        if b.path not in macros:
            located.append((b.path.split("."), b))
    where = next((b.where for b in reversed(bindings) if not b.where.startswith("--set ")), "config")
    provenance: dict[str, str] = {}
    return _section(schema, None, located, "", where, provenance), provenance


def _section(schema: type, default: Any, located: _Located, path: str, where: str, provenance: dict[str, str]) -> Any:
    """An instance of `schema`; what is not bound is as in `default`, where that is one too."""
    title = f"{path} ({schema.__name__})" if path else schema.__name__
    fields = _fields(schema, default)
    lines: dict[str, str] = {}
    for (name, *rest), b in located:
        if name not in fields:
            raise ConfigError(f"{b.where}: {title} has no field {name:.80}{_nearest(name, fields)}")
        lines[".".join([name, *rest])] = b.where
    values, missing = {}, []
    for name, (hint, value) in fields.items():
        below = [(rest, b) for (first, *rest), b in located if first == name]
        full = f"{path}.{name}" if path else name
        values[name] = _field(hint, value, below, full, where, provenance)
        if values[name] is _MISSING:
            missing.append(f"`{full} = ...` ({_spell(hint)})")
    if missing:
        raise ConfigError(f"{where}: {title} has fields without a value; write {', '.join(missing)}")
    try:
        return schema(**values)
    except ValueError as error:  # __post_init__ speaks of fields: name the line that bound the first of them
        named = [lines[word] for word in re.findall(r"\w+(?:\.\w+)*", str(error)) if word in lines]
        raise ConfigError(f"{[*named, *lines.values(), where][0]}: {title}: {error}") from error


def _field(hint: Any, value: Any, located: _Located, path: str, where: str, provenance: dict[str, str]) -> Any:
    """The value of one field, MISSING if it has none. `value` is its default, `where` its section's place."""
    if _of_sections(hint):
        return _numbered(hint, value, located, path, where, provenance)
    classes = {f"@{c.__name__}": c for c in _members(hint) if isinstance(c, type) and dataclasses.is_dataclass(c)}
    default, chosen, below = value, False, []
    lone = list(classes.values())[0] if len(classes) == 1 else None
    schema = type(default) if type(default) in classes.values() else lone  # None while it is a plain value
    for rest, b in located:
        if rest and schema is None:
            choices = "first write " + " or ".join(f"`{path} = {name}`" for name in classes)
            raise ConfigError(f"{b.where}: {choices if classes else f'{path} is {_spell(hint)}, not a section'}")
        if rest:
            below.append((rest, b))
            if type(default) is not schema:
                provenance.setdefault(path, b.where)
            continue
        if b.text in classes:
            if classes[b.text] is not schema:
                schema, below = classes[b.text], []
            chosen = True
        elif b.text.startswith("@"):
            nearest = _nearest(b.text, classes) or f"; it is {_spell(hint)}"
            raise ConfigError(f"{b.where}: {path} cannot be {b.text:.80}{nearest}")
        else:
            value, schema, chosen, below = _value(b, hint), None, False, []
        provenance[path] = b.where
    if schema is None or not (chosen or below or schema in (hint, type(default))):
        return value
    return _section(schema, default, below, path, provenance.get(path, where), provenance)


def _numbered(hint: Any, value: Any, located: _Located, path: str, where: str, provenance: dict[str, str]) -> Any:
    """As `_field`, of a tuple of sections, which are `path.1`, `path.2` and so on."""
    below: dict[int, _Located] = {}
    for rest, b in located:
        if not rest:
            value, below = _value(b, hint), {}  # (): only that is a literal
            provenance[path] = b.where
        elif not re.fullmatch("[1-9][0-9]{0,3}", rest[0]):
            raise ConfigError(f"{b.where}: the sections of {path} are {path}.1, {path}.2 and so on, not {b.path:.80}")
        else:
            below.setdefault(int(rest[0]), []).append((rest[1:], b))
    if value is _MISSING:
        if not below:
            return value
        value = ()
    there = dict(enumerate(value, 1))
    for number in sorted(below):
        if number > len(there) + 1:
            wanted, b = f"{path}.{len(there) + 1}", below[number][0][1]
            raise ConfigError(
                f"{b.where}: {path}.{number} without {wanted}: sections are numbered from 1, without gaps"
            )
        default, full = there.get(number, _MISSING), f"{path}.{number}"
        there[number] = _field(typing.get_args(hint)[0], default, below[number], full, where, provenance)
    return tuple(there.values())


def _value(b: Binding, hint: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Python only warns of an invalid escape such as "\d"
        try:
            value = ast.literal_eval(b.text)
            shown = repr(value)  # fails for an integer of more digits than Python will print
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            kinds = """a number, "text" ('"text"' in a shell), True, False, None, or these in (), [] or {}"""
            raise ConfigError(f"{b.where}: {b.path} = {b.text:.80} is not a literal: {kinds}") from None
    try:
        return _convert(value, hint)
    except ValueError:
        raise ConfigError(f"{b.where}: {b.path} must be {_spell(hint)}, got {shown:.80}") from None


def _convert(value: Any, hint: Any) -> Any:
    """`value` as the declared type holds it: 3 as 3.0, a list as a tuple. ValueError if it does not fit."""
    origin, args, members = typing.get_origin(hint), typing.get_args(hint), _members(hint)
    if len(members) > 1:
        for member in sorted(members, key=lambda member: member is not type(value)):  # 3 stays an int in float | int
            with contextlib.suppress(ValueError):
                return _convert(value, member)
    elif origin is Literal and any(type(value) is type(arg) and value == arg for arg in args):  # True is not 1
        return value
    elif origin is tuple and isinstance(value, tuple | list):
        hints = args[:1] * len(value) if args[-1] is ... else args
        if len(hints) == len(value):
            return tuple(map(_convert, value, hints))
    elif origin is dict and isinstance(value, dict):
        return {_convert(k, args[0]): _convert(v, args[1]) for k, v in value.items()}
    elif hint is float and type(value) in (int, float) and abs(value) <= sys.float_info.max:  # 1e400 is infinity
        return float(value)
    elif hint is Any or (hint in (bool, int, str, types.NoneType) and type(value) is hint):
        return value
    raise ValueError


def _fields(schema: type, instance: Any) -> dict[str, tuple[Any, Any]]:
    """Declared type and default of each field; the default is MISSING or, if it is of the schema, from `instance`."""
    hints, fields = typing.get_type_hints(schema), dataclasses.fields(schema)
    values = {f.name: f.default if f.default_factory is _MISSING else f.default_factory() for f in fields}
    if type(instance) is schema:
        values = {name: getattr(instance, name) for name in values}
    return {name: (hints[name], value) for name, value in values.items()}


def _members(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in _UNIONS else (hint,)


def _of_sections(hint: Any) -> bool:
    """Whether a declared type is `tuple[SomeDataclass, ...]`."""
    return typing.get_origin(hint) is tuple and dataclasses.is_dataclass(typing.get_args(hint)[0])


def _spell(hint: Any) -> str:
    """A declared type in the words of an error message."""
    if _of_sections(hint):
        return "() or numbered sections"
    if typing.get_origin(hint) in (*_UNIONS, Literal):
        return " or ".join(repr(arg) if isinstance(arg, str) else _spell(arg) for arg in typing.get_args(hint))
    name = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
    return f"@{name}" if dataclasses.is_dataclass(hint) else name.replace("NoneType", "None")


def _nearest(name: str, options: Collection[str]) -> str:
    close = difflib.get_close_matches(name, options, n=1)
    return f"; did you mean {close[0]}?" if close else f"; there is {', '.join(options)}" if options else ""


def render(config: Any, provenance: Mapping[str, str] | None = None) -> str:
    """The whole config as text that `resolve` reads back to an equal one; `provenance` becomes aligned comments."""
    rows = list(_rows(config, ""))
    if provenance is not None:
        width = max((len(text) for text, _ in rows if len(text) <= 60), default=0)  # a longer line sticks out
        origins = {path: " ".join(provenance.get(path, "default").split()) for _, path in rows}
        rows = [(f"{text:<{width}}  # {origins[path]}" if text else "", path) for text, path in rows]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(text for text, _ in rows)).strip() + "\n"


def _rows(config: Any, prefix: str) -> Iterator[tuple[str, str]]:
    """(line, path) of each line: the plain fields, then a paragraph for each section."""
    fields = []
    for name, (hint, value) in _fields(type(config), config).items():
        numbered = enumerate(value, 1) if _of_sections(hint) and value else ()
        one = (prefix + name, hint, value)
        fields += [(f"{prefix}{name}.{n}", typing.get_args(hint)[0], each) for n, each in numbered] or [one]
    for path, hint, value in sorted(fields, key=lambda field: dataclasses.is_dataclass(field[2])):
        if not dataclasses.is_dataclass(value):
            yield f"{path} = {value!r}", path
            continue
        yield "", ""
        if len(_members(hint)) > 1:
            yield f"{path} = @{type(value).__name__}", path
        yield from _rows(value, f"{path}.")
