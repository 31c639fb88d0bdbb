"""Requests as the engine takes them, made of those that clients send, and what reads the answers.

Rendering, encoding and compiling a grammar take time that grows with what was sent: all this runs in a thread beside
the event loop.
"""

from __future__ import annotations

import dataclasses
import functools
import secrets
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from infer.server.choices import ChatChoice, Choice, ReactCompletion, TextChoice
from infer.server.errors import ApiError, blaming
from infer.server.logprobs import ChatLogprobs, TextLogprobs
from infer.server.protocol import ChatBody, CompletionBody
from qwen_jax.engine import ChatCompletion, Completion, Request, Sampling
from qwen_jax.engine.structured import Grammar, Grammars
from qwen_jax.errors import DataError
from qwen_jax.text import Tokenizer, fim
from qwen_jax.text.chat import Format, encode, text_of
from qwen_jax.text.messages import read_messages
from qwen_jax.text.template import JinjaFormat
from qwen_jax.text.tools import REACT_STOPS, react_messages
from qwen_jax.weights.usage import turn_ends

# Of a completion that asks for no number, as in OpenAI's API. A chat may take all the room there is.
DEFAULT_TOKENS = 16
_SAMPLED = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Served:
    """What the routes know of the model.

    Attributes:
      name: what clients call it.
      created: when the server began, in seconds since 1970.
      tokenizer: its own.
      form: the format of its chats; None where it has none.
      thinks_unasked: whether a model that thinks does so where a request leaves it open.
      sampling: how tokens are chosen where a request leaves it open.
      max_new_tokens: of an answer whose request leaves it open; None for all there is room for.
      stop_ids: tokens that end a text.
      max_length: tokens of a prompt and its completion.
    """

    name: str
    created: int
    tokenizer: Tokenizer
    form: Format | JinjaFormat | None
    thinks_unasked: bool
    sampling: Sampling
    max_new_tokens: int | None
    stop_ids: frozenset[int]
    max_length: int

    def check_name(self, name: str | None) -> None:
        """Refuses the name of another model; None stands for this one."""
        if name not in (None, self.name):
            message = f"there is no model {name!r:.100} here; {self.name!r} is served"
            raise ApiError(404, message, param="model", code="model_not_found")

    @functools.cached_property
    def chat_stop_ids(self) -> frozenset[int]:
        """Tokens that end an answer."""
        return self.stop_ids | turn_ends(self.tokenizer)

    @functools.cached_property
    def grammars(self) -> Grammars:
        """Raises ConfigError where the package for them is not installed."""
        return Grammars(self.tokenizer, self.chat_stop_ids)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared:
    """A request of a client's: a request to the engine and a choice for each of its rows.

    Attributes:
      num_prompt_tokens: of all its prompts.
    """

    requests: Sequence[Request]
    choices: Sequence[Choice]
    num_prompt_tokens: int


def prepare_chat(served: Served, body: ChatBody) -> Prepared:
    """What a chat comes to. Raises ApiError."""
    form, tokenizer, stop_ids = served.form, served.tokenizer, served.chat_stop_ids
    if form is None:
        raise ApiError(400, "the model has no chat format; use /v1/completions", param="messages")
    reacts = form.name == "qwen1" and bool(body.offered_tools)
    with blaming("messages"):
        pieces = _render(served, form, body, reacts)
        ids = encode(tokenizer, pieces).ids
    prompt = text_of(pieces)
    in_thought = form.thinks and prompt.endswith("<think>\n")
    may_think = form.thinks and not prompt.endswith("</think>\n\n")
    grammar = _grammar(served, form, body)
    reads = dict(thinks=form.thinks, in_thought=in_thought, tools=bool(body.offered_tools))
    request = _request(served, body, ids, _seed(body), stop_ids, served.max_new_tokens or served.max_length)
    requests, choices = [], []
    for row in range(body.num_rows):
        with blaming("response_format" if body.response_format else "tool_choice"):
            constraint = grammar and grammar.constraint(thinks=may_think, in_thought=in_thought)
        requests.append(dataclasses.replace(request, row=row, constraint=constraint))
        if reacts:
            completion = ReactCompletion(Completion(tokenizer, stop_ids, [*body.stops, *REACT_STOPS]))
        else:
            completion = ChatCompletion(tokenizer, stop_ids, body.stops, **reads)
        logprobs = ChatLogprobs(tokenizer, stop_ids) if body.logprobs else None
        choices.append(ChatChoice(completion, logprobs, one_call=body.parallel_tool_calls is False))
    return Prepared(requests=requests, choices=choices, num_prompt_tokens=len(ids))


