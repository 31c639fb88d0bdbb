"""Writes docs/tpu-configs.md: what the TPU compiler says of every run for TPUs in configs. Nothing runs on a TPU.

python benchmarks/tpu_configs.py                 # all of them, some minutes each
python benchmarks/tpu_configs.py CONFIG.gin ...  # only these; the other rows stay
"""

from __future__ import annotations

import ast
import dataclasses
import re
import sys
from pathlib import Path

from qwen_jax import bindings
from train.config import TrainConfig
from train.plan import estimate, page
from train.plan.chips import GIB
from train.plan.compiled import Compiled, check_installed, compile_step
from train.plan.topology import Topology, parse

ROOT = Path(__file__).parents[1]
CONFIGS, TUNING, PAGE = ROOT / "configs" / "tpu", ROOT / "configs", ROOT / "docs" / "tpu-configs.md"

TEXT = """\
# The runs for TPUs

{label}. Of each device:

- memory: at the worst moment, and what a program may use;
- collectives: bytes of their results in a step (AG all-gather, AR all-reduce, RS reduce-scatter, CP collective-permute,
  A2A all-to-all), and how long a step waits for them;
- step: a roofline over the compiler's cycles, attention at half of the peak rate, and the links;
- MFU: causal attention counts half, recomputation nothing.

Of a run with stages the row is of the last.

`python benchmarks/tpu_configs.py` writes this page; `python -m train.plan CONFIG.gin --topology v5e-256` says more of
one run. Those of configs/tpu are pretraining, and the others supervised fine-tuning of a published model, of which
only the shape is needed here.

"""
HEAD = ("run", "chips", "rows x tokens", "mesh", "remat", "memory, GiB", "collectives, GB", "waiting", "step", "MFU")
SHORT = {
    "all-gather": "AG",
    "all-reduce": "AR",
    "reduce-scatter": "RS",
    "collective-permute": "CP",
    "all-to-all": "A2A",
}


def runs() -> list[Path]:
    """The configs that are named after chips, and those of fine-tuning; the others are included by these."""
    named = [path for path in CONFIGS.glob("*.gin") if re.search(r"-v\d[a-z]-\d+$", path.stem)]
    return sorted(named) + sorted(TUNING.glob("sft_*.gin"))


def load(path: Path) -> tuple[TrainConfig, Topology]:
    """A run as it is in its last stage, and its chips: those in its name, or in the command on top of it."""
    config, _ = bindings.resolve(TrainConfig, [_shape_alone(each) for each in bindings.read(path)])
    told = re.search(r"--topology (\S+)", path.read_text())
    return config.stage_configs[-1][1], parse(told[1] if told else "-".join(path.stem.split("-")[-2:]))


def _shape_alone(binding: bindings.Binding) -> bindings.Binding:
    """A published model by its name, in the place of its folder."""
    new = {"@Pretrained": ("model", "@Zoo"), "%MODEL": ("model.name", "%MODEL")}
    if binding.path == "MODEL":
        return dataclasses.replace(binding, text=repr(_published(Path(ast.literal_eval(binding.text)))))
    if binding.path in ("model", "model.path") and binding.text in new:
        path, text = new[binding.text]
        return dataclasses.replace(binding, path=path, text=text)
    return binding


def _published(model: Path) -> str:
    """The name of the model that a folder has the shape of, or that a run began with."""
    if model.parts[0] == "runs":
        (begun,) = [each.text for each in bindings.read(TUNING / f"{model.name}.gin") if each.path == "MODEL"]
        return _published(Path(ast.literal_eval(begun)))
    return re.sub("-(long|sft)$", "", model.name)


def settings(path: Path) -> list[str]:
    """The cells that the config alone decides."""
    config, topology = load(path)
    micro = f" in {config.accumulation} micro-batches" if config.accumulation > 1 else ""
    return [
        f"[{path.stem}](../{path.relative_to(ROOT)})",
        f"{topology.num_chips} {topology.chip.name}",
        f"{config.batch_size:,} x {config.data.sequence_length:,}{micro}",
        page.mesh_text(config),
        config.remat,
    ]


def row(path: Path, compiled: Compiled) -> list[str]:
    """All cells of a run that was compiled and fits."""
    config, topology = load(path)
    time = estimate.of_program(config, topology, compiled)
    results = dict.fromkeys(SHORT, 0.0)
    for collective in compiled.program.collectives:
        results[collective.kind] += collective.executions * collective.bytes / 1e9
    return [
        *settings(path),
        f"{compiled.peak / GIB:.1f} of {topology.hbm / GIB:.1f}",
        ", ".join(f"{SHORT[kind]} {size:.1f}" for kind, size in results.items() if size >= 0.05),
        f"{time.exposed * 1e3:,.0f} ms",
        f"{time.step * 1e3:,.0f} ms",
        f"{time.mfu:.0%}",
    ]


def rows(text: str) -> dict[str, list[str]]:
    """The cells of each run on a page, by the name of its config."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| [")]
    return {re.search(r"([^/]+)\)$", cells[0])[1]: cells for cells in lines}


def write(found: dict[str, list[str]]) -> None:
    """The page, in the order of `runs`; runs that are no more are left out."""
    lines = [HEAD, ["---"] * len(HEAD), *(found[path.name] for path in runs() if path.name in found)]
    table = "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
    PAGE.write_text(TEXT.format(label=page.label().capitalize()) + table)


def main(names: list[str]) -> int:
    """The exit code."""
    check_installed()
    before = PAGE.read_text() if names else ""
    if names and page.label().capitalize() not in before:
        sys.exit(f"{PAGE} is from another compiler than {page.label()}; write it anew, without naming configs")
    found = rows(before)
    for path in [path for path in runs() if not names or path.name in {Path(name).name for name in names}]:
        config, topology = load(path)
        print(f"{path.stem} …", file=sys.stderr, flush=True)
        compiled = compile_step(config, topology)
        if compiled.program is None:
            sys.exit(f"{path} does not fit: {compiled.peak / GIB:.1f} GiB of {topology.hbm / GIB:.1f}")
        found[path.name] = row(path, compiled)
        print(" | ".join(found[path.name]), flush=True)
        write(found)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
