"""The frame of every benchmark against a peer: two programs in turn, one table, one verdict per bar.

The two sides run in processes of their own, since their thread pools would fight over the cores, and alternate, so
that a machine that slows down slows both. The least of several medians is compared: noise only ever adds time.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

# The model of the benchmarks: the width of Qwen2.5-0.5B, half its depth, 208 million parameters.
SHAPE = dict(width=896, num_heads=14, num_kv_heads=2, mlp_width=4864, num_layers=12, vocab_size=32768)
THREADS = 2


@dataclasses.dataclass(frozen=True)
class Bar:
    """`ours / theirs` (or its inverse, for rates) that must be reached in one measure; `ours` alone without a peer."""

    name: str
    ours: Sequence[str]  # settings, the best of which counts
    theirs: Sequence[str]
    measure: str
    goal: float
    higher_is_better: bool = False


def require(*packages: str) -> None:
    """Ends the program, naming what is not installed."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        sys.exit(f"missing: {', '.join(missing)}. The peer runs beside us: pip install -e '.[parity]'")


def one_side(sides: Mapping[str, Callable[[], Mapping[str, float]]]) -> None:
    """In a child process: runs the side that is named on the command line, prints its figures, and ends."""
    if len(sys.argv) == 3 and sys.argv[1] == "--side":
        print(json.dumps(sides[sys.argv[2]]()))
        raise SystemExit(0)


def compare(sides: Sequence[str], bars: Sequence[Bar], *, rounds: int, units: Mapping[str, str]) -> int:
    """Measures all sides on CPU and prints the table and the bars. The exit code: 1 if any bar is short."""
    return judge(measure(sides, rounds=rounds, units=units), bars)


def measure(
    sides: Sequence[str], *, rounds: int, units: Mapping[str, str], platform: str = "cpu"
) -> dict[str, dict[str, float]]:
    """Runs all sides in turn on jax's `platform` and prints the table: the least of each figure of each side."""
    figures: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    env = os.environ | {"JAX_PLATFORMS": platform, "OMP_NUM_THREADS": str(THREADS), "TF_CPP_MIN_LOG_LEVEL": "3"}
    for number in range(rounds):
        for side in sides:
            print(f"round {number + 1} of {rounds}: {side} …", file=sys.stderr, flush=True)
            done = subprocess.run(
                [sys.executable, sys.argv[0], "--side", side], env=env, capture_output=True, text=True
            )
            if done.returncode:
                sys.exit(f"{side} failed:\n{done.stderr[-3000:]}")
            figures[side].append(json.loads(done.stdout.splitlines()[-1]))
    print(f"\nall figures are the least of {rounds} rounds (in brackets: the most)\n")
    print("side".ljust(22), *(name.rjust(24) for name in units))
    best: dict[str, dict[str, float]] = {}
    for side, rows in figures.items():
        best[side] = {name: min(row[name] for row in rows) for name in rows[0]}
        cells = (f"{best[side][n]:.4f} ({max(row[n] for row in rows):.4f})" if n in best[side] else "-" for n in units)
        print(side.ljust(22), *(cell.rjust(24) for cell in cells))
    print()
    for name, meaning in units.items():
        print(f"{name}: {meaning}")
    print()
    return best


def judge(best: Mapping[str, Mapping[str, float]], bars: Sequence[Bar]) -> int:
    """Prints the bars. The exit code: 1 if any is short."""
    short = False
    for bar in bars:
        ours = min(best[side][bar.measure] for side in bar.ours)
        theirs = min((best[side][bar.measure] for side in bar.theirs), default=1.0)
        figure = theirs / ours if bar.higher_is_better else ours / theirs
        reached = figure >= bar.goal if bar.higher_is_better else figure <= bar.goal
        short |= not reached
        goal, verdict = f"{'>=' if bar.higher_is_better else '<='}{bar.goal:.2f}", "ok" if reached else "short"
        print(f"BAR {bar.name} {figure:.2f} {goal} {verdict}")
    return int(short)


def seconds_per_step(engine: Any, prompts: Sequence[Sequence[int]], new: int) -> float:
    """Seconds of a step in which all prompts make a token, until the first of them has `new`; of one token, its own."""
    from qwen_jax.engine import Request, Sampling

    begin = time.perf_counter()
    numbers = {
        engine.add(Request(prompt=prompt, max_new_tokens=new, sampling=Sampling(temperature=0))) for prompt in prompts
    }
    waiting, steps, start = set(numbers), 0, begin
    while True:
        made = engine.step()
        if not waiting:
            steps += 1
        elif not (waiting := waiting - {token.request for token in made}):
            start = time.perf_counter()
        if any(token.finish_reason for token in made):
            break
    seconds = (time.perf_counter() - start) / steps if steps else time.perf_counter() - begin
    for number in numbers:
        engine.cancel(number)
    while engine.busy:
        engine.step()
    return seconds


