"""Chats with a model, many at a time: what is asked goes into the engine, and answers come out as they are done."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections import deque
from collections.abc import Callable

import jax

from qwen_jax.engine import Capacity, ChatCompletion, Engine, Request, Sampling, load
from qwen_jax.engine.structured import Grammars
from qwen_jax.errors import ConfigError, NumericalError
from qwen_jax.sharding import make_mesh
from qwen_jax.text import Tokenizer
from qwen_jax.text.chat import FORMATS, Format, encode, text_of
from qwen_jax.text.template import JinjaFormat
from qwen_jax.weights.source import NativeCheckpoint, PublishedFolder, open_model
from qwen_jax.weights.usage import read_usage, turn_ends
from train.data.synthesis.config import Model
from train.data.synthesis.stages import Answer, Ask

_FULL_ROWS = 4  # answers of full length that the cache has room for; most are a fraction as long


@dataclasses.dataclass(frozen=True, kw_only=True)
class Opened:
    """A model without its weights: what is wrong with the rest is said before they are read.

    Attributes:
      sampling: the config's, and of the model's own what that leaves open.
      max_length: tokens of a question and its answer.
    """

    config: Model
    model: PublishedFolder | NativeCheckpoint
    tokenizer: Tokenizer
    form: Format | JinjaFormat
    stop_ids: frozenset[int]
    sampling: Sampling
    max_length: int

    def load(self) -> Engine:
        """The engine, on the first device."""
        rows = self.config.max_rows
        cache = min(rows, _FULL_ROWS) * self.max_length
        capacity = Capacity(max_rows=rows, max_length=self.max_length, cache_tokens=cache)
        mesh = make_mesh(devices=jax.devices()[:1])
        return load(self.model, self.tokenizer, mesh=mesh, dtype=self.config.dtype, capacity=capacity)


def open_for(config: Model, *, warn: Callable[[str], None]) -> Opened:
    """The model of a config. Raises ConfigError, FileError or ModelError."""
    given = {field.name for field in dataclasses.fields(Sampling)} & set(vars(config))
    wanted = {name: value for name in given if (value := getattr(config, name)) is not None}
    Sampling(**wanted)  # what cannot be sampled with is refused before anything is read
    model = open_model(config.path, warn=warn)
    tokenizer = model.tokenizer()
    usage = read_usage(model, tokenizer, warn=warn)
    if config.format and config.format not in FORMATS:
        raise ConfigError(f"model.format={config.format!r} is none of {', '.join(FORMATS)}")
    form = FORMATS[config.format] if config.format else usage.chat_format(tokenizer, warn=warn)
    if form is None:
        raise ConfigError(f"{model.path} has no chat template; bind model.format to one of {', '.join(FORMATS)}")
    if not config.thinking and not form.thinks:
        raise ConfigError(f"model.thinking=False: chat format {form.name} has no thoughts; leave it out")
    max_length = min(config.max_length, model.config.max_position)
    if max_length <= config.max_new_tokens:
        raise ConfigError(f"model.max_new_tokens={config.max_new_tokens} fills all {max_length} positions of the model")
    return Opened(
        config=config,
        model=model,
        tokenizer=tokenizer,
        form=form,
        stop_ids=usage.stop_ids | turn_ends(tokenizer),
        sampling=Sampling(**{**usage.defaults, **wanted}),
        max_length=max_length,
    )


# Number of a row, of the time it asks, and of the question.
Key = tuple[int, int, int]


class Asker:
    """Asks the model, and gives answers by the keys they were asked with.

    Attributes:
      prompt_tokens, new_tokens: of all answers that were given.
    """

    def __init__(self, opened: Opened, engine: Engine, *, seed: int) -> None:
        self._opened, self._engine, self._seed = opened, engine, seed
        self._running: dict[int, tuple[Key, ChatCompletion, list[str], list[str]]] = {}
        self._ready: deque[tuple[Key, Answer]] = deque()
        self.prompt_tokens = self.new_tokens = 0

    @property
    def busy(self) -> bool:
        """Whether anything was asked that is not answered."""
        return bool(self._running or self._ready)

    def add(self, key: Key, ask: Ask) -> None:
        """Asks; what is drawn depends on the seed and on repr(key) alone. Raises DataError for a chat of no form."""
        opened, form = self._opened, self._opened.form
        thinking = None if opened.config.thinking else False
        pieces = form.render(ask.messages, add_generation_prompt=True, enable_thinking=thinking)
        ids, prompt = encode(opened.tokenizer, pieces).ids, text_of(pieces)
        if len(ids) + opened.config.max_new_tokens > opened.max_length:
            self._ready.append((key, Answer(text="", finish_reason="no room")))
            return
        in_thought = form.thinks and prompt.endswith("<think>\n")
        constraint = None
        if ask.schema is not None:
            may_think = form.thinks and not prompt.endswith("</think>\n\n")
            grammar = self._grammars.json_schema(ask.schema)
            constraint = grammar.constraint(thinks=may_think, in_thought=in_thought)
        seed, row = _numbers(f"{self._seed}/{key!r}")
        request = Request(
            prompt=ids,
            max_new_tokens=opened.config.max_new_tokens,
            sampling=opened.sampling,
            seed=seed,
            row=row,
            stop_ids=opened.stop_ids,
            constraint=constraint,
        )
        reads = dict(thinks=form.thinks, in_thought=in_thought, tools=False)
        completion = ChatCompletion(opened.tokenizer, opened.stop_ids, (), **reads)
        self._running[self._engine.add(request)] = key, completion, [], []
        self.prompt_tokens += len(ids)

    def step(self) -> list[tuple[Key, Answer]]:
        """The next step of the model, and the answers that end with it."""
        answers = list(self._ready)
        self._ready.clear()
        for token in self._engine.step() if self._running else ():
            if token.request not in self._running:
                continue  # of an answer that has ended
            if token.finish_reason == "error":
                raise NumericalError(
                    "the model's logits are not finite (NaN or inf); the weights or the dtype cannot be used"
                )
            self.new_tokens += 1
            key, completion, words, thought = self._running[token.request]
            deltas = completion.push(token.id)
            deltas += completion.end("length") if token.finish_reason == "length" else []
            words += [delta.content for delta in deltas]
            thought += [delta.reasoning for delta in deltas]
            if completion.finish_reason:
                self._engine.cancel(token.request)
                del self._running[token.request]
                reason = "length" if completion.finish_reason == "length" else "stop"
                answers.append((key, Answer(text="".join(words), thought="".join(thought), finish_reason=reason)))
        return answers

    @functools.cached_property
    def _grammars(self) -> Grammars:
        return Grammars(self._opened.tokenizer, self._opened.stop_ids)


def _numbers(text: str) -> tuple[int, int]:
    """Two numbers of 32 bits that are a text's own."""
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")
