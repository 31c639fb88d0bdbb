"""Weights to four or eight bits: each number to the nearest, with the scale of its group that loses least."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float16, UInt8

from qwen_jax.errors import ConfigError, ModelError
from qwen_jax.weights import hf
from qwen_jax.weights.hf_quantization import HEAD, Quantization
from qwen_jax.weights.quantized import arrays
from qwen_jax.weights.sinks import PublishedSink
from qwen_jax.weights.source import Piece

# Of the scale with which the largest number of a group is just in range. Below one, it is cut off, and all others are
# rounded in finer steps.
_FACTORS = np.linspace(0.6, 1, 17)
_LARGEST_SCALE = float(np.finfo(np.float16).max)
# Matrices of a layer that decide where a token goes: small, and a little off they choose another expert.
_KEPT = ("mlp/router/w", "mlp/shared_gate/w")


class Rounding:
    """What becomes of the weights of a model.

    Attributes:
      how: they are stored.
      names: of those that are quantised: the matrices of the layers, and head and embedding if asked for.

    Raises ModelError where one has no whole number of groups or words, ConfigError where there is no head.
    """

    def __init__(self, table: Sequence[hf.Tensor], how: Quantization, *, head: bool, embedding: bool = False) -> None:
        self.how = how = dataclasses.replace(how, embedding=table[0].name if embedding else None)
        self.names = frozenset(tensor.name for tensor in table if _is_matrix(tensor, head=head, embedding=embedding))
        if head and HEAD not in self.names:
            raise ConfigError(
                "--quantize-head: this model has no output head of its own; leave it out, or take --quantize-embedding"
            )
        for tensor in table:
            if tensor.name in self.names:
                outputs, inputs = tensor.shape
                n = how.of(tensor.name).count
                group = how.of(tensor.name).group or n
                if inputs % group or outputs % n:
                    raise ModelError(
                        f"{tensor.name} has {inputs} inputs and {outputs} outputs, and quantised they must be "
                        f"multiples of {group} and {n}; choose another --quantize"
                    )

    def to_hf(self) -> dict[str, Any]:
        """The `quantization_config`."""
        return self.how.to_hf(head=HEAD in self.names)

    def tensors(
        self, table: Sequence[hf.Tensor], dtypes: Mapping[str, np.dtype]
    ) -> tuple[list[hf.Tensor], dict[str, np.dtype]]:
        """The tensors that are written in place of those of a table, and their types."""
        found, kinds = [], {}
        for tensor in table:
            if tensor.name not in self.names:
                found.append(tensor)
                kinds[tensor.name] = dtypes[tensor.name]
                continue
            for end, shape in self.how.of(tensor.name).shapes(*tensor.shape).items():
                name = tensor.name.removesuffix("weight") + end
                found.append(hf.Tensor(name=name, shape=shape, parts=()))
                kinds[name] = np.dtype(np.float16 if end == "scales" else np.int32)
        return found, kinds

    def quantize(self, name: str, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows [outputs, inputs] of a weight, as unsigned numbers [inputs, outputs] and scales [groups, outputs].

        Raises ModelError for numbers that no scale fits.
        """
        how = self.how.of(name)
        if not np.abs(values.astype(np.float32)).max() <= _LARGEST_SCALE * (how.middle - 0.5):  # so of NaN too
            raise ModelError(
                f"{name} holds NaN, infinity, or numbers too large for a scale in float16, and cannot be quantised: "
                "is the model damaged?"
            )
        numbers, scales = _rounded(values.astype(np.float32), bits=how.bits, group=how.group or values.shape[1])
        return np.asarray(numbers).T, np.asarray(scales).T

    def round(self, name: str, values: np.ndarray) -> np.ndarray:
        """What quantised rows stand for, float32."""
        numbers, scales = self.quantize(name, values)
        how, inputs = self.how.of(name), values.shape[1]
        wide = np.repeat(scales.astype(np.float32), how.group or inputs, axis=0)
        return ((numbers.astype(np.float32) - how.middle) * wide).T


class QuantizedSink:
    """A Sink that quantises some tensors, whose pieces come each in order, before a PublishedSink writes them.

    Args:
      sink: for what `rounding.tensors` gives.
      rounding: of which tensors, and how.
    """

    def __init__(self, sink: PublishedSink, rounding: Rounding) -> None:
        self._sink, self._rounding = sink, rounding
        self._parts: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {name: [] for name in rounding.names}

    def __enter__(self) -> Self:
        self._sink.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        self._sink.__exit__(kind, *rest)

    def write(self, piece: Piece, values: np.ndarray) -> None:
        name = piece.tensor.name
        if name not in self._rounding.names:
            self._sink.write(piece, values)
            return
        self._parts[name].append(self._rounding.quantize(name, values.reshape(-1, piece.tensor.shape[1])))
        if piece.rows.stop == piece.tensor.shape[0]:
            numbers, scales = (np.concatenate(each, axis=1) for each in zip(*self._parts.pop(name), strict=True))
            for end, array in arrays(numbers, scales, self._rounding.how.of(name)).items():
                self._sink.put(name.removesuffix("weight") + end, array)


def _is_matrix(tensor: hf.Tensor, *, head: bool, embedding: bool) -> bool:
    path = tensor.parts[0].path
    of_layer = path.startswith("layers/") and path.endswith("/w") and not path.endswith(_KEPT)
    return {"head/w": head, "embed/w": embedding}.get(path, of_layer)


@functools.partial(jax.jit, static_argnames=("bits", "group"))
def _rounded(
    values: Float[Array, "O I"], *, bits: int, group: int
) -> tuple[UInt8[Array, "O I"], Float16[Array, "O G"]]:
    parts, middle = values.reshape(len(values), -1, group), 2 ** (bits - 1)
    largest = jnp.abs(parts).max(-1)

    def numbers(scales: Array) -> Array:
        steps = parts / jnp.where(scales > 0, scales, 1).astype(jnp.float32)[..., None]
        return jnp.clip(jnp.round(steps), -middle, middle - 1)

    def better(best: tuple[Array, Array], factor: Array) -> tuple[tuple[Array, Array], None]:
        scales = (largest * factor / (middle - 0.5)).astype(jnp.float16)
        loss = jnp.square(numbers(scales) * scales.astype(jnp.float32)[..., None] - parts).sum(-1)
        return (jnp.minimum(loss, best[0]), jnp.where(loss < best[0], scales, best[1])), None

    # With one of the last two, numbers that were rounded before stay as they are.
    factors = [*_FACTORS, (middle - 0.5) / middle, (middle - 0.5) / (middle - 1)]
    start = jnp.full(largest.shape, jnp.inf), jnp.zeros(largest.shape, jnp.float16)
    (_, scales), _ = jax.lax.scan(better, start, jnp.array(factors, jnp.float32))
    return (numbers(scales) + middle).astype(jnp.uint8).reshape(values.shape), scales
