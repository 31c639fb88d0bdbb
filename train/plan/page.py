"""The plan of a run as a page of text, or as JSON."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

from train.config import TrainConfig
from train.plan import advice, estimate, formulas
from train.plan.chips import GIB
from train.plan.compiled import Compiled, versions
from train.plan.estimate import Estimate
from train.plan.hlo import Collective, Program
from train.plan.topology import Topology

_BAR = 24


def label() -> str:
    """What all the numbers are."""
    return f"compiled, not run: compiler estimates ({versions()})"


def render(config: TrainConfig, topology: Topology, compiled: Compiled, prefix: str = "") -> str:
    """The page for people; `prefix` is that of `candidates.settings`."""
    return "\n".join(_lines(config, topology, compiled, prefix)) + "\n"


def as_json(config: TrainConfig, topology: Topology, compiled: Compiled, prefix: str = "") -> dict[str, Any]:
    """The same for programs; bytes and FLOPs are of one device, seconds of one step."""
    memory = memory_by_kind(config, compiled) | {"peak": compiled.peak, "limit": topology.hbm}
    memory |= {"phases": compiled.phases} if compiled.phases else {}
    out: dict[str, Any] = {
        "label": label(),
        "topology": str(topology),
        "chips": topology.num_chips,
        "mesh": dataclasses.asdict(config.mesh),
        "memory": memory,
        "fits": compiled.program is not None,
        "advice": advice.to_fit(config, topology, compiled, prefix),
        "compile_seconds": compiled.seconds,
        "absent": compiled.absent,
    }
    if compiled.program is None:
        return out
    time = estimate.of_program(config, topology, compiled)
    collectives = [
        {"kind": c.kind, "bytes": c.bytes, "executions": c.executions, "devices": _devices(c, topology)}
        | {"overlapped": c.overlapped, "seconds": estimate.duration(c, compiled, topology), "where": c.where}
        for c in compiled.program.collectives
    ]
    return out | {"estimate": as_dict(time), "kernels": compiled.program.kernels, "collectives": collectives}


def _devices(collective: Collective, topology: Topology) -> int:
    """How many devices take part."""
    return topology.slices if collective.between_slices else len(collective.group) or topology.num_devices


def as_dict(time: Estimate) -> dict[str, float]:
    """An estimate in numbers alone."""
    names = ("compute", "hbm", "overlapped", "exposed", "step", "flops", "tokens", "tokens_per_second", "mfu")
    return {name: getattr(time, name) for name in names}


def memory_by_kind(config: TrainConfig, compiled: Compiled) -> dict[str, float]:
    """Bytes per device: what goes in, the gradients by formula, and what else there is at the peak."""
    gradients = compiled.parameters * formulas.GRADIENT / formulas.PARAMETER
    known = compiled.parameters + compiled.optimizer + compiled.batch
    return {
        "parameters": compiled.parameters,
        "optimizer": compiled.optimizer,
        "gradients": gradients,
        "activations": max(0, compiled.peak - known - gradients),
    }


def mesh_text(config: TrainConfig) -> str:
    """The sizes of the mesh axes, those of 1 left out."""
    sizes = dataclasses.asdict(config.mesh).items()
    return " x ".join(f"{axis} {size}" for axis, size in sizes if size > 1) or "one device"


def _lines(config: TrainConfig, topology: Topology, compiled: Compiled, prefix: str) -> Iterator[str]:
    model, rows = config.model_config, config.micro_batch_size / config.mesh.row_shards
    yield label()
    yield ""
    active = f", {model.num_active_parameters:,} of them active" if model.moe else ""
    yield f"model     {model.num_parameters:,} parameters{active}, {config.data.sequence_length:,} tokens per row"
    yield f"chips     {topology.num_chips} x {topology.chip.name} ({topology}), {topology.num_devices} devices"
    yield f"mesh      {mesh_text(config)}"
    micro = f" in {config.accumulation} micro-batches" if config.accumulation > 1 else ""
    yield f"step      {config.batch_size:,} rows{micro}, {rows:g} at a time per row shard; remat {config.remat}"
    yield from _memory(config, topology, compiled)
    if compiled.program is not None:
        yield from _collectives(topology, compiled, compiled.program)
        yield from _time(config, topology, compiled, compiled.program)
    if changes := advice.to_fit(config, topology, compiled, prefix):
        yield ""
        yield from changes


def _memory(config: TrainConfig, topology: Topology, compiled: Compiled) -> Iterator[str]:
    notes = {"gradients": "by formula", "activations": "and everything else at the peak"}
    yield ""
    yield f"{'HBM per device':<16}{'GiB':>8}"
    for kind, size in memory_by_kind(config, compiled).items():
        yield f"  {kind:<14}{size / GIB:>8.2f}  {notes.get(kind, '')}".rstrip()
    for name, size in compiled.phases.items():
        yield f"  at most in {name:<10}{size / GIB:>5.2f}"
    for path in compiled.absent:
        yield f"  {path} is not there yet, and counts as a model of the policy's shape"
    part = compiled.peak / topology.hbm
    filled = min(_BAR, round(part * _BAR))
    bar = "#" * filled + "." * (_BAR - filled)
    fits = "" if compiled.program else "  DOES NOT FIT"
    yield f"  {'peak':<14}{compiled.peak / GIB:>8.2f}  [{bar}] {part:.0%} of {topology.hbm / GIB:.2f}{fits}"


def _collectives(topology: Topology, compiled: Compiled, program: Program) -> Iterator[str]:
    """By kind, and then the longest of those that the device waits for."""
    rows: dict[tuple[str, bool], list[float]] = {}
    waited = []
    for c in program.collectives:
        seconds = estimate.duration(c, compiled, topology)
        kind = c.kind + (" of slices" if c.between_slices else "")
        row = rows.setdefault((kind, c.overlapped), [0, 0.0, 0.0])
        for i, more in enumerate((c.executions, c.executions * c.bytes, seconds)):
            row[i] += more
        if not c.overlapped:
            waited.append((seconds, c))
    yield ""
    yield f"{'collectives':<26}{'':<12}{'per step':>9}{'GB out':>9}{'ms':>9}"
    for (kind, overlapped), (count, size, seconds) in sorted(rows.items()):
        how = "overlapped" if overlapped else "exposed"
        yield f"  {kind:<24}{how:<12}{count:>9,}{size / 1e9:>9.2f}{seconds * 1e3:>9.1f}"
    for seconds, c in sorted(waited, key=lambda pair: -pair[0])[:4]:
        what = f"{c.executions} x {c.bytes / 1e6:.1f} MB {c.kind}"
        yield f"    {seconds * 1e3:>6.1f} ms of waiting: {what}, {_place(c.where)}"


def _place(operation: str) -> str:
    """The part of the model, and the direction, of an operation's name."""
    parts = re.search(r"layers/[a-z_]+(?:/[a-z_]+)?|[a-z_]+$", operation.replace("/dot_general", ""))
    return (parts[0] if parts else "no name") + (" backward" if "transpose(" in operation else "")


