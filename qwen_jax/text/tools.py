"""Calls of tools: reading them from an answer, and Qwen1's prompt for them, which is plain text (ReAct).

Formats that know tools write them themselves (`chat.Format.render`). Qwen1 has no words for tools: `react_messages`
turns a chat with tools into one without.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qwen_jax.errors import DataError
from qwen_jax.text.messages import Call, Message, read_messages, to_json
from qwen_jax.text.tokenizer import Tokenizer

REACT_STOPS = ("Observation:", "Observation:\n")

THOUGHT_TAGS = ("<think>", "</think>")
CALL_TAGS = ("<tool_call>", "</tool_call>")
_TAGS = (*THOUGHT_TAGS, *CALL_TAGS)
_REACT = """Answer the following questions as best you can. You have access to the following tools:

{tools}

Use the following format:

Question: the input question you must answer
Thought: you should always think about what to do
Action: the action to take, should be one of [{names}]
Action Input: the input to the action
Observation: the result of the action
... (this Thought/Action/Action Input/Observation can be repeated zero or more times)
Thought: I now know the final answer
Final Answer: the final answer to the original input question

Begin!

Question: {query}"""
_REACT_TOOL = (
    "{model_name}: Call this tool to interact with the {human_name} API. What is the {human_name} API useful for? "
    "{description} Parameters: {parameters} {hint}"
)
_HINTS = {
    "json": "Format the arguments as a JSON object.",
    "code": "Enclose the code within triple backticks (`) at the beginning and end of the code.",
}


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a model's answer says.

    Attributes:
      content: the words for the user, with the blocks that look like calls and are none.
      reasoning: what it thought; None if it has no thought.
      malformed: for each such block, what is wrong with it.
    """

    content: str
    reasoning: str | None
    calls: tuple[Call, ...]
    malformed: tuple[str, ...]

    def message(self) -> dict[str, Any]:
        """The answer as a message of the chat, to be rendered again."""
        calls = [{"type": "function", "function": {"name": c.name, "arguments": c.arguments}} for c in self.calls]
        fields = {
            "role": "assistant",
            "content": self.content,
            "reasoning_content": self.reasoning,
            "tool_calls": calls,
        }
        return {field: value for field, value in fields.items() if value or field in ("role", "content")}


def parse(text: str, *, thinks: bool, in_thought: bool | None = None) -> Answer:
    """Reads an answer of Qwen2.5 or Qwen3: `<think>` where the format `thinks`, and `<tool_call>` blocks.

    `text` is the model's answer alone, without its <|im_end|>. Nothing that users send belongs in here.

    Args:
      thinks: whether the chat format has thoughts.
      in_thought: whether the prompt ended inside a thought. None where that is not known: then what stands before
        </think> is the thought, whether it was opened or not.
    """
    return _parse(split_tags(text, _TAGS), thinks, in_thought)


def parse_ids(tokenizer: Tokenizer, ids: Iterable[int], *, thinks: bool, in_thought: bool | None = None) -> Answer:
    """Reads an answer as `parse` does, taking as tags only control tokens, not the characters they are made of.

    A tag that the tokenizer has no token for is its characters.
    """
    tags, spelled = tag_tokens(tokenizer)
    parts, run = [""], []
    for token in [*ids, None]:
        if token is not None and token not in tags:
            run.append(token)
            continue
        first, *rest = split_tags(tokenizer.decode(run), spelled)
        parts[-1] += first
        parts += rest
        if token is not None:
            parts += [tags[token], ""]
        run = []
    return _parse(parts, thinks, in_thought)


def tag_tokens(tokenizer: Tokenizer) -> tuple[dict[int, str], frozenset[str]]:
    """The tags that are tokens, by id, and those that the tokenizer has no token for."""
    tokens = {tokenizer.control[tag]: tag for tag in _TAGS if tag in tokenizer.control}
    return tokens, frozenset(_TAGS) - set(tokens.values())


