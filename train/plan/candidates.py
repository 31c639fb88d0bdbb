"""Ways to lay out a run on a topology that train the same: meshes, what is recomputed, rows at a time."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

from qwen_jax.errors import ConfigError
from train.config import Mesh, TrainConfig
from train.plan import estimate, formulas
from train.plan.chips import GIB
from train.plan.topology import Topology


def candidates(config: TrainConfig, topology: Topology) -> list[TrainConfig]:
    """Every valid layout of a run, best first by formula, those that seem not to fit last."""

    def key(candidate: TrainConfig) -> tuple[bool, float]:
        return formulas.train_bytes(candidate) > topology.hbm, estimate.by_formula(candidate, topology).step

    return sorted(_valid(config, topology), key=key)


def with_devices(config: TrainConfig, topology: Topology, prefix: str = "") -> TrainConfig:
    """The config with a mesh of the topology's devices: its own, or its own on every slice.

    Raises ConfigError, with meshes that would do. `prefix` is that of `settings`.
    """
    mesh, slices, devices = config.mesh, topology.slices, topology.num_devices
    own = math.prod(dataclasses.astuple(mesh))
    if own * slices == devices and slices > 1:
        on_all = dataclasses.replace(mesh, data=mesh.data * slices)
        try:
            return dataclasses.replace(config, mesh=on_all)
        except ConfigError as error:
            raise ConfigError(f"the mesh is that of one slice, and with mesh.data={on_all.data} {error}") from error
    if own != devices:
        proposals = _proposals(config, topology, prefix)
        raise ConfigError(f"the mesh has {own} devices and {topology} has {devices}; {proposals}")
    if mesh.data % slices:
        proposals = _proposals(config, topology, prefix)
        raise ConfigError(f"mesh.data={mesh.data} must be a multiple of the {slices} slices; {proposals}")
    return config


def check_state(config: TrainConfig, topology: Topology) -> None:
    """Raises ConfigError if the state of the model cannot fit, however it is split."""
    state = formulas.whole_state_bytes(config)
    hbm = topology.hbm * topology.num_devices / topology.slices  # slices repeat the state
    if state > hbm:
        least = topology.larger(state / topology.hbm)
        raise ConfigError(
            f"parameters, moments and gradients are {state / GIB:,.0f} GiB and a {topology.label} holds "
            f"{hbm / GIB:,.0f} GiB; it takes {math.ceil(state / topology.chip.hbm)} chips, "
            + (f"so at least {least.label}" if least else f"and no slice of {topology.chip.name} has as many")
        )


def settings(candidate: TrainConfig, config: TrainConfig, prefix: str = "") -> str:
    """What `--set` takes to make one layout of another; `prefix` is "stages.1." where that is whose layout it is."""
    mesh, before = dataclasses.asdict(candidate.mesh), dataclasses.asdict(config.mesh)
    # A stage may have no mesh of its own to change, and is given a whole one.
    kept = dataclasses.asdict(Mesh()) if prefix and mesh != before else before
    changes = [f"mesh.{axis}={size}" for axis, size in mesh.items() if size != before[axis] or size != kept[axis]]
    if candidate.remat != config.remat:
        changes.append(f"remat='\"{candidate.remat}\"'")
    if candidate.accumulation != config.accumulation:
        changes.append(f"accumulation={candidate.accumulation}")
    return " ".join(prefix + change for change in changes)


def _proposals(config: TrainConfig, topology: Topology, prefix: str) -> str:
    found = list(dict.fromkeys(settings(candidate, config, prefix) for candidate in candidates(config, topology)))
    if not found:
        return (
            f"no mesh of {topology.num_devices} splits a batch_size of {config.batch_size}; choose another batch_size"
        )
    return f"--set {' or '.join(found[:2])} would do; --search finds the best"


def _valid(config: TrainConfig, topology: Topology) -> Iterator[TrainConfig]:
    moe = config.model_config.moe
    for mesh in _meshes(topology, num_experts=moe.num_experts if moe else 1):
        rows = config.batch_size // mesh.row_shards
        for remat in ("none", "dots", "full"):
            for accumulation in _divisors(rows):
                try:
                    yield dataclasses.replace(config, mesh=mesh, remat=remat, accumulation=accumulation)
                except ConfigError:  # the config knows what splits evenly
                    continue


def _meshes(topology: Topology, *, num_experts: int) -> Iterator[Mesh]:
    each = topology.num_devices // topology.slices
    for data in _divisors(each):
        for fsdp in _divisors(each // data):
            for context in _divisors(each // data // fsdp):
                left = each // data // fsdp // context
                for expert in _divisors(math.gcd(left, num_experts)):
                    sizes = dict(fsdp=fsdp, context=context, expert=expert, tensor=left // expert)
                    yield Mesh(data=data * topology.slices, **sizes)


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
