"""Chats to text, ids and the mask of what the assistant wrote, in the format of every generation.

A render is a list of pieces, made in one pass. Text is their concatenation; ids and mask come from the same pieces.
Only the words of the format itself are trusted: a control token that a message, a tool or a result spells out stays
the characters it is made of.

The formats write what the published chat templates write, without a template engine.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

from qwen_jax.errors import ConfigError, DataError, ModelError
from qwen_jax.text.messages import Call, Message, read_messages, to_json
from qwen_jax.text.tokenizer import Tokenizer

_HELPFUL = "You are a helpful assistant."

# What a system message says of tools, before and after their list.
TOOLS = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
CALLS = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n'
    "</tool_call>"
)
_CLOSE = "<|im_end|>\n"
NO_THOUGHT = "<think>\n\n</think>\n\n"
# What no format writes but as a control token, so a tokenizer without it does not belong to the format.
_CONTROL = re.compile(r"<\|\w+\|>")
_BYTE = {False: b"\0", True: b"\1"}


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A stretch of rendered text.

    Attributes:
      trusted: written by the format, so control tokens in it become their ids.
      trained: written by the assistant, so training learns it; None where the template does not say.
    """

    text: str
    trusted: bool = False
    trained: bool | None = False


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """Token ids of a render, and for each whether it holds anything that is trained, where the pieces say so."""

    ids: list[int]
    trained: list[bool] | None

    @property
    def mask(self) -> list[bool]:
        """True at every token to train; a DataError where the chat template does not mark them."""
        if self.trained is None:
            raise DataError("the chat template does not say what the assistant wrote; mark it with {% generation %}")
        return self.trained


def text_of(pieces: Iterable[Piece]) -> str:
    """The rendered text."""
    return "".join(piece.text for piece in pieces)


def encode(tokenizer: Tokenizer, pieces: Sequence[Piece], *, trust_contents: bool = False) -> Encoded:
    """Ids and mask of a render. A token is trained if one of its characters is.

    Text between two control tokens is encoded in one go, whichever pieces it is from: newlines merge across them.

    Args:
      trust_contents: control tokens spelled out in contents become their ids too, as Hugging Face tokenizers do
        it; for data of your own, never for what users send.
    """
    for piece in pieces:
        for token in _CONTROL.findall(piece.text) if piece.trusted else ():
            if token not in tokenizer.control:
                raise ModelError(f"the tokenizer has no token {token}, which the chat format writes; use its own")
    text = text_of(pieces)
    trusted = b"".join(_BYTE[piece.trusted or trust_contents] * len(piece.text) for piece in pieces)
    trained = b"".join(_BYTE[bool(piece.trained)] * len(piece.text) for piece in pieces)
    ids: list[int] = []
    mask: list[bool] = []
    position = 0
    for start, end in [*_control_spans(tokenizer, text, trusted), (len(text), len(text))]:
        run, flags = _encode_run(tokenizer, text[position:start], trained[position:start])
        ids += run
        mask += flags
        if start < end:
            ids.append(tokenizer.control[text[start:end]])
            mask.append(1 in trained[start:end])
        position = end
    return Encoded(ids=ids, trained=None if any(piece.trained is None for piece in pieces) else mask)


