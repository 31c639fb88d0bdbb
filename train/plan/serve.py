"""What a model needs and gives when it decodes, by formula: nothing is compiled."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from qwen_jax.config import ModelConfig
from qwen_jax.errors import ConfigError
from train.plan import formulas
from train.plan.chips import GIB
from train.plan.topology import Topology

LABEL = "by formula, nothing compiled and nothing run: upper bounds of bfloat16 decoding"

# HBM that is not for weights and cache: activations of a step, the logits, the program.
_RESERVE = 0.05

_CONTEXTS = (2048, 8192, 32768, 131072)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Serving:
    """One tensor-parallel size; everything is of one copy of the model, on `tensor` devices.

    Attributes:
      tensor: devices that share a copy.
      weights: bytes per device.
      kv: bytes per token and device.
      tokens: that the caches can hold, 0 or fewer if the weights leave no room.
      batches: for each context length, the rows that fit and the tokens per second that all of them get.
      one: tokens per second of a single row, at the first context length.
    """

    tensor: int
    weights: float
    kv: float
    tokens: int
    batches: dict[int, tuple[int, float]]
    one: float


def plan(config: ModelConfig, topology: Topology) -> list[Serving]:
    """Every way to split the model's heads within a slice. Raises ConfigError if it fits in none."""
    devices = topology.num_devices // topology.slices
    found = [_serving(config, topology, size) for size in config.tensor_sizes if devices % size == 0]
    fitting = [serving for serving in found if serving.tokens > 0]
    if not fitting:
        most, weights = found[-1].tensor, formulas.BF16 * config.num_parameters
        raise ConfigError(
            f"the weights are {weights / GIB:,.0f} GiB, and {most} devices of {topology}, the most that share this "
            f"model's heads, have {most * topology.hbm / GIB:,.0f} GiB; choose a topology of more or larger chips"
        )
    return fitting


def _serving(config: ModelConfig, topology: Topology, tensor: int) -> Serving:
    weights = formulas.BF16 * config.num_parameters / tensor
    # With fewer kv heads than devices, each device has one.
    kv = formulas.kv_bytes(config) / min(tensor, config.num_kv_heads)
    tokens = int((topology.hbm * (1 - _RESERVE) - weights) // kv)
    contexts = sorted({min(context, config.max_position) for context in _CONTEXTS})
    rate = lambda rows, context: rows / _step(config, topology, tensor, kv, rows, context)
    rows = {context: max(0, tokens // context) for context in contexts}
    batches = {context: (count, rate(count, context)) for context, count in rows.items() if count}
    return Serving(tensor=tensor, weights=weights, kv=kv, tokens=tokens, batches=batches, one=rate(1, contexts[0]))


def _step(config: ModelConfig, topology: Topology, tensor: int, kv: float, rows: int, context: int) -> float:
    """Seconds of a decoding step, at the least: reading weights and cache, or multiplying."""
    matmul = formulas.matmul_parameters(config) / tensor
    experts = min(config.moe.num_experts, rows * config.moe.top_k) if config.moe else None
    weights = formulas.BF16 * formulas.matmul_parameters(config, experts=experts) / tensor
    read = (weights + rows * context * kv) / topology.bandwidth
    attention = 4 * config.num_layers * config.num_heads * config.head_dim * context / tensor
    return max(read, rows * (2 * matmul + attention) / topology.flops)


def render(found: Sequence[Serving], config: ModelConfig, topology: Topology) -> str:
    """The page for people."""
    lines = [LABEL, ""]
    lines.append(
        f"model     {config.num_parameters:,} parameters, {formulas.kv_bytes(config):,} bytes of cache per token"
    )
    lines.append(f"chips     {topology.num_chips} x {topology.chip.name} ({topology}), {topology.num_devices} devices")
    for serving in found:
        copies = topology.num_devices // serving.tensor
        lines += ["", f"tensor={serving.tensor}, copies of the model: {copies}"]
        lines.append(
            f"  per device {serving.weights / GIB:.2f} GiB of weights in {topology.hbm / GIB:.2f}, "
            f"room for {serving.tokens:,} tokens of cache; one row {serving.one:,.0f} tokens/s"
        )
        for context, (rows, rate) in serving.batches.items():
            lines.append(
                f"  {context:>8,} tokens each: {rows:>6,} rows  {rate:>10,.0f} tokens/s per copy, "
                f"{rate / serving.tensor * topology.chip.devices:>8,.0f} per chip"
            )
    return "\n".join(lines) + "\n"


def as_json(found: Sequence[Serving], config: ModelConfig, topology: Topology) -> dict[str, Any]:
    """The same for programs."""
    return {
        "label": LABEL,
        "topology": str(topology),
        "parameters": config.num_parameters,
        "kv_bytes_per_token": formulas.kv_bytes(config),
        "tensor": [dataclasses.asdict(serving) for serving in found],
    }
