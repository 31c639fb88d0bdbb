"""Perplexity past the training length, in the shape of table 3 of the Qwen report (arXiv 2309.16609): one small model
trained at 512 tokens, and what each way to go further makes of held-out documents of at least 4096.

    python benchmarks/long_context.py

Trains by the path of `python -m train`, from configs/quickstart.gin; what is there already in runs/long-context is not
computed again. Writes docs/long-context.png and the measured part of docs/long-context.md.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from small_runs import GREY, picture, train, write_measured

from qwen_jax import model, sharding
from qwen_jax.config import DualChunk, ModelConfig, QwenNTK, Scaling, Yarn
from qwen_jax.weights.load import load_params
from qwen_jax.weights.source import open_model
from train.data import TokenShards
from train.data.manifest import Manifest

RUNS, PAGE, PICTURE = Path("runs/long-context"), Path("docs/long-context.md"), Path("docs/long-context.png")
TOKENS, LONG = RUNS / "tokens", RUNS / "long.jsonl"
TRAINED, LENGTHS = 512, (512, 1024, 2048, 4096)
VOCABULARY, LAYERS = 512, 4
CONTINUED_STEPS = 40
SMOOTHED = 128  # neighbouring positions that are a point of the picture
EVERY_NTH = 5  # of the long documents of the training split, those that continuations see: more than they need

BASE = {
    "data.tokens": str(TOKENS),
    "data.held_out": 0.03,
    "data.tokenizer.vocab_size": VOCABULARY,
    "data.sequence_length": TRAINED,
    "model.vocab_size": VOCABULARY,
    "model.num_layers": LAYERS,
    "model.mlp_width": 256,
    "model.max_position": TRAINED,
    "batch_size": 8,
    "steps": 1000,
    "optimizer.peak_lr": 4e-3,
    "evaluation.every": 250,
    "evaluation.batches": 20,
    "checkpoint.every": 250,
}
CONTINUED = {
    "model": "@Pretrained",
    "model.path": str(RUNS / "base"),
    "model.dtype": "float32",
    "model.max_position": LENGTHS[-1],
    "data.source": "@Text",
    "data.source.path": str(LONG),
    "data.tokenizer": "@TokenizerFile",
    "data.tokenizer.path": str(RUNS / "base" / "tokenizer.json"),
    "data.held_out": 0.0,
    "data.sequence_length": LENGTHS[-1],
    "batch_size": 2,
    "steps": CONTINUED_STEPS,
    "optimizer.peak_lr": 1e-3,
    "schedule.warmup_steps": 5,
    "checkpoint.every": CONTINUED_STEPS,
}
YARN = Yarn(
    factor=LENGTHS[-1] / TRAINED,
    original_positions=TRAINED,
    beta_fast=32.0,
    beta_slow=1.0,
    attention_factor=0.1 * math.log(LENGTHS[-1] / TRAINED) + 1,
)
# Chunks of the training length, as published for Qwen2.5-1M.
DUAL_CHUNK = DualChunk(chunk_size=TRAINED, local_size=TRAINED // 8, original_positions=TRAINED)
THETA = 1e6  # what Qwen2 raised its base to, from the same 10000 and for as many times more tokens


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the table: a run, and what is changed of its model to read with it.

    Attributes:
      name: in the table.
      run: below RUNS.
      color: in the picture.
      scaling: of the model's rope; None for the run's.
      logn, windows: as in ModelConfig.
    """

    name: str
    run: str
    color: str
    scaling: Scaling | None = None
    logn: int = 0
    windows: tuple[int, ...] = ()

    def of(self, config: ModelConfig) -> ModelConfig:
        """The model that reads."""
        rope = dataclasses.replace(config.rope, scaling=self.scaling) if self.scaling else config.rope
        return dataclasses.replace(config, rope=rope, logn=self.logn, windows=self.windows)


NTK = QwenNTK(original_positions=TRAINED)
# Shorter in lower layers: the training length in the first, twice as many in each further one, all in the last.
WINDOWS = tuple(TRAINED * 2**layer for layer in range(LAYERS - 1)) + (0,)
ROWS = (
    Row("original", "base", "#b8323a"),
    Row("+ dynamic NTK", "base", "#9ecae1", NTK),
    Row("+ NTK + LogN", "base", "#4292c6", NTK, logn=TRAINED),
    Row("+ NTK + LogN + windows", "base", "#08519c", NTK, logn=TRAINED, windows=WINDOWS),
    Row("YaRN, as it is", "base", "#a1d99b", YARN),
    Row("dual chunk attention", "base", "#756bb1", DUAL_CHUNK),
    Row("original, trained on", "plain", "#fb9a99"),
    Row("YaRN, trained on", "yarn", "#238b45"),
    Row("theta 1e6, trained on", "theta", "#e08214"),
)

TRAINING = dict(
    steps=BASE["steps"],
    rows=BASE["batch_size"],
    trained=TRAINED,
    longest=LENGTHS[-1],
    more=CONTINUED_STEPS,
    more_rows=CONTINUED["batch_size"],
    windows=", ".join(map(str, WINDOWS)),
    chunk=DUAL_CHUNK.chunk_size,
    smoothed=SMOOTHED,
)
TEXT = """
{table}
Perplexity of held-out files of the Python standard library: the first {longest} tokens of each of the {count} that have
so many, read in pieces of as many tokens as the column says, so that all columns predict the same tokens. The model is
that of [configs/quickstart.gin](../configs/quickstart.gin) with four layers, after {steps} steps of {rows} x {trained}
tokens. Its windows are {windows}, layer by layer (0 for all), and dual chunk attention has chunks of {chunk}. "Trained
on" is {more} steps more, of {more_rows} x {longest} tokens of other files: such a line is to be read from left to
right, and beside others of its kind. The picture has the last column by position, as means of {smoothed}.

![loss by position](long-context.png)

`python benchmarks/long_context.py` trains, measures, and writes this part of the page.
"""