@dataclass(frozen=True, kw_only=True)
class Format:
    """The chat format of one generation.

    Attributes:
      default_system: the system text of a chat that has none; None writes no system block.
      tools: whether tools, calls and results can be written.
      thinks: whether assistants think, between <think> tags. What was thought before the last question is left out.
      quiet: the prompt always closes an empty thought, so that the model does not think.
      header_newline: whether training learns the newline after `<|im_start|>assistant`, as the masks of TRL have it
        for some generations.
      open_end: the last message is not closed, unless a prompt for the next follows.
    """

    name: str
    default_system: str | None = None
    tools: bool = False
    thinks: bool = False
    quiet: bool = False
    header_newline: bool = True
    open_end: bool = False

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        enable_thinking: bool | None = None,
    ) -> list[Piece]:
        """The chat in pieces. Arguments mean what they mean to Hugging Face's `apply_chat_template`.

        Args:
          messages: see `messages.read_messages`. A string of call arguments is written as it is.
          tools: JSON schemas of functions, as OpenAI writes them.
          add_generation_prompt: end where the assistant's answer begins.
          continue_final_message: end inside the last message, an assistant's, for the model to go on.
          enable_thinking: False closes an empty thought in the generation prompt; None is the format's own choice.

        Raises:
          DataError: a message is malformed, or holds what the format cannot write.
          ConfigError: the arguments contradict each other or the format.
        """
        chat = read_messages(messages)
        self._check(chat, tools)
        if continue_final_message and (add_generation_prompt or chat[-1].role != "assistant"):
            raise ConfigError("continue_final_message goes on with an assistant's message, without a generation prompt")
        if enable_thinking is not None and (not self.thinks or (self.quiet and enable_thinking)):
            raise ConfigError(f"enable_thinking={enable_thinking} cannot be chosen in format {self.name}; leave it out")
        pieces = self._system(chat, tools) + self._turns(chat)
        if continue_final_message or (self.open_end and not add_generation_prompt):
            pieces.pop()  # the last message's <|im_end|>
        if add_generation_prompt and not (self.open_end and chat[-1].role == "assistant"):
            pieces.append(_words("<|im_start|>assistant\n"))
            if self.quiet or enable_thinking is False:
                pieces.append(_words(NO_THOUGHT))
        return pieces

    def _check(self, chat: list[Message], tools: Sequence[Mapping[str, Any]] | None) -> None:
        """A DataError for what this format would have to leave out."""
        way_out = "text.tools.react_messages makes plain text of it"
        for index, message in enumerate(chat):
            if not self.tools and (message.calls or message.role == "tool"):
                raise DataError(f"format {self.name} cannot write messages[{index}], a tool's; {way_out}")
            if not self.thinks and message.reasoning:
                raise DataError(f"format {self.name} cannot write messages[{index}].reasoning_content; leave it out")
        if isinstance(tools, str | Mapping) or not isinstance(tools, Sequence | None):
            raise DataError(f"tools is a {type(tools).__name__}; want a list of function schemas")
        if tools and not self.tools:
            raise DataError(f"format {self.name} cannot write tools; {way_out}")
        for index, tool in enumerate(tools or ()):
            if not isinstance(tool, Mapping):
                raise DataError(f"tools[{index}] is a {type(tool).__name__}; want the schema of a function, an object")

    def _system(self, chat: list[Message], tools: Sequence[Mapping[str, Any]] | None) -> list[Piece]:
        """The first block: the system message or its default, and the tools."""
        if chat[0].role == "system":
            text = [Piece(text=chat[0].content)]
        else:
            text = [_words(self.default_system)] if self.default_system is not None else []
        if tools:
            text += [_words("\n\n" + TOOLS if text else TOOLS)]
            for index, tool in enumerate(tools):
                text += [_words("\n"), Piece(text=to_json(tool, f"tools[{index}]"))]
            text += [_words(CALLS)]
        return [_words("<|im_start|>system\n"), *text, _words(_CLOSE)] if text else []

    def _turns(self, chat: list[Message]) -> list[Piece]:
        """The messages after the first block; results in a row share a turn of the user."""
        pieces: list[Piece] = []
        question = _last_question(chat) if self.thinks else len(chat)
        rest = list(enumerate(chat))[chat[0].role == "system" :]
        for role, run in groupby(rest, key=lambda item: item[1].role):
            if role == "tool":
                pieces.append(_words("<|im_start|>user"))
                for _, message in run:
                    result = Piece(text=message.content)
                    pieces += [_words("\n<tool_response>\n"), result, _words("\n</tool_response>")]
                pieces.append(_words(_CLOSE))
                continue
            for index, message in run:
                if role == "assistant":
                    pieces += self._answer(message, index > question, index == len(chat) - 1)
                else:
                    pieces += [_words(f"<|im_start|>{role}\n"), Piece(text=message.content), _words(_CLOSE)]
        return pieces

    def _answer(self, message: Message, recent: bool, last: bool) -> list[Piece]:
        """An assistant's turn; `recent` is after the last question, where thoughts are kept."""
        content, reasoning, trained = message.content, message.reasoning, message.trained
        if self.thinks and reasoning is None and "</think>" in content:
            reasoning = content.split("</think>")[0].rstrip("\n").split("<think>")[-1].lstrip("\n")
            content = content.split("</think>")[-1].lstrip("\n")
        answer = []
        if recent and (last or reasoning):
            thought = Piece(text=(reasoning or "").strip("\n"), trained=trained)
            answer += [_words("<think>\n", trained), thought, _words("\n</think>\n\n", trained)]
            answer += [Piece(text=content.lstrip("\n"), trained=trained)]
        else:
            answer += [Piece(text=content, trained=trained)]
        for index, call in enumerate(message.calls):
            answer += [_words("\n", trained)] if content or index else []
            answer += _call(call, trained)
        newline = _words("\n", trained and self.header_newline)
        return [_words("<|im_start|>assistant"), newline, *answer, _words(_CLOSE, trained)]


