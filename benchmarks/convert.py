"""Converting a model of 8.3 GB beside copying its files: time on the clock, and the memory that it takes.

    TMPDIR=/a/disk/with/26/GB/free python benchmarks/convert.py

Every side is a whole process that starts from the same published folder in the page cache and ends with its output on
the disk. The peer, a plain copy, moves the same bytes and does nothing else. `conversion` is until all of the model is
written; `whole` also has what follows: every tensor read back, compared with its source, and its digest taken.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np
from side_by_side import Bar, compare, one_side

from qwen_jax import zoo
from qwen_jax.text.tokenizer import train_bpe
from qwen_jax.weights import hf, hf_config
from qwen_jax.weights.safetensors import SafetensorsWriter
from qwen_jax.weights.tensors import TensorInfo

FOLDER = Path(tempfile.gettempdir()) / "qwen-convert-benchmark"
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
# The shape of Qwen2.5-3B with more layers, so that its two shards hold 8.3 GB and its largest tensor 0.6 GB.
CONFIG = dataclasses.replace(zoo.published("Qwen2.5-3B"), num_layers=50, param_dtype="bfloat16", dtype="bfloat16")
TABLE = hf.table(CONFIG, "qwen2")
ALLOWED_BYTES = 2 * max(2 * math.prod(tensor.shape) for tensor in TABLE) + 300e6


def make_source(folder: Path) -> None:
    """Writes the published folder, one shard for each half of the layers."""
    folder.mkdir(parents=True)
    noise = np.random.default_rng(0).standard_normal(2**22).astype(BFLOAT16)
    weight_map = {}
    for number, tensors in enumerate((TABLE[: len(TABLE) // 2], TABLE[len(TABLE) // 2 :])):
        file = f"model-{number + 1:05d}-of-00002.safetensors"
        infos = {tensor.name: TensorInfo(shape=tensor.shape, dtype=BFLOAT16) for tensor in tensors}
        weight_map |= dict.fromkeys(infos, file)
        with SafetensorsWriter(folder / file, infos, {"format": "pt"}) as writer:
            for name, info in infos.items():
                columns = math.prod(info.shape[1:])
                step = max(1, noise.size // columns)
                for start in range(0, info.shape[0], step):
                    rows = min(step, info.shape[0] - start)
                    writer.write(name, noise[: rows * columns].reshape(rows, *info.shape[1:]), start=start)
    index = {"metadata": {"total_size": 2 * CONFIG.num_parameters}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(hf_config.to_hf(CONFIG, "qwen2")))
    (folder / "tokenizer.json").write_bytes(train_bpe(["the the the"], vocab_size=260).to_bytes())


def run(*command: str) -> tuple[float, float, str]:
    """Seconds on the clock and peak bytes in memory of a process, and what it wrote to stderr."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *command], stderr=subprocess.PIPE, text=True)
    assert process.stderr
    stderr = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(stderr)
    return time.perf_counter() - start, usage.ru_maxrss * 1024, stderr


def copy(source: Path, target: Path) -> dict[str, float]:
    seconds, _, _ = run("-c", f"import os, shutil; shutil.copytree({str(source)!r}, {str(target)!r}); os.sync()")
    return {"conversion": seconds, "whole": seconds}


def convert(to: str, source: Path, target: Path) -> dict[str, float]:
    whole, memory, stderr = run("-m", "qwen_jax.weights.convert", str(source), str(target), "--to", to)
    written = re.search(r"tensors, .* GB in ([0-9.]+) s", stderr)
    assert written, stderr
    return {"conversion": float(written[1]), "whole": whole, "memory": memory / ALLOWED_BYTES}


def side(work, target: str) -> dict[str, float]:
    """Runs one side from a warm page cache, with nothing left to be written from before, and removes what it wrote."""
    for file in (FOLDER / "source").iterdir():
        with open(file, "rb", buffering=0) as stream:
            while stream.read(2**24):
                pass
    os.sync()
    try:
        return work(FOLDER / "source", FOLDER / target)
    finally:
        shutil.rmtree(FOLDER / target, ignore_errors=True)


SIDES = {
    "copy": functools.partial(side, copy, "copy"),
    "published": functools.partial(side, functools.partial(convert, "hf"), "published"),
    "checkpoint": functools.partial(side, functools.partial(convert, "native"), "checkpoint"),
}
BARS = [
    *(Bar(f"convert_{name}_time", [name], ["copy"], "conversion", 1.5) for name in ("published", "checkpoint")),
    *(Bar(f"convert_{name}_whole_time", [name], ["copy"], "whole", 1.5) for name in ("published", "checkpoint")),
    *(Bar(f"convert_{name}_memory", [name], [], "memory", 1.0) for name in ("published", "checkpoint")),
]

if __name__ == "__main__":
    one_side(SIDES)
    units = {
        "conversion": "seconds until the model is written and synced",
        "whole": "seconds of the whole process, certificate included",
        "memory": f"peak resident memory / (twice the largest tensor + 300 MB = {ALLOWED_BYTES / 1e6:.0f} MB)",
    }
    make_source(FOLDER / "source")
    try:
        raise SystemExit(compare(list(SIDES), BARS, rounds=2, units=units))
    finally:
        shutil.rmtree(FOLDER)
