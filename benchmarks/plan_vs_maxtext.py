"""The training step of Qwen2.5-7B against MaxText's, as the TPU compiler sees them. Nothing here runs on a TPU.

    python benchmarks/plan_vs_maxtext.py --maxtext maxtext/bin/python [--chip v5e]

Both sides are compiled for a whole slice by one libtpu, that of MaxText's environment: one row of 4096 tokens per
chip, whole layers recomputed, everything else at MaxText's defaults. The cycles are the compiler's estimates, without
attention kernels, which it has none for, and without waiting for the links: they compare programs, and predict no time.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from train.config import AdamW, Checkpointing, Cosine, Evaluation, Mesh, TrainConfig, Zoo
from train.data.config import Data, Text, TokenizerFile
from train.plan import hlo
from train.plan.chips import GIB
from train.plan.compiled import ENVIRONMENT, compile_step
from train.plan.topology import Topology, parse

SLICES = {"v5e": "v5e-256", "v5p": "v5p-256", "v6e": "v6e-256"}  # MaxText and we have the same names for them
MODEL, LENGTH = "Qwen2.5-7B", 4096
KINDS = ("all-gather", "all-reduce", "reduce-scatter")
INSTALL = "python3.12 -m venv maxtext && maxtext/bin/pip install 'maxtext[tpu]==0.2.5'"

# Run by MaxText's interpreter. What it has, and where:
_FIND = """
import json, importlib.metadata as m, importlib.util as u
folder = lambda name: list(u.find_spec(name).submodule_search_locations)[0]
versions = {name: m.version(name) for name in ("maxtext", "jax", "libtpu")}
print(json.dumps({"versions": versions, "config": folder("maxtext") + "/configs/base.yml",
                  "library": folder("libtpu") + "/libtpu.so"}))
"""

# And its own command, which keeps the compiled step that it makes:
_COMPILE = """
import pathlib, sys
from absl import app
from maxtext.trainers.pre_train import train_compile
make, folder = train_compile.jit_and_compile, pathlib.Path(sys.argv.pop(1))
def keep(*args, **kwargs):
    compiled = make(*args, **kwargs)
    (folder / "hlo").write_text(compiled.as_text())
    (folder / "peak").write_text(str(compiled.memory_analysis().peak_memory_in_bytes))
    return compiled
train_compile.jit_and_compile = keep
app.run(train_compile.main)
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figures:
    """Of one side, per device and step.

    Attributes:
      peak: bytes of HBM.
      cycles: the compiler's estimate, without kernels.
      received: bytes that come over the links, for each kind of collective.
      kernels: executions of each.
    """

    peak: int
    cycles: float
    received: dict[str, float]
    kernels: dict[str, int]

    @classmethod
    def of(cls, peak: int, program: hlo.Program, num_devices: int) -> Figures:
        """The figures of a compiled program."""
        received = dict.fromkeys(KINDS, 0.0)
        for c in program.collectives:
            if c.kind in received:
                received[c.kind] += c.executions * c.received(len(c.group) or num_devices)
        cycles = program.matmul_cycles + program.other_cycles
        return cls(peak=peak, cycles=cycles, received=received, kernels=dict(program.kernels))


def find_maxtext(python: str) -> dict:
    """Versions and files of MaxText's environment. Ends the program if something is missing."""
    try:
        done = subprocess.run([python, "-c", _FIND], capture_output=True, text=True)
    except OSError as error:
        sys.exit(f"--maxtext {python}: {error.strerror}. The peer has an environment of its own: {INSTALL}")
    if done.returncode:
        sys.exit(f"--maxtext {python}: {done.stderr.splitlines()[-1]}. Its environment needs: {INSTALL}")
    return json.loads(done.stdout)


def theirs(python: str, config: str, topology: Topology) -> Figures:
    """MaxText's step, compiled by its own command."""
    with tempfile.TemporaryDirectory() as folder:
        command = [python, "-c", _COMPILE, folder, config, f"compile_topology={SLICES[topology.chip.name]}"]
        command += ["compile_topology_num_slices=1", f"model_name={MODEL.lower()}"]
        command += [f"max_target_length={LENGTH}", "per_device_batch_size=1"]
        done = subprocess.run(command, env=os.environ | ENVIRONMENT, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"MaxText failed:\n{done.stderr[-3000:]}")
        program, peak = hlo.read(Path(folder, "hlo").read_text()), int(Path(folder, "peak").read_text())
    return Figures.of(peak, program, topology.num_devices)


