"""The child process of `template`: renders an untrusted Jinja template, with jinja2 and the standard library alone.

Run as a script: JSON {"source", "contexts"} in, JSON {"renders": [[text, spans], ...]} or {"error", "refused"} out.
"""

from __future__ import annotations

import json
import resource
import sys
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY_BYTES = 512 << 20
CPU_SECONDS = 2
MAX_CHARACTERS = 4 << 20


class Refused(jinja2.TemplateError):
    """The template says that it cannot write this chat."""


class _Generation(Extension):
    """{% generation %} blocks: notes which characters of the output they wrote."""

    tags = {"generation"}

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        environment.extend(blocks=[], spans=[])

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_note"), [], [], body).set_lineno(line)

    def _note(self, caller: Any) -> str:
        text = caller()
        start = sum(map(len, self.environment.blocks))
        self.environment.spans.append((start, start + len(text)))
        return text


def compile_template(source: str) -> jinja2.Template:
    """The template in the environment that Hugging Face's `apply_chat_template` gives it."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    return environment.from_string(source)


def render(template: jinja2.Template, context: dict[str, Any]) -> tuple[str, list[tuple[int, int]]]:
    """The text, and the [start, end) characters that {% generation %} blocks wrote."""
    blocks, spans = template.environment.blocks, template.environment.spans
    blocks.clear()
    spans.clear()
    length = 0
    for block in template.generate(context):
        blocks.append(block)
        length += len(block)
        if length > MAX_CHARACTERS:
            raise MemoryError(f"wrote more than {MAX_CHARACTERS} characters")
    return "".join(blocks), list(spans)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise Refused(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    request = json.load(sys.stdin)
    try:
        template = compile_template(request["source"])
        answer = {"renders": [render(template, context) for context in request["contexts"]]}
    except Exception as error:  # whatever a template does wrong, the parent shall hear of it in one line
        answer = {"error": f"{type(error).__name__}: {error}", "refused": isinstance(error, Refused)}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
