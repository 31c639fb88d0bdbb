"""AdamW with clipping, the optimiser of the Qwen reports."""

from __future__ import annotations

from typing import Any

import jax
import optax

from train.config import AdamW


def adamw(config: AdamW) -> optax.GradientTransformationExtraArgs:
    """One step: clipped gradient, Adam, plus decayed weights, all of it times minus the learning rate, `rate`.

    The gradient is clipped as a whole, by the norm over all parameters. Both moments have the dtype of the parameters.
    """
    chain = optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=decays),
    )

    def update(
        gradient: Any, state: optax.OptState, params: Any = None, *, rate: jax.Array, **_: Any
    ) -> tuple[Any, optax.OptState]:
        # For the bias correction optax raises a float to the power of an integer, which strict promotion forbids.
        with jax.numpy_dtype_promotion("standard"):
            direction, state = chain.update(gradient, state, params)
        return jax.tree.map(lambda d: -(rate * d), direction), state

    return optax.GradientTransformationExtraArgs(chain.init, update)


def decays(params: Any) -> Any:
    """Which parameters decay: tables and matrices (named `w`, and those of adapters), not biases or norm scales.

    By name and not by rank: a bias of attention heads is [N, H], and any parameter of a stack has one more axis.
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in ("w", "lora_a", "lora_b"), params)
