"""The command: what it runs, what it leaves, and what it refuses. But for one, its runs are planted."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest

from qwen_jax import bindings
from qwen_jax.errors import ConfigError, DataError, NumericalError
from train.config import TrainConfig
from train.progress import Report
from train.scaling import sweep
from train.scaling.__main__ import main
from train.scaling.config import Scaling, Shape, Target
from train.scaling.points import points


@pytest.fixture
def scaling(config, tmp_path) -> Scaling:
    """Two sizes, two numbers of tokens, three learning rates and batches, of the tiny run."""
    (tmp_path / "run.gin").write_text(bindings.render(config))
    target = Target(run=str(tmp_path / "run.gin"), tokens=10**6, changes=("accumulation = 2", "batch_size = 4"))
    return Scaling(
        output=str(tmp_path / "scaling"),
        run=str(tmp_path / "run.gin"),
        changes=("layers = 'scan'",),
        models=(Shape(num_layers=1), Shape(width=32, num_layers=2)),
        tokens=(2560, 10240),
        batch_sizes=(2, 4, 8),
        peak_lrs=(1e-3, 1e-2, 1e-1),
        target=target,
    )


@pytest.fixture
def command(scaling, tmp_path):
    """A function: main's arguments after the config, and changes of the latter, to the exit code."""

    def run(*arguments, **changes):
        file = tmp_path / "scaling.gin"
        file.write_text(bindings.render(dataclasses.replace(scaling, **changes)))
        return main([str(file), *arguments])

    return run


@pytest.fixture
def planted(monkeypatch):
    """Runs that come to a loss with its minimum at 3 D^0.25 rows and a rate of N^-0.5; the names of those that ran."""
    ran = []

    def train(point):
        ran.append(point.name)
        rate, rows = point.size**-0.5, 3 * (point.tokens / 2560) ** 0.25
        x, y = math.log(point.config.optimizer.peak_lr / rate), math.log(point.config.batch_size / rows)
        return 2 + x * x + y * y

    monkeypatch.setattr(sweep, "train", train)
    return ran


def test_planted_laws_become_a_run(command, planted, scaling, capsys):
    assert command() == 0
    assert len(planted) == len(set(planted)) == 36
    out = capsys.readouterr()
    assert "mu_opt = 1 N^-0.500 D^" in out.out and "36 runs" in out.err and "FLOPs" in out.err
    folder = Path(scaling.output)
    report = json.loads((folder / "report.json").read_text())
    assert report["laws"]["batch_tokens"]["d_exponent"] == pytest.approx(0.25)
    assert [len(cell["runs"]) for cell in report["cells"]] == [9] * 4
    assert (folder / "scaling.png").read_bytes().startswith(b"\x89PNG")
    text = (folder / "recommended.gin").read_text()
    run, _ = bindings.resolve(TrainConfig, bindings.read(folder / "recommended.gin"))
    size = next(cell["size"] for cell in report["cells"])
    assert "times the sweep's most" in text and "% confidence" in text
    # The law's rows, in pairs, since the target accumulates; its own size is that of the larger model with width 16.
    assert run.batch_size == 2 * round(3 * (1e6 / 2560) ** 0.25 / 2) and run.accumulation == 2
    assert run.steps == round(1e6 / (run.batch_size * 16)) and run.schedule.warmup_fraction == 0.1
    assert run.optimizer.peak_lr < size**-0.5


def test_a_run_is_an_ordinary_one_and_is_done_once(scaling, enough_devices, capsys):
    first, second, third, *_ = sorted(points(scaling), key=lambda point: point.config.steps)
    assert first.config.steps == 20
    loss = sweep.train(first)
    folder = Path(first.config.run_dir)
    assert loss == sweep.final_loss(first) and {"metrics.jsonl", "checkpoints", "config.gin", "log.txt"} <= {
        path.name for path in folder.iterdir()
    }
    assert (Path(scaling.output) / "tokens" / "all" / "manifest.json").exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "run", pytest.fail)
        assert sweep.sweep([first], Report()) == [loss]
        patch.setattr(sweep, "run", lambda *_: (_ for _ in ()).throw(NumericalError("the loss is nan")))
        assert sweep.sweep([second], Report()) == [math.inf]
        patch.setattr(sweep, "run", lambda *_: 130)
        with pytest.raises(sweep.Stopped):
            sweep.sweep([third], Report())
    assert sweep.final_loss(second) == math.inf
    assert "diverged" in capsys.readouterr().err


def test_a_dry_run_lists_and_trains_nothing(command, planted, scaling, capsys):
    assert command("--dry-run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 37 and "rows2-lr0.001" in lines[0] and "36 runs" in lines[-1]
    assert not planted and not Path(scaling.output).exists()


def test_optima_at_the_edge_give_no_law_but_a_report(command, planted, scaling, capsys):
    with pytest.raises(
        DataError, match=r"4 of 4 cells .*the highest batch is the best.*widen peak_lrs and batch_sizes"
    ):
        command(batch_sizes=(1, 2, 3))
    assert json.loads((Path(scaling.output) / "report.json").read_text())["laws"]["peak_lr"] is None
    assert "in doubt" in capsys.readouterr().out and not (Path(scaling.output) / "recommended.gin").exists()


REFUSED = {
    "batch_sizes=.2, 4. must be at least 3": dict(batch_sizes=(2, 4)),
    "peak_lrs=.* must be above 0 and rise": dict(peak_lrs=(1e-3, 1e-3, 1e-2)),
    "models are 1; a law wants": dict(models=(Shape(),)),
    "there are 2: make them differ": dict(models=(Shape(width=32), Shape(width=32))),
    "tokens=2560 are 5 steps of batch_size=32": dict(batch_sizes=(2, 4, 32)),
    "set data.held_out above 0": dict(changes=("data.held_out = 0.0",)),
    "leave stages out": dict(changes=("stages.1.from_step = 2",)),
    "no field stepz": dict(changes=("stepz = 2",)),
    "model = @ModelConfig": dict(changes=("model = @Zoo", "model.name = 'Qwen2.5-0.5B'")),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_swept_is_refused_before_anything_runs(message, command, planted):
    with pytest.raises(ConfigError, match=message) as caught:
        command(**REFUSED[message])
    assert not planted and "\n" not in str(caught.value)
