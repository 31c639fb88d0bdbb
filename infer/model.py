"""A model as the options ask for it: opened, with its own defaults wherever nothing was given."""

from __future__ import annotations

import dataclasses
import math
import sys

import jax
from jax.sharding import Mesh

from infer.config import DEFAULT_LENGTH, Options
from infer.terminal import warn
from qwen_jax.engine import Capacity, Engine, PromptLookup, Replicas, Sampling, VerticalSlash, load, load_draft
from qwen_jax.errors import ConfigError
from qwen_jax.sharding import make_mesh
from qwen_jax.text import Tokenizer
from qwen_jax.text.chat import FORMATS, Format
from qwen_jax.text.template import JinjaFormat
from qwen_jax.weights.source import Model, open_model
from qwen_jax.weights.usage import GENERATION, Usage, read_usage

INT8_PAGE = 128  # tokens

FIELDS = {x.name for x in dataclasses.fields(Sampling)} & {x.name for x in dataclasses.fields(Options)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Opened:
    """A model without its weights: what is wrong with the rest is said before they are read.

    Attributes:
      usage: how it is meant to be used.
      sampling: the options', and of `usage` what they leave open.
      draft: the model that guesses at its tokens; None for none.
    """

    options: Options
    model: Model
    tokenizer: Tokenizer
    usage: Usage
    sampling: Sampling
    draft: Model | None

    def chat_format(self) -> Format | JinjaFormat:
        """The format the options name, or else the model's. Raises ConfigError where there is none."""
        options = self.options
        form = FORMATS[options.format] if options.format else self.usage.chat_format(self.tokenizer, warn=warn)
        if form is None:
            raise ConfigError(
                f"{self.model.path} has no chat template; choose a format with --format: {', '.join(FORMATS)}"
            )
        if not options.thinking and not form.thinks:
            raise ConfigError(f"--no-thinking: chat format {form.name} has no thoughts; leave it out")
        return form

    def room(self, max_length: int | None) -> int:
        """Tokens that a prompt and its answer have room for, where --max-length asks for so many."""
        max_position = self.model.config.max_position
        if max_length and max_length > max_position:
            raise ConfigError(f"--max-length {max_length}: the model has {max_position} positions")
        return max_length or min(max_position, DEFAULT_LENGTH)

    def load(self, capacity: Capacity) -> Engine | Replicas:
        """The engine, on the devices of --mesh, or as many as `data` says, with such a capacity each."""
        engines = [self._engine(mesh, capacity) for mesh in self._meshes()]
        return engines[0] if len(engines) == 1 else Replicas(engines)

    def _engine(self, mesh: Mesh, capacity: Capacity) -> Engine:
        options = self.options
        where = dict(mesh=mesh, dtype=options.dtype)
        if options.kv_cache == "int8":
            # Pages of int8 are larger, and the last one of each row is half empty.
            tokens = capacity.cache_tokens and capacity.cache_tokens + capacity.max_rows * INT8_PAGE
            capacity = dataclasses.replace(capacity, int8=True, page_size=INT8_PAGE, cache_tokens=tokens)
        speculate = None if options.prompt_lookup is None else PromptLookup(num_guesses=options.prompt_lookup)
        if self.draft is not None:
            speculate = load_draft(self.draft, self.tokenizer, **where, num_guesses=options.draft_tokens)
        sparse = None if options.sparse_prefill is None else VerticalSlash(threshold=options.sparse_prefill)
        return load(self.model, self.tokenizer, **where, capacity=capacity, sparse=sparse, speculate=speculate)

    def _meshes(self) -> list[Mesh]:
        """The first devices, those of each engine.

        Raises ConfigError if they are too few, or cannot share the models evenly.
        """
        sizes, devices = self.options.mesh, jax.devices()
        given, wanted = ",".join(f"{axis}={size}" for axis, size in sizes.items()), math.prod(sizes.values())
        if wanted > len(devices):
            raise ConfigError(f"--mesh {given} takes {wanted} devices, and there are {len(devices)}")
        for model in filter(None, (self.model, self.draft)):
            experts, fitting = model.config.moe.num_experts if model.config.moe else 1, model.config.tensor_sizes
            if experts % sizes.get("expert", 1):
                number = experts if model.config.moe else "no"
                raise ConfigError(f"--mesh {given}: {model.path} has {number} experts to share evenly")
            if sizes.get("tensor", 1) not in fitting:
                can_be = ", ".join(map(str, fitting))
                raise ConfigError(f"--mesh {given}: {model.path} cannot be split so; tensor can be {can_be}")
        size = wanted // sizes.get("data", 1)
        of_one = {axis: ways for axis, ways in sizes.items() if axis != "data"}
        return [make_mesh(**of_one, devices=devices[start : start + size]) for start in range(0, wanted, size)]

    def report(self) -> None:
        """One line on stderr, if any default is the model's."""
        values = {**self.usage.defaults, "max_new_tokens": self.usage.max_new_tokens}
        off = {**dataclasses.asdict(Sampling()), "temperature": None, "max_new_tokens": None}
        # The likeliest token is the same whatever is kept beside it.
        idle = ("top_k", "top_p", "min_p") if self.sampling.temperature == 0 else ()
        used = [
            f"{name} {value:g}"
            for name, value in values.items()
            if getattr(self.options, name) is None and value != off[name] and name not in idle
        ]
        if used:
            print(f"sampling: {', '.join(used)} ({GENERATION})", file=sys.stderr)


def open_for(options: Options) -> Opened:
    """The model that the options name."""
    given = {name: value for name in FIELDS if (value := getattr(options, name)) is not None}
    Sampling(**given)  # what cannot be sampled with is refused before anything is read
    opening = dict(allow_pickle_format=options.allow_pickle_format, warn=warn)
    model = open_model(options.model, **opening)
    draft = None if options.draft is None else open_model(options.draft, **opening)
    tokenizer = model.tokenizer()
    usage = read_usage(model, tokenizer, warn=warn)
    sampling = Sampling(**{**usage.defaults, **given})
    return Opened(options=options, model=model, tokenizer=tokenizer, usage=usage, sampling=sampling, draft=draft)
