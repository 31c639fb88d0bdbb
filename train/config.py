"""What a training run is: the schema of the .gin files of `python -m train`.

Every section checks itself; `TrainConfig` checks what the sections have to do with each other.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from dataclasses import dataclass
from typing import Literal

from qwen_jax import zoo
from qwen_jax.config import DType, ModelConfig, Rope, Score
from qwen_jax.errors import ConfigError
from qwen_jax.weights import hf, targets
from train.alignment import DPO, OnlineMerging, ProcessReward, Reward
from train.data.config import Data, Mixture, Preferences, Source
from train.reinforcement import GRPO, PPO, Online, OnlineDPO


def _at_least(least: int, section: object, *names: str) -> None:
    for name in names:
        if getattr(section, name) < least:
            raise ConfigError(f"{name}={getattr(section, name)} must be at least {least}")


def _below_one(section: object, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(section, name) < 1:
            raise ConfigError(f"{name}={getattr(section, name)} must be at least 0 and below 1")


_READ = {
    "text": "texts or conversations",
    "steps": 'solutions whose steps are judged (@Preferences with kind = "steps")',
    "completions": "completions that are compared (@Preferences)",
}


def _next(value: int, step: int) -> int:
    return -(-value // step) * step


def _weighted(source: Source | Mixture, weights: tuple[float, ...]) -> Mixture:
    """The mixture with other weights."""
    if not isinstance(source, Mixture) or len(weights) != len(source.parts):
        count = len(source.parts) if isinstance(source, Mixture) else "no"
        raise ConfigError(f"weights={weights} are those of a mixture's parts, and data.source has {count} parts")
    parts = zip(source.parts, weights, strict=True)
    return Mixture(parts=tuple(dataclasses.replace(part, weight=weight) for part, weight in parts))


@dataclass(frozen=True, kw_only=True)
class Zoo:
    """A published model by name: its shape, not its weights.

    Attributes:
      name: as published, e.g. "Qwen2.5-0.5B".
      dtype: type of activations and of matmul inputs. Parameters are trained in float32.
      rope: takes the place of the published one, whose theta is that of the last stage of training; None keeps that.
      max_position: likewise, positions that the model serves.
    """

    name: str
    dtype: DType = "bfloat16"
    rope: Rope | None = None
    max_position: int | None = None


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """A model with its weights: the run begins with them, and with a fresh optimiser at step 0.

    Of what lies beside the weights only the tokenizer counts, and goes on; so does the chat template where there are
    conversations that name no other format. Sampling defaults do not.

    Attributes:
      path: a published folder, a run, a checkpoint, or with the extra `hub` the name of a published model. It must stay
        for as long as the run goes on.
      dtype: type of activations and of matmul inputs. Parameters are trained in float32.
      rope: takes the place of the model's own; None keeps that.
      max_position: likewise, positions that the model serves.
    """

    path: str
    dtype: DType = "bfloat16"
    rope: Rope | None = None
    max_position: int | None = None

    def __post_init__(self) -> None:
        if not self.path:
            raise ConfigError('path="" names no model; give a published folder, a run or a checkpoint')


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """Low-rank matrices that are trained beside frozen ones; the defaults are those of Qwen's own finetune.py.

    The base stays in the type that it computes in, or quantised as it is published (QLoRA). Experts and routers of a
    mixture are not adapted; attention is, and the shared expert.

    Attributes:
      rank: of each product of two matrices.
      alpha: the products are multiplied with alpha / rank.
      dropout: part of their inputs that is left out in training.
      targets: which matrices: ends of their published names, such as "q_proj", or "all-linear".
      train_embeddings: train the embedding and the head as well, whole, as a base model needs to learn the tokens of
        chats; PEFT calls them modules_to_save.
    """

    rank: int = 64
    alpha: float = 16.0
    dropout: float = 0.05
    targets: tuple[str, ...] = ("all-linear",)
    train_embeddings: bool = False

    def __post_init__(self) -> None:
        _at_least(1, self, "rank")
        _below_one(self, "dropout")
        if not self.alpha > 0:
            raise ConfigError(f"alpha={self.alpha} must be above 0")
        if not self.targets:
            raise ConfigError('targets=() adapts nothing; name matrices, or "all-linear"')

    @property
    def scale(self) -> float:
        """Of the products."""
        return self.alpha / self.rank

    def paths(self, model: ModelConfig) -> tuple[str, ...]:
        """The matrices in the tree of a model. Raises ConfigError for a target that is none."""
        return targets.select(hf.table(model, hf.model_type_of(model)), self.targets)


@dataclass(frozen=True, kw_only=True)
class Noise:
    """What makes training random, in training alone; the numbers are a function of seed and step. All off by default.

    Attributes:
      neftune_alpha: noise on the embeddings (NEFTune, arXiv 2310.05914), uniform within this / sqrt(tokens of the row
        times width); the paper has 5 to 15.
      embedding_dropout: part of the embeddings' numbers that is left out.
      attention_dropout: part of the attention weights that is left out. Not of every implementation of attention.
    """

    neftune_alpha: float = 0.0
    embedding_dropout: float = 0.0
    attention_dropout: float = 0.0

    def __post_init__(self) -> None:
        _at_least(0, self, "neftune_alpha")
        _below_one(self, "embedding_dropout", "attention_dropout")


@dataclass(frozen=True, kw_only=True)
class LM:
    """Next-token prediction on documents. What is added to the loss is for mixtures of experts alone.

    Attributes:
      balance: times how unevenly the router spreads tokens over experts, top_k if evenly.
      balance_over: what it is to be even over: all tokens of a micro-batch, on all devices, or each row of it.
      z: times the mean squared log-sum-exp of the router's logits.
    """

    balance: float = 0.0
    balance_over: Literal["batch", "sequence"] = "batch"
    z: float = 0.0

    def __post_init__(self) -> None:
        _at_least(0, self, "balance", "z")
        if self.balance_over != "batch" and not self.balance:
            raise ConfigError(f"balance_over={self.balance_over!r} does nothing with balance=0.0; set both or neither")


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """AdamW; the defaults are those of the Qwen report (arXiv 2309.16609).

    Attributes:
      peak_lr: the highest learning rate of the schedule.
      b1, b2: decay rates of the two moments.
      eps: added to the square root of the second moment.
      weight_decay: fraction of each weight taken off per step, times the learning rate. Applied to matrices and
        embeddings; not to biases and norm scales.
      clip_norm: longest gradient, over all parameters, that is used as it is; longer ones are scaled down to it.
    """

    peak_lr: float
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        _below_one(self, "b1", "b2")
        for name in ("peak_lr", "eps", "clip_norm"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}={getattr(self, name)} must be above 0")
        if not self.weight_decay >= 0:
            raise ConfigError(f"weight_decay={self.weight_decay} must not be negative")


@dataclass(frozen=True, kw_only=True)
class Cosine:
    """Linear warm-up, then half a cosine from the peak down to `final_fraction` of it at the last step.

    Attributes:
      warmup_steps: how long it is, or
      warmup_fraction: how long of the steps, rounded down; one of the two.
      final_fraction: 1 for a rate that stays at the peak.
    """

    warmup_steps: int | None = None
    warmup_fraction: float | None = None
    final_fraction: float = 0.1

    def __post_init__(self) -> None:
        if (self.warmup_steps is None) == (self.warmup_fraction is None):
            raise ConfigError(
                f"warmup_steps={self.warmup_steps} and warmup_fraction={self.warmup_fraction}: say one of them, how "
                "long the warm-up is"
            )
        if self.warmup_steps is not None and self.warmup_steps < 0:
            raise ConfigError(f"warmup_steps={self.warmup_steps} must not be negative")
        if self.warmup_fraction is not None:
            _below_one(self, "warmup_fraction")
        if not 0 <= self.final_fraction <= 1:
            raise ConfigError(f"final_fraction={self.final_fraction} must be between 0 and 1")

    def warmup(self, steps: int) -> int:
        """Steps of the warm-up in a run of so many."""
        return self.warmup_steps or 0 if self.warmup_fraction is None else int(self.warmup_fraction * steps)


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """How many ways each mesh axis splits the run; the product is the number of devices (see docs/sharding.md).

    data, fsdp and expert split the rows of a batch, context its columns, tensor the heads and the vocabulary; fsdp
    also splits every weight, and expert the experts.
    """

    data: int = 1
    fsdp: int = 1
    context: int = 1
    expert: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        _at_least(1, self, "data", "fsdp", "context", "expert", "tensor")

    @property
    def row_shards(self) -> int:
        """How many ways the rows of a batch are split."""
        return self.data * self.fsdp * self.expert


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What changes in a run after `from_step` steps. What is None stays as it was.

    Attributes:
      from_step: steps done before.
      sequence_length: predicted tokens per row. The model then serves at least as many positions.
      full_length: fraction of the rows that stay whole; the others are cut to lengths of the stages before.
      weights: of the parts of the mixture, in their order.
      theta: base frequency of the rotary embedding.
      batch_size, accumulation, remat: as in TrainConfig.
      mesh: as in TrainConfig, and of as many devices; an axis that is not named has size 1.
    """

    from_step: int
    sequence_length: int | None = None
    full_length: float | None = None
    weights: tuple[float, ...] | None = None
    theta: float | None = None
    batch_size: int | None = None
    accumulation: int | None = None
    mesh: Mesh | None = None
    remat: Literal["none", "dots", "full"] | None = None