_QWEN25 = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
_MATH = "Please reason step by step, and put your final answer within \\boxed{}."

FORMATS = {
    form.name: form
    for form in (
        # Qwen1's own prompt builder encodes the newline of a header apart from a content that begins with newlines.
        Format(name="qwen1", default_system=_HELPFUL),
        Format(name="qwen1.5", default_system=_HELPFUL.rstrip("."), open_end=True),
        Format(name="qwen2", default_system=_HELPFUL),
        Format(name="qwen2.5", default_system=_QWEN25, tools=True),
        Format(name="qwen2.5-math", default_system=_MATH, tools=True),
        Format(name="qwen3", tools=True, thinks=True, header_newline=False),
        Format(name="qwen3-nonthinking", tools=True, thinks=True, quiet=True, header_newline=False),
        Format(name="qwen3-instruct-2507", tools=True, header_newline=False),
    )
}

# sha256 of published templates, with LF and no newline at the end, to the format that writes the same.
_TEMPLATES = {
    "7a2fad4301dcce93b13747dfd6ee5fa696dc12de86b85b86344bea8f649022b3": "qwen1.5",
    "793202280c0910ab26bc6eb57c8212c2417324c6d8c4efd0d10d59092ab3e3eb": "qwen2",
    "55b2f4a26ac9ee719330a61a0c39d9e538b0e9322212f048326318cff4f8674a": "qwen2.5",
    "2976f7de3b9489e3237dc5ad2734060f756d026da00f24464c59c2e3bb40ee37": "qwen2.5-math",
    "a55ee1b1660128b7098723e0abcd92caa0788061051c62d51cbe87d9cf1974d8": "qwen3",
    "30a75d10e60b57e2f260420163dd59720dacf9f63b9a8de070d65dd80a7b30f7": "qwen3-nonthinking",
    "f3714f7117c9d447db80ceb3fcb67a64ba08d149dd4434fe53add9c7f1dd344b": "qwen2.5",
    "64f85b198065d0fba2a81f37e10ed68161ce2c19a754c7100e67e0ca2ee9c326": "qwen3-instruct-2507",
    "48e17aa3caf5bf20075b6e7366864ee943e00b6f0752aadfe8b670c2ab0291a5": "qwen3-instruct-2507",
    "87a2728cb8dc9fe424d624542f6060ec05a1d285ebbec578bb078900e33396b5": "qwen3",
    # Those of chat_template.template_of.
    "48c2031b5c52335638cb3ef4b00a40d2fa6377ad4008c22473e8cde2cac863fe": "qwen2",
    "8ec0446ede60a066dfde7bf6f05dafacf4e39277894d189de80479c7a84a2de9": "qwen1.5",
    "febffec7873802be3291d9f89f6ae063ece32c661b205d5628db27035fb8842d": "qwen2.5",
    "3e553946962bc8339e8c8d2d7eab7c2387fda9def3516c13efc1dc793279e2d8": "qwen2.5-math",
    "0c42c21f7f10de73d346174bad08406c423850d64cb700c6678b796a2d14e7ed": "qwen3",
    "b6832c3fecc00b44789cc5a5af15dec4cb81cc965d2da78355c4a2587561afef": "qwen3-nonthinking",
    "bbf3d4ecec11381d02e99012374429f37ecb27b946ab5b5630599d914201af87": "qwen3-instruct-2507",
}


