"""What a device holds while it trains: all parameters, an adapter, and an adapter beside weights of 4 bits.

    python benchmarks/lora.py [MODEL [TOPOLOGY]]

The step is compiled for a TPU that is not there (libtpu; no TPU is needed) and not run: one row of 2048 tokens, with
the settings of Qwen's own finetune.py but no dropout, and whole layers recomputed. What does not fit is what the
compiler says it would have wanted.
"""

from __future__ import annotations

import math
import os
import sys
from typing import Any

from train.plan.compiled import ENVIRONMENT

os.environ |= ENVIRONMENT

import jax

from qwen_jax import model, sharding
from qwen_jax.weights import hf
from qwen_jax.weights.hf_quantization import parse as quantization
from qwen_jax.weights.load import abstract_params
from qwen_jax.weights.quantize import Rounding
from train import adapter
from train.config import AdamW, Checkpointing, Cosine, Evaluation, LoRA, TrainConfig, Zoo
from train.data.config import Data, PythonStdlib, TokenizerFile
from train.feed import abstract_batch
from train.plan.aot import devices, peak_of
from train.plan.chips import GIB
from train.plan.topology import parse
from train.step import abstract_state, configured

LENGTH = 2048
HOWS = {"full": None, "LoRA": LoRA(), "LoRA, embeddings": LoRA(train_embeddings=True), "QLoRA, int4-g128": LoRA()}


def config_of(name: str, lora: LoRA | None) -> TrainConfig:
    """A run of one row a step."""
    data = Data(source=PythonStdlib(), tokenizer=TokenizerFile(path="tokenizer.json"), sequence_length=LENGTH)
    return TrainConfig(
        run_dir="runs/none",
        model=Zoo(name=name),
        adapter=lora,
        data=data,
        batch_size=1,
        steps=2,
        optimizer=AdamW(peak_lr=3e-4),
        schedule=Cosine(warmup_steps=1),
        remat="full",
        checkpoint=Checkpointing(every=1),
        evaluation=Evaluation(every=1),
    )


def quantised(config: TrainConfig) -> Any:
    """The frozen parameters in 4 bits, layers stacked."""
    shape = config.model_config
    table = hf.table(shape, hf.model_type_of(shape))
    rounding = Rounding(table, quantization("int4-g128"), head=False)
    how = {name: rounding.how.of(name) for name in rounding.names}
    params = abstract_params(shape, table, dtype="bfloat16", stacked=False, quantized=how)
    return jax.eval_shape(model.stack_layers, params)


def measure(how: str, name: str) -> tuple[int, int, int]:
    """Bytes of what is frozen, of the trained parameters with their moments, and of all at the peak."""
    config = config_of(name, HOWS[how])
    _, optimizer, step = configured(config)
    state = abstract_state(config.model_config, optimizer, config.adapter)
    frozen: Any = adapter.abstract(config.model_config, config.adapter)[1] if config.adapter else {}
    if how.startswith("QLoRA"):
        frozen = quantised(config)
    peak, _ = peak_of(step.lower(state, abstract_batch(config), frozen))
    return _bytes(frozen), _bytes((state.params, state.optimizer)), peak


def _bytes(tree: Any) -> int:
    bits = lambda x: 4 if x.dtype.name == "int4" else 8 * x.dtype.itemsize
    return sum(math.prod(x.shape) * bits(x) // 8 for x in jax.tree.leaves(tree))


def main(name: str = "Qwen2.5-7B", topology: str = "v5p:2x2x1") -> None:
    print(f"{name}, {LENGTH} tokens, on one chip of {topology}; GiB\n| | frozen | trained, with moments | peak |")
    print("|---|---|---|---|")
    with jax.set_mesh(sharding.make_mesh(devices=devices(parse(topology))[:1])):
        for how in HOWS:
            print(f"| {how} | {' | '.join(f'{size / GIB:.1f}' for size in measure(how, name))} |", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
