"""Weights of four or eight bits, and products with them that never hold a wide copy of one.

A weight is `scale * (q - zero)`; a group of inputs of an output shares scale and zero (GPTQ, arXiv 2210.17323; AWQ,
arXiv 2306.00978). They are for decoding: nothing here has a gradient.
"""

from __future__ import annotations

import dataclasses
import math
import typing

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from qwen_jax import sharding
from qwen_jax.errors import ConfigError

# Up to so many rows, XLA on CPU multiplies numbers as it takes them out of their words, row by row.
_FEW_ROWS = 4
# Numbers of an output in one pass of that loop: enough to hide what a pass costs, and few to compile.
_TERMS = 16
# Outputs of a block that is widened for more rows: what is made of it stays in a core's cache.
_BLOCK = 256


@typing.no_type_check  # at run time: one of partition specs says how one of arrays is split
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantized:
    """What stands in the place of a weight, with its outputs O and inputs I each as one axis.

    XLA keeps four bits as four on TPU and GPU, and as eight on CPU; there they are packed in words.

    Attributes:
      values: q - 2^(bits - 1) as [G, I / G, O] int4 or int8; or q in words, [I * bits / 32, O] int32, the numbers of
        neighbouring inputs in one, the first in the lowest bits. Of experts, with a first axis E.
      scales: of each group, [G, O]; of experts [E, G, O].
      zeros: likewise, less 2^(bits - 1); None where they are 0.
      bits: 4 or 8.
      shape: of the whole weight it stands for, such as (N, H, D).
    """

    values: Int[Array, "*E inputs O"]
    scales: Float[Array, "*E G O"]
    zeros: Int[Array, "*E G O"] | None
    bits: int = dataclasses.field(metadata={"static": True})
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    @property
    def packed(self) -> bool:
        """Whether the values are words."""
        return self.values.dtype == jnp.int32

    def __getitem__(self, expert: Int[Array, ""]) -> Quantized:
        """The weight of one expert."""
        return dataclasses.replace(jax.tree.map(lambda each: each[expert], self), shape=self.shape[1:])


def is_packed() -> bool:
    """Whether weights for the current mesh are to be packed in words."""
    return sharding.platform() == "cpu"


def split(of_weight: P, outputs: int, w: Quantized) -> Quantized:
    """How each array is split where the weight it stands for, of so many output axes, is split as `of_weight` says.

    Raises ConfigError where that would go through a group of inputs.
    """
    first = w.scales.ndim - 2  # of experts there is an axis more
    stack, columns, rows = of_weight[:first], of_weight[first], of_weight[first + outputs]
    groups, ways = w.scales.shape[-2], sharding.axis_size(rows)
    if groups > 1 and groups % ways:
        raise ConfigError(
            f"{groups} groups of a quantised weight cannot be split {ways} ways over mesh axis {rows}: "
            f"choose a size that divides {groups}"
        )
    of_group, in_group = (rows, None) if groups > 1 else (None, rows)
    values = P(*stack, rows, columns) if w.packed else P(*stack, of_group, in_group, columns)
    scales = P(*stack, of_group, columns)
    return dataclasses.replace(w, values=values, scales=scales, zeros=None if w.zeros is None else scales)


def contract(
    xs: str, outputs: str, inputs: str, x: Float[Array, "..."], w: Quantized, *, dtype: jnp.dtype
) -> Float[Array, "..."]:
    """The product of x, whose letters `xs` end with the inputs, and w, in `dtype`: x's rows, then the outputs."""
    rows = xs.removesuffix(inputs)
    shape = x.shape[: len(rows)] + w.shape[: len(outputs)]
    of_weight = sharding.gathered(outputs + inputs, w.shape)
    specs, axis = split(of_weight, len(outputs), w), of_weight[len(outputs)]

    def local(x: Array, w: Quantized) -> Array:
        y = dot(x.reshape(math.prod(x.shape[: len(rows)]), -1), w)
        y = jax.lax.psum(y, axis) if axis else y
        return y.astype(dtype).reshape(*x.shape[: len(rows)], -1, *shape[len(rows) + 1 :])

    of_x = sharding.activation(xs, x.shape)
    mapped = jax.shard_map(
        local, in_specs=(of_x, specs), out_specs=sharding.activation(rows + outputs, shape), check_vma=False
    )
    return mapped(*jax.tree.map(jax.sharding.reshard, (x, w), (of_x, specs)))


def dot(x: Float[Array, "M I"], w: Quantized) -> Float[Array, "M O"]:
    """On one device: the product over the inputs, in float32."""
    x = only_forward(x, w)
    if not w.packed:
        return _fused(x, w)
    return _by_row(x, w) if len(x) <= _FEW_ROWS else _by_block(x, w)


