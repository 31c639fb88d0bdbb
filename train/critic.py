"""PPO's critic: a model of its own that is trained beside the policy, on the same batches, by steps of its own."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from qwen_jax import model
from qwen_jax.errors import ModelError
from qwen_jax.weights.adapted import is_quantized
from qwen_jax.weights.checkpoint import Checkpoint
from qwen_jax.weights.source import open_model
from train import optim
from train.adapter import NOTHING, Frozen
from train.config import Pretrained, TrainConfig
from train.objectives import Batch, value
from train.reinforcement import PPO
from train.step import Critic, Metrics, State, TrainStep, abstract_params, loaded, make_train_step


def optimizer(config: TrainConfig) -> optax.GradientTransformationExtraArgs:
    """The critic's: that of the run, without what is only for a policy."""
    return optim.adamw(config.optimizer)


def fresh(config: TrainConfig, *, unroll: bool) -> Critic:
    """The critic before the first step, on the current mesh. Raises ModelError for weights that are quantised."""
    assert isinstance(config.objective, PPO) and isinstance(config.model, Pretrained)
    with open_model(config.objective.critic.model or config.model.path, warn=lambda _: None) as source:
        if is_quantized(source):
            raise ModelError(f"{source.path} is quantised, and a critic is trained whole: name objective.critic.model")
        params = loaded(config.critic_config, source, seed=config.seed, unroll=unroll)
    return Critic(params, jax.jit(optimizer(config).init)(params))


def abstract(config: TrainConfig) -> Critic | None:
    """Shapes, dtypes and shardings of the critic on the current mesh, layers stacked; None where there is none."""
    if not isinstance(config.objective, PPO):
        return None
    return Critic(*abstract_params(model.abstract(config.critic_config), optimizer(config)))


def restored(config: TrainConfig, checkpoint: Checkpoint, *, unroll: bool) -> Critic:
    """The critic that a checkpoint holds, on the current mesh."""
    critic = checkpoint.load("critic", abstract(config))
    return jax.jit(model.unstack_layers)(critic) if unroll else critic


def value_step(config: TrainConfig) -> TrainStep:
    """The compiled step of the critic, which takes its parameters and moments for those of a state."""
    objective = config.objective
    assert isinstance(objective, PPO)
    how: dict[str, Any] = dict(remat=config.remat, attention=config.attention, balanced=True)
    rate = optim.cosine(config.schedule, peak=objective.critic.peak_lr, steps=config.steps)
    loss = lambda params, batch: value.loss(config.critic_config, objective, params, batch, **how)
    return make_train_step(loss, optimizer(config), rate)


class ActorCritic:
    """The step of PPO: the critic's, and then the policy's, which waits while the critic is warmed up.

    Metrics are those of the policy, and beside them those of the critic as `value`, `value_loss` and so on; while it
    learns alone, the loss and the gradient are its own.
    """

    def __init__(self, config: TrainConfig, policy_step: TrainStep, *, step: int) -> None:
        """
        Args:
          config: of the run.
          policy_step: of the policy.
          step: that comes next.
        """
        assert isinstance(config.objective, PPO)
        self._policy_step, self._value_step, self._step = policy_step, value_step(config), step
        self._warmup = config.objective.critic.warmup_steps

    def __call__(self, state: State, batch: Batch, frozen: Frozen = NOTHING) -> tuple[State, Metrics]:
        """The next state and what was measured; the given one is used up."""
        assert state.critic is not None
        alone, said = self._value_step(State(jnp.copy(state.step), *state.critic), batch)
        state = state._replace(critic=Critic(alone.params, alone.optimizer))
        told = {f"value_{name}": said[name] for name in ("loss", "grad_norm", "learning_rate")}
        told |= {name: x for name, x in said.items() if name.startswith("value")}
        warming, self._step = self._step < self._warmup, self._step + 1
        if warming:
            own = {name: said[name] for name in ("loss", "grad_norm", "learning_rate", "weight")}
            return state._replace(step=state.step + 1), own | told
        state, metrics = self._policy_step(state, batch, frozen)
        return state, metrics | told