@dataclass(frozen=True, kw_only=True)
class Checkpointing:
    """A checkpoint every `every` steps and at the end, of which the latest `keep` stay.

    With `keep_best`, so does that of the lowest held-out loss (in its last stage, of a run that has several); where an
    evaluation finds a lower one, there is a checkpoint at once.
    """

    every: int
    keep: int = 3
    keep_best: bool = False

    def __post_init__(self) -> None:
        _at_least(1, self, "every", "keep")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Held-out loss every `every` steps over `batches` micro-batches (0: all there are), and at the end over all.

    Attributes:
      every, batches: see above.
      samples: held-out prompts that the model answers at each evaluation, by its likeliest tokens, into samples.jsonl.
      max_new_tokens: of such an answer.
    """

    every: int
    batches: int = 0
    samples: int = 0
    max_new_tokens: int = 256

    def __post_init__(self) -> None:
        _at_least(1, self, "every", "max_new_tokens")
        _at_least(0, self, "batches", "samples")


@dataclass(frozen=True, kw_only=True)
class Export:
    """What the end of a run leaves in `RUN/export`: its best checkpoint, or the last, as transformers and PEFT read it.

    Attributes:
      merged: of an adapter, the whole model that it makes; False for the adapter alone, in the form of PEFT.
      dtype: of a whole model's weights; None for float32, in which they are trained, or that of an adapter's base.
    """

    merged: bool = False
    dtype: DType | None = None


@dataclass(frozen=True, kw_only=True)
class Profile:
    """A trace of `steps` steps (0: none), after the first `skip` of each start and stage, in the run's `profile`."""

    steps: int = 0
    skip: int = 5

    def __post_init__(self) -> None:
        _at_least(0, self, "steps")
        _at_least(1, self, "skip")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run.

    Attributes:
      run_dir: the directory that everything is written to.
      seed: of the initial weights and of the order of the data.
      model: a shape written out, a published one by name, or a model whose weights the run begins with.
      adapter: what is trained in place of the whole model; None for all of it.
      noise: what makes training random.
      data: where tokens come from.
      objective: what is minimised.
      batch_size: rows of each optimiser step, over all devices and micro-batches; of objectives on the model's own
        completions how many of these, which may need fewer rows.
      accumulation: micro-batches of one step; more of them need less memory for the same step.
      steps: optimiser steps in all. 0 where `epochs` says how many.
      epochs: how often all rows are seen; of a mixture, how often as many rows as its parts have together.
      optimizer: and its constants.
      schedule: learning rate over the steps.
      merging: of every step with what the model had learned before; None for none.
      mesh: how the run is split over devices.
      remat: what the backward pass recomputes to save memory: nothing, all but matrix products ("dots"), whole layers.
      attention: which implementation.
      layers: one compiled layer in a loop ("scan"), or each on its own ("unroll", faster on CPU); "auto" picks.
      checkpoint: when the state is saved.
      evaluation: when the held-out loss is measured, and what is asked then.
      export: what is published at the end; None for nothing.
      log_every: steps between rows of metrics.jsonl.
      profile: which steps are traced.
      stages: what changes on the way; all that is above holds from the first step on.
    """

    run_dir: str
    seed: int = 0
    model: ModelConfig | Zoo | Pretrained
    adapter: LoRA | None = None
    noise: Noise = Noise()
    data: Data
    objective: LM | Reward | ProcessReward | DPO | OnlineDPO | GRPO | PPO = LM()
    batch_size: int
    accumulation: int = 1
    steps: int = 0
    epochs: float = 0.0
    optimizer: AdamW
    schedule: Cosine
    merging: OnlineMerging | None = None
    mesh: Mesh = Mesh()
    remat: Literal["none", "dots", "full"] = "none"
    attention: Literal["auto", "pallas", "xla", "cudnn", "reference"] = "auto"
    layers: Literal["auto", "scan", "unroll"] = "auto"
    checkpoint: Checkpointing
    evaluation: Evaluation
    export: Export | None = None
    log_every: int = 1
    profile: Profile = Profile()
    stages: tuple[Stage, ...] = ()

    def __post_init__(self) -> None:
        _at_least(1, self, "batch_size", "accumulation", "log_every")
        _at_least(0, self, "seed", "steps", "epochs")
        if not self.run_dir:
            raise ConfigError("run_dir is empty; name the directory that the run is written to")
        if bool(self.steps) == bool(self.epochs):
            raise ConfigError(f"steps={self.steps} and epochs={self.epochs}: say one of them, how long the run is")
        if self.epochs and self.stages:
            raise ConfigError(f"epochs={self.epochs} cannot be counted over stages, which begin at a step; say steps")
        if self.steps and self.schedule.warmup(self.steps) >= self.steps:
            raise ConfigError(
                f"schedule.warmup_steps={self.schedule.warmup_steps} must be below steps={self.steps}, or the peak "
                f"learning rate is never reached"
            )
        if self.checkpoint.keep_best and self.evaluation.batches:
            raise ConfigError(
                f"checkpoint.keep_best compares losses over the same text, and evaluation.batches="
                f"{self.evaluation.batches} is not all of it; set it to 0, with a smaller data.held_out perhaps"
            )
        if self.export and not self.adapter and self.export.merged:
            raise ConfigError("export.merged is for an adapter, and the whole model is trained; leave it out")
        self._check_batch()
        self._check_model()
        self._check_alignment()
        self._check_online()
        self._check_stages()

    def _check_batch(self) -> None:
        length, mesh = self.data.sequence_length, self.mesh
        if self.batch_size % self.accumulation:
            raise ConfigError(f"batch_size={self.batch_size} must be a multiple of accumulation={self.accumulation}")
        shards = mesh.row_shards * self.accumulation
        if self.batch_size % shards:
            raise ConfigError(
                f"a micro-batch has {self.micro_batch_size} rows (batch_size={self.batch_size} / "
                f"accumulation={self.accumulation}), which must be a multiple of mesh.data * mesh.fsdp * mesh.expert "
                f"= {mesh.row_shards}; the next batch_size that is so is {_next(self.batch_size, shards)}"
            )
        if mesh.context > 1 and length % (2 * mesh.context):
            raise ConfigError(
                f"data.sequence_length={length} must be a multiple of 2 * mesh.context = {2 * mesh.context}: each "
                f"device takes an early and a late piece of a sequence; the next such length is "
                f"{_next(length, 2 * mesh.context)}"
            )

    def _check_model(self) -> None:
        model, mesh, length = self.model_config, self.mesh, self.data.sequence_length
        if length > model.max_position:
            raise ConfigError(f"data.sequence_length={length} must not exceed model.max_position={model.max_position}")
        scaling = model.rope.scaling
        if model.rope.by_length and length > scaling.original_positions:
            raise ConfigError(
                f"data.sequence_length={length} must not exceed model.rope.scaling.original_positions="
                f"{scaling.original_positions}: past it {type(scaling).__name__} goes by the longest document of a "
                f"row, and packed documents would change each other; train within it, or with @Yarn or @Linear"
            )
        if model.param_dtype != "float32":
            raise ConfigError(
                f"model.param_dtype={model.param_dtype!r} would lose most updates to rounding; train with "
                f"'float32' and set model.dtype='bfloat16' for bfloat16 matmuls"
            )
        self._check_experts()
        if self.adapter:
            self.adapter.paths(model)
        can_be = ", ".join(map(str, model.tensor_sizes))
        for name in ("num_heads", "mlp_width", "vocab_size"):
            if getattr(model, name) % mesh.tensor:
                raise ConfigError(
                    f"model.{name}={getattr(model, name)} must be a multiple of mesh.tensor={mesh.tensor}; "
                    f"it can be {can_be}"
                )
        if model.num_kv_heads % mesh.tensor and mesh.tensor % model.num_kv_heads:
            raise ConfigError(
                f"model.num_kv_heads={model.num_kv_heads} must be a multiple of mesh.tensor={mesh.tensor} or divide "
                f"it, so that a device has whole heads; it can be {can_be}"
            )
        if model.width % mesh.fsdp:
            raise ConfigError(f"model.width={model.width} must be a multiple of mesh.fsdp={mesh.fsdp}")

    def _check_alignment(self) -> None:
        kind, score = type(self.objective).__name__, self.model_config.score
        wanted = {"Reward": 1, "ProcessReward": 2}.get(kind)
        if (score.labels if score else None) != wanted:
            has, wants = (f"a score of {n} labels" if n else "no score" for n in (score and score.labels, wanted))
            raise ConfigError(f"objective {kind} trains a model with {wants}, and this one has {has}")
        if score and self.evaluation.samples:
            raise ConfigError(
                f"evaluation.samples={self.evaluation.samples} are answers, which a model of {kind} does not give"
            )
        if score and self.adapter:
            raise ConfigError(f"objective {kind} trains a model with its new head, whole; leave adapter out")
        online = isinstance(self.objective, Online)
        for part in self.data.parts:
            found = part.source.kind if isinstance(part.source, Preferences) else "text"
            fits = "text" if online else {"LM": "text", "ProcessReward": "steps"}.get(kind, "completions")
            if found != fits:
                raise ConfigError(f"objective {kind} reads {_READ[fits]}; data.source has {_READ[found]}")
        if online != bool(self.data.prompts):
            has, wants = ("@Prompts" if x else "no @Prompts" for x in (self.data.prompts, online))
            raise ConfigError(f"objective {kind} wants {wants} as data.source, or a part of it, and there is {has}")
        if self.merging and self.adapter:
            raise ConfigError("merging and an adapter do not go together: what was learned before is in all parameters")

    def _check_online(self) -> None:
        if not isinstance(self.objective, Online):
            return
        kind, rollout = type(self.objective).__name__, self.objective.rollout
        wanted = getattr(self.objective, "text", 0.0) > 0
        if wanted != bool(self.data.parts):
            raise ConfigError(
                f"objective {kind} learns from its own completions; text parts of data.source go with PPO and its "
                "field text above 0, and only with that"
            )
        unread = [part.name for part in getattr(self.data.source, "parts", ()) if not part.weight]
        if unread:
            raise ConfigError(f"data.source has weight=0.0 for {unread[0]}, which nothing would read; leave it out")
        texts = 2 if isinstance(self.objective, OnlineDPO) else 1
        if texts * rollout.max_new_tokens >= self.data.sequence_length:
            raise ConfigError(
                f"objective.rollout.max_new_tokens={rollout.max_new_tokens} must be below data.sequence_length="
                f"{self.data.sequence_length}{' / 2, as a pair' if texts == 2 else ', which'} holds the prompt as well"
            )
        if self.batch_size * rollout.updates % (rollout.completions * rollout.passes):
            raise ConfigError(
                f"an episode of batch_size * updates / passes = {self.batch_size} * {rollout.updates} / "
                f"{rollout.passes} completions must be whole prompts of objective.rollout.completions="
                f"{rollout.completions}"
            )
        if getattr(self.objective, "reference", "live") != "live":
            raise ConfigError(
                f"objective {kind} makes its own rows, of which nothing is known before: leave reference out"
            )
        if self.stages:
            raise ConfigError(f"objective {kind} has no stages; run one after the other, each with model = @Pretrained")
        if self.noise != Noise() or (self.adapter and self.adapter.dropout):
            raise ConfigError(
                f"objective {kind} compares probabilities, which noise and dropout would change: set adapter.dropout = "
                "0.0 and leave noise out"
            )

    @functools.cached_property
    def text_config(self) -> TrainConfig | None:
        """What is read beside the model's own completions, as the config of a run on that alone; None for nothing.

        A step has as many rows of text for its completions as the weights of the parts say, in whole micro-batches.
        """
        if not (isinstance(self.objective, PPO) and self.objective.text):
            return None
        assert isinstance(self.data.source, Mixture)
        text = sum(part.weight for part in self.data.parts)
        asked = sum(part.weight for part in self.data.source.parts) - text
        accumulation = math.ceil(self.batch_size * text / asked / self.micro_batch_size)
        return dataclasses.replace(
            self,
            objective=LM(),
            data=dataclasses.replace(self.data, source=Mixture(parts=self.data.parts)),
            batch_size=accumulation * self.micro_batch_size,
            accumulation=accumulation,
        )

    @property
    def compares(self) -> bool:
        """Whether the run keeps the model that it begins with, to compare with."""
        if isinstance(self.objective, DPO):
            return self.objective.reference == "live"
        return isinstance(self.objective, GRPO | PPO) and self.objective.kl > 0

    @property
    def completions_per_episode(self) -> int:
        """Completions that are sampled together, of objectives on the model's own."""
        assert isinstance(self.objective, Online)
        rollout = self.objective.rollout
        return self.batch_size * rollout.updates // rollout.passes

    @functools.cached_property
    def critic_config(self) -> ModelConfig:
        """The shape of PPO's critic."""
        assert isinstance(self.objective, PPO)
        if self.objective.critic.model is None:
            return dataclasses.replace(self.model_config, score=Score(labels=1, hidden=False))
        from qwen_jax.weights.source import read_config

        own = read_config(self.objective.critic.model)
        if not own.score or own.score.labels != 1:
            raise ConfigError(f"objective.critic.model={self.objective.critic.model} is no reward model of one score")
        return dataclasses.replace(own, dtype=self.model_config.dtype, param_dtype="float32")

    def _check_experts(self) -> None:
        moe, mesh = self.model_config.moe, self.mesh
        if moe is None:
            for name in ("balance", "z"):
                if getattr(self.objective, name, 0):
                    raise ConfigError(f"objective.{name} is for a mixture of experts, and the model is dense")
            return
        if bool(moe.shared_width) == self.model_config.qk_norm:
            raise ConfigError(
                f"model.moe.shared_width={moe.shared_width} with model.qk_norm={self.model_config.qk_norm} is of no "
                f"published architecture, and no checkpoint of it could be opened: a mixture of experts has either"
            )
        if moe.num_experts % mesh.expert:
            raise ConfigError(
                f"model.moe.num_experts={moe.num_experts} must be a multiple of mesh.expert={mesh.expert}"
            )
        for name in ("expert_width", "shared_width"):
            if getattr(moe, name) % mesh.tensor:
                raise ConfigError(
                    f"model.moe.{name}={getattr(moe, name)} must be a multiple of mesh.tensor={mesh.tensor}; "
                    f"it can be {', '.join(map(str, self.model_config.tensor_sizes))}"
                )

    def _check_stages(self) -> None:
        devices = lambda config: math.prod(dataclasses.astuple(config.mesh))
        before, least = "0", 0
        for number, stage in enumerate(self.stages, 1):
            name = f"stages.{number}.from_step={stage.from_step}"
            if not least < stage.from_step < self.steps:
                raise ConfigError(f"{name} must be above {before} and below steps={self.steps}")
            before, least = name, stage.from_step
            own = devices(self.stage_configs[number][1])
            if own != devices(self):
                raise ConfigError(f"from {name} on, the mesh has {own} devices, and at first {devices(self)}")

    @functools.cached_property
    def stage_configs(self) -> list[tuple[range, TrainConfig]]:
        """The steps of each stage, the first being before `stages`, and the run as it is in them, without stages.

        While the steps of `epochs` are not known, there are as few as the schedule has room for.
        """
        if self.epochs:
            return self.with_steps(self.schedule.warmup(0) + 1).stage_configs
        config = dataclasses.replace(self, stages=()) if self.stages else self
        configs, starts = [config], [0, *(stage.from_step for stage in self.stages), self.steps]
        for number, stage in enumerate(self.stages, 1):
            try:
                config = config._changed(stage)
            except ConfigError as error:
                raise ConfigError(f"from stages.{number}.from_step={stage.from_step} on, {error}") from error
            configs.append(config)
        return [(range(*steps), config) for steps, config in zip(itertools.pairwise(starts), configs, strict=True)]

    def with_steps(self, steps: int) -> TrainConfig:
        """This config with a number of steps in the place of epochs."""
        return dataclasses.replace(self, steps=steps, epochs=0.0)

    def _changed(self, stage: Stage) -> TrainConfig:
        """This config as a stage makes it."""
        names = ("batch_size", "accumulation", "mesh", "remat")
        values = {name: getattr(stage, name) for name in names if getattr(stage, name) is not None}
        data, model = self.data, self.model_config
        length = data.sequence_length if stage.sequence_length is None else stage.sequence_length
        full = data.full_length if stage.full_length is None else stage.full_length
        shorter = {size for size in (*data.shorter_lengths, data.sequence_length) if size < length}
        rope = model.rope if stage.theta is None else dataclasses.replace(model.rope, theta=stage.theta)
        if rope != model.rope or length > model.max_position:
            longest = max(length, model.max_position)
            values["model"] = dataclasses.replace(self.model, rope=rope, max_position=longest)
        source = data.source if stage.weights is None else _weighted(data.source, stage.weights)
        values["data"] = dataclasses.replace(
            data, source=source, sequence_length=length, full_length=full, shorter_lengths=tuple(sorted(shorter))
        )
        return dataclasses.replace(self, **values)

    def tokens_after(self, step: int) -> int:
        """Tokens of the first `step` steps, padding included."""
        return sum(
            max(0, min(step, steps.stop) - steps.start) * config.tokens_per_step for steps, config in self.stage_configs
        )

    @functools.cached_property
    def model_config(self) -> ModelConfig:
        """The model's shape, that of others looked up."""
        if isinstance(self.model, ModelConfig):
            return self._with_score(self.model)
        if isinstance(self.model, Zoo):
            own = zoo.published(self.model.name)
        else:
            from qwen_jax.weights.source import read_config  # which loads jax: other configs are read without

            own = read_config(self.model.path)
        given = {name: getattr(self.model, name) for name in ("rope", "max_position")}
        changed = {name: value for name, value in given.items() if value is not None}
        return self._with_score(dataclasses.replace(own, dtype=self.model.dtype, param_dtype="float32", **changed))

    def _with_score(self, model: ModelConfig) -> ModelConfig:
        """A language model as the reward model that its objective makes of it."""
        match self.objective:
            case Reward(hidden=hidden) if model.score is None:
                return dataclasses.replace(model, score=Score(labels=1, hidden=hidden))
            case ProcessReward() if model.score is None:
                return dataclasses.replace(model, score=Score(labels=2, hidden=True))
        return model

    @property
    def micro_batch_size(self) -> int:
        """Rows that go through the model at once, over all devices."""
        return self.batch_size // self.accumulation

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimiser step, padding included."""
        return self.batch_size * self.data.sequence_length
