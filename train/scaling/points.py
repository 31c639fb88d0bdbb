"""The runs of a sweep, each an ordinary config, and what they will take."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from qwen_jax import bindings
from qwen_jax.config import ModelConfig
from qwen_jax.errors import ConfigError
from train.config import Pretrained, TrainConfig
from train.data.config import Mixture
from train.plan.formulas import train_flops
from train.scaling.config import Scaling, Shape, Target

LEAST_STEPS = 10  # of a run: fewer say nothing of a schedule


@dataclass(frozen=True)
class Point:
    """A run of the sweep.

    Attributes:
      config, text: of the run, and as its folder keeps it.
      size: N, parameters that compute a token, less the tables of embeddings.
      tokens: D, that it is to be trained on; the run has them up to half a step.
    """

    config: TrainConfig
    text: str
    size: int
    tokens: int

    @property
    def name(self) -> str:
        """Of its folder, and in messages."""
        return Path(self.config.run_dir).name

    @property
    def flops(self) -> float:
        """Operations of the whole training, forward and backward."""
        length = self.config.data.sequence_length
        return train_flops(self.config.model_config, length) * self.config.tokens_after(self.config.steps)


def size_of(model: ModelConfig) -> int:
    """Parameters that compute a token, less the tables of embeddings: one where they are tied, or two."""
    return model.num_active_parameters - model.vocab_size * model.width * (1 if model.tie_embeddings else 2)


def points(config: Scaling) -> list[Point]:
    """All runs, those that take least first. Raises ConfigError for a run that cannot be."""
    base = [*bindings.read(Path(config.run)), *bindings.parse_set(config.changes)]
    common, _ = bindings.resolve(TrainConfig, base)
    _check(common, config)
    grid = itertools.product(config.models, config.tokens, config.batch_sizes, config.peak_lrs)
    found = [_point(config, base, common, *each) for each in grid]
    sizes = {point.size for point in found}
    if len(sizes) < len(config.models):
        raise ConfigError(
            f"models have the sizes {sorted(sizes)}, and there are {len(config.models)}: make them differ"
        )
    return sorted(found, key=lambda point: point.flops)


def target_run(target: Target) -> TrainConfig:
    """The run as it is written. Raises ConfigError if no laws are for it."""
    run, _ = bindings.resolve(TrainConfig, [*bindings.read(Path(target.run)), *bindings.parse_set(target.changes)])
    _check_stages(run, target.run)
    return run


def _check(common: TrainConfig, config: Scaling) -> None:
    if isinstance(common.model, Pretrained) or not isinstance(common.model, ModelConfig):
        raise ConfigError(f"{config.run}: a sweep changes the shape of a model, so write it out: model = @ModelConfig")
    _check_stages(common, config.run)
    if not common.data.held_out:
        raise ConfigError(f"{config.run}: runs are compared by their held-out loss; set data.held_out above 0")


def _check_stages(run: TrainConfig, file: str) -> None:
    if run.stages:
        raise ConfigError(f"{file}: a run with stages has no one learning rate and batch; leave stages out")


def _point(
    config: Scaling,
    base: Sequence[bindings.Binding],
    common: TrainConfig,
    shape: Shape,
    tokens: int,
    batch_size: int,
    peak_lr: float,
) -> Point:
    steps = round(tokens / (batch_size * common.data.sequence_length))
    if steps < LEAST_STEPS:
        raise ConfigError(f"tokens={tokens} are {steps} steps of batch_size={batch_size}; {LEAST_STEPS} are the least")
    model = {f"model.{name}": value for name, value in asdict(shape).items() if value is not None}
    changes = model | schedule(steps, peak_lr, batch_size, config.warmup) | _tokens(common, config)
    changes |= {"checkpoint.every": steps, "evaluation.every": steps}

    def resolve(run_dir: str) -> tuple[TrainConfig, dict[str, str]]:
        lines = [f"{path} = {value!r}" for path, value in {**changes, "run_dir": run_dir}.items()]
        return bindings.resolve(TrainConfig, [*base, *bindings.parse_set(lines)])

    size = size_of(resolve("unnamed")[0].model_config)
    name = f"N{size}-D{tokens}-rows{batch_size}-lr{peak_lr:g}"
    run, origins = resolve(str(Path(config.output) / "runs" / name))
    return Point(run, bindings.render(run, origins), size, tokens)


def schedule(steps: int, peak_lr: float, batch_size: int, warmup: float) -> dict[str, object]:
    """What a sweep chooses of a run, by the paths of a TrainConfig."""
    return {
        "batch_size": batch_size,
        "steps": steps,
        "epochs": 0.0,
        "optimizer.peak_lr": peak_lr,
        "schedule.warmup_steps": None,
        "schedule.warmup_fraction": warmup,
    }


def _tokens(common: TrainConfig, config: Scaling) -> dict[str, object]:
    """Folders of tokens that all runs share, where the run names none."""
    folder, mixed = Path(config.output) / "tokens", isinstance(common.data.source, Mixture)
    names = [f"source.parts.{n}." if mixed else "" for n in range(1, len(common.data.parts) + 1)]
    return {
        f"data.{name}tokens": str(folder / part.name)
        for name, part in zip(names, common.data.parts, strict=True)
        if not part.tokens
    }