# ----------------------------------------------------------------------------------------------------- training


def write_long_documents() -> None:
    """Writes some long documents of the training split as text, for continuations to be trained on."""
    if LONG.exists():
        return
    with open_model(RUNS / "base") as base:
        tokenizer = base.tokenizer()
    texts = [tokenizer.decode(ids[:-1].tolist()) for ids in documents("train")[::EVERY_NTH]]
    LONG.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def documents(split: str) -> list[np.ndarray]:
    """The tokens of each document of a split with more than the longest length, its end_of_text included."""
    shards = TokenShards(TOKENS, split, Manifest.read(TOKENS))
    ranges = map(shards.document, range(shards.num_documents))
    return [shards.tokens(start, stop) for start, stop in ranges if stop - start > LENGTHS[-1]]


# ---------------------------------------------------------------------------------------------------- measuring


@functools.partial(jax.jit, static_argnums=0)
def token_losses(config: ModelConfig, params: model.Params, window: jax.Array) -> jax.Array:
    """Nats of every target of rows [B, T + 1], as [B, T]."""
    tokens, targets = window[:, :-1], window[:, 1:]
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    hidden = model.forward(config, params, tokens, positions)
    logits = jax.sharding.reshard(model.logits(params, hidden), jax.P())
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]


def measure(row: Row, texts: np.ndarray) -> np.ndarray:
    """Nats of the targets of all texts [N, 4097], read in pieces of each length: [lengths, N, 4096]."""
    with open_model(RUNS / row.run) as source:
        config = row.of(source.config)
        key = f"{config.to_json()}{source.path}{hashlib.sha256(texts.tobytes()).hexdigest()}"
        kept = RUNS / f"losses-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npy"
        if kept.exists():
            return np.load(kept)
        print(f"{row.name} …", file=sys.stderr, flush=True)
        params = load_params(source, dtype="float32", stacked=True)
    found = np.stack([[read(config, params, text, length) for text in texts] for length in LENGTHS])
    np.save(kept, found)
    return found


def read(config: ModelConfig, params: model.Params, text: np.ndarray, length: int) -> np.ndarray:
    """Nats of the 4096 targets of one text [4097], read in pieces of `length`."""
    pieces = np.stack([text[start : start + length + 1] for start in range(0, len(text) - 1, length)])
    return np.asarray(token_losses(config, params, jnp.asarray(pieces))).ravel()


# ---------------------------------------------------------------------------------------------------- reporting


def table(found: Sequence[np.ndarray]) -> str:
    """Perplexities, a row for each method and a column for each length; last how much the longest adds to the first."""
    head = ("", *map(str, LENGTHS), f"{LENGTHS[-1]} to {LENGTHS[0]}")
    lines = [head, ("---",) * len(head)]
    for row, losses in zip(ROWS, found, strict=True):
        means = losses.mean(axis=(1, 2))
        change = math.expm1(means[-1] - means[0])
        lines.append((row.name, *(f"{math.exp(mean):.2f}" for mean in means), f"{change:+.1%}"))
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def draw(found: Sequence[np.ndarray], path: Path) -> None:
    """Loss by position in texts that are read whole."""
    figure, axes = picture()
    for row, losses in zip(ROWS, found, strict=True):
        means = losses[-1].mean(axis=0).reshape(-1, SMOOTHED).mean(axis=1)
        axes.plot(SMOOTHED * (np.arange(len(means)) + 0.5), means, color=row.color, linewidth=1.8, label=row.name)
    axes.axvline(TRAINED, color=GREY, linewidth=1, linestyle=(0, (5, 4)))
    axes.text(TRAINED, 1.01, "trained so far", transform=axes.get_xaxis_transform(), ha="center", color=GREY)
    axes.set(xlabel="position", ylabel="nats per token", xlim=(0, LENGTHS[-1]))
    axes.set_xticks((0, *LENGTHS))
    axes.legend(frameon=False)
    figure.savefig(path)


def main() -> int:
    """The exit code."""
    RUNS.mkdir(parents=True, exist_ok=True)
    train(RUNS / "base", BASE)
    write_long_documents()
    train(RUNS / "plain", CONTINUED)
    rope = {f"model.rope.scaling.{name}": value for name, value in dataclasses.asdict(YARN).items()}
    train(RUNS / "yarn", {**CONTINUED, "model.rope.theta": 1e4, "model.rope.scaling": "@Yarn", **rope})
    train(RUNS / "theta", {**CONTINUED, "model.rope.theta": THETA})
    texts = np.stack([ids[: LENGTHS[-1] + 1] for ids in documents("held_out")]).astype(np.int32)
    with jax.set_mesh(sharding.make_mesh(devices=jax.devices()[:1])):
        found = [measure(row, texts) for row in ROWS]
    measured = table(found)
    print(measured)
    draw(found, PICTURE)
    write_measured(PAGE, TEXT.format(table=measured, count=len(texts), **TRAINING))
    return 0


if __name__ == "__main__":
    sys.exit(main())