def format_of_template(template: str) -> Format | None:
    """The format that writes what this Jinja template writes; None for a template that is not known."""
    text = template.replace("\r\n", "\n").removesuffix("\n")
    name = _TEMPLATES.get(hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest())
    return None if name is None else FORMATS[name]


def window(
    tokenizer: Tokenizer, form: Format, messages: Sequence[Mapping[str, Any]], *, max_window_size: int = 6144
) -> list[Mapping[str, Any]]:
    """The chat without the oldest exchanges, as Qwen1's prompt builder cuts it.

    An exchange is a user's message and what follows it. The system message and the last exchange stay, and of the
    others the newest whose tokens, with those of the system message, fit `max_window_size`.
    """
    chat = read_messages(messages)
    first = int(chat[0].role == "system")
    starts = [first] + [index for index in range(first + 1, len(chat)) if chat[index].role == "user"]
    kept, room = starts[-1], max_window_size - len(encode(tokenizer, form._system(chat, None)).ids)
    for start, end in reversed(list(pairwise(starts))):
        room -= len(encode(tokenizer, form._turns(chat[start:end])).ids)
        if room < 0:
            break
        kept = start
    return [*messages[:first], *messages[kept:]]


def _words(text: str, trained: bool = False) -> Piece:
    return Piece(text=text, trusted=True, trained=trained)


def _call(call: Call, trained: bool) -> list[Piece]:
    return [
        _words('<tool_call>\n{"name": "', trained),
        Piece(text=call.name, trained=trained),
        _words('", "arguments": ', trained),
        Piece(text=call.arguments, trained=trained),
        _words("}\n</tool_call>", trained),
    ]


def _last_question(chat: list[Message]) -> int:
    """Index of the last user message that is not a tool's result; the last index where there is none."""
    for index in reversed(range(len(chat))):
        content = chat[index].content
        result = content.startswith("<tool_response>") and content.endswith("</tool_response>")
        if chat[index].role == "user" and not result:
            return index
    return len(chat) - 1


def _encode_run(tokenizer: Tokenizer, text: str, trained: bytes) -> tuple[list[int], list[bool]]:
    """Ids and mask of text between control tokens; offsets, which cost time, matter only where both kinds meet."""
    if 0 in trained and 1 in trained:
        ids, spans = tokenizer.encode_with_offsets(text)
        return ids, [1 in trained[start:end] for start, end in spans]
    ids = tokenizer.encode(text)
    return ids, [1 in trained] * len(ids)


def _control_spans(tokenizer: Tokenizer, text: str, trusted: bytes) -> list[tuple[int, int]]:
    """Where control tokens lie wholly inside trusted text; the longest where several begin."""
    tokens = re.compile("|".join(map(re.escape, sorted(tokenizer.control, key=len, reverse=True))))
    stretches = re.finditer(rb"\x01+", trusted)
    return [match.span() for stretch in stretches for match in tokens.finditer(text, *stretch.span())]
