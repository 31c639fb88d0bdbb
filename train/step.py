"""One optimiser step, and the state it carries.

The state in memory has its layers stacked or one by one, whatever trains faster; on disk they are stacked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from qwen_jax import model
from qwen_jax.config import ModelConfig
from qwen_jax.errors import ModelError
from qwen_jax.weights.adapted import is_quantized
from qwen_jax.weights.checkpoint import Checkpoint
from qwen_jax.weights.load import load_params
from qwen_jax.weights.source import Model
from train import adapter as adapters
from train import objectives, optim
from train.adapter import NOTHING, Frozen, Join
from train.config import LoRA, TrainConfig
from train.objectives import Batch, Objective, Refer
from train.reinforcement import PPO

Metrics = dict[str, jax.Array]
TrainStep = Callable[..., tuple["State", Metrics]]  # of the state, a batch, and maybe what is frozen


class Critic(NamedTuple):
    """The value model of PPO, and the moments of its gradient."""

    params: model.Params
    optimizer: optax.OptState


class State(NamedTuple):
    """All that training carries from step to step.

    Attributes:
      step: int32 scalar, optimiser steps done. The learning rate and the order of the data depend on nothing else.
      params: the parameters that are trained: those of the model, or of an adapter.
      optimizer: moments of the gradient, shaped and split like the parameters.
      critic: of PPO.
    """

    step: jax.Array
    params: model.Params
    optimizer: optax.OptState
    critic: Critic | None = None


def initial_state(config: ModelConfig, optimizer: optax.GradientTransformation, *, seed: int, unroll: bool) -> State:
    """The state before the first step, under the current mesh."""

    params = jax.jit(model.init, static_argnums=0)(config, jax.random.key(seed))
    if unroll:
        # On its own: compiled together with the random numbers, it would have their code repeated for each layer.
        params = jax.jit(model.unstack_layers)(params)
    return State(jnp.zeros((), jnp.int32), params, jax.jit(optimizer.init)(params))


def pretrained_state(
    config: TrainConfig, source: Model, optimizer: optax.GradientTransformation, *, unroll: bool
) -> State:
    """The state before the first step of a run that begins with the weights of a model, under the current mesh.

    A reward model that begins with a language model has a fresh score in the place of its output head.

    Raises ModelError for weights that are quantised.
    """
    if is_quantized(source):
        raise ModelError(
            f"{source.path} is quantised, and those weights have no gradient: train an adapter beside them with "
            "adapter = @LoRA, or write them unquantised: python -m qwen_jax.weights.convert SRC DST --dtype bfloat16"
        )
    params = loaded(config.model_config, source, seed=config.seed, unroll=unroll)
    return State(jnp.zeros((), jnp.int32), params, jax.jit(optimizer.init)(params))


def loaded(config: ModelConfig, source: Model, *, seed: int, unroll: bool) -> model.Params:
    """The weights of a model in float32, under the current mesh, with a fresh score if `config` alone has one."""
    params = load_params(source, dtype="float32", stacked=True)
    if config.score and not source.config.score:
        score = jax.jit(lambda: model.init(config, jax.random.key(seed))["score"])()
        params = {name: node for name, node in params.items() if name != "head"} | {"score": score}
    return jax.jit(model.unstack_layers)(params) if unroll else params


def adapted_state(
    config: TrainConfig, adapter: LoRA, frozen: model.Params, optimizer: optax.GradientTransformation, *, unroll: bool
) -> State:
    """The state before the first step of a run that trains an adapter beside frozen parameters."""
    params = adapters.initial(config.model_config, adapter, frozen, seed=config.seed)
    if unroll:
        params = jax.jit(model.unstack_layers)(params)
    return State(jnp.zeros((), jnp.int32), params, jax.jit(optimizer.init)(params))


def abstract_state(config: ModelConfig, optimizer: optax.GradientTransformation, adapter: LoRA | None = None) -> State:
    """Shapes, dtypes and shardings of the state on the current mesh, layers stacked."""
    params = adapters.abstract(config, adapter)[0] if adapter else model.abstract(config)
    whole = jax.NamedSharding(jax.sharding.get_mesh(), jax.P())
    return State(jax.ShapeDtypeStruct((), jnp.int32, sharding=whole), *abstract_params(params, optimizer))


def abstract_params(
    params: model.Params, optimizer: optax.GradientTransformation
) -> tuple[model.Params, optax.OptState]:
    """Abstract parameters, and the moments that an optimiser has for them."""
    whole = jax.NamedSharding(jax.sharding.get_mesh(), jax.P())
    # The optimiser's own counters have no sharding yet; like everything else they belong on all devices.
    moments = jax.tree.map(
        lambda x: x if x.sharding else x.update(sharding=whole), jax.eval_shape(optimizer.init, params)
    )
    return params, moments


def restored_state(
    checkpoint: Checkpoint,
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    adapter: LoRA | None = None,
    *,
    unroll: bool,
) -> State:
    """The state that a checkpoint holds, split over the current mesh, which need not be the one it was saved on."""
    like = abstract_state(config, optimizer, adapter)
    step = jax.device_put(np.int32(checkpoint.step), like.step.sharding)
    state = State(step, checkpoint.load("params", like.params), checkpoint.load("optimizer", like.optimizer))
    return jax.jit(model.unstack_layers)(state) if unroll else state


def stacked(state: State) -> State:
    """The state as checkpoints store it."""
    return jax.jit(model.stack_layers)(state)


def unrolled(config: TrainConfig, mesh: Mesh) -> bool:
    """Whether each layer is compiled on its own. Left to "auto", that is on CPU, where a scan copies every weight."""
    if config.layers == "auto":
        return mesh.devices.flat[0].platform == "cpu"
    return config.layers == "unroll"


def configured(
    config: TrainConfig,
) -> tuple[Objective, optax.GradientTransformationExtraArgs, TrainStep]:
    """What a run minimises, its optimiser, and its step: the one that `train.run` runs and `train.plan` compiles."""
    objective, optimizer = objectives.make(config), optim.make(config)
    learning_rate = optim.cosine(config.schedule, peak=config.optimizer.peak_lr, steps=config.steps)
    step = make_train_step(
        objective,
        optimizer,
        learning_rate,
        join=adapters.join(config.adapter),
        refer=objectives.refer(config),
        beside=_text(config),
        seed=config.seed if objectives.is_random(config) else None,
    )
    return objective, optimizer, step


def _text(config: TrainConfig) -> tuple[Objective, float] | None:
    """What is minimised beside the objective, and its weight."""
    if not config.text_config:
        return None
    assert isinstance(config.objective, PPO)
    return objectives.make(config.text_config), config.objective.text


def make_train_step(
    objective: Objective,
    optimizer: optax.GradientTransformationExtraArgs,
    learning_rate: Callable[[jax.Array], jax.Array],
    *,
    join: Join | None = None,
    refer: Refer | None = None,
    beside: tuple[Objective, float] | None = None,
    seed: int | None = None,
) -> TrainStep:
    """The compiled step: (state, batch) to the next state and float32 scalars. The given state is used up.

    What is frozen comes as a third argument, which stays. With a `seed` every micro-batch has a
    "key" of its own, a function of it and of the step.

    Every array of the batch is [accumulation, rows, ...]. The loss is the sum over all micro-batches divided by the
    sum of their weights, and so is its gradient: the number of micro-batches changes memory, not the step. With
    `beside`, another objective and its weight, the batch has another of its own as "text", whose mean loss counts too.

    The scalars are `loss` (nats per token), whatever else the objective measures, `grad_norm` (before clipping),
    `learning_rate` and `weight` (tokens that count), and `text_loss` of that; all of the loss at the parameters before
    the step.
    """

    join, refer = join or adapters.join(None), refer or (lambda frozen, batch: batch)

    def train_step(state: State, batch: Batch, frozen: Frozen = NOTHING) -> tuple[State, Metrics]:
        def loss(params: model.Params, micro: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
            return objective(join(params, frozen, micro.get("key")), refer(frozen, micro))

        if seed is not None:
            key = jax.random.fold_in(jax.random.key(seed), state.step)
            batch = {**batch, "key": jax.random.split(key, len(batch["tokens"]))}
        own: dict[str, Any] = dict(batch)
        text = own.pop("text", None)
        gradient, weight, sums = _mean_gradient(loss, state.params, own)
        measured = {name: value / weight for name, value in sums.items() if name != "weight"}
        if beside:
            other, share = beside
            of_text = lambda params, micro: other(join(params, frozen, None), micro)
            more, tokens, said = _mean_gradient(of_text, state.params, text)
            gradient = jax.tree.map(lambda g, more: g + share * more, gradient, more)
            measured["text_loss"] = said["loss"] / tokens
        rate, before = learning_rate(state.step), (state.optimizer, state.params)
        changes, moments = optimizer.update(gradient, *before, rate=rate, learned=frozen.learned)
        params = jax.tree.map(jnp.add, state.params, changes)
        metrics = {
            **measured,
            "grad_norm": optax.tree.norm(gradient),
            "learning_rate": rate,
            "weight": sums["weight"],
        }
        return State(state.step + 1, params, moments, state.critic), metrics

    return jax.jit(train_step, donate_argnums=0)


def make_eval_step(objective: Objective, refer: Refer) -> Callable[[model.Params, Batch, Frozen], Metrics]:
    """The compiled evaluation of a batch shaped as in training: the sums of the objective."""

    def eval_step(params: model.Params, batch: Batch, frozen: Frozen) -> Metrics:
        _, sums = _accumulate(lambda params, micro: objective(params, refer(frozen, micro)), params, batch)
        return sums

    return jax.jit(eval_step)


def _mean_gradient(
    loss: Objective, params: model.Params, batch: Batch
) -> tuple[model.Params, jax.Array, dict[str, jax.Array]]:
    """The gradient of the summed loss of a batch divided by its weight, that weight, and the sums."""
    (_, sums), gradient = _accumulate(jax.value_and_grad(loss, has_aux=True), params, batch)
    weight = jnp.maximum(sums["weight"], 1)  # a batch without a single target has loss 0, not 0 / 0
    return jax.tree.map(lambda g: g / weight, gradient), weight, sums


def _accumulate(of_one: Callable[[model.Params, Batch], Any], params: model.Params, batch: Batch) -> Any:
    """The sum of `of_one(params, micro_batch)` over the first axis of the batch, one micro-batch at a time."""
    first = jax.tree.map(lambda x: x[0], batch)
    if jax.tree.leaves(batch)[0].shape[0] == 1:
        return of_one(params, first)
    zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding), jax.eval_shape(of_one, params, first)
    )
    add = lambda sums, micro: (jax.tree.map(jnp.add, sums, of_one(params, micro)), None)
    return jax.lax.scan(add, zeros, batch)[0]
