"""How a model is meant to be used: what the files beside its weights say of sampling, endings and chats."""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from qwen_jax.errors import ConfigError, ModelError
from qwen_jax.ops.sampling import Sampling
from qwen_jax.text import Tokenizer
from qwen_jax.text.chat import FORMATS, Format
from qwen_jax.text.template import JinjaFormat, load_format
from qwen_jax.weights import strict_json
from qwen_jax.weights.source import Model

GENERATION = "generation_config.json"
TOKENIZER = "tokenizer_config.json"
# Tokens that no answer in ChatML holds: the turn has ended, or the model has lost its way.
TURN_ENDS = ("<|im_end|>", "<|endoftext|>", "<|im_start|>")
# What `generate()` of transformers 5 takes for a top_k that is absent or null.
_TOP_K = 50
# Of Qwen1's own prompt builder.
_WINDOW = 6144
# Fields that change what is generated and are not computed here, with the value beside null and 0 that has no effect.
_NOT_HONOURED = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "diversity_penalty": 0,
    "penalty_alpha": 0,
    "dola_layers": None,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "bad_words_ids": [],
    "sequence_bias": [],
    "suppress_tokens": [],
    "begin_suppress_tokens": [],
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "typical_p": 1,
    "top_h": None,
    "epsilon_cutoff": 0,
    "eta_cutoff": 0,
    "encoder_repetition_penalty": 1,
    "guidance_scale": 1,
    "min_length": 0,
    "min_new_tokens": 0,
    "max_time": None,
    "stop_strings": [],
    "stop_words_ids": [[151643]],  # Qwen1's <|endoftext|>, its eos_token_id as well
    "token_healing": False,
    "watermarking_config": None,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Usage:
    """Sampling, endings and chats of a model as its files have them.

    Attributes:
      defaults: fields of `Sampling` that generation_config.json sets, as `generate()` of transformers 5 reads them:
        without do_sample the temperature is 0, and a top_k that is not given is 50. Presence and frequency penalties,
        which it does not have, hold as well. Empty without the file.
      max_new_tokens: of generation_config.json.
      stop_ids: tokens that end a text.
      template: the chat template; None where there is none.
      special_tokens: the tokens that a template may name, such as "eos_token".
      window: tokens of history in a chat with Qwen1, which has a format and no template; None for other models.
    """

    defaults: Mapping[str, float]
    max_new_tokens: int | None
    stop_ids: frozenset[int]
    template: str | None
    special_tokens: Mapping[str, str]
    window: int | None

    def chat_format(self, tokenizer: Tokenizer, *, warn: Callable[[str], None]) -> Format | JinjaFormat | None:
        """The format of the model's chats, None where it has none; `warn` hears of a template that is not known."""
        if self.window is not None:
            return FORMATS["qwen1"]
        if self.template is None:
            return None
        return load_format(self.template, tokenizer.control, special_tokens=self.special_tokens, warn=warn)


def read_usage(model: Model, tokenizer: Tokenizer, *, warn: Callable[[str], None]) -> Usage:
    """What the files of a model say.

    Args:
      model: from `source.open_model`.
      tokenizer: its tokenizer.
      warn: takes one line about fields that cannot be honoured.

    Raises ModelError for a field of the wrong type or range.
    """
    files = model.side_files()
    generation = _Fields.of(files, model.path, GENERATION)
    settings = _Fields.of(files, model.path, TOKENIZER)
    if ignored := [name for name, off in _NOT_HONOURED.items() if generation.values.get(name) not in (None, 0, off)]:
        warn(f"{generation.where}: not honoured, so texts may differ from other programs': {', '.join(ignored)}")
    qwen1 = model.model_type == "qwen" and generation.values.get("chat_format") == "chatml"
    return Usage(
        defaults=_sampling(generation) if GENERATION in files else {},
        max_new_tokens=generation.integer("max_new_tokens", low=1),
        stop_ids=_stop_ids(model, tokenizer, generation, _Fields.of(files, model.path, "config.json"), settings),
        template=_template(files, model.path, settings),
        special_tokens={name: text for name in settings.values if (text := settings.token(name)) is not None},
        window=generation.integer("max_window_size", low=1) or _WINDOW if qwen1 else None,
    )


