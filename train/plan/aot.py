"""Compiles a training step for TPUs that are not there, in a process for nothing else; see `compiled.compile_step`."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

from qwen_jax import bindings, model, sharding
from qwen_jax.command import run_command
from train import critic, frozen
from train.config import TrainConfig
from train.feed import abstract_batch
from train.plan import hlo, phases
from train.plan.compiled import Compiled
from train.plan.topology import Topology, parse
from train.reinforcement import Online
from train.step import abstract_state, configured, unrolled

# What the compiler says when HBM is too small, e.g. "Used 20.11G of 15.75G hbm" or "(480.00G) exceeds available HBM".
_NEEDED = re.compile(r"[Uu]sed ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm|\(?([\d.]+)([KMGT])\)? exceeds available HBM")


def main() -> int:
    """Reads a config, writes a `Compiled` as JSON, and the program if its file has a name."""
    request, topology, slices, result, program = sys.argv[1:]
    config, _ = bindings.resolve(TrainConfig, bindings.read(Path(request)))
    compiled, text = compile_here(config, parse(topology, slices=int(slices)))
    Path(result).write_text(json.dumps(dataclasses.asdict(compiled)))
    if program:
        Path(program).write_text(text)
    return 0


def compile_here(config: TrainConfig, topology: Topology) -> tuple[Compiled, str]:
    """The compiled step, and its text."""
    absent, config = phases.absent(config), phases.with_critic(config)
    mesh = sharding.make_mesh(**dataclasses.asdict(config.mesh), devices=devices(topology))
    with jax.set_mesh(mesh):
        _, optimizer, step = configured(config)
        state, batch = abstract_state(config.model_config, optimizer, config.adapter), abstract_batch(config)
        state = state._replace(critic=critic.abstract(config))
        kept = frozen.abstract(config)
        if unrolled(config, mesh):
            state, kept = jax.eval_shape(model.unstack_layers, (state, kept))
        lowered, start = step.lower(state, batch, kept), time.perf_counter()
        peak, text = peak_of(lowered, beside=phases.held(config, state, kept))
        more = phases.lowered(config, state, kept) if isinstance(config.objective, Online) else {}
        peaks = {name: peak_of(program, beside=held)[0] for name, (program, held) in more.items()}
        worst = max([peak, *peaks.values()])
    places = [(getattr(device, "slice_index", 0), *device.coords) for device in mesh.devices.flat]
    compiled = Compiled(
        seconds=time.perf_counter() - start,
        parameters=phases.size((state.params, kept)),
        optimizer=phases.size(state.optimizer),
        batch=phases.size(batch),
        peak=worst,
        phases={"step": peak, **peaks} if peaks else {},
        absent=absent,
        program=hlo.read(text) if text and worst <= topology.hbm else None,
        places=places,
    )
    return compiled, text


def peak_of(lowered: jax.stages.Lowered, *, beside: int = 0) -> tuple[int, str]:
    """Bytes in use at the worst moment, and the text of the program; "" where it does not fit, which it then wanted.

    There are `beside` bytes all the time, of which what the program takes as arguments is a part.
    """
    try:
        executable = lowered.compile()
        memory = executable.memory_analysis()
        there = memory.argument_size_in_bytes
        return memory.peak_memory_in_bytes + max(0, beside - there), executable.as_text()
    except jax.errors.JaxRuntimeError as error:
        needed = _NEEDED.search(str(error))
        if needed is None:
            raise
        number, unit = needed[1] or needed[3], needed[2] or needed[4]
        return int(float(number) * 2 ** (10 * "_KMGT".index(unit))), ""


def devices(topology: Topology) -> Sequence[Any]:
    """The devices of a topology, to compile for."""
    shape = topology.shape
    return topologies.get_topology_desc(
        platform="tpu",
        topology_name=topology.libtpu,
        chip_config_name=topology.chip.mode,
        chips_per_host_bounds=(min(shape[0], 2), min(shape[1], 2), 1),
        num_slices=topology.slices,
    ).devices


if __name__ == "__main__":
    sys.exit(run_command("plan", main))