def only_forward(x: Array, weights: object) -> Array:
    """x, of which a gradient is refused (ConfigError) where there is a quantised one among the weights."""
    found = jax.tree.leaves(weights, is_leaf=lambda w: isinstance(w, Quantized))
    return _without_gradient(x) if any(isinstance(w, Quantized) for w in found) else x


@jax.custom_jvp
def _without_gradient(x: Array) -> Array:
    return x


@_without_gradient.defjvp
def _refuse(primals: object, tangents: object) -> tuple[Array, Array]:
    raise ConfigError(
        "quantised weights are for decoding, and this takes a gradient: train the model they were made of, "
        "or convert them with --dtype first"
    )


def _fused(x: Float[Array, "M I"], w: Quantized) -> Float[Array, "M O"]:
    # Over groups and their inputs as two axes: brought to one, the compiler would make the wide weight first.
    values, scales = w.values.astype(jnp.float32), w.scales.astype(jnp.float32)[:, None]
    if w.zeros is not None:
        values = values - w.zeros.astype(jnp.float32)[:, None]
    wide, x = (values * scales).astype(x.dtype), x.reshape(len(x), *w.values.shape[:2])
    return jax.lax.dot_general(x, wide, (((1, 2), (0, 1)), ((), ())), preferred_element_type=jnp.float32)


def _by_row(x: Float[Array, "M I"], w: Quantized) -> Float[Array, "M O"]:
    """Row by row, a few words of each output at a time, in one loop over vectors of outputs: nothing wide is stored."""
    (words, outputs), count = w.values.shape, 32 // w.bits
    per_group = words // len(w.scales)
    step = math.gcd(per_group, _TERMS // count)
    mask = 2**w.bits - 1

    def row(x: Array) -> Array:
        x = x.astype(jnp.float32).reshape(words // step, step, count)
        offsets = x.sum((1, 2))
        # Numbers stay where they are in their word, which makes them larger; but for the last, where the sign is.
        factors = x * jnp.array([2.0 ** (-w.bits * i) for i in range(count - 1)] + [1.0])

        def add(i: Array, y: Array) -> Array:
            group = i * step // per_group
            zero = 2 ** (w.bits - 1) + (0 if w.zeros is None else w.zeros[group].astype(jnp.float32))
            total = -offsets[i] * zero
            for j in range(step):
                word = jax.lax.dynamic_index_in_dim(w.values, i * step + j, keepdims=False)
                for k in range(count):
                    last = k == count - 1
                    q = jax.lax.shift_right_logical(word, 32 - w.bits) if last else word & (mask << w.bits * k)
                    total = total + q.astype(jnp.float32) * factors[i, j, k]
            return y + total * w.scales[group].astype(jnp.float32)

        return jax.lax.fori_loop(0, words // step, add, jnp.zeros(outputs, jnp.float32))

    return row(x[0])[None] if len(x) == 1 else jax.lax.map(row, x)


def _by_block(x: Float[Array, "M I"], w: Quantized) -> Float[Array, "M O"]:
    """Some outputs at a time, and of their words one number each: what is widened is as long as their words."""
    (words, outputs), groups, count = w.values.shape, len(w.scales), 32 // w.bits
    size = min(_BLOCK, outputs)
    every = x.reshape(len(x), words, count).transpose(2, 0, 1)  # the inputs whose numbers are n-th in a word

    def block(i: Array, y: Array) -> Array:
        start = jnp.minimum(i * size, outputs - size)  # the last may begin in the one before
        cut = lambda a: jax.lax.dynamic_slice_in_dim(a, start, size, axis=1)
        values, scales = cut(w.values), cut(w.scales).astype(jnp.float32)[:, None]
        zeros = 0 if w.zeros is None else cut(w.zeros).astype(jnp.float32)[:, None]

        def add(n: Array, y: Array) -> Array:
            q = jax.lax.shift_right_logical(values, n * w.bits) & (2**w.bits - 1)
            q = q.astype(jnp.float32).reshape(groups, -1, size) - 2 ** (w.bits - 1) - zeros
            wide = (q * scales).astype(x.dtype).reshape(words, size)
            return y + jnp.dot(every[n], wide, preferred_element_type=jnp.float32)

        of_block = jax.lax.fori_loop(0, count, add, jnp.zeros((len(x), size), jnp.float32))
        return jax.lax.dynamic_update_slice_in_dim(y, of_block, start, axis=1)

    return jax.lax.fori_loop(0, -(-outputs // size), block, jnp.zeros((len(x), outputs), jnp.float32))
