"""`python -m train.plan CONFIG.gin --topology v5e:16x16`: a run planned for TPUs that are not there.

libtpu compiles the very step that `python -m train` would run, here and without a TPU: does it fit, what goes over the
links, how long would a step take. Nothing runs; the numbers are the compiler's estimates, or formulas.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from qwen_jax import bindings
from qwen_jax.command import run_command
from qwen_jax.errors import ConfigError, FileError
from train.command import ConfigParser, resolve
from train.config import TrainConfig
from train.plan import page, search, serve
from train.plan import topology as topologies
from train.plan.candidates import check_state, settings, with_devices
from train.plan.compiled import check_installed, compile_step
from train.plan.topology import Topology

MOST, BUDGET = 3, 900  # layouts that a search compiles, and seconds after which it begins no further one

EPILOG = """\
topologies are a chip and a shape (v5e:16x16, v5p:4x4x8) or an accelerator type (v5litepod-256, v5p-256, v6e-256)

exit codes: 0 done, 1 unexpected, 2 usage or config, or does not fit, 4 file, or libtpu not installed, 130 interrupted

  python -m train.plan mine.gin --topology v5e:16x16 --set mesh.fsdp=256 batch_size=256
  python -m train.plan mine.gin --topology v5p-256 --search --output best.gin
  python -m train.plan mine.gin --topology v6e-8 --serve
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code of the command line `arguments` (default: this process's)."""
    options = parse(arguments)
    topology = topologies.parse(options.topology, slices=options.slices)
    config, _ = resolve(TrainConfig, options)
    stages = dict(enumerate(stage for _, stage in config.stage_configs))
    if options.stage is not None and options.stage not in stages:
        raise ConfigError(f"--stage {options.stage} is not one of this run's, which are 0 to {len(stages) - 1}")
    if options.serve:
        model = stages[len(stages) - 1].model_config
        found = serve.plan(model, topology)
        _print(options, serve.as_json(found, model, topology), serve.render(found, model, topology))
        return 0
    if options.stage is not None:
        stages = {options.stage: stages[options.stage]}
    if len(stages) > 1 and (options.search or options.hlo):
        raise ConfigError(f"--search and --hlo are for one stage; choose it with --stage, of 0 to {len(stages) - 1}")
    check_state(config, topology)
    for path in (options.output, options.hlo):  # before minutes of compiling
        if path and not path.parent.is_dir():
            raise FileError(f"{path} cannot be written: there is no folder {path.parent}")
    if options.search:
        check_installed()
        ((number, stage),) = stages.items()
        return _search(stage, topology, options, _prefix(number))
    return _compile(stages, topology, options)


def _compile(stages: dict[int, TrainConfig], topology: Topology, options: argparse.Namespace) -> int:
    """Prints a page for each stage, all of them checked before the first is compiled."""
    whole = {number: with_devices(stage, topology, _prefix(number)) for number, stage in stages.items()}
    for number, stage in stages.items():
        if whole[number] != stage:
            changes = settings(whole[number], stage, _prefix(number))
            _say(f"the mesh is that of one slice; to train on all of them, --set {changes}")
    check_installed()
    _say(f"compiling for {topology}; a large model takes a minute or more")
    fields, fits = [], True
    for number, stage in whole.items():
        compiled = compile_step(stage, topology, hlo=options.hlo)
        fits = fits and compiled.program is not None
        fields.append(page.as_json(stage, topology, compiled, _prefix(number)))
        if not options.json:
            title = f"stage {number}\n" if len(whole) > 1 else ""
            print(
                title + page.render(stage, topology, compiled, _prefix(number)), end="\n" * (len(whole) > 1), flush=True
            )
    if options.json:
        print(json.dumps(fields if len(fields) > 1 else fields[0], indent=2))
    return 0 if fits else ConfigError.exit_code


def _prefix(stage: int) -> str:
    """Of the fields that are a stage's own."""
    return f"stages.{stage}." if stage else ""


def _search(config: TrainConfig, topology: Topology, options: argparse.Namespace, prefix: str) -> int:
    output = options.output
    if output and output.exists() and output.samefile(options.config):
        raise ConfigError(f"--output {output} is the config itself; choose another file")
    most, budget = options.compile or MOST, BUDGET if options.budget is None else options.budget
    trials = search.search(config, topology, compile_step, most=most, budget=budget, say=_say)
    _print(options, search.as_json(trials, topology), search.table(trials, topology))
    if output:
        _write(output, trials[0].config, options, prefix)
    return 0


def _write(output: Path, best: TrainConfig, options: argparse.Namespace, prefix: str) -> None:
    """Writes the config that includes the user's and overrides the layout, after what --set overrode."""
    layout = {f"mesh.{axis}": size for axis, size in dataclasses.asdict(best.mesh).items()}
    layout |= {"remat": best.remat, "accumulation": best.accumulation}
    bound = {binding.path: binding.text for binding in bindings.parse_set(options.set)}
    bound |= {prefix + path: repr(value) for path, value in layout.items()}
    lines = [f'include "{os.path.relpath(options.config, output.parent)}"', ""]
    lines += [f"{path} = {text}" for path, text in bound.items()]
    try:
        output.write_text("\n".join(lines) + "\n")
    except OSError as error:
        raise FileError(f"--output {output} cannot be written: {error.strerror}") from error
    _say(f"{output} has the best: python -m train {output}")


def _print(options: argparse.Namespace, fields: object, text: str) -> None:
    print(json.dumps(fields, indent=2) if options.json else text, end="\n" if options.json else "")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = ConfigParser("train.plan", description=__doc__, epilog=EPILOG, config="the run")
    parser.add_argument("--topology", metavar="CHIP:SHAPE", required=True, help="what to plan for")
    parser.add_argument("--slices", metavar="N", type=int, default=1, help="slices of it, along the data axis")
    parser.add_argument("--stage", metavar="N", type=int, help="of a run with stages: 0 is before stages.1 (all)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--search", action="store_true", help="find mesh, remat and accumulation of the same run")
    what.add_argument("--serve", action="store_true", help="plan decoding of the model instead, by formula")
    parser.add_argument("--output", metavar="BEST.gin", type=Path, help="with --search, where the best config goes")
    parser.add_argument("--compile", metavar="N", type=int, help=f"with --search, how many to compile ({MOST})")
    parser.add_argument(
        "--budget", metavar="SECONDS", type=float, help=f"with --search, begin no compilation after ({BUDGET})"
    )
    parser.add_argument("--hlo", metavar="FILE", type=Path, help="keep the text of the compiled program")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a page")
    options = parser.parse_args(arguments)
    for name in ("output", "compile", "budget"):
        if getattr(options, name) is not None and not options.search:
            parser.error(f"--{name} is for --search")
    if options.hlo and (options.search or options.serve):
        parser.error("--hlo is for one program: leave out --search and --serve")
    if options.compile is not None and options.compile < 1:
        parser.error(f"--compile {options.compile} must be at least 1")
    if options.budget is not None and not options.budget >= 0:
        parser.error(f"--budget {options.budget:g} must not be negative")
    return options


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(run_command("plan", main))