def ours(topology: Topology, library: str) -> Figures:
    """Our step, compiled by the same libtpu."""
    config = TrainConfig(
        run_dir="nothing is written",
        model=Zoo(name=MODEL),
        data=Data(source=Text(path="none"), tokenizer=TokenizerFile(path="none"), sequence_length=LENGTH),
        batch_size=topology.num_devices,
        steps=100,
        optimizer=AdamW(peak_lr=3e-4),
        schedule=Cosine(warmup_steps=10),
        mesh=Mesh(fsdp=topology.num_devices),
        remat="full",
        checkpoint=Checkpointing(every=100),
        evaluation=Evaluation(every=100),
    )
    os.environ["TPU_LIBRARY_PATH"] = library
    compiled = compile_step(config, topology)
    if compiled.program is None:
        sys.exit(f"ours does not fit {topology}: {compiled.peak / GIB:.1f} GiB")
    return Figures.of(compiled.peak, compiled.program, topology.num_devices)


def report(chip: str, mine: Figures, other: Figures) -> bool:
    """Prints the table and the bars of a chip; whether all are reached."""
    total = lambda figures: sum(figures.received.values())
    rows = [
        ("HBM peak, GiB", mine.peak / GIB, other.peak / GIB),
        ("cycles, million", mine.cycles / 1e6, other.cycles / 1e6),
    ]
    rows += [(f"{kind} received, GB", mine.received[kind] / 1e9, other.received[kind] / 1e9) for kind in KINDS]
    rows += [("received in all, GB", total(mine) / 1e9, total(other) / 1e9)]
    print(f"\n{SLICES[chip]:<28}{'ours':>12}{'MaxText':>12}{'ratio':>8}")
    for name, a, b in rows:
        print(f"{name:<28}{a:>12.2f}{b:>12.2f}{f'{a / b:.2f}' if b else '-':>8}")
    for name, figures in (("ours", mine), ("MaxText", other)):
        kernels = ", ".join(f"{count} x {kernel}" for kernel, count in figures.kernels.items())
        print(f"kernels not counted, {name}: {kernels or 'none'}")
    print()
    ratios = {
        "peak": mine.peak / other.peak,
        "cycles": mine.cycles / other.cycles,
        "collectives": total(mine) / total(other),
    }
    for name, ratio in ratios.items():
        print(f"BAR maxtext-{chip}-{name} {ratio:.3f} <=1.00 {'ok' if ratio <= 1 else 'short'}", flush=True)
    return all(ratio <= 1 for ratio in ratios.values())


def main() -> int:
    """The exit code: 1 if any bar is short."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--maxtext", metavar="PYTHON", required=True, help="the interpreter of MaxText's environment")
    parser.add_argument("--chip", choices=SLICES, nargs="+", default=list(SLICES), help="default: all")
    options = parser.parse_args()
    found = find_maxtext(options.maxtext)
    has, mine = found["versions"], version("jax")
    if mine != has["jax"]:
        # What one libtpu compiled need not be readable by another jax than its own.
        sys.exit(f"jax here is {mine} and MaxText's is {has['jax']}: run this with Python 3.12 and jax {has['jax']}")
    print("Estimates of the TPU compiler; nothing ran on a TPU.")
    print(f"{MODEL}, one row of {LENGTH} tokens per chip, whole layers recomputed; per chip and step.")
    print(f"ours: jax {mine}, libtpu {has['libtpu']}")
    print(f"theirs: MaxText {has['maxtext']}, jax {has['jax']}, libtpu {has['libtpu']}", flush=True)
    reached = True
    for chip in options.chip:
        topology = parse(SLICES[chip])
        other = theirs(options.maxtext, found["config"], topology)
        reached &= report(chip, ours(topology, found["library"]), other)
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
