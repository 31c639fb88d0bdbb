"""Requests as clients send them: the bodies of OpenAI's API, with the fields that users of Qwen know beside them.

Types are strict, as OpenAI's are. Fields that are not known are ignored, which is what clients of OpenAI's API rely on;
those that are known and cannot be honoured, or would reach further than a client should, are refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from qwen_jax.engine.request import MAX_LOGPROBS

_NAME = re.compile(r"[\w.-]{1,64}", re.ASCII)
# What other servers honour and this one does not, beside what a client has no business with: a chat template is a
# program.
_REFUSED = {
    "chat_template", "audio", "modalities", "prediction", "web_search_options", "functions", "function_call",
    "use_beam_search", "length_penalty", "prompt_logprobs", "ignore_eos", "min_tokens", "stop_token_ids",
    "guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs", "regex", "ebnf",
    "add_generation_prompt", "continue_final_message",
}  # fmt: skip
# Their only honoured values.
_HARMLESS = {"modalities": ["text"], "add_generation_prompt": True}

# What a message mostly is, for the description of the API; `qwen_jax.text.messages` says what it may be.
_MESSAGE = {
    "type": "object",
    "properties": {"role": {"enum": ["system", "user", "assistant", "tool"]}, "content": {"type": "string"}},
    "required": ["role", "content"],
}

Stop = Annotated[str, Field(min_length=1, max_length=256)]
Token = Annotated[int, Field(ge=0)]


class StreamOptions(BaseModel):
    """How a stream is written."""

    model_config = ConfigDict(strict=True)

    include_usage: bool | None = None


class Body(BaseModel):
    """What requests of both kinds have; None stands for the model's own default, as an absent field does."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="ignore")

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1024)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, data: Any) -> Any:
        for name in _REFUSED.intersection(data) if isinstance(data, Mapping) else ():
            if name not in cls.model_fields and data[name] is not None and data[name] != _HARMLESS.get(name):
                raise ValueError(f"{name} is not honoured here; leave it out")
        return data

    @property
    def limit(self) -> int | None:
        """Tokens a completion may have, as far as was said."""
        return self.max_tokens

    @property
    def num_rows(self) -> int:
        """Completions that are made."""
        return self.n or 1

    @property
    def stops(self) -> list[str]:
        """The strings that end a completion."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with a count of its tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatBody(Body):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1, json_schema_extra={"items": _MESSAGE})]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: Annotated[list[dict[str, Any]], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    response_format: dict[str, Any] | None = None
    enable_thinking: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @field_validator("tools")
    @classmethod
    def _are_functions(cls, tools: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
        for index, tool in enumerate(tools or ()):
            function = tool.get("function")
            if tool.get("type") != "function" or not isinstance(function, dict):
                raise ValueError(f'tools[{index}] is not {{"type": "function", "function": {{...}}}}')
            name = function.get("name")
            if not (isinstance(name, str) and _NAME.fullmatch(name)):
                raise ValueError(f"tools[{index}].function.name is not 1 to 64 letters, digits, _, . and -")
        return tools

    @field_validator("response_format")
    @classmethod
    def _is_known(cls, wanted: dict[str, Any] | None) -> dict[str, Any] | None:
        kind = wanted.get("type") if wanted is not None else "text"
        if kind not in ("text", "json_object", "json_schema"):
            raise ValueError("response_format.type is not one of text, json_object and json_schema")
        if wanted is not None and kind == "json_schema":
            schema = wanted.get("json_schema")
            if not (isinstance(schema, dict) and isinstance(schema.get("schema"), dict)):
                raise ValueError('response_format.json_schema is not {"name": ..., "schema": {...}}')
        return wanted

    @field_validator("chat_template_kwargs")
    @classmethod
    def _is_thinking(cls, options: dict[str, Any] | None) -> dict[str, Any] | None:
        for name, value in (options or {}).items():
            if name != "enable_thinking" or not isinstance(value, bool | None):
                raise ValueError("chat_template_kwargs: only enable_thinking, true or false, can be chosen")
        return options

    @model_validator(mode="after")
    def _agrees(self) -> ChatBody:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if isinstance(self.tool_choice, dict) or self.tool_choice == "required":
            if not self.tools:
                raise ValueError("tool_choice asks for a call and there are no tools")
        if isinstance(self.tool_choice, dict) and self.forced_tool is None:
            raise ValueError('tool_choice is not {"type": "function", "function": {"name": ...}}')
        if self.offered_tools and (self.response_format or {"type": "text"})["type"] != "text":
            raise ValueError(
                "response_format goes with no tools, which have a form of their own; leave one of them out"
            )
        return self

    @property
    def forced_tool(self) -> str | None:
        """The tool that has to be called, if there is one."""
        if not isinstance(self.tool_choice, dict) or self.tool_choice.get("type") != "function":
            return None
        function = self.tool_choice.get("function")
        name = function.get("name") if isinstance(function, dict) else None
        return name if isinstance(name, str) else None

    @property
    def offered_tools(self) -> list[dict[str, Any]]:
        """The tools that the model is told of."""
        return [] if self.tool_choice == "none" else self.tools or []

    @property
    def thinking(self) -> bool | None:
        """Whether the model shall think; None where nothing was said."""
        template = (self.chat_template_kwargs or {}).get("enable_thinking")
        return self.enable_thinking if self.enable_thinking is not None else template

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class CompletionBody(Body):
    """The body of /v1/completions."""

    prompt: str | list[Token] | list[str] | list[list[Token]] = Field(union_mode="left_to_right")
    suffix: str | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    best_of: int | None = None

    @model_validator(mode="after")
    def _agrees(self) -> CompletionBody:
        if not self.prompts or [] in self.prompts:
            raise ValueError("prompt is empty; give a text, or the ids of tokens")
        if self.best_of not in (None, 1, self.n or 1):
            raise ValueError("best_of is not honoured beyond n; leave it out")
        if self.echo and (self.logprobs is not None or self.suffix is not None):
            raise ValueError("echo goes with neither logprobs, which a prompt does not get here, nor suffix")
        if self.suffix is not None and not all(isinstance(prompt, str) for prompt in self.prompts):
            raise ValueError("suffix needs a prompt of text")
        return self

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """Each of the prompts, as text or as ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return self.prompt  # type: ignore[return-value]

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def num_rows(self) -> int:
        return len(self.prompts) * (self.n or 1)