def _time(config: TrainConfig, topology: Topology, compiled: Compiled, program: Program) -> Iterator[str]:
    time = estimate.of_program(config, topology, compiled)
    useful = formulas.train_flops(config.model_config, config.data.sequence_length)
    matmul = program.matmul_cycles / topology.chip.clock
    kernels = ", ".join(f"{count} x {name}" for name, count in program.kernels.items())
    yield ""
    yield f"{'time of a step':<16}{'ms':>8}"
    yield f"  {'compute':<14}{time.compute * 1e3:>8.0f}  {matmul * 1e3:.0f} in fusions with a matrix product"
    if kernels:
        yield f"{'':<24}  kernels at {estimate.KERNEL_EFFICIENCY:.0%} of the peak rate: {kernels}"
    yield f"  {'HBM':<14}{time.hbm * 1e3:>8.0f}  state and weights, the least there is"
    yield f"  {'overlapped':<14}{time.overlapped * 1e3:>8.0f}  communication beside compute"
    yield f"  {'exposed':<14}{time.exposed * 1e3:>8.0f}  communication that is waited for"
    yield f"  {'step':<14}{time.step * 1e3:>8.0f}  the longest of the first three, and what is exposed"
    rate = time.tokens_per_second
    yield f"  {rate:,.0f} tokens/s, {rate / topology.num_chips:,.0f} per chip; estimated MFU {time.mfu:.1%}"
    total = useful * config.tokens_per_step
    yield f"  {total:.3g} FLOPs per step, {useful / 1e9:.1f} GFLOP per token (causal attention, no recomputation)"
