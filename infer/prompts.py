"""Prompts of the command line and of files: texts to continue and chats to answer."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from infer.config import Generate, Score
from qwen_jax.errors import ConfigError, DataError, FileError, UserError
from qwen_jax.text import Tokenizer
from qwen_jax.text.chat import Format, encode
from qwen_jax.text.template import JinjaFormat


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt, and the place it came from, for messages.

    Attributes:
      row: {"prompt": text}, or {"messages": [...]} with or without "tools".
    """

    row: Mapping[str, Any]
    where: str

    @property
    def is_chat(self) -> bool:
        return "messages" in self.row


def read_prompts(options: Generate | Score) -> tuple[list[Prompt], bool]:
    """The prompts of the command line and of the input, and whether the input was JSON lines."""
    prompts = [Prompt({"prompt": text}, f"--prompt {number}") for number, text in enumerate(options.prompt, 1)]
    jsonl = False
    if options.input is not None:
        more, jsonl = _read(options.input)
        prompts += more
    elif not prompts:
        raise ConfigError('no prompt; give --prompt "TEXT", --input FILE, or --input - for standard input')
    for prompt in prompts:
        try:
            prompt.row.get("prompt", "").encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{prompt.where}: character {error.start + 1} of the prompt is not valid UTF-8") from error
    return prompts, jsonl


def encode_text(prompt: Prompt, tokenizer: Tokenizer, *, control_tokens: bool) -> list[int]:
    """Ids of a text. Documents follow <|endoftext|>, so that is what an empty one starts from."""
    text = prompt.row["prompt"]
    return (tokenizer.encode_trusted(text) if control_tokens else tokenizer.encode(text)) or [tokenizer.end_of_text]


def encode_chat(prompt: Prompt, tokenizer: Tokenizer, form: Format | JinjaFormat, *, thinking: bool) -> list[int]:
    """Ids of a chat up to where the answer begins. Raises DataError if there is nothing to answer."""
    try:
        pieces = form.render(
            prompt.row["messages"],
            tools=prompt.row.get("tools"),
            add_generation_prompt=True,
            enable_thinking=None if thinking else False,
        )
        if prompt.row["messages"][-1]["role"] == "assistant":
            raise DataError("the last message is the assistant's; leave it out, and it is answered anew")
        return encode(tokenizer, pieces).ids
    except UserError as error:
        raise type(error)(f"{prompt.where}: {error}") from error


def _read(source: str) -> tuple[list[Prompt], bool]:
    """The prompts in a file, or "-" for standard input, and whether they are JSON lines."""
    name = "standard input" if source == "-" else source
    try:
        data = sys.stdin.buffer.read() if source == "-" else Path(source).expanduser().read_bytes()
    except OSError as error:
        raise FileError(f"cannot read prompts from {name}: {error.strerror}") from error
    try:
        lines = data.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(f"{name}:{line}: not UTF-8 ({error.reason}); convert the file to UTF-8") from error
    numbered = [(f"{name}:{number}", line.rstrip("\r")) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise DataError(f'{name} has no prompts; one per line, or JSON lines {{"prompt": ...}}, are wanted')
    jsonl = source.endswith(".jsonl") or numbered[0][1].lstrip().startswith("{")
    return [Prompt(_row(line, where) if jsonl else {"prompt": line}, where) for where, line in numbered], jsonl


def _row(line: str, where: str) -> dict[str, Any]:
    """What is needed of a JSON line."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f'{where}: not JSON ({error}); rows such as {{"prompt": "..."}} are wanted') from error
    if not isinstance(row, dict) or ("prompt" in row) == ("messages" in row):
        found = f"keys {', '.join(row)}" if isinstance(row, dict) else type(row).__name__
        raise DataError(f'{where}: the row has {found}; an object with either "prompt" or "messages" is wanted')
    if "messages" in row:
        return {name: row[name] for name in ("messages", "tools") if name in row}
    if not isinstance(row["prompt"], str):
        raise DataError(f"{where}: the prompt is {type(row['prompt']).__name__}; a string is wanted")
    return {"prompt": row["prompt"]}
