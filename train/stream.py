"""Where a config meets its data: the format of its chats, its rows, how long an epoch is."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

from qwen_jax.errors import ConfigError
from qwen_jax.text import Tokenizer
from qwen_jax.text.chat import FORMATS
from qwen_jax.text.chat_template import template_of
from train.config import Pretrained, TrainConfig
from train.data import Corpus, Rows, TokenShards, prompts
from train.data.config import Chats, Conversations, Data, Part, Preferences, Prompts
from train.data.conversations import ChatFormat
from train.data.mixture import MixedRows, Schedule
from train.data.prompts import Prompt
from train.data.rows import BestFit, Layout, Windows, stream_seed
from train.reinforcement import Online, OnlineDPO

TEMPLATE = "chat_template.jinja"
Sides = tuple[list[Prompt], list[Prompt]]  # to train on, and held out


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stream:
    """The rows of a stage.

    Attributes:
      rows: batch by batch.
      parts: the stream of each part.
      schedule: whose turn it is.
    """

    rows: Rows | MixedRows
    parts: Sequence[Rows]
    schedule: Schedule


def check_parts(config: TrainConfig) -> None:
    """Raises ConfigError for a part of the mixture that no stage reads."""
    for number, part in enumerate(config.data.parts, 1):
        if not any(stage.data.parts[number - 1].weight for _, stage in config.stage_configs):
            raise ConfigError(
                f"data.source.parts.{number}.weight={part.weight}: nothing reads {part.name}; leave it out"
            )


def chat_format(config: TrainConfig, *, warn: Callable[[str], None]) -> ChatFormat | None:
    """What the conversations of a run are written in: the format they name, or that of the model it begins with.

    None where there are no conversations. Raises ConfigError where nothing says which, or several do.
    """
    chats: list[Chats | Prompts] = [part.source for part in config.data.parts if isinstance(part.source, Chats)]
    chats += [asked] if (asked := config.data.prompts) and asked.chat else []
    names = {chat.format for chat in chats}
    if len(names) > 1:
        raise ConfigError(
            f"conversations are in formats {', '.join(map(str, names))}; a model chats in one, so name the same for all"
        )
    if not chats:
        return None
    if (name := names.pop()) is not None:
        return ChatFormat(form=FORMATS[name], template=template_of(FORMATS[name]))
    if isinstance(config.model, Pretrained):
        from qwen_jax.weights.source import open_model  # which loads jax
        from qwen_jax.weights.usage import read_usage

        with open_model(config.model.path, warn=warn) as model:
            tokenizer = model.tokenizer()
            usage = read_usage(model, tokenizer, warn=lambda _: None)
            form = usage.chat_format(tokenizer, warn=warn)
        if form is not None:
            template = usage.template if usage.template is not None else template_of(FORMATS["qwen1"])
            return ChatFormat(form=form, template=template)
    raise ConfigError(
        f"nothing says which format the conversations are to be written in; name one: data.source.format = "
        f'"qwen2.5", of {", ".join(FORMATS)}'
    )


def stream(corpus: Corpus, steps: range, config: TrainConfig) -> Stream:
    """The rows of a stage. Raises DataError for a part of which no row can be made."""
    data, alone = config.data, len(corpus.parts) == 1
    weights = [part.weight for part in data.parts]
    parts = [
        Rows(
            tokens.train,
            sequence_length=data.sequence_length,
            batch_size=config.batch_size if alone else 1,
            seed=config.seed if alone else stream_seed(config.seed, number),
            layout=layout(tokens.train, part, data, seed=config.seed),
            first_step=steps.start,
            full_length=data.full_length,
            shorter_lengths=data.shorter_lengths,
        )
        for number, (tokens, part) in enumerate(zip(corpus.parts, data.parts, strict=True), 1)
    ]
    mixed = MixedRows(parts, weights, batch_size=config.batch_size, seed=config.seed, first_step=steps.start)
    return Stream(rows=parts[0] if alone else mixed, parts=parts, schedule=mixed.schedule)


def layout(shards: TokenShards, part: Part, data: Data, *, seed: int) -> Layout:
    """How the tokens of a part become rows."""
    if data.packing_of(part) == "windows":
        return Windows(shards, data.sequence_length)
    # Half of a comparison is none.
    too_long = "drop" if isinstance(part.source, Preferences) else "split"
    too_long = part.source.too_long if isinstance(part.source, Conversations) else too_long
    return BestFit(shards, data.sequence_length, seed=seed, too_long=too_long)


def read_prompts(
    config: TrainConfig, tokenizer: Tokenizer, chat: ChatFormat | None, *, report: Callable[[str], None]
) -> Sides:
    """The prompts of a run on its own completions, those to train on and those held out; none of another."""
    if not config.data.prompts:
        return [], []
    assert isinstance(config.objective, Online)
    # Of a text all tokens but the last are inputs; a pair is in one row.
    texts = 2 if isinstance(config.objective, OnlineDPO) else 1
    room = min(config.data.sequence_length // texts + 1, config.model_config.max_position)
    return prompts.read(
        config.data.prompts,
        form=chat and chat.form,
        tokenizer=tokenizer,
        longest=room - config.objective.rollout.max_new_tokens,
        held_out=config.data.held_out,
        max_bad_fraction=config.data.max_bad_fraction,
        report=report,
    )


def count_steps(config: TrainConfig, corpus: Corpus, num_prompts: int) -> TrainConfig:
    """The config with its epochs as steps: as many as every row or prompt is seen in, the last again perhaps."""
    if not config.epochs:
        return config
    if isinstance(config.objective, Online):
        rollout = config.objective.rollout
        num_rows = num_prompts * rollout.completions * rollout.passes
    else:
        pairs = zip(corpus.parts, config.data.parts, strict=True)
        num_rows = sum(
            layout(tokens.train, part, config.data, seed=config.seed).num_rows for tokens, part in pairs if part.weight
        )
    steps = math.ceil(config.epochs * num_rows / config.batch_size)
    if steps <= config.schedule.warmup(steps):
        raise ConfigError(
            f"epochs={config.epochs} are {steps} steps of this data, and schedule.warmup_steps="
            f"{config.schedule.warmup_steps} must be below; lower it"
        )
    return config.with_steps(steps)


def facts(stream: Stream, steps: range, config: TrainConfig) -> list[str]:
    """What a stage reads of each part, as lines."""
    counts = stream.schedule.counts(len(steps) * config.batch_size).tolist()
    lines = []
    for part, rows, count in zip(config.data.parts, stream.parts, counts, strict=True):
        layout = rows.layout
        epochs = count / layout.num_rows
        full = layout.num_columns / (layout.num_rows * config.data.sequence_length)
        text = f"{count:,} of {layout.num_rows:,} rows ({epochs:.2f} epochs), {full:.1%} full"
        if isinstance(layout, BestFit) and (layout.num_cut or layout.num_left_out):
            text += f"; {layout.num_cut:,} documents cut, {layout.num_left_out:,} left out"
        if rows.trained_fraction < 1:
            text += f"; {rows.trained_fraction:.1%} of its tokens trained"
        lines.append(text if len(stream.parts) == 1 else f"{part.name}: {text}")
    return lines
