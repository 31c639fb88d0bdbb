"""How long a step takes: a roofline over compute, HBM and the links, from formulas or from a compiled program."""

from __future__ import annotations

import dataclasses
import math

from train.config import TrainConfig
from train.plan import formulas
from train.plan.chips import BETWEEN_SLICES
from train.plan.compiled import Compiled
from train.plan.hlo import Collective
from train.plan.topology import Topology

# Part of the peak rate that attention kernels count with: the compiler has no estimate of theirs.
KERNEL_EFFICIENCY = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """Seconds of one optimiser step.

    Attributes:
      compute: of arithmetic.
      hbm: of reading and writing state and weights, the least there is.
      overlapped: of communication during which the device computes.
      exposed: of communication that it waits for.
      flops: operations that the step is for, on one device: without recomputation.
      tokens: of the step, on all devices.
      topology: what it runs on.
    """

    compute: float
    hbm: float
    overlapped: float
    exposed: float
    flops: float
    tokens: int
    topology: Topology

    @property
    def step(self) -> float:
        """Seconds of the whole."""
        return max(self.compute, self.hbm, self.overlapped) + self.exposed

    @property
    def tokens_per_second(self) -> float:
        """On all chips."""
        return self.tokens / self.step

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation: operations the step is for, over what the chips could do in its time."""
        return self.flops / self.step / self.topology.flops


def of_program(config: TrainConfig, topology: Topology, compiled: Compiled) -> Estimate:
    """From what the compiler says of a step. Raises ValueError for one that does not fit."""
    program = compiled.program
    if program is None:
        raise ValueError("a step that does not fit has no program to estimate")
    compute = (program.matmul_cycles + program.other_cycles) / topology.chip.clock
    if program.kernels:
        compute += _attention(config, topology)
    # How long the loop over the rows of experts is, the compiler cannot know.
    experts = _per_device(config, formulas.executed_expert_flops(config.model_config))
    compute += experts / topology.flops / KERNEL_EFFICIENCY
    seconds = {True: 0.0, False: 0.0}
    for collective in program.collectives:
        seconds[collective.overlapped] += duration(collective, compiled, topology)
    return _estimate(config, topology, compute=compute, overlapped=seconds[True], exposed=seconds[False])


def duration(collective: Collective, compiled: Compiled, topology: Topology) -> float:
    """Seconds per step that a collective takes, if only the rate of the links counts."""
    if collective.between_slices:
        size, rate = topology.slices, BETWEEN_SLICES / topology.chip.devices
    else:
        places = [compiled.places[i] for i in collective.group] or compiled.places
        size, rate = len(places), topology.rate(places)
    return collective.executions * collective.received(size) / rate


def by_formula(config: TrainConfig, topology: Topology) -> Estimate:
    """From formulas alone, to order candidates before any is compiled: what goes along fsdp counts as overlapped."""
    model, mesh, rate = config.model_config, config.mesh, _rates(config, topology)
    weights = formulas.BF16 * formulas.used_parameters(config)
    tokens = config.tokens_per_step / (mesh.row_shards * mesh.context)
    passes = formulas.passes(config)
    # Gathered forward and backward, and the gradient scattered, in every micro-batch.
    fsdp = config.accumulation * 3 * weights * (mesh.fsdp - 1) / mesh.fsdp / rate["fsdp"]
    # A sum after attention and one after the MLP, in every pass.
    sums = passes * 2 * model.num_layers * tokens * model.width * formulas.BF16
    tensor = 2 * sums * (mesh.tensor - 1) / mesh.tensor / rate["tensor"]
    kv = tokens * formulas.kv_bytes(model) / min(mesh.tensor, model.num_kv_heads)
    context = passes * kv * (mesh.context - 1) / rate["context"]
    # Tokens go to all devices along `expert`, and sums come back.
    moved = passes * model.num_layers * tokens * model.width * (formulas.BF16 + formulas.F32) if model.moe else 0
    expert = moved * (mesh.expert - 1) / rate["expert"]
    gradient = formulas.F32 * formulas.held_parameters(config)
    data = 2 * gradient * (mesh.data - 1) / mesh.data / rate["data"]
    compute = _per_device(config, formulas.executed_matmul_flops(config)) / topology.flops
    compute += _attention(config, topology)
    return _estimate(config, topology, compute=compute, overlapped=fsdp, exposed=tensor + context + expert + data)


def _estimate(
    config: TrainConfig, topology: Topology, *, compute: float, overlapped: float, exposed: float
) -> Estimate:
    model = config.model_config
    # The update reads and writes all of the state; every pass of a micro-batch reads the weights.
    state = 2 * formulas.state_bytes(config)
    passes = formulas.passes(config)
    weights = config.accumulation * passes * formulas.BF16 * formulas.used_parameters(config)
    return Estimate(
        compute=compute,
        hbm=(state + weights) / topology.bandwidth,
        overlapped=overlapped,
        exposed=exposed,
        flops=_per_device(config, formulas.train_flops(model, config.data.sequence_length)),
        tokens=config.tokens_per_step,
        topology=topology,
    )


def _attention(config: TrainConfig, topology: Topology) -> float:
    """Seconds of a step's attention kernels."""
    # Only without remat is what the forward kernel gave still there. How often the backward kernel runs says nothing:
    # it takes the keys of a long sequence in several runs.
    forward = 1 if config.remat == "none" else 2
    flops = _per_device(config, formulas.executed_attention_flops(config, forward=forward))
    return flops / topology.flops / KERNEL_EFFICIENCY


def _per_device(config: TrainConfig, per_token: float) -> float:
    devices = config.mesh.row_shards * config.mesh.context * config.mesh.tensor
    return per_token * config.tokens_per_step / devices


def _rates(config: TrainConfig, topology: Topology) -> dict[str, float]:
    """Bytes per second along each axis of the mesh, if the last axes get the links of the first axes of a slice."""
    left, rates = list(topology.shape), {}
    for axis in ("tensor", "expert", "context", "fsdp", "data"):
        size, spans = getattr(config.mesh, axis), []
        for i, chips in enumerate(left):
            spans.append(math.gcd(size, chips))
            size, left[i] = size // spans[i], chips // spans[i]
        rates[axis] = topology.rate_along(spans)
    if topology.slices > 1:
        rates["data"] = BETWEEN_SLICES / topology.chip.devices
    return rates
