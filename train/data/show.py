"""`python -m train.data.show CONFIG.gin`: a few rows of a run as its model sees them, and what is trained of them."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np

from qwen_jax.command import run_command
from qwen_jax.errors import ConfigError
from qwen_jax.text import Tokenizer
from train.command import ConfigParser, resolve
from train.config import TrainConfig
from train.data import prepare
from train.data.prompts import Order, Prompt
from train.data.rows import GOOD, Batch
from train.progress import Report
from train.reinforcement import Online
from train.stream import Stream, chat_format, check_parts, count_steps, facts, read_prompts, stream

EPILOG = """\
What is trained is green, or in ⟦ ⟧ where there is no colour (NO_COLOR, or no terminal). A line with positions is the
border of a document; the last token of a document is a target alone. Tokens are made and kept as a run would make them.

  python -m train.data.show configs/sft.gin --rows 5
  python -m train.data.show mine.gin --step 1000 --whole
"""
SHOWN = 600  # characters of a stretch of text, unless --whole


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code of the command line `arguments` (default: this process's)."""
    parser = ConfigParser("train.data.show", description=__doc__, epilog=EPILOG, config="the run")
    parser.add_argument("--step", type=int, default=0, help="of the batch that is shown (default: 0)")
    parser.add_argument("--rows", type=int, default=3, help="how many of its rows (default: 3)")
    parser.add_argument("--whole", action="store_true", help="leave nothing out of long texts")
    options = parser.parse_args(arguments)
    config, _ = resolve(TrainConfig, options)

    report = Report()
    check_parts(config)
    chat = chat_format(config, warn=report.warn)
    corpus = prepare(config.data, Path(config.run_dir).expanduser(), seed=config.seed, report=report.line, chat=chat)
    asked, _ = read_prompts(config, corpus.tokenizer, chat, report=report.line)
    config = count_steps(config, corpus, len(asked))
    if not 0 <= options.step < config.steps:
        raise ConfigError(f"--step {options.step} is not one of the {config.steps:,} steps, counted from 0")
    steps, stage = next(each for each in config.stage_configs if options.step in each[0])
    paint = _Paint(color=sys.stdout.isatty() and not os.environ.get("NO_COLOR"), whole=options.whole)
    for line in _prompts(asked, options.step, options.rows, stage, corpus.tokenizer, paint) if asked else ():
        print(line)
    if corpus.parts:
        stage = stage.text_config or stage
        read = stream(corpus, steps, stage)
        for line in _lines(read, options.step, options.rows, steps, stage, corpus.tokenizer, paint):
            print(line)
    return 0


def _prompts(
    asked: Sequence[Prompt], step: int, count: int, config: TrainConfig, tokenizer: Tokenizer, paint: _Paint
) -> Iterator[str]:
    """Prompts of the episode of a step, in the order of a run that knows no rewards, and what they are judged by."""
    assert isinstance(config.objective, Online)
    rollout, order = config.objective.rollout, Order(len(asked), seed=config.seed, by_variance=False)
    groups = config.completions_per_episode // rollout.completions
    order.take(step // rollout.updates * groups)
    for number in order.take(min(count, groups)).tolist():
        prompt = asked[number]
        yield paint.bold(f"prompt {number}: {len(prompt.ids):,} tokens, {prompt.origin}")
        text = paint.text(tokenizer.decode(prompt.ids, skip_special=False), False)
        yield from (f"   {line}" for line in text.split("\n"))
        for name, value in prompt.columns.items():
            shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            yield paint.dim(f"── {name}: ") + paint.text(shown, False)
        yield ""
    yield paint.bold(
        f"{len(asked):,} prompts; an episode asks {groups:,} of them {rollout.completions} times, for "
        f"{rollout.updates} steps of {config.batch_size:,} completions"
    )


def _lines(
    read: Stream, step: int, num_rows: int, steps: range, config: TrainConfig, tokenizer: Tokenizer, paint: _Paint
) -> Iterator[str]:
    first = (step - steps.start) * config.batch_size
    batch = read.rows.batch(step, slice(0, num_rows))
    parts, _ = read.schedule.rows(range(first, first + len(batch["tokens"])))
    for number, part in enumerate(parts.tolist()):
        row = {name: values[number] for name, values in batch.items()}
        name = f"{config.data.parts[part].name}, " if len(config.data.parts) > 1 else ""
        documents, full, length = int(row["segments"].max()), int((row["segments"] > 0).sum()), len(row["tokens"])
        counted = f"{documents} document" + "s" * (documents != 1)
        share = row["weights"].sum() / max(1, full)
        yield paint.bold(
            f"row {number} of step {step}: {name}{counted}, {full:,} of {length:,} columns ({full / length:.1%}), "
            f"{share:.1%} trained"
        )
        for segment in range(1, documents + 1):
            yield from _document(row, segment, tokenizer, paint)
        yield ""
    yield paint.bold(f"steps {steps.start:,} to {steps.stop:,}, {config.batch_size:,} rows each")
    yield from facts(read, steps, config)


def _document(row: Batch, segment: int, tokenizer: Tokenizer, paint: _Paint) -> Iterator[str]:
    """A document of a row: its border, and its text with what is trained marked."""
    (columns,) = np.nonzero(row["segments"] == segment)
    weights, positions = row["weights"][columns], row["positions"][columns]
    yield paint.dim(
        f"── {segment}: positions {positions[0]} to {positions[-1]}, {int(weights.sum()):,} targets trained"
        + (_judged(row, columns) if "labels" in row else "")
    )
    ids = [int(row["tokens"][columns[0]]), *row["targets"][columns].tolist()]
    flags = [False, *(weights > 0).tolist()]
    if row["tokens"][columns[-1]] == tokenizer.end_of_text:  # in a window, where what follows is the next document
        ids, flags = ids[:-1], flags[:-1]
    text = ""
    for trained, run in groupby(zip(flags, ids, strict=True), key=lambda pair: pair[0]):
        text += paint.text(tokenizer.decode((token for _, token in run), skip_special=False), trained)
    yield from (f"   {line}" for line in text.split("\n"))


def _judged(row: Batch, columns: np.ndarray) -> str:
    """What is said of a text: whether it is good, or how many of its steps are."""
    labels, group = row["labels"][columns], int(row["groups"][columns[0]])
    good, steps = int((labels == GOOD).sum()), int((labels > 0).sum())
    return f", of prompt {group}: " + (f"{good} of {steps} steps good" if steps > 1 else "good" if good else "bad")


class _Paint:
    """Text for a terminal, or for what is none."""

    def __init__(self, *, color: bool, whole: bool) -> None:
        self._color, self._whole = color, whole

    def bold(self, text: str) -> str:
        return self._styled(text, "1")

    def dim(self, text: str) -> str:
        return self._styled(text, "2")

    def text(self, text: str, trained: bool) -> str:
        """Text of a document, long ones without their middle; a terminal obeys nothing that stands in it."""
        if not self._whole and len(text) > SHOWN:
            half = SHOWN // 2
            text = f"{text[:half]} […{len(text) - SHOWN:,} characters…] {text[-half:]}"
        text = "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)
        if not self._color:
            return f"⟦{text}⟧" if trained else text
        return "\n".join(self._styled(line, "32") if trained else line for line in text.split("\n"))

    def _styled(self, text: str, code: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self._color and text else text


if __name__ == "__main__":
    sys.exit(run_command("show", main))
