"""Quantised weights made here, number by number, without the code that reads or makes them."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np

from qwen_jax.ops.quantized import Quantized


def words(numbers: np.ndarray, bits: int) -> np.ndarray:
    """Unsigned numbers, with those of the first axis that share a word joined: the first in the lowest bits."""
    count = 32 // bits
    joined = np.zeros((len(numbers) // count, *numbers.shape[1:]), np.uint32)
    for i in range(count):
        joined |= numbers[i::count].astype(np.uint32) << np.uint32(bits * i)
    return joined.view(np.int32)


def random(
    rng: np.random.Generator,
    shape: tuple[int, ...],
    inputs: int,
    *,
    bits: int,
    group: int,
    zeros: bool = False,
    packed: bool = True,
    table: bool = False,
) -> tuple[Quantized, np.ndarray]:
    """A weight whose last `inputs` axes are inputs, and what it stands for."""
    size = math.prod(shape[len(shape) - inputs :])
    middle, groups = 2 ** (bits - 1), size // group
    q = rng.integers(0, 2 * middle, (size, math.prod(shape) // size))
    scales = rng.uniform(0.01, 0.02, (groups, q.shape[1])).astype(np.float16)
    zero = rng.integers(0, 2 * middle, scales.shape) if zeros else np.full(scales.shape, middle)
    wide = (q - zero.repeat(group, 0)) * scales.repeat(group, 0).astype(np.float32)
    values = words(q, bits) if packed else (q - middle).T if table else (q - middle).reshape(groups, group, -1)
    w = Quantized(
        values=jnp.asarray(values, jnp.int32 if packed else jnp.int4 if bits == 4 else jnp.int8),
        scales=jnp.asarray(scales),
        zeros=jnp.asarray(zero - middle, jnp.int8) if zeros else None,
        bits=bits,
        shape=shape,
    )
    return w, wide.T.reshape(shape)


def wide(w: Quantized, inputs: int) -> np.ndarray:
    """What a weight whose last `inputs` axes are inputs stands for, of experts too."""
    values, scales, middle = np.asarray(w.values), np.asarray(w.scales, np.float32), 2 ** (w.bits - 1)
    if values.dtype == np.int32:
        shifts = np.arange(0, 32, w.bits)
        numbers = (values[..., None, :] >> shifts[:, None] & 2 * middle - 1) - middle
    else:
        numbers = (values.T if values.ndim == scales.ndim else values).astype(int)
    numbers = numbers.reshape(*scales.shape[:-1], -1, scales.shape[-1])
    zeros = 0 if w.zeros is None else np.asarray(w.zeros, int)[..., None, :]
    found = (numbers - zeros) * scales[..., None, :]
    stack, size = w.shape[: scales.ndim - 2], math.prod(w.shape[len(w.shape) - inputs :])
    return np.swapaxes(found.reshape(*stack, size, -1), -1, -2).reshape(w.shape).astype(np.float32)
