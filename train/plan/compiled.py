"""What the compiler says of a training step on TPUs that are not there."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from qwen_jax import bindings
from qwen_jax.errors import ConfigError, FileError
from train.config import TrainConfig
from train.plan.hlo import Collective, Program
from train.plan.topology import Topology

# libtpu asks for a TPU's surroundings as it loads: these are answers, so that it neither waits nor complains.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TF_CPP_MIN_LOG_LEVEL": "2",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # another process may be compiling too
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """A compiled training step; all bytes are of one device.

    Attributes:
      seconds: that compiling took.
      parameters, optimizer, batch: bytes of what goes into the step.
      peak: bytes in use at the worst moment, those included; if it does not fit, what the compiler wanted.
      phases: the same of each phase of an episode, of objectives on the model's own completions.
      absent: reward models that cannot be read yet, and were counted as of the policy's shape.
      program: what it does; None if it needs more memory than a device has.
      places: slice number and coordinates of each device of the mesh, in its order.
    """

    seconds: float
    parameters: int
    optimizer: int
    batch: int
    peak: int
    program: Program | None
    places: list[tuple[int, ...]]
    phases: dict[str, int] = dataclasses.field(default_factory=dict)
    absent: list[str] = dataclasses.field(default_factory=list)


def versions() -> str:
    """The compiler's."""
    return f"jax {importlib.metadata.version('jax')}, libtpu {importlib.metadata.version('libtpu')}"


def check_installed() -> None:
    """Raises FileError unless there is a TPU compiler."""
    if importlib.util.find_spec("libtpu") is None:
        raise FileError("libtpu, the TPU compiler, is not installed: pip install 'qwen-jax[tpu]'; no TPU is needed")


def compile_step(config: TrainConfig, topology: Topology, *, hlo: Path | None = None) -> Compiled:
    """The step of a run compiled for a topology, in a process of its own: libtpu ends the one its checks fail in.

    Args:
      config: the run; its mesh has the devices of the topology.
      topology: what to compile for.
      hlo: file for the text of the compiled program.

    Raises ConfigError with the compiler's last words if it fails for anything but memory.
    """
    with tempfile.TemporaryDirectory() as folder:
        request, result, log = (Path(folder) / name for name in ("config.gin", "result.json", "log"))
        request.write_text(bindings.render(config))
        command = [sys.executable, "-m", "train.plan.aot", request, topology.label, topology.slices, result, hlo or ""]
        with open(log, "wb") as output:
            done = subprocess.run(
                list(map(str, command)), env=os.environ | ENVIRONMENT, stdout=output, stderr=subprocess.STDOUT
            )
        if done.returncode == 0:
            return _read(json.loads(result.read_text()))
        raise ConfigError(f"{topology} cannot run this: {_last_words(log.read_text(errors='replace'))}")


def _last_words(log: str) -> str:
    """The line of a failed compilation's output that says most."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    telling = [line for line in lines if "error:" in line or "Check failed" in line or "Error: " in line]
    return (telling or lines or ["no output"])[-1].removeprefix("plan: error: ")[:400]


def _read(fields: dict[str, Any]) -> Compiled:
    program = fields["program"]
    if program:
        collectives = tuple(Collective(**each | {"group": tuple(each["group"])}) for each in program["collectives"])
        program = Program(**program | {"collectives": collectives})
    return Compiled(**fields | {"program": program, "places": [tuple(place) for place in fields["places"]]})
