"""Tools of a chat: functions of a file, and an interpreter of Python. All of it runs in the sandbox, nothing here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qwen_jax.errors import ConfigError, DataError, FileError
from qwen_jax.sandbox.process import Limits
from qwen_jax.sandbox.run import Result
from qwen_jax.sandbox.session import Session
from qwen_jax.text.messages import Call

INTERPRETER = "code_interpreter"

_CHILD = Path(__file__).with_name("tools_child.py")
_LIMITS = Limits(wall_seconds=30, cpu_seconds=30)
_CHARACTERS = 8000  # of a result, which takes its place in the chat
_ENDS = {
    "timeout": f"stopped after {_LIMITS.wall_seconds} s",
    "memory": f"stopped at {_LIMITS.memory_bytes >> 20} MiB of memory",
    "output": f"stopped at {_LIMITS.output_bytes} bytes of output",
    "killed": "the interpreter ended",
}
_INTERPRETER_SCHEMA = {
    "type": "function",
    "function": {
        "name": INTERPRETER,
        "description": "Runs Python code and returns what it prints and the value of its last line. Variables are kept "
        "from one call to the next. There is no network.",
        "parameters": {
            "type": "object",
            "properties": {"code": {"type": "string", "description": "the Python code"}},
            "required": ["code"],
        },
    },
}


class Toolbox:
    """What a model may call.

    Attributes:
      schemas: JSON schemas of the tools, as OpenAI writes them.
    """

    def __init__(self, functions: Path | None, *, interpreter: bool, allow_weak: bool) -> None:
        """
        Args:
          functions: a Python file, whose functions with type hints and docstrings are tools.
          interpreter: whether there is a tool that runs code.
          allow_weak: see `qwen_jax.sandbox.run.run`.

        Raises:
          FileError, DataError: the file is not there, or no file of functions.
          SandboxError: this machine cannot lock code in.
        """
        self.schemas: list[dict[str, Any]] = []
        self._sessions: list[Session] = []
        self._functions: _Functions | None = None
        self._interpreter: Session | None = None
        try:
            if functions is not None:
                self._functions = _Functions(functions, self._open(allow_weak))
                self.schemas += self._functions.schemas
            if interpreter:
                if INTERPRETER in self._names():
                    raise ConfigError(f"{functions}: {INTERPRETER} is the name of --code-interpreter's own tool")
                self._interpreter = self._open(allow_weak)
                self.schemas.append(_INTERPRETER_SCHEMA)
        except BaseException:
            self.close()
            raise

    def call(self, call: Call) -> str:
        """What a call gives: its result, or what is wrong, for the model to read. Nobody vouches for what it says."""
        try:
            arguments = json.loads(call.arguments)
        except (ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict):
            return "error: the arguments are not a JSON object"
        if self._interpreter and call.name == INTERPRETER:
            if not isinstance(code := arguments.get("code"), str):
                return "error: want the code as a string, in the argument code"
            return _shortened(_of_code(self._interpreter.run(code)))
        if self._functions and call.name in self._names():
            return _shortened(self._functions.call(call))
        return f"error: there is no tool {call.name}; there are {', '.join(self._names())}"

    def close(self) -> None:
        """Ends what runs."""
        for session in self._sessions:
            session.close()

    def _open(self, allow_weak: bool) -> Session:
        self._sessions.append(Session(limits=_LIMITS, allow_weak=allow_weak))
        return self._sessions[-1]

    def _names(self) -> list[str]:
        return [schema["function"]["name"] for schema in self.schemas]


class _Functions:
    """The functions of a file, in an interpreter of their own."""

    def __init__(self, path: Path, session: Session) -> None:
        try:
            source = path.expanduser().read_text("utf-8")
        except OSError as error:
            raise FileError(f"cannot read {path}: {error.strerror}") from error
        except ValueError as error:
            raise DataError(f"{path} is not UTF-8 text") from error
        self._session = session
        self._cell = f"load({source!r}, {path.name!r})"
        result = self._load()
        if result.reason != "ok":
            raise DataError(f"{path}: {_last_line(result.stderr) or _ENDS[result.reason]}")
        self.schemas = _read_schemas(result.stdout)
        if not self.schemas:
            raise DataError(f"{path} defines no function whose name begins without an underscore")

    def call(self, call: Call) -> str:
        if not self._session.alive and (result := self._load()).reason != "ok":
            return f"error: {_last_line(result.stderr) or _ENDS[result.reason]}"
        result = self._session.run(f"call({call.name!r}, {call.arguments!r})")
        if result.reason == "ok":
            return result.stdout
        return f"{result.stdout}error: {_ENDS.get(result.reason) or _last_line(result.stderr)}"

    def _load(self) -> Result:
        """Runs the file in a new interpreter; its last line of output is the schemas."""
        result = self._session.run(_CHILD.read_text("utf-8"))
        return self._session.run(self._cell) if result.reason == "ok" else result


def _read_schemas(output: str) -> list[dict[str, Any]]:
    try:
        schemas = json.loads(_last_line(output))
        return [schema for schema in schemas if isinstance(schema["function"]["name"], str)]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise DataError("the file of functions writes over what describes them") from error


def _of_code(result: Result) -> str:
    """What a cell says, as an interpreter at a terminal would show it."""
    parts = [result.stdout, result.value, result.stderr]
    if end := _ENDS.get(result.reason):
        parts.append(f"{end}; all variables are gone")
    return "\n".join(part.rstrip("\n") for part in parts if part)


def _shortened(text: str) -> str:
    if (rest := len(text) - _CHARACTERS) > 0:
        return f"{text[:_CHARACTERS]}\n({rest} more characters)"
    return text.rstrip("\n")


def _last_line(text: str) -> str:
    return text.rstrip().rpartition("\n")[2]
