"""What a search tries and keeps, and what its command writes, with a compiler that is not one."""

from __future__ import annotations

import dataclasses
import math

import pytest

from qwen_jax import bindings
from qwen_jax.errors import ConfigError, FileError
from train.config import Mesh, Stage, TrainConfig
from train.plan import __main__ as command
from train.plan import candidates, estimate, page, search
from train.plan.compiled import Compiled
from train.plan.hlo import Program
from train.plan.topology import parse

pytestmark = pytest.mark.usefixtures("a_compiler")

V5E, V5P = parse("v5e:16x16"), parse("v5p:4x4x8")


def compiled(config, topology, *, peak=0.5, slower=1.0) -> Compiled:
    """What a compiler might say: `slower` times the formula, `peak` of a device's memory."""
    seconds = estimate.by_formula(config, topology).step * slower
    program = Program(matmul_cycles=seconds * topology.chip.clock, other_cycles=0, kernels={}, collectives=())
    fits = program if peak <= 1 else None
    size = int(peak * topology.hbm)
    places = [(0, 0, 0, 0)]
    return Compiled(seconds=1.0, parameters=1, optimizer=2, batch=3, peak=size, program=fits, places=places)


def run(config, topology, compile_step=compiled, **options):
    said = []
    options = dict(most=3, budget=600.0) | options
    return search.search(config, topology, compile_step, say=said.append, **options), said


def test_the_fastest_compiled_is_kept_not_the_first(planned):
    tried = []

    def compile_step(config, topology):
        tried.append(config)
        return compiled(config, topology, slower=3.0 - len(tried))

    trials, _ = run(planned, V5P, compile_step)
    assert len(tried) == 3 and len({(each.mesh, each.remat) for each in tried}) == 3
    assert trials[0].config == tried[-1]
    assert [trial.seconds for trial in trials] == sorted(trial.seconds for trial in trials)


def test_one_that_does_not_fit_or_compile_is_tried_and_told(planned):
    answers = iter([dict(peak=1.5), ConfigError("Check failed"), dict(), dict()])

    def compile_step(config, topology):
        answer = next(answers)
        if isinstance(answer, ConfigError):
            raise answer
        return compiled(config, topology, **answer)

    trials, _ = run(planned, V5P, compile_step, most=2)
    assert [trial.estimate is not None for trial in trials] == [True, True, False, False]
    text = search.table(trials, V5P)
    assert "does not fit" in text and "does not compile" in text
    assert len(search.as_json(trials, V5P)) == 4


def test_nothing_that_fits_is_an_error(planned):
    with pytest.raises(ConfigError, match=r"none of 6 layouts compiles for v5p:4x4x8; .* needs 191.5 GiB of 95.74"):
        run(planned, V5P, lambda config, topology: compiled(config, topology, peak=2.0), most=2)


def test_the_budget_ends_the_search(planned):
    trials, said = run(planned, V5P, budget=0.0)
    assert len(trials) == 1 and "are over: 1 layouts" in said[-1]


def test_a_batch_that_nothing_splits(planned, change):
    planned = change(planned, "data.sequence_length", 4095)
    with pytest.raises(ConfigError, match="no mesh of 256 devices splits a batch_size of 3"):
        run(dataclasses.replace(planned, batch_size=3, mesh=Mesh()), V5E)


def test_the_page_says_what_would_fit(planned):
    over = compiled(planned, V5E, peak=1.25)
    text = page.render(planned, V5E, over)
    assert "125% of 15.75  DOES NOT FIT" in text and "3.94 GiB too much per device" in text
    proposals = [line.split("--set ")[1].split("   ")[0] for line in text.splitlines() if "  --set" in line]
    assert proposals
    for proposal in proposals:  # each is one that `python -m train` takes
        resolved(planned, proposal.replace("'", "").split(), V5E)


def resolved(config, settings, topology):
    text = bindings.render(config).splitlines()
    lines = [bindings.Binding(*line.split(" = ", 1), "file") for line in text if " = " in line]
    changed, _ = bindings.resolve(TrainConfig, [*lines, *bindings.parse_set(settings)])
    assert candidates.with_devices(changed, topology) is changed


