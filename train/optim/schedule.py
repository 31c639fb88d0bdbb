"""The learning rate as a pure function of the step."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from train.config import Cosine


def cosine(config: Cosine, *, peak: float, steps: int) -> Callable[[jax.Array], jax.Array]:
    """The learning rate of each step: linear warm-up to `peak`, then half a cosine down to a fraction of it.

    Step 0 already learns (peak / (warm-up + 1)), the step after the warm-up runs at `peak`, step `steps - 1` at
    `final_fraction * peak`, and every later step at that same value.

    Args:
      config: length of the warm-up and where the cosine ends.
      peak: the highest learning rate.
      steps: length of the run, warm-up included.

    Returns:
      A function from an integer step, counted from 0, to a float32 scalar.
    """
    final, warmup = config.final_fraction * peak, config.warmup(steps)
    decay_steps = max(steps - 1 - warmup, 1)

    def learning_rate(step: jax.Array) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        rising = peak * (step + 1) / (warmup + 1)
        progress = jnp.clip((step - warmup) / decay_steps, 0, 1)
        falling = final + (peak - final) * (1 + jnp.cos(jnp.pi * progress)) / 2
        return jnp.where(step < warmup, rising, falling)

    return learning_rate
