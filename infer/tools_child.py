"""Functions as tools, inside the sandbox: their schemas from hints and docstrings, and calls of them.

The first cell of the interpreter that a file of functions lives in; `infer.tools` gives the cells that follow.
"""

from __future__ import annotations

import inspect
import json
import linecache
import re
import sys
import types
import typing

_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean", list: "array", dict: "object"}
_SECTION = re.compile(r"(Args|Arguments|Returns?|Raises|Yields|Examples?|Notes?):\s*")
_ARGUMENT = re.compile(r"(\w+)(?: ?\([^)]*\))?: *(.*)")
_functions: dict = {}


def load(source: str, name: str) -> None:
    """Runs a file of functions, and prints the schemas of those that it defines and that begin with no underscore."""
    sys.modules["functions"] = module = types.ModuleType("functions")
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    exec(compile(source, name, "exec", dont_inherit=True), module.__dict__)
    for key, value in vars(module).items():
        if inspect.isfunction(value) and value.__code__.co_filename == name and not key.startswith("_"):
            _functions[key] = value
    print(json.dumps([_schema(key, function) for key, function in _functions.items()]))


def call(name: str, arguments: str) -> None:
    """Prints what a function returns: text as it is, anything else as JSON."""
    value = _functions[name](**json.loads(arguments))
    if value is not None:
        print(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))


def _schema(name: str, function: types.FunctionType) -> dict:
    description, arguments = _documented(inspect.getdoc(function) or "")
    if not description:
        raise ValueError(f"{name} has no docstring; it tells the model what the function does")
    hints = typing.get_type_hints(function)
    properties, required = {}, []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise ValueError(f"{name}({parameter}): a model gives arguments by name; want ordinary parameters")
        if parameter.name not in hints:
            raise ValueError(f"{name}({parameter}) has no type hint; it tells the model what to give")
        properties[parameter.name] = _json_type(hints[parameter.name], f"{name}({parameter})")
        if parameter.name in arguments:
            properties[parameter.name]["description"] = arguments[parameter.name]
        if parameter.default is parameter.empty:
            required.append(parameter.name)
    parameters = {"type": "object", "properties": properties, "required": required}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def _json_type(hint: object, where: str) -> dict:
    """JSON schema of the values that a type hint allows."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        kinds = [part for part in parts if part is not types.NoneType]
        return (
            _json_type(kinds[0], where) if len(kinds) == 1 else {"anyOf": [_json_type(kind, where) for kind in kinds]}
        )
    if origin is typing.Literal:
        return {"enum": list(parts)}
    kind = origin or hint
    if kind not in _TYPES:
        raise ValueError(f"{where}: want {', '.join(kind.__name__ for kind in _TYPES)}, Literal or a union of them")
    schema = {"type": _TYPES[kind]}
    if kind is list and parts:
        schema["items"] = _json_type(parts[0], where)
    if kind is dict and parts:
        schema["additionalProperties"] = _json_type(parts[1], where)
    return schema


def _documented(docstring: str) -> tuple[str, dict]:
    """The description before the sections of a docstring, and what `Args:` says of each argument."""
    description, arguments, section, name = [], {}, "", ""
    for line in docstring.splitlines():
        if _SECTION.fullmatch(line):
            section = line.strip(": ")
        elif not section:
            description.append(line)
        elif section.startswith("Arg") and (match := _ARGUMENT.fullmatch(line.strip())):
            name, arguments[match[1]] = match[1], match[2]
        elif section.startswith("Arg") and name and line.strip():
            arguments[name] += f" {line.strip()}"
    return "\n".join(description).strip(), arguments