def test_the_best_is_written_as_a_config_that_includes_the_users(planned, tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.gin").write_text(bindings.render(planned))
    (tmp_path / "out").mkdir()
    best = tmp_path / "out" / "best.gin"
    monkeypatch.setattr(command, "compile_step", compiled)
    monkeypatch.setattr(command, "check_installed", lambda: None)
    arguments = [str(tmp_path / "mine.gin"), "--topology", "v5p-256", "--search", "--output", str(best)]
    assert command.main([*arguments, "--set", "steps=77", "mesh.fsdp=64"]) == 0
    found, _ = bindings.resolve(TrainConfig, bindings.read(best))
    assert best.read_text().startswith('include "../mine.gin"')
    assert found.steps == 77 and math.prod(dataclasses.astuple(found.mesh)) == 128
    assert "compiled, not run" in capsys.readouterr().out


def test_the_config_is_not_written_over(planned, tmp_path, monkeypatch):
    mine = tmp_path / "mine.gin"
    mine.write_text(bindings.render(planned))
    monkeypatch.setattr(command, "check_installed", lambda: None)
    with pytest.raises(ConfigError, match="is the config itself"):
        command.main([str(mine), "--topology", "v5p-256", "--search", "--output", str(mine)])


@pytest.mark.parametrize(
    "options, message",
    [
        (["--output", "x.gin"], "--output is for --search"),
        (["--budget", "5"], "--budget is for --search"),
        (["--search", "--hlo", "x"], "--hlo is for one program"),
        (["--search", "--compile", "0"], "--compile 0 must be at least 1"),
        (["--search", "--budget", "-1"], "--budget -1 must not be negative"),
        (["--search", "--budget", "nan"], "--budget nan must not be negative"),
        (["--search", "--serve"], "not allowed with"),
    ],
)
def test_options_that_would_be_ignored_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        command.main(["mine.gin", "--topology", "v5e:2x2", *options])


def test_a_folder_that_is_not_there_is_noticed_before_compiling(planned, tmp_path):
    mine = tmp_path / "mine.gin"
    mine.write_text(bindings.render(planned))
    with pytest.raises(FileError, match="there is no folder"):
        command.main([str(mine), "--topology", "v5e:16x16", "--hlo", str(tmp_path / "no" / "hlo")])


def test_each_stage_has_its_page_and_a_search_is_of_one(planned, change, tmp_path, monkeypatch, capsys):
    stage = Stage(from_step=3, sequence_length=32768, batch_size=128, mesh=Mesh(fsdp=64, context=4))
    (tmp_path / "mine.gin").write_text(bindings.render(change(planned, "stages", (stage,))))
    peaks = {4096: 0.5, 32768: 1.5}
    fits_first = lambda config, topology, hlo=None: compiled(config, topology, peak=peaks[config.data.sequence_length])
    monkeypatch.setattr(command, "compile_step", fits_first)
    monkeypatch.setattr(command, "check_installed", lambda: None)
    arguments = [str(tmp_path / "mine.gin"), "--topology", "v5e:16x16"]
    assert command.main(arguments) == ConfigError.exit_code
    first, second = capsys.readouterr().out.split("stage 1\n")
    assert "4,096 tokens per row" in first and "DOES NOT FIT" not in first
    assert "32,768 tokens per row" in second and "DOES NOT FIT" in second and "--set stages.1.mesh." in second
    assert command.main([*arguments, "--stage", "0"]) == 0
    assert capsys.readouterr().out.startswith("compiled, not run")
    with pytest.raises(ConfigError, match="--search and --hlo are for one stage; choose it with --stage, of 0 to 1"):
        command.main([*arguments, "--search"])
    with pytest.raises(ConfigError, match="--stage 2 is not one of this run's, which are 0 to 1"):
        command.main([*arguments, "--stage", "2"])
    monkeypatch.setattr(command, "compile_step", compiled)
    best = tmp_path / "best.gin"
    assert command.main([*arguments, "--search", "--stage", "1", "--output", str(best)]) == 0
    found, _ = bindings.resolve(TrainConfig, bindings.read(best))
    assert found.mesh == planned.mesh and math.prod(dataclasses.astuple(found.stages[0].mesh)) == 256
