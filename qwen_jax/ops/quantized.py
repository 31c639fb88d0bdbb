"""Weights of four or eight bits, and products with them that never hold a wide copy of one.

A weight is `scale * (q - zero)`; a group of inputs of an output shares scale and zero (GPTQ, arXiv 2210.17323; AWQ,
arXiv 2306.00978). Weights have no gradient; activations have theirs, by products that hold no wide copy either.
"""

from __future__ import annotations

import dataclasses
import functools
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
        neighbouring inputs in one, the first in the lowest bits. Of experts, with a first axis E. Of a table, whose
        outputs are looked up, [O, I] where not in words: the compiler for TPU would turn any other around first.
      scales: of each group, [G, O]; of experts [E, G, O].
      zeros: likewise, less 2^(bits - 1); None where they are 0.
      bits: 4 or 8.
      shape: of the whole weight it stands for, such as (N, H, D).
    """

    values: Int[Array, "..."]
    scales: Float[Array, "*E G O"]
    zeros: Int[Array, "*E G O"] | None
    bits: int = dataclasses.field(metadata={"static": True})
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    @property
    def packed(self) -> bool:
        """Whether the values are words."""
        return self.values.dtype == jnp.int32

    @property
    def is_table(self) -> bool:
        """Whether the values are rows, one for each output; there is one group then."""
        return not self.packed and self.values.ndim == self.scales.ndim

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
    if w.packed:
        values = P(*stack, rows, columns)
    else:
        values = P(columns, rows) if w.is_table else P(*stack, of_group, in_group, columns)
    scales = P(*stack, of_group, columns)
    return dataclasses.replace(w, values=values, scales=scales, zeros=None if w.zeros is None else scales)


def contract(
    xs: str, outputs: str, inputs: str, x: Float[Array, "..."], w: Quantized, *, dtype: jnp.dtype
) -> Float[Array, "..."]:
    """The product of x, whose letters `xs` end with the inputs, and w, in `dtype`: x's rows, then the outputs.

    Differentiable in x; there is no gradient of w.
    """
    x = jax.sharding.reshard(x, sharding.activation(xs, x.shape))
    return _contract((xs.removesuffix(inputs), outputs, inputs), dtype, x, w)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _contract(letters, dtype, x, w):
    return _forward(letters, dtype, x, w)[0]


def _forward(letters, dtype, x, w):
    like = jnp.zeros((), x.dtype)  # of x, its type is enough to go back
    return _on_each_device(letters, dtype, x, w, back=False), (w, like)


def _backward(letters, dtype, saved, dy):
    w, like = saved
    return _on_each_device(letters, like.dtype, dy.astype(like.dtype), w, back=True), None


_contract.defvjp(_forward, _backward)


def _on_each_device(letters: tuple[str, str, str], dtype: jnp.dtype, x: Array, w: Quantized, *, back: bool) -> Array:
    """The product over the inputs, or `back` over the outputs; letters are those of rows, outputs and inputs."""
    rows, outputs, inputs = letters
    before, after = (outputs, inputs) if back else (inputs, outputs)
    sizes = dict(zip(outputs + inputs, w.shape, strict=True))
    shape = x.shape[: len(rows)] + tuple(sizes[letter] for letter in after)
    of_weight = sharding.gathered(outputs + inputs, w.shape)
    axis, multiply = (of_weight[0], dot_back) if back else (of_weight[len(outputs)], dot)

    def local(x: Array, w: Quantized) -> Array:
        y = multiply(x.reshape(math.prod(x.shape[: len(rows)]), -1), w)
        y = jax.lax.psum(y, axis) if axis else y
        return y.astype(dtype).reshape(*x.shape[: len(rows)], -1, *shape[len(rows) + 1 :])

    splits = sharding.activation(rows + before, x.shape), split(of_weight, len(outputs), w)
    mapped = jax.shard_map(local, in_specs=splits, out_specs=sharding.activation(rows + after, shape), check_vma=False)
    return mapped(*jax.tree.map(jax.sharding.reshard, (x, w), splits))


def dot(x: Float[Array, "M I"], w: Quantized) -> Float[Array, "M O"]:
    """On one device: the product over the inputs, in float32."""
    if not w.packed:
        return _fused(x, w)
    return _by_row(x, w) if len(x) <= _FEW_ROWS else _by_block(x, w)


def dot_back(dy: Float[Array, "M O"], w: Quantized) -> Float[Array, "M I"]:
    """On one device: the product over the outputs, in float32, which takes a gradient back through `dot`."""
    return _back_by_block(dy, w) if w.packed else _fused_back(dy, w)


def look_up(ids: Int[Array, "*n"], w: Quantized, *, dtype: jnp.dtype) -> Float[Array, "*n I"]:
    """On one device: the rows of a table, packed or not, that are those of outputs `ids`."""
    flat = ids.reshape(-1)
    of_columns = lambda a: a.at[:, flat].get(mode="promise_in_bounds")
    values = w.values.at[flat].get(mode="promise_in_bounds") if w.is_table else of_columns(w.values)
    zeros = None if w.zeros is None else of_columns(w.zeros)
    found = dataclasses.replace(w, values=values, scales=of_columns(w.scales), zeros=zeros)
    if not w.packed:
        return _wide(found, dtype).reshape(*ids.shape, -1)
    numbers = [_numbers(found, jnp.int32(n), dtype) for n in range(32 // w.bits)]
    return jnp.stack(numbers, axis=1).reshape(-1, ids.size).T.reshape(*ids.shape, -1)


def _fused(x: Float[Array, "M I"], w: Quantized) -> Float[Array, "M O"]:
    inputs = (1,), (1,)
    if not w.is_table:
        # Over groups and their inputs as two axes: brought to one, the compiler would make the wide weight first.
        x, inputs = x.reshape(len(x), *w.values.shape[:2]), ((1, 2), (0, 1))
    return jax.lax.dot_general(x, _wide(w, x.dtype), (inputs, ((), ())), preferred_element_type=jnp.float32)


def _fused_back(dy: Float[Array, "M O"], w: Quantized) -> Float[Array, "M I"]:
    wide, outputs = _wide(w, dy.dtype), 0 if w.is_table else 2
    dx = jax.lax.dot_general(dy, wide, (((1,), (outputs,)), ((), ())), preferred_element_type=jnp.float32)
    # Without the barrier the compiler joins groups and their inputs before the product, and writes the wide weight.
    return jax.lax.optimization_barrier(dx).reshape(len(dy), -1)


def _wide(w: Quantized, dtype: jnp.dtype) -> Float[Array, "..."]:
    """The numbers of a weight that is not packed, for a compiler that makes them as it multiplies."""
    beside = lambda of_groups: (of_groups.T if w.is_table else of_groups[:, None]).astype(jnp.float32)
    values = w.values.astype(jnp.float32)
    if w.zeros is not None:
        values = values - beside(w.zeros)
    return (values * beside(w.scales)).astype(dtype)


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
    (words, outputs), count = w.values.shape, 32 // w.bits
    size = min(_BLOCK, outputs)
    every = x.reshape(len(x), words, count).transpose(2, 0, 1)  # the inputs whose numbers are n-th in a word

    def block(i: Array, y: Array) -> Array:
        start = jnp.minimum(i * size, outputs - size)  # the last may begin in the one before
        cut = _outputs(w, start, size)
        add = lambda n, y: y + jnp.dot(every[n], _numbers(cut, n, x.dtype), preferred_element_type=jnp.float32)
        of_block = jax.lax.fori_loop(0, count, add, jnp.zeros((len(x), size), jnp.float32))
        return jax.lax.dynamic_update_slice_in_dim(y, of_block, start, axis=1)

    return jax.lax.fori_loop(0, -(-outputs // size), block, jnp.zeros((len(x), outputs), jnp.float32))


def _back_by_block(dy: Float[Array, "M O"], w: Quantized) -> Float[Array, "M I"]:
    """Likewise; each block adds to all inputs."""
    (words, outputs), count = w.values.shape, 32 // w.bits
    size = min(_BLOCK, outputs)

    def block(i: Array, every: Array) -> Array:
        start = jnp.minimum(i * size, outputs - size)
        cut, rows = _outputs(w, start, size), jax.lax.dynamic_slice_in_dim(dy, start, size, axis=1)
        rows = jnp.where(start + jnp.arange(size) >= i * size, rows, 0)  # but each output once

        def add(n: Array, every: Array) -> Array:
            of_n = jnp.dot(rows, _numbers(cut, n, dy.dtype).T, preferred_element_type=jnp.float32)
            return every.at[n].add(of_n)

        return jax.lax.fori_loop(0, count, add, every)

    every = jnp.zeros((count, len(dy), words), jnp.float32)
    return jax.lax.fori_loop(0, -(-outputs // size), block, every).transpose(1, 2, 0).reshape(len(dy), -1)


def _outputs(w: Quantized, start: Array, size: int) -> Quantized:
    """The part of a packed weight that makes `size` of its outputs."""
    return jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, start, size, axis=1), w)


def _numbers(w: Quantized, n: Array, dtype: jnp.dtype) -> Float[Array, "words O"]:
    """Of each word of a packed weight the n-th number, as what it stands for."""
    q = jax.lax.shift_right_logical(w.values, n * w.bits) & (2**w.bits - 1)
    q = q.astype(jnp.float32).reshape(len(w.scales), -1, q.shape[1]) - 2 ** (w.bits - 1)
    if w.zeros is not None:
        q = q - w.zeros.astype(jnp.float32)[:, None]
    return (q * w.scales.astype(jnp.float32)[:, None]).astype(dtype).reshape(w.values.shape)
