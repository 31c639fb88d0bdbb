"""What quantised weights cost and save: perplexity, memory, and the time of a product on CPU.

    python benchmarks/quantization.py [MODEL --text FILE]

Without a model it is the quick start, trained by the path of `python -m train` and read on held-out files; what is
there already in runs/quantization is not computed again. Memory is that of Qwen2.5-7B, from its compiled program.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from side_by_side import median_seconds
from small_runs import train

from qwen_jax import model, sharding, zoo
from qwen_jax.config import ModelConfig
from qwen_jax.ops.linear import contract
from qwen_jax.ops.quantized import Quantized
from qwen_jax.weights import convert, hf
from qwen_jax.weights.hf_quantization import Quantization, parse
from qwen_jax.weights.load import abstract_params, load_params
from qwen_jax.weights.quantize import Rounding
from qwen_jax.weights.source import open_model
from train.data import TokenShards
from train.data.manifest import Manifest

RUNS = Path("runs/quantization")
TOKENS = RUNS / "tokens"
BASE = {"data.tokens": str(TOKENS), "model.num_layers": 4, "data.held_out": 0.05}
HOWS = ("int8", "int4-g128", "int4-g32")
KINDS = {how: ["--quantize", how] for how in HOWS} | {
    "int4-g128, embedding int8": ["--quantize", "int4-g128", "--quantize-embedding"]
}
LENGTH, WINDOWS, BATCH = 256, 160, 8
# The widest matrices of Qwen2.5-7B, halved along the other side.
OUTPUTS, INPUTS = 9472, 3584


@functools.partial(jax.jit, static_argnums=0)
def nats(config: ModelConfig, params: model.Params, window: jax.Array) -> jax.Array:
    """The mean loss of rows [B, T + 1]."""
    tokens, targets = window[:, :-1], window[:, 1:]
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    logits = jax.sharding.reshard(model.logits(params, model.forward(config, params, tokens, positions)), jax.P())
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1).mean()


def windows(reference: Path, text: Path | None) -> np.ndarray:
    """Held-out tokens, or those of a text, as [N, BATCH, LENGTH + 1]."""
    if text is None:
        shards = TokenShards(TOKENS, "held_out", Manifest.read(TOKENS))
        ids = shards.tokens(0, len(shards))
    else:
        with open_model(reference) as source:
            ids = np.array(source.tokenizer().encode(text.read_text()))
    count = min(WINDOWS, (len(ids) - 1) // LENGTH) // BATCH
    starts = np.linspace(0, len(ids) - LENGTH - 1, count * BATCH).astype(int)
    rows = np.stack([ids[start : start + LENGTH + 1] for start in starts]).astype(np.int32)
    return rows.reshape(count, BATCH, LENGTH + 1)


def perplexity(reference: Path, text: Path | None) -> None:
    """Prints it of the model in float32, in bfloat16, and quantised in each way."""
    rows = windows(reference, text)
    with open_model(reference) as source:
        weights = source.table
        dense = {"float32": (reference, "float32"), "bfloat16": (reference, "bfloat16")}
    print(
        f"\n{rows.shape[0] * BATCH} windows of {LENGTH} tokens; {sum(math.prod(t.shape) for t in weights):,} parameters"
    )
    print("| weights | perplexity | against float32 | bytes of all parameters |\n|---|---|---|---|")
    first = None
    small = {kind: (quantised(reference, kind), "float32") for kind in KINDS}
    for name, (path, dtype) in (dense | small).items():
        with open_model(path) as source:
            params = load_params(source, dtype=dtype, stacked=False)
            config = dataclasses.replace(source.config, dtype=dtype, param_dtype=dtype)
        loss = float(np.mean([float(nats(config, params, jnp.asarray(batch))) for batch in rows]))
        first = loss if first is None else first
        size = sum(x.nbytes for x in jax.tree.leaves(params))
        print(f"| {name} | {math.exp(loss):.4f} | {math.expm1(loss - first):+.3%} | {size:,} |", flush=True)


def quantised(reference: Path, kind: str) -> Path:
    """The model quantised in some way, made unless it is there."""
    target = RUNS / f"{reference.name}-{kind}"
    if not target.exists():
        assert convert.main([str(reference), str(target), *KINDS[kind]]) == 0
    return target


def memory() -> None:
    """Prints what a step of one token of Qwen2.5-7B takes, parameters and all; it is compiled and not run."""
    config = zoo.published("Qwen2.5-7B")
    config = dataclasses.replace(config, dtype="bfloat16", param_dtype="bfloat16")
    table, ids = hf.table(config, "qwen2"), jax.ShapeDtypeStruct((1, 1), jnp.int32)

    def step(params: model.Params, ids: jax.Array) -> jax.Array:
        return model.logits(params, model.forward(config, params, ids, ids))

    def peak(quantized: dict[str, Quantization]) -> int:
        params = abstract_params(config, table, dtype="bfloat16", stacked=False, quantized=quantized)
        return jax.jit(step).lower(params, ids).compile().memory_analysis().peak_memory_in_bytes

    print("\n| Qwen2.5-7B | peak of a step | of bfloat16 |\n|---|---|---|")
    whole = peak({})
    print(f"| bfloat16 | {whole / 1e9:.2f} GB | |")
    for how in HOWS[:2]:
        for head, embedding in ((False, False), (True, False), (True, True)):
            rounding = Rounding(table, parse(how), head=head, embedding=embedding)
            more = ", head and embedding int8" if embedding else ", head int8" * head
            found = peak({name: rounding.how.of(name) for name in rounding.names})
            print(f"| {how}{more} | {found / 1e9:.2f} GB | {found / whole:.3f} |", flush=True)


def times() -> None:
    """Prints how long products take, for rows that decode and for those of a prompt."""
    rng = np.random.default_rng(0)
    wide = jnp.asarray(rng.standard_normal((OUTPUTS, INPUTS)), jnp.float32)
    weights = {"float32": wide, "bfloat16": wide.astype(jnp.bfloat16)}
    for how in HOWS[:2]:
        stored = parse(how)
        weights[how] = Quantized(
            values=jnp.asarray(rng.integers(-(2**31), 2**31, (INPUTS // stored.count, OUTPUTS)), jnp.int32),
            scales=jnp.asarray(rng.uniform(0.01, 0.02, (stored.groups(INPUTS), OUTPUTS)), jnp.float16),
            zeros=None,
            bits=stored.bits,
            shape=(OUTPUTS, INPUTS),
        )
    multiply = jax.jit(lambda x, w: contract("btd,fd->btf", x, w))
    print(f"\n{OUTPUTS} x {INPUTS}, milliseconds; activations in float32, in bfloat16 where two are given")
    print(f"| rows | {' | '.join(weights)} |\n|{'---|' * (1 + len(weights))}")
    for rows in (1, 2, 4, 8, 16, 64, 256):
        cells = []
        for name, w in weights.items():
            # One row of bfloat16 is padded to two by whoever decodes: XLA takes ten times as long for one.
            kinds = [("float32", rows)] if name == "float32" else [("bfloat16", max(rows, 2))]
            kinds = [("float32", rows), *kinds] if isinstance(w, Quantized) else kinds
            xs = [jnp.asarray(rng.standard_normal((count, 1, INPUTS)), kind) for kind, count in kinds]
            found = [median_seconds(lambda x=x, w=w: multiply(x, w).block_until_ready(), times=15) for x in xs]
            cells.append(" / ".join(f"{1e3 * seconds:.1f}" for seconds in found))
        print(f"| {rows} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, help="a model of its own instead of the quick start's")
    parser.add_argument("--text", type=Path, help="what it reads")
    options = parser.parse_args()
    if (options.model is None) != (options.text is None):
        parser.error("a model comes with --text, and the quick start without")
    RUNS.mkdir(parents=True, exist_ok=True)
    if options.model is None:
        train(RUNS / "base", BASE)
    with jax.set_mesh(sharding.make_mesh(devices=jax.devices()[:1])):
        perplexity(options.model or RUNS / "base", options.text)
        memory()
        times()


if __name__ == "__main__":
    main()