def split_tags(text: str, tags: Collection[str]) -> list[str]:
    """Text, tag, text, tag … text."""
    return re.split(f"({'|'.join(map(re.escape, sorted(tags)))})", text) if tags else [text]


def react_prompt(query: str, tools: Sequence[Mapping[str, Any]]) -> str:
    """Qwen1's text for a user's message that may be answered with tools.

    A tool is a function as OpenAI writes it, or a record of Qwen1 with `name_for_model`, `name_for_human`,
    `description_for_model`, `parameters`, and `args_format` "json" (if not given) or "code".
    """
    names, texts = [], []
    for index, tool in enumerate(tools):
        record = tool.get("function", tool) if isinstance(tool, Mapping) else tool
        if not (isinstance(record, Mapping) and "parameters" in record):
            raise DataError(f"tools[{index}] has no parameters; want the schema of a function")
        name = record.get("name_for_model", record.get("name"))
        if not isinstance(name, str):
            raise DataError(f"tools[{index}].name is {name!r}; want a string")
        if (arguments := record.get("args_format", "json")) not in list(_HINTS):
            raise DataError(f"tools[{index}].args_format is {arguments!r}; want one of {', '.join(_HINTS)}")
        text = _REACT_TOOL.format(
            model_name=name,
            human_name=record.get("name_for_human", name),
            description=record.get("description_for_model", record.get("description", "")),
            parameters=to_json(record["parameters"], f"tools[{index}].parameters"),
            hint=_HINTS[arguments],
        )
        names.append(name)
        texts.append(text)
    return _REACT.format(tools="\n\n".join(texts), names=",".join(names), query=query)