def prepare_completion(served: Served, body: CompletionBody) -> Prepared:
    """What a completion comes to. Raises ApiError."""
    tokenizer, stop_ids = served.tokenizer, served.stop_ids
    if body.suffix is not None:
        stop_ids |= {tokenizer.control[token] for token in fim.STOP_TOKENS if token in tokenizer.control}
    seed, requests, choices, num_prompt_tokens = _seed(body), [], [], 0
    for prompt in body.prompts:
        with blaming("prompt" if body.suffix is None else "suffix"):
            ids = _encode(tokenizer, prompt, body.suffix)
            echo = prompt if isinstance(prompt, str) else tokenizer.decode(prompt, skip_special=False)
        num_prompt_tokens += len(ids)
        request = _request(served, body, ids, seed, stop_ids, DEFAULT_TOKENS)
        for _ in range(body.n or 1):
            requests.append(dataclasses.replace(request, row=len(requests)))
            logprobs = TextLogprobs(tokenizer, stop_ids) if body.logprobs is not None else None
            completion = Completion(tokenizer, stop_ids, body.stops)
            choices.append(TextChoice(completion, logprobs, echo=echo if body.echo else ""))
    return Prepared(requests=requests, choices=choices, num_prompt_tokens=num_prompt_tokens)


def _render(served: Served, form: Format | JinjaFormat, body: ChatBody, reacts: bool) -> Sequence[Any]:
    """The chat in pieces, up to where the answer begins."""
    messages: list[Mapping[str, Any]] = [
        message | {"role": "system"} if message.get("role") == "developer" else message for message in body.messages
    ]
    # Before a template of any kind sees them: only text is let in.
    if read_messages(messages)[-1].role == "assistant":
        raise DataError("the last message is the assistant's; leave it out, and it is answered anew")
    if reacts:
        plain = react_messages(messages, body.offered_tools)
        goes_on = plain[-1]["role"] == "assistant"
        return form.render(plain, add_generation_prompt=not goes_on, continue_final_message=goes_on)
    thinking = body.thinking if body.thinking is not None or served.thinks_unasked else False
    if not (thinking or form.thinks):
        thinking = None  # what the format cannot do, it need not be kept from
    return form.render(messages, tools=body.offered_tools or None, add_generation_prompt=True, enable_thinking=thinking)


def _encode(tokenizer: Tokenizer, prompt: str | list[int], suffix: str | None) -> list[int]:
    """Ids of a prompt. Documents follow <|endoftext|>, so that is what an empty one starts from."""
    if not isinstance(prompt, str):
        return prompt
    if suffix is not None:
        return encode(tokenizer, fim.fill_in_the_middle(prompt, suffix)).ids
    return tokenizer.encode(prompt) or [tokenizer.end_of_text]


def _grammar(served: Served, form: Format | JinjaFormat, body: ChatBody) -> Grammar | None:
    """What the answer is held to; None for nothing."""
    if body.forced_tool or body.tool_choice == "required":
        if not form.tools:
            raise ApiError(400, f"tool_choice: with format {form.name} no call can be forced", param="tool_choice")
        with blaming("tools"):
            one_call = body.parallel_tool_calls is False
            return served.grammars.calls(body.offered_tools, name=body.forced_tool, parallel=not one_call)
    wanted = body.response_format or {"type": "text"}
    with blaming("response_format"):
        if wanted["type"] == "json_object":
            return served.grammars.json_object()
        if wanted["type"] == "json_schema":
            return served.grammars.json_schema(wanted["json_schema"]["schema"])
    return None


def _seed(body: ChatBody | CompletionBody) -> int:
    return secrets.randbits(32) if body.seed is None else body.seed % 2**32


def _request(
    served: Served,
    body: ChatBody | CompletionBody,
    ids: Sequence[int],
    seed: int,
    stop_ids: Collection[int],
    default_tokens: int,
) -> Request:
    """What the rows of a prompt have in common."""
    asked, room = body.limit, served.max_length - len(ids)
    if room < (asked or 1):
        raise ApiError(
            400,
            f"a prompt of {len(ids)} tokens and {asked or 1} new ones do not fit into the {served.max_length} tokens "
            f"there is room for; {f'ask for at most {room} new tokens' if room > 0 else 'shorten the prompt'}",
            param="max_tokens" if asked and room > 0 else None,
            code="context_length_exceeded",
        )
    with blaming(None):
        return Request(
            prompt=ids,
            max_new_tokens=asked or min(default_tokens, room),
            sampling=_sampling(served, body),
            seed=seed,
            stop_ids=frozenset(stop_ids),
            logprobs=body.num_logprobs,
        )


def _sampling(served: Served, body: ChatBody | CompletionBody) -> Sampling:
    """How tokens are chosen: as the request says, else as the model's files do."""
    given = {name: value for name in _SAMPLED if (value := getattr(body, name)) is not None}
    if body.top_k is not None:
        given["top_k"] = max(body.top_k, 0)  # other servers write -1 for all
    if body.logit_bias:
        given["logit_bias"] = tuple({_token(served, name): bias for name, bias in body.logit_bias.items()}.items())
    return dataclasses.replace(served.sampling, **given)


def _token(served: Served, name: str) -> int:
    if not (name.isascii() and name.isdigit() and len(name) < 10 and int(name) < served.tokenizer.num_tokens):
        most = served.tokenizer.num_tokens - 1
        raise ApiError(
            400, f"logit_bias names the token {name!r:.40}; ids from 0 to {most} are wanted", param="logit_bias"
        )
    return int(name)