def median_seconds(call: Callable[[], object], *, times: int, warm_up: int = 1) -> float:
    """The median duration of `call`, which must return only when its work is done."""
    import statistics

    for _ in range(warm_up):
        call()
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def read_bandwidth() -> float:
    """Bytes per second that `THREADS` cores read together, of arrays that no cache holds."""
    from concurrent.futures import ThreadPoolExecutor

    import numpy as np

    arrays = [np.ones(2**25, np.int64) for _ in range(THREADS)]
    with ThreadPoolExecutor(THREADS) as threads:
        seconds = [median_seconds(lambda: list(threads.map(np.sum, arrays)), times=1) for _ in range(9)]
    return sum(array.nbytes for array in arrays) / min(seconds)


def torch_model(dtype: str, *, num_layers: int = SHAPE["num_layers"]):
    """The peer's model of `SHAPE`, on `THREADS` threads."""
    import torch
    import transformers

    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    config = transformers.Qwen2Config(
        hidden_size=SHAPE["width"],
        num_attention_heads=SHAPE["num_heads"],
        num_key_value_heads=SHAPE["num_kv_heads"],
        intermediate_size=SHAPE["mlp_width"],
        num_hidden_layers=num_layers,
        vocab_size=SHAPE["vocab_size"],
        tie_word_embeddings=True,
        max_position_embeddings=4096,
        attn_implementation="sdpa",
    )
    return transformers.Qwen2ForCausalLM(config).to(getattr(torch, dtype))


def our_config(*, param_dtype: str, dtype: str):
    """Our model of `SHAPE`."""
    from qwen_jax.config import ModelConfig, Rope

    return ModelConfig(
        **SHAPE,
        head_dim=SHAPE["width"] // SHAPE["num_heads"],
        max_position=4096,
        norm_eps=1e-6,
        qkv_bias=True,
        qk_norm=False,
        tie_embeddings=True,
        rope=Rope(theta=10000.0),
        param_dtype=param_dtype,
        dtype=dtype,
    )


def our_step_seconds(model, *, rows: int, length: int, steps: int, warm_up: int) -> float:
    """The median duration of the step that `python -m train` runs, on one device."""
    import jax
    import numpy as np

    from qwen_jax import sharding
    from train.config import AdamW, Checkpointing, Cosine, Evaluation, TrainConfig
    from train.data.config import Data, Text, TokenizerFile
    from train.step import configured, initial_state, unrolled

    config = TrainConfig(
        run_dir="nothing is written",
        model=model,
        data=Data(source=Text(path="none"), tokenizer=TokenizerFile(path="none"), sequence_length=length),
        batch_size=rows,
        steps=100,
        optimizer=AdamW(peak_lr=1e-4),
        schedule=Cosine(warmup_steps=10),
        checkpoint=Checkpointing(every=100),
        evaluation=Evaluation(every=100),
    )
    ids = np.random.default_rng(0).integers(0, config.model_config.vocab_size, (1, rows, length + 1), dtype=np.int32)
    ones = np.ones((1, rows, length), np.int32)
    batch = {
        "tokens": ids[..., :-1],
        "targets": ids[..., 1:],
        "positions": np.arange(length, dtype=np.int32) * ones,
        "segments": ones,
        "weights": ones.astype(np.float32),
    }
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        _, optimizer, train_step = configured(config)
        state = initial_state(config.model_config, optimizer, seed=0, unroll=unrolled(config, mesh))
        batch = jax.tree.map(jax.numpy.asarray, batch)

        def step() -> None:
            nonlocal state
            state, metrics = train_step(state, batch)
            metrics["loss"].block_until_ready()

        return median_seconds(step, times=steps, warm_up=warm_up)


def torch_step_seconds(net, *, rows: int, length: int, steps: int, autocast: bool = False) -> float:
    """The median duration of the peer's step on CPU: fused AdamW, clipping, bfloat16 products under `autocast`."""
    import torch

    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(0, net.config.vocab_size, (rows, length))

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = net(ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return median_seconds(step, times=steps)