def react_messages(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The chat with tools as Qwen1 reads it: system, user and assistant messages of plain text.

    The last user message gets the tools; calls and results become the text of one assistant message. After a result
    this ends in "Thought:", for the model to go on (`continue_final_message`); generation stops at `REACT_STOPS`.
    """
    chat = read_messages(messages)
    plain: list[dict[str, Any]] = []
    for index, message in enumerate(chat):
        content = message.content.lstrip("\n").rstrip()
        if message.role == "tool":
            content = f"Observation: {content}"
            if not plain or plain[-1]["role"] != "assistant":
                raise DataError(
                    f"messages[{index}] is the result of a tool, and no assistant's message before it called"
                )
        elif message.role == "assistant":
            content = _react_answer(message, content, index)
        if message.role in ("tool", "assistant") and plain and plain[-1]["role"] == "assistant":
            plain[-1]["content"] += f"\n{content}"
        else:
            plain.append({"role": message.role, "content": content})
    if chat[-1].role == "tool":
        plain[-1]["content"] += "\nThought:"
    questions = [message for message in plain if message["role"] == "user"]
    if not questions:
        raise DataError("messages holds no user message, where the tools would be described")
    questions[-1]["content"] = react_prompt(questions[-1]["content"], tools)
    return plain


def parse_react(text: str) -> Answer:
    """Reads an answer of Qwen1 to `react_prompt`: its last action, else its final answer, else all of it.

    The arguments are JSON, or what Python reads as a dict, or code between triple backticks, which becomes
    {"code": ...}; the content beside a call is the thought.
    """
    text = "\n" + text.strip()
    action, given, result = (text.rfind(f"\n{word}:") for word in ("Action", "Action Input", "Observation"))
    if 0 <= action < given:
        name = text[action + len("\nAction:") : given].strip()
        arguments = text[given + len("\nAction Input:") : result if result > given else None].strip()
        if (found := _loose_object(arguments)) is None or not name:
            return Answer(content=text[1:], reasoning=None, calls=(), malformed=(f"not a JSON object: {arguments}",))
        call = Call(name=name, arguments=found)
        return Answer(content=_thought(text[:action]), reasoning=None, calls=(call,), malformed=())
    _, final, answer = text.rpartition("\nFinal Answer:")
    return Answer(content=answer.strip() if final else _thought(text), reasoning=None, calls=(), malformed=())


def read_call(text: str) -> Call:
    """The call that the text of a block makes, its arguments as they are written; a ValueError if it is none."""
    call = _read_json(text)
    if not (isinstance(call, dict) and isinstance(call.get("name"), str) and isinstance(call.get("arguments"), dict)):
        raise ValueError(f'want {{"name": ..., "arguments": {{...}}}}, got {text.strip()}')
    if not call["name"]:
        raise ValueError("the name is empty")
    call["name"].encode()  # a ValueError for a lone surrogate, which no text can hold
    return Call(name=call["name"], arguments=_written(text, "arguments"))


def _parse(parts: list[str], thinks: bool, in_thought: bool | None) -> Answer:
    """`parts` alternates text and tags, text first."""
    if in_thought:
        parts = ["", "<think>", *parts]
    reasoning, tags = None, parts[1::2]
    opened = thinks and tags[:1] == ["<think>"] and not parts[0].strip()
    if opened or (thinks and in_thought is None and "</think>" in tags):
        end = 2 * tags.index("</think>") + 1 if "</think>" in tags else len(parts)
        reasoning = "".join(parts[2 * opened : end]).strip("\n")
        parts = [parts[end + 1].lstrip("\n"), *parts[end + 2 :]] if end < len(parts) else [""]
    content, calls, malformed = parts[0], [], []
    position = 1
    while position < len(parts):
        if parts[position] != "<tool_call>":
            content += "".join(parts[position : position + 2])
            position += 2
            continue
        end = next((n for n in range(position, len(parts), 2) if parts[n] == "</tool_call>"), len(parts))
        try:
            calls.append(read_call("".join(parts[position + 1 : end])))
            content = content.removesuffix("\n" if parts[position - 1] else "")
        except (ValueError, RecursionError) as error:
            malformed.append(f"{type(error).__name__}: {error}")
            content += "".join(parts[position : end + 1])
        content += "".join(parts[end + 1 : end + 2])
        position = end + 2
    return Answer(content=content, reasoning=reasoning, calls=tuple(calls), malformed=tuple(malformed))


def _written(text: str, key: str) -> str:
    """The value of `key` as the JSON object `text` writes it; the last, where it comes twice."""
    scan, written = json.JSONDecoder().raw_decode, ""
    position = _next_part(text, text.index("{") + 1)
    while text[position] != "}":
        found, end = scan(text, position)
        start = _next_part(text, end)
        _, end = scan(text, start)
        written = text[start:end] if found == key else written
        position = _next_part(text, end)
    return written


def _next_part(text: str, position: int) -> int:
    """Where the next key or value of a JSON object begins, or its end."""
    while text[position] in " \t\n\r,:":
        position += 1
    return position


def _react_answer(message: Message, content: str, index: int) -> str:
    if message.reasoning or not message.trained:
        raise DataError(
            f"messages[{index}]: Qwen1's prompt for tools has no place for reasoning_content, train or weight"
        )
    if not message.calls:
        return f"Thought: I now know the final answer.\nFinal Answer: {content}"
    call, *others = message.calls
    if others:
        raise DataError(f"messages[{index}].tool_calls has {len(message.calls)} calls; Qwen1 makes one at a time")
    thought = content if content.startswith("Thought:") else f"Thought: {content}"
    return f"{thought}\nAction: {call.name}\nAction Input: {call.arguments}"


def _thought(text: str) -> str:
    return text.strip().removeprefix("Thought:").strip()


def _loose_object(text: str) -> str | None:
    """JSON text of the object that `text` means, if it means one."""
    if fenced := re.fullmatch(r"```(?:python|py)?\n?(.*?)\n?```", text, re.DOTALL):
        return to_json({"code": fenced[1]}, "code")
    for read in (_read_json, ast.literal_eval):
        try:
            value = read(text)
            if isinstance(value, dict):
                return to_json(value, "arguments")
        except (ValueError, SyntaxError, RecursionError, MemoryError, DataError):
            continue
    return None


def _read_json(text: str) -> Any:
    return json.loads(text, parse_constant=_refuse_constant)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
