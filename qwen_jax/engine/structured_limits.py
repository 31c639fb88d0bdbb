"""What a grammar from outside may be: limits that are measured on it, and a child process for all others."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qwen_jax.errors import DataError

MAX_CHARACTERS = 100_000  # of the schemas of a request, as JSON
MAX_PATTERN = 1000  # characters
MAX_REPETITIONS = 5000  # of a pattern, nested ones multiplied; each adds 3 µs to every mask
WALL_SECONDS = 10  # the child's own limit is in seconds of the processor

_REPETITION = re.compile(r"(\)?)\{(\d+)(?:,(\d*))?\}")
_CHILD = Path(__file__).with_name("structured_child.py")


def check_schema(schema: Any, where: str) -> None:
    """A DataError for what is no schema, or has a pattern that would make masks slow."""
    if not isinstance(schema, Mapping):
        raise DataError(f"{where} is a {type(schema).__name__}; want a JSON schema, an object")
    for pattern in _patterns(schema):
        check_pattern(pattern, f"a pattern in {where}")


def _patterns(schema: Mapping[str, Any]) -> Iterator[str]:
    """All that may be a regular expression."""
    nodes: list[Any] = [schema]
    while nodes:
        node = nodes.pop()
        if isinstance(node, Mapping):
            named = node.get("patternProperties")
            yield from (pattern for pattern in [node.get("pattern")] if isinstance(pattern, str))
            yield from map(str, named if isinstance(named, Mapping) else ())
            nodes += node.values()
        elif isinstance(node, list):
            nodes += node


def check_pattern(pattern: str, where: str) -> None:
    """A DataError for a regular expression that would make masks slow."""
    if len(pattern) > MAX_PATTERN:
        raise DataError(f"{where} has {len(pattern):,} characters; at most {MAX_PATTERN:,}")
    if re.search("[\ud800-\udfff]", pattern):
        raise DataError(f"{where} has a lone surrogate, which no text holds")
    total, factor = 1, 1
    for group, low, high in _REPETITION.findall(pattern):
        if group:
            factor *= int(high or low)
        else:
            total += int(high or low)
    if total * factor > MAX_REPETITIONS:
        raise DataError(f"{where} repeats {total * factor:,} times; at most {MAX_REPETITIONS:,}")


def check_compiles(grammar: str) -> None:
    """Compiles a grammar in a child that has no environment; a DataError for what is wrong with it."""
    try:
        child = subprocess.run(
            [sys.executable, "-P", str(_CHILD)],
            input=grammar,
            capture_output=True,
            text=True,
            timeout=WALL_SECONDS,
            env={},
        )
    except subprocess.TimeoutExpired:
        raise DataError(f"the grammar was given up after {WALL_SECONDS} s; make it simpler") from None
    if child.returncode:
        raise DataError("the grammar takes too much time, memory or depth to compile; make it simpler")
    if child.stdout:
        raise DataError(f"the grammar cannot be used: {one_line(child.stdout)}")


def schema_json(value: Any) -> str:
    """JSON text of a schema, or of a grammar that holds some."""
    try:
        text = json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(f"the schema cannot be written as JSON: {error}") from error
    if len(text) > MAX_CHARACTERS:
        raise DataError(f"the schemas take {len(text):,} characters as JSON; at most {MAX_CHARACTERS:,}")
    return text


def one_line(message: str) -> str:
    """What the library complains of, as the part of a line."""
    return " ".join(message.replace("<non-verbose/>", "").split())[:200]