def turn_ends(tokenizer: Tokenizer) -> frozenset[int]:
    """Tokens that end an answer, besides those that end every text of a model."""
    return frozenset(tokenizer.control[text] for text in TURN_ENDS if text in tokenizer.control)


def _sampling(fields: _Fields) -> dict[str, float]:
    values = {
        "temperature": fields.number("temperature"),
        "top_k": fields.integer("top_k"),
        "top_p": fields.number("top_p"),
        "min_p": fields.number("min_p"),
        "repetition_penalty": fields.number("repetition_penalty"),
        "presence_penalty": fields.number("presence_penalty"),
        "frequency_penalty": fields.number("frequency_penalty"),
    }
    given = {"temperature": 1.0, "top_k": _TOP_K} | {name: value for name, value in values.items() if value is not None}
    if not fields.flag("do_sample"):
        given["temperature"] = 0.0
    try:
        Sampling(**given)
    except ConfigError as error:
        raise ModelError(f"{fields.where}: {error}") from error
    return given


def _stop_ids(
    model: Model, tokenizer: Tokenizer, generation: _Fields, config: _Fields, settings: _Fields
) -> frozenset[int]:
    """The first that is given of generation_config's, config's and the tokenizer's; else <|endoftext|>."""
    ids = generation.ids("eos_token_id", tokenizer.num_tokens) or config.ids("eos_token_id", tokenizer.num_tokens)
    if not ids and (text := settings.token("eos_token")) is not None:
        if text not in tokenizer.control:
            raise ModelError(f"{settings.where}: eos_token is {text!r}, which the tokenizer does not have")
        ids = {tokenizer.control[text]}
    ids = ids or {tokenizer.end_of_text}
    return frozenset(ids) | (turn_ends(tokenizer) if model.chat else frozenset())


def _template(files: Mapping[str, bytes], folder: Path, settings: _Fields) -> str | None:
    """The template in its own file, or else in tokenizer_config.json: the only one, or the one named "default"."""
    if (contents := files.get("chat_template.jinja")) is not None:
        try:
            return contents.decode()
        except UnicodeDecodeError as error:
            raise ModelError(f"{folder / 'chat_template.jinja'} is not UTF-8 at byte {error.start}") from error
    found = settings.values.get("chat_template")
    if isinstance(found, list):
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = named.get("default", found)
    if not isinstance(found, str | None):
        raise settings.refusal("chat_template", 'a string, or a list with {"name": "default", "template": ...}')
    return found


@dataclasses.dataclass(frozen=True)
class _Fields:
    """The fields of a file, each read with its type. A null, or a file that is not there, is as good as absent."""

    values: Mapping[str, Any]
    where: Path

    @classmethod
    def of(cls, files: Mapping[str, bytes], folder: Path, name: str) -> _Fields:
        try:
            return cls(strict_json.loads(files[name]) if name in files else {}, folder / name)
        except ValueError as error:
            raise ModelError(f"{folder / name}: {error}") from error

    def refusal(self, name: str, wanted: str) -> ModelError:
        return ModelError(f"{self.where}: {name} is {reprlib.repr(self.values[name])}; wanted is {wanted}")

    def number(self, name: str) -> float | None:
        value = self.values.get(name)
        if type(value) not in (int, float, type(None)):
            raise self.refusal(name, "a number")
        return value

    def integer(self, name: str, low: int = 0) -> int | None:
        value = self.values.get(name)
        if value is not None and (type(value) is not int or value < low):
            raise self.refusal(name, f"a whole number from {low} up")
        return value

    def flag(self, name: str) -> bool:
        value = self.values.get(name)
        if not isinstance(value, bool | None):
            raise self.refusal(name, "true or false")
        return bool(value)

    def ids(self, name: str, num_tokens: int) -> set[int]:
        """The ids of a field that holds one or a list; empty where it is absent."""
        value = self.values.get(name)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(index) is int and 0 <= index < num_tokens for index in ids):
            raise self.refusal(name, f"ids of the tokenizer's {num_tokens} tokens")
        return set(ids)

    def token(self, name: str) -> str | None:
        """The text of a token, which may be wrapped in an object; None for a field that does not hold one."""
        value = self.values.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        return value if name.endswith("_token") and isinstance(value, str) else None
