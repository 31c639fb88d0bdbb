"""The child process of `template`: renders an untrusted Jinja template, with jinja2 and the standard library alone.

Run as a script: JSON {"source", "contexts"} in, JSON out: {"renders": [[text, spans], ...]},
{"refused": reason} or {"error": reason}.
"""

from __future__ import annotations

import json
import resource
import sys
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY_BYTES = 512 << 20
CPU_SECONDS = 1
MAX_CHARACTERS = 4 << 20


class Refused(jinja2.TemplateError):
    """The template says that it cannot write this chat."""


class _Generation(Extension):
    """{% generation %} blocks: notes which characters of the output they wrote."""

    tags = {"generation"}

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        self.blocks: list[str] = []
        self.spans: list[tuple[int, int]] = []

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_note"), [], [], body).set_lineno(line)

    def _note(self, caller: Any) -> str:
        text = caller()
        start = sum(map(len, self.blocks))
        self.spans.append((start, start + len(text)))
        return text


class _Dict:
    """`dict` for templates: makes dicts, and is no type."""

    def __call__(self, *args: Any, **values: Any) -> dict[Any, Any]:
        return dict(*args, **values)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(jinja2.utils.Namespace):
    """`namespace` for templates, which keeps no name that Python gives a meaning to."""

    def __init__(*args: Any, **values: Any) -> None:
        jinja2.utils.Namespace.__init__(*args, **values)
        for name in dict(*args[1:], **values):
            _check_name(name)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold {name!r}")


class Template:
    """A template in the environment that Hugging Face's `apply_chat_template` gives it."""

    def __init__(self, source: str) -> None:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        self._generation = _Generation(environment)
        environment.extensions[_Generation.identifier] = self._generation
        environment.filters["tojson"] = _tojson
        environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        environment.globals |= {"dict": _Dict(), "namespace": _Namespace}
        self._template = environment.from_string(source)

    def render(self, context: dict[str, Any]) -> tuple[str, list[tuple[int, int]]]:
        """The text, and the [start, end) characters that {% generation %} blocks wrote."""
        blocks, spans = self._generation.blocks, self._generation.spans = [], []
        length = 0
        for block in self._template.generate(context):
            blocks.append(block)
            length += len(block)
            if length > MAX_CHARACTERS:
                raise MemoryError(f"it writes more than {MAX_CHARACTERS} characters")
        return "".join(blocks), spans


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
        template = Template(request["source"])
        answer = {"renders": [template.render(context) for context in request["contexts"]]}
    except Refused as error:
        answer = {"refused": str(error)}
    except MemoryError as error:
        answer = {"error": str(error) or f"it needs more than {MEMORY_BYTES >> 20} MiB"}
    except Exception as error:  # whatever a template does wrong, the parent shall hear of it
        answer = {"error": f"{type(error).__name__}: {error}"}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
