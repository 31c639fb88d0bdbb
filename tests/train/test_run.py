"""Whole runs, in this process: what resuming, stopping and failing leave behind."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
from pathlib import Path

import jax
import numpy as np
import pytest

from qwen_jax import bindings
from qwen_jax.config import ModelConfig
from qwen_jax.errors import INTERRUPTED, SAVED_PLEASE_RESTART, ConfigError, DataError, FileError, NumericalError
from qwen_jax.model import stack_layers
from qwen_jax.weights.checkpoint import Checkpoints, open_checkpoint
from tests.train.conftest import record
from train import hosts
from train import run as run_module
from train.config import Mesh, Pretrained, Profile, Stage
from train.feed import Reading
from train.record import METRICS
from train.rollout import Rollouts

pytestmark = pytest.mark.usefixtures("enough_devices")


def run(config, **options) -> int:
    return run_module.run(config, bindings.render(config), **options)


def steps(config) -> list[int]:
    return Checkpoints(Path(config.run_dir) / "checkpoints", warn=pytest.fail).steps()


def final_arrays(config) -> dict[str, bytes]:
    """Every array file of the last checkpoint, loaded as what it says it is."""
    from qwen_jax import model, sharding
    from train import optim

    checkpoint = Checkpoints(Path(config.run_dir) / "checkpoints", warn=pytest.fail).latest_valid()
    with jax.set_mesh(sharding.make_mesh(devices=jax.devices()[:1])):
        like = model.abstract(config.model_config)
        optimizer = jax.eval_shape(optim.adamw(config.optimizer).init, like)
        trees = checkpoint.load("params", like), checkpoint.load("optimizer", optimizer)
    return {
        jax.tree_util.keystr(path): np.asarray(x).tobytes() for path, x in jax.tree_util.tree_leaves_with_path(trees)
    }


@contextlib.contextmanager
def when_step(step, action):
    """Inside it, a run calls `action` as it is about to take its step number `step`, counted from 0."""
    with pytest.MonkeyPatch.context() as patch:
        for feed in (Reading, Rollouts):

            def batch(self, n, state, frozen, given=feed.batch):
                if n == step:
                    action()
                return given(self, n, state, frozen)

            patch.setattr(feed, "batch", batch)
        yield


def test_stopped_and_resumed_equals_unbroken_bit_for_bit(config, change, tmp_path):
    broken = change(config, "run_dir", str(tmp_path / "broken"))
    assert run(config) == 0
    with when_step(2, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        assert run(broken) == SAVED_PLEASE_RESTART
    assert steps(broken)[-1] == 3, "saved at the next step boundary, between the scheduled checkpoints"
    assert [row["step"] for row in record(broken)] == [1, 2, 3], "the evaluation of step 3 is left to the next start"
    assert run(broken, resume=True) == 0
    assert record(broken) == record(config)
    assert final_arrays(broken) == final_arrays(config)


def test_what_a_crash_wrote_beyond_its_checkpoint_is_written_once(config, change, tmp_path):
    broken = change(change(config, "run_dir", str(tmp_path / "broken")), "checkpoint.every", 3)

    def crash():
        raise RuntimeError("power cut")

    assert run(config) == 0
    with when_step(5, crash), pytest.raises(RuntimeError, match="power cut"):
        run(broken)
    path = Path(broken.run_dir) / METRICS
    assert (record(broken)[-1]["step"], steps(broken)) == (4, [3])
    path.write_bytes(path.read_bytes()[:-7])
    assert run(broken) == 0
    assert record(broken) == record(config)


def test_run_goes_on_with_another_mesh(config, change, tmp_path):
    """One device up to step 3, then eight: rows, weights and heads each split two ways."""
    moved = change(config, "run_dir", str(tmp_path / "moved"))
    assert run(config) == 0
    with when_step(2, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        run(moved)
    assert run(change(moved, "mesh", Mesh(data=2, fsdp=2, tensor=2)), resume=True) == 0
    # float32 sums in another order, and three steps of Adam on what they differ by
    for there, here in zip(record(moved), record(config), strict=True):
        assert there == pytest.approx(here, rel=1e-4)


def test_stages_follow_each_other_and_resume_bit_for_bit(config, change, tmp_path, capsys):
    """Stopped as the first stage ends, before its evaluation, and inside the second."""
    longer = dict(sequence_length=64, full_length=0.5, theta=1e5, batch_size=4)
    stage = Stage(from_step=3, **longer, accumulation=2, mesh=Mesh(context=2), remat="full")
    config = change(change(change(config, "model.num_layers", 1), "mesh", Mesh(fsdp=2)), "stages", (stage,))
    broken = change(config, "run_dir", str(tmp_path / "broken"))
    assert run(config) == 0
    shown = capsys.readouterr()
    assert "1 of 0 to 1, up to step 6" in shown.err and shown.out.count("bits per byte") == 1
    for stop_in in (2, 4):
        with when_step(stop_in, lambda: os.kill(os.getpid(), signal.SIGTERM)):
            assert run(broken) == SAVED_PLEASE_RESTART
        assert steps(broken)[-1] == stop_in + 1
    assert run(broken) == 0
    assert record(broken) == record(config)
    assert final_arrays(broken) == final_arrays(config)
    rows = record(config)
    assert [row["tokens"] for row in rows if "tokens" in row] == [128, 256, 384, 640, 896, 1152]
    assert [row["step"] for row in rows if "held_out_loss" in row] == [3, 6]
    models = [open_checkpoint(Path(config.run_dir) / "checkpoints" / f"{n:08}").read("model.json") for n in (3, 6)]
    made = [ModelConfig.from_json(model.decode()) for model in models]
    assert [(model.rope.theta, model.max_position) for model in made] == [(1e4, 32), (1e5, 64)]


def test_a_mixture_of_experts_trains_on_a_mesh_and_says_how_even_it_is(mixture, change):
    config = change(change(mixture, "mesh", Mesh(fsdp=2, expert=2)), "layers", "scan")
    assert run(config) == 0
    trained = [row for row in record(config) if "loss" in row]
    assert all(row.keys() >= {"balance", "z", "max_load"} for row in trained)
    assert all(1 <= row["max_load"] <= 4 / 2 for row in trained)
    assert trained[-1]["loss"] < trained[0]["loss"]


def test_a_run_begins_with_the_weights_of_another(config, change, tmp_path, monkeypatch):
    assert run(config) == 0
    begin, begun = run_module.pretrained_state, []

    def pretrained_state(*arguments, **options):
        state = begin(*arguments, **options)
        begun.append(jax.device_get((state.step, stack_layers(state.params))))
        return state

    monkeypatch.setattr(run_module, "pretrained_state", pretrained_state)
    again = change(change(config, "run_dir", str(tmp_path / "again")), "model", Pretrained(path=config.run_dir))
    again = change(again, "model.dtype", "float32")
    assert run(again) == 0
    [(step, params)] = begun
    parent = final_arrays(config)
    assert step == 0
    for path, x in jax.tree_util.tree_leaves_with_path((params,)):
        assert x.tobytes() == parent[jax.tree_util.keystr(path)]
    assert steps(again) == steps(config) and record(again)[0]["loss"] < record(config)[0]["loss"]
    other = change(change(again, "run_dir", str(tmp_path / "other")), "data.tokenizer.vocab_size", 262)
    with pytest.raises(DataError, match="of another tokenizer than .*run.*set data.tokenizer = @TokenizerFile"):
        run(other)
    assert not steps(other)


def test_interrupt_saves_and_says_130(config):
    with when_step(2, lambda: os.kill(os.getpid(), signal.SIGINT)):
        assert run(config) == INTERRUPTED
    assert steps(config)[-1] == 3
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("bad, saved", [(1, []), (3, [2])])
def test_first_non_finite_loss_ends_the_run_and_is_not_saved(config, monkeypatch, bad, saved):
    given = Reading.batch

    def poisoned(self, n, state, frozen):
        batch, known = given(self, n, state, frozen)
        return (batch | {"weights": batch["weights"] * np.float32("nan")} if n == bad else batch), known

    monkeypatch.setattr(Reading, "batch", poisoned)
    with pytest.raises(NumericalError, match=f"step {bad + 1}: the loss is nan"):
        run(config)
    assert steps(config) == saved
    assert record(config)[-1]["step"] == bad


def test_complete_run_only_reports(config, capsys):
    assert run(config) == 0
    before, first = record(config), capsys.readouterr().out
    assert run(config) == 0
    assert record(config) == before
    assert capsys.readouterr().out == first
    assert "bits per byte" in first and "python -m infer generate" in first
    assert (Path(config.run_dir) / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_other_config_is_refused_naming_the_field_and_both_values(config, change):
    assert run(config) == 0
    before = record(config)
    with pytest.raises(ConfigError, match=r"optimizer\.peak_lr was 0\.01 and is now 0\.02"):
        run(change(config, "optimizer.peak_lr", 0.02))
    assert record(config) == before
    assert run(change(config, "log_every", 2)) == 0


def test_resume_wants_a_checkpoint_and_fresh_an_empty_directory(config):
    with pytest.raises(ConfigError, match="--resume"):
        run(config, resume=True)
    (Path(config.run_dir) / "tokens").mkdir(parents=True)  # as train.data.show leaves it
    assert run(config, fresh=True) == 0
    with pytest.raises(ConfigError, match="--fresh"):
        run(config, fresh=True)


def test_unwritable_run_directory_is_found_before_anything_else(config, change, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(run_module, "prepare", pytest.fail)
    with pytest.raises(FileError, match="choose another run_dir"):
        run(change(config, "run_dir", str(tmp_path / "file" / "run")))


def test_vocabulary_smaller_than_the_tokenizer_is_refused(config, change):
    with pytest.raises(ConfigError, match=r"264 tokens and model\.vocab_size is 260"):
        run(change(config, "model.vocab_size", 260))


def test_a_few_steps_are_traced(config):
    run(dataclasses.replace(config, profile=Profile(steps=2, skip=1)))
    assert list(Path(config.run_dir).glob("profile/**/*.xplane.pb"))


def test_a_run_too_short_to_be_traced_says_so(config, capsys):
    run(dataclasses.replace(config, profile=Profile(steps=2, skip=99)))
    assert "nothing was traced: the run ended before step 99; lower profile.skip" in " ".join(
        capsys.readouterr().err.split()
    )


def test_attention_that_cannot_be_is_refused_before_data_is_prepared(config):
    with pytest.raises(ConfigError, match="attention='cudnn' cannot be used, since this mesh is of cpu"):
        run(dataclasses.replace(config, attention="cudnn"))
    assert not (Path(config.run_dir) / "tokenizer.json").exists()


def test_hosts_are_looked_for_where_there_are_tpus_and_nowhere_else(monkeypatch):
    calls, before = [], jax.config.jax_platforms

    def initialize(*arguments):
        calls.append(arguments)
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    monkeypatch.delenv("JAX_COORDINATOR_ADDRESS", raising=False)
    try:
        for platforms in ("cpu", "tpu,cpu"):
            jax.config.update("jax_platforms", platforms)
            hosts.join()
    finally:
        jax.config.update("jax_platforms", before)
    assert calls == [()]


@pytest.mark.parametrize("changes", [{"evaluation.samples": 1}, {"checkpoint.keep_best": True}])
def test_what_looks_at_held_out_text_wants_some(config, changes):
    ((path, value),) = changes.items()
    section, name = path.split(".")
    asked = dataclasses.replace(getattr(config, section), **{name: value})
    data = dataclasses.replace(config.data, held_out=0.0)
    config = dataclasses.replace(config, data=data, **{section: asked})
    with pytest.raises(ConfigError, match="looks at held-out text, and there is none; set data.held_out above 0"):
        run_module.run(config, bindings.render(config))
