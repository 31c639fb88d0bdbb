"""The best layout of a run on a topology: ordered by formula, the first few compiled, the fastest of those kept."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

from qwen_jax.errors import ConfigError
from train.config import TrainConfig
from train.plan import estimate, page
from train.plan.candidates import candidates
from train.plan.chips import GIB
from train.plan.compiled import Compiled
from train.plan.estimate import Estimate
from train.plan.topology import Topology

Compile = Callable[[TrainConfig, Topology], Compiled]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """A layout that was compiled, or could not be."""

    config: TrainConfig
    compiled: Compiled | None
    error: str
    estimate: Estimate | None

    @property
    def seconds(self) -> float:
        """Of a step; infinite where it does not fit or compile."""
        return self.estimate.step if self.estimate else float("inf")


def search(
    config: TrainConfig, topology: Topology, compile_step: Compile, *, most: int, budget: float, say: Callable
) -> list[Trial]:
    """Compiled layouts of a run, fastest first.

    Args:
      config: the run; its mesh, remat and accumulation are what is searched for.
      topology: what it is to run on.
      compile_step: such as `compiled.compile_step`.
      most: layouts to compile at most, of those that fit; one that does not fit costs a compilation, too.
      budget: seconds after which no further one is begun.
      say: takes a line for each stage.

    Raises ConfigError if there is no layout, or none of those compiled fits.
    """
    start, ordered = time.monotonic(), _distinct(candidates(config, topology))
    if not ordered:
        raise ConfigError(
            f"no mesh of {topology.num_devices} devices splits a batch_size of {config.batch_size} and this model; "
            f"choose a batch_size that is a multiple of {topology.num_devices}, or another topology"
        )
    say(f"{len(ordered)} layouts, ordered by formula; compiling the first {most}, for at most {budget:.0f} s")
    trials: list[Trial] = []
    for candidate in ordered:
        if sum(trial.estimate is not None for trial in trials) == most or len(trials) == 3 * most:
            break
        if trials and time.monotonic() - start > budget:
            say(f"{budget:.0f} s are over: {len(trials)} layouts compiled")
            break
        say(f"compiling {_text(candidate)}")
        trials.append(_try(candidate, topology, compile_step))
    trials.sort(key=lambda trial: trial.seconds)
    first = trials[0]
    if first.estimate is None:
        peak = f"it needs {first.compiled.peak / GIB:.1f} GiB of {topology.hbm / GIB:.2f}" if first.compiled else ""
        raise ConfigError(
            f"none of {len(trials)} layouts compiles for {topology}; {_text(first.config)}: {peak or first.error}"
        )
    return trials


def table(trials: Sequence[Trial], topology: Topology) -> str:
    """The trials as lines of text."""
    lines = [page.label(), ""]
    lines.append(f"{'step ms':>8}{'MFU':>7}{'tokens/s':>12}{'peak GiB':>10}{'by formula ms':>15}  layout")
    for trial in trials:
        formula = estimate.by_formula(trial.config, topology).step * 1e3
        if trial.estimate and trial.compiled:
            e, peak = trial.estimate, trial.compiled.peak / GIB
            row = f"{e.step * 1e3:>8.0f}{e.mfu:>7.1%}{e.tokens_per_second:>12,.0f}{peak:>10.2f}"
        elif trial.compiled:
            row = f"{'does not fit':>27}{trial.compiled.peak / GIB:>10.2f}"
        else:
            row = f"{'does not compile':>37}"
        lines.append(f"{row}{formula:>15.0f}  {_text(trial.config)}")
    return "\n".join(lines) + "\n"


def as_json(trials: Sequence[Trial], topology: Topology) -> list[dict[str, Any]]:
    """The trials for programs."""
    return [
        {
            "mesh": dataclasses.asdict(trial.config.mesh),
            "remat": trial.config.remat,
            "accumulation": trial.config.accumulation,
            "estimate": page.as_dict(trial.estimate) if trial.estimate else None,
            "peak": trial.compiled.peak if trial.compiled else None,
            "error": trial.error,
        }
        for trial in trials
    ]


def _try(candidate: TrainConfig, topology: Topology, compile_step: Compile) -> Trial:
    try:
        compiled = compile_step(candidate, topology)
    except ConfigError as error:
        return Trial(config=candidate, compiled=None, error=str(error), estimate=None)
    fits = compiled.program is not None
    time = estimate.of_program(candidate, topology, compiled) if fits else None
    return Trial(config=candidate, compiled=compiled, error="", estimate=time)


def _distinct(ordered: Sequence[TrainConfig]) -> list[TrainConfig]:
    """One of those that differ only in accumulation, which the formula hardly tells apart: the first."""
    return list({(each.mesh, each.remat): each for each in reversed(ordered)}.values())[::-1]


def _text(config: TrainConfig) -> str:
    return f"{page.mesh_text(config)}, remat {config.remat}, accumulation {config.accumulation}"
