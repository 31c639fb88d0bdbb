"""The parts with parameters that everything else is made of."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from qwen_jax import sharding
from qwen_jax.ops.linear import contract, letters
from qwen_jax.ops.lora import Adapted
from qwen_jax.ops.norm import rms_norm
from qwen_jax.ops.quantized import Quantized


def weight(module: nn.Module, init: Callable[[Array], Array]) -> Array | Quantized | Adapted:
    """The parameter "w" of a module, which may be quantised or adapted; where there is none, `init(key)`."""
    if module.has_variable("params", "w") and isinstance(w := module.get_variable("params", "w"), Quantized | Adapted):
        return w  # of other arrays than those of init, which Flax compares
    return module.param("w", init)


class Linear(nn.Module):
    """`einsum(pattern, x, w) + b`, e.g. "btd,nhd->btnh" with shape (N, H, D).

    The letters say the rest: those of w that x lacks are the output (and the bias), those they share give the
    fan-in, and all of them how w is split. w starts with variance `scale / fan-in`, b with zeros.
    """

    pattern: str
    shape: tuple[int, ...]
    param_dtype: jnp.dtype
    bias: bool = False
    scale: float = 1.0

    def setup(self) -> None:
        xs, ws, _ = letters(self.pattern)
        ins = tuple(i for i, letter in enumerate(ws) if letter in xs)
        outs = tuple(i for i, letter in enumerate(ws) if letter not in xs)
        kernel = jax.nn.initializers.variance_scaling(
            self.scale, "fan_in", "truncated_normal", in_axis=ins, out_axis=outs
        )
        split = sharding.weight(ws, self.shape)
        self.w = weight(self, lambda key: kernel(key, self.shape, self.param_dtype, out_sharding=split))
        if self.bias:
            shape = tuple(self.shape[i] for i in outs)
            whole = sharding.gathered("".join(ws[i] for i in outs), shape)
            self.b = self.param("b", lambda key: jnp.zeros(shape, self.param_dtype, out_sharding=whole))

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        y = contract(self.pattern, x, self.w)
        return y + self.b.astype(y.dtype) if self.bias else y

    def weight(self) -> Float[Array, "..."] | Quantized | Adapted:
        """w alone, as it is stored."""
        return self.w


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, with a learned scale that starts at one."""

    eps: float
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        scale = self.param("scale", lambda key: jnp.ones(x.shape[-1], self.param_dtype))
        return rms_norm(x, scale, eps=self.eps)


class Table(nn.Module):
    """A [V, D] table of vectors: the token embedding, or an untied output head."""

    shape: tuple[int, int]
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self) -> Float[Array, "V D"] | Quantized | Adapted:
        split = sharding.weight("vd", self.shape)
        normal = jax.nn.initializers.normal(0.02)
        return weight(self, lambda key: normal(key, self.shape, self.param_dtype, out_sharding=split))
