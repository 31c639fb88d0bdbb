"""Memory and speed of quantised models on CPU, as served: `python -m infer generate`, and steps of its engine.

    python benchmarks/quantized_decoding.py [--model Qwen2.5-7B]

The model has random weights: 1.4 billion of them with the proportions of Qwen2.5-7B, a seventh of it embedding and
head, or the shape of a published model, of which memory is measured alone. Memory is the most that a process ever had
resident (ru_maxrss), files' pages, loading and compiling included, less that of the same command with a model of as
many layers and hardly any weights.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from side_by_side import Bar, judge, seconds_per_step

from qwen_jax import sharding, zoo
from qwen_jax.config import ModelConfig, Rope
from qwen_jax.text import Tokenizer
from qwen_jax.text.tokenizer import train_bpe
from qwen_jax.weights import convert, hf
from qwen_jax.weights.source import Model, Piece, open_model

SMALL = ModelConfig(
    width=2048,
    num_layers=16,
    num_heads=16,
    num_kv_heads=4,
    head_dim=128,
    mlp_width=10752,
    vocab_size=49920,
    max_position=4096,
    norm_eps=1e-6,
    qkv_bias=True,
    qk_norm=False,
    tie_embeddings=False,
    rope=Rope(theta=1e6),
)
NO_WEIGHTS = dict(width=32, num_heads=4, num_kv_heads=4, head_dim=8, mlp_width=16, vocab_size=320)
KINDS = {
    "bfloat16": [],
    "int8": ["--quantize", "int8"],
    "int4-g128": ["--quantize", "int4-g128"],
    "int4-g128, head int8": ["--quantize", "int4-g128", "--quantize-head"],
    "int4-g128, head and embedding int8": ["--quantize", "int4-g128", "--quantize-head", "--quantize-embedding"],
}
BATCHES, PROMPT, NEW = (1, 8), 32, 24
BAR = 0.35


class Random(Model):
    """A model of random weights, drawn as they are read."""

    path, model_type, layout, chat = Path("random"), "qwen2", None, False

    def __init__(self, config: ModelConfig) -> None:
        self.config = dataclasses.replace(config, param_dtype="bfloat16", dtype="bfloat16")
        self.table = hf.table(self.config, self.model_type)
        self._tokenizer = train_bpe(Path("README.md").read_text().splitlines(), vocab_size=320)

    def dtype(self, tensor: hf.Tensor) -> np.dtype:
        return np.dtype("bfloat16")

    def read(self, piece: Piece) -> np.ndarray:
        if piece.part.path.endswith("/scale"):
            return np.ones(piece.shape, self.dtype(piece.tensor))
        rng = np.random.default_rng([len(piece.tensor.name), *piece.part.stack, piece.start])
        values = rng.standard_normal(piece.shape, np.float32) * self.config.width**-0.5
        return values.astype(self.dtype(piece.tensor))

    def side_files(self) -> dict[str, bytes]:
        return {"tokenizer.json": self._tokenizer.to_bytes()}

    def tokenizer(self) -> Tokenizer:
        return self._tokenizer

    def close(self) -> None:
        pass


def most_memory(model: Path) -> int:
    """Bytes that `python -m infer generate` on a model had resident at most."""
    command = [sys.executable, "-m", "infer", "generate", str(model), "--prompt", "import numpy as"]
    child = subprocess.Popen([*command, "--max-new-tokens", "16", "--temperature", "0"], stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        sys.exit(f"{' '.join(command)} failed")
    return used.ru_maxrss * 1024


def step_seconds(model: Path, dtype: str) -> dict[int, float]:
    """Seconds of a step of the engine, by the number of rows."""
    import jax

    from qwen_jax.engine import Capacity, load

    capacity = Capacity(max_rows=max(BATCHES), max_length=PROMPT + NEW)
    with open_model(model) as source:
        mesh = sharding.make_mesh(devices=jax.devices()[:1])
        engine = load(source, source.tokenizer(), mesh=mesh, capacity=capacity, dtype=dtype)
    draw, found = np.random.default_rng(0).integers, {}
    for rows in BATCHES:
        prompts = lambda rows=rows: draw(0, 256, (rows, PROMPT)).tolist()
        seconds_per_step(engine, prompts(), NEW)
        found[rows] = min(seconds_per_step(engine, prompts(), NEW) for _ in range(3))
    return found


def make(folder: Path, config: ModelConfig) -> dict[str, Path]:
    """The folders of all kinds, and one of as many layers and hardly any weights."""
    say = lambda line: print(line, file=sys.stderr)
    convert.convert(Random(dataclasses.replace(config, **NO_WEIGHTS)), folder / "empty", to="hf", dtype=None, say=say)
    convert.convert(Random(config), folder / "bfloat16", to="hf", dtype=None, say=say)
    for kind, arguments in KINDS.items():
        if arguments:
            subprocess.run(
                [sys.executable, "-m", "qwen_jax.weights.convert", folder / "bfloat16", folder / kind, *arguments],
                check=True,
            )
    return {kind: folder / kind for kind in ("empty", *KINDS)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a published model's name, for its shape")
    name = parser.parse_args().model
    with tempfile.TemporaryDirectory() as folder:
        models = make(Path(folder), zoo.published(name) if name else SMALL)
        print("| weights | on disk | most memory | less an empty model's | of bfloat16 |\n|---|---|---|---|---|")
        most = {kind: most_memory(path) for kind, path in models.items()}
        own = {kind: most[kind] - most["empty"] for kind in KINDS}
        for kind in KINDS:
            size = sum(file.stat().st_size for file in models[kind].glob("*.safetensors"))
            cells = f"{size / 1e9:.2f} GB | {most[kind] / 1e9:.2f} GB | {own[kind] / 1e9:.2f} GB"
            print(f"| {kind} | {cells} | {own[kind] / own['bfloat16']:.3f} |", flush=True)
        print(f"\n(an empty model: {most['empty'] / 1e9:.2f} GB)")
        if not name:
            steps = " | ".join(f"a step of {rows}" for rows in BATCHES)
            print(f"\n| weights | computed in | {steps} |\n|---|---|---|---|")
        for kind in () if name else KINDS:
            for dtype in ("float32", "bfloat16"):
                seconds = step_seconds(models[kind], dtype)
                cells = " | ".join(f"{1e3 * seconds[rows]:.0f} ms" for rows in BATCHES)
                print(f"| {kind} | {dtype} | {cells} |", flush=True)
    measures = {kind: {"memory": own[kind] / own["bfloat16"]} for kind in KINDS}
    bars = [Bar("memory_" + kind.replace(", ", "_").replace(" ", "_"), [kind], [], "memory", BAR) for kind in KINDS]
    return judge(measures, [bar for bar in bars if "int4" in bar.name])


if __name__ == "__main__":
    raise SystemExit(main())
