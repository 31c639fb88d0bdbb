"""Runs on preferences: what they measure, go on with and leave behind."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
from pathlib import Path

import numpy as np
import pytest

from infer.__main__ import main as infer
from qwen_jax import bindings
from qwen_jax.config import Score
from qwen_jax.errors import SAVED_PLEASE_RESTART, ConfigError, FileError, ModelError
from qwen_jax.weights import convert
from qwen_jax.weights.source import open_model
from tests.published import publish
from tests.train.conftest import record
from tests.train.test_hosts import TIMEOUT, forget, run_on, started
from tests.train.test_run import final_arrays, run, when_step
from train.alignment import DPO, Reward
from train.config import LoRA, Mesh, Pretrained
from train.data import Preferences, show
from train.data.config import TokenizerFile

pytestmark = pytest.mark.usefixtures("enough_devices")


@pytest.fixture
def pairs(config, tmp_path):
    """The tiny run on pairs, from a published model; rows hold one or two of them."""
    rows = [{"prompt": f"{n}?", "chosen": f" {n % 7}.", "rejected": f" {n % 7}!"} for n in range(40)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shape = dataclasses.replace(config.model, num_layers=1)
    publish(tmp_path / "start", shape, "qwen2")
    data = dataclasses.replace(
        config.data,
        source=Preferences(path=str(tmp_path / "pairs.jsonl"), format="qwen2"),
        tokenizer=TokenizerFile(path=str(tmp_path / "start")),
        tokens=str(tmp_path / "tokens"),
        sequence_length=32,
    )
    start = Pretrained(path=str(tmp_path / "start"), dtype="float32")
    return dataclasses.replace(config, model=start, data=data, batch_size=4, steps=4, objective=DPO())


@pytest.mark.parametrize("adapter", [None, LoRA(rank=2, targets=("q_proj",), train_embeddings=True)])
def test_dpo_begins_at_log_2_and_goes_on_bit_for_bit(pairs, change, tmp_path, adapter):
    config = dataclasses.replace(pairs, adapter=adapter)
    broken = change(config, "run_dir", str(tmp_path / "broken"))
    assert run(config) == 0
    with when_step(2, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        assert run(broken) == SAVED_PLEASE_RESTART
    assert run(broken) == 0
    rows = record(config)
    assert record(broken) == rows
    assert rows[0]["loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert {"accuracy", "margin", "chosen", "rejected", "log_ratio"} <= rows[0].keys()
    last = rows[-1]
    assert last["held_out_loss"] < math.log(2) and last["held_out_margin"] > 0
    assert last["held_out_margin"] == pytest.approx(last["held_out_chosen"] - last["held_out_rejected"], abs=1e-6)
    assert (Path(config.run_dir) / "loss.png").exists()
    if adapter is None:
        assert final_arrays(broken) == final_arrays(config)


def test_a_reward_model_is_trained_published_and_scores(pairs, tmp_path, capsys):
    config = dataclasses.replace(pairs, objective=Reward())
    assert run(config) == 0
    out = capsys.readouterr()
    assert "held-out accuracy" in out.out and f"infer score {config.run_dir}" in out.out
    exported = tmp_path / "exported"
    assert convert.main([config.run_dir, str(exported)]) == 0
    about = json.loads((exported / "config.json").read_text())
    assert about["architectures"] == ["Qwen2ForSequenceClassification"] and "pad_token_id" in about
    with open_model(exported) as model:
        assert model.config.score == Score(labels=1, hidden=False)
    texts = [f"{n}? {n % 7}{end}" for n in range(3) for end in ".!"]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    ask = lambda model, *more: infer(["score", str(model), "--input", str(tmp_path / "texts.jsonl"), *more])
    assert ask(exported, "--output", str(tmp_path / "scores.jsonl"), "--batch-size", "4") == 0
    rows = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == texts
    capsys.readouterr()
    assert ask(config.run_dir) == 0
    here = [json.loads(line)["score"] for line in capsys.readouterr().out.splitlines()]
    np.testing.assert_allclose(here, [row["score"] for row in rows], rtol=1e-5, atol=1e-6)
    assert len(set(here)) == len(here)
    with pytest.raises(ModelError, match="is a language model and scores nothing"):
        ask(pairs.model.path)


def test_what_compares_begins_with_weights(pairs):
    with pytest.raises(ConfigError, match="objective DPO compares with the model that the run begins with: set model"):
        run(dataclasses.replace(pairs, model=pairs.model_config))


def test_rows_of_pairs_are_shown(pairs, tmp_path, capsys):
    (tmp_path / "a.gin").write_text(bindings.render(pairs))
    assert show.main([str(tmp_path / "a.gin"), "--rows", "1"]) == 0
    out = capsys.readouterr().out
    assert ", of prompt 1: good" in out and ", of prompt 1: bad" in out


def test_a_new_score_is_the_one_that_its_objective_asks_for(pairs):
    asked = dataclasses.replace(pairs, objective=Reward(hidden=True))
    assert asked.model_config.score == Score(labels=1, hidden=True)
    assert pairs.model_config.score is None


@pytest.mark.parametrize("adapter", [None, LoRA(rank=2, targets=("q_proj",), dropout=0.0)])
def test_a_reference_computed_before_is_the_one_computed_on_the_way(pairs, change, tmp_path, adapter):
    live = dataclasses.replace(pairs, adapter=adapter)
    before = change(live, "run_dir", str(tmp_path / "before"))
    before = dataclasses.replace(before, objective=DPO(reference="precomputed"))
    assert run(live) == 0
    with when_step(2, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        assert run(before) == SAVED_PLEASE_RESTART
    assert len(list((tmp_path / "before" / "reference").glob("*.npy"))) == 2
    assert run(before) == 0
    for one, other in zip(record(before), record(live), strict=True):
        assert one == pytest.approx(other, rel=1e-5, abs=1e-6)


def test_two_hosts_compute_a_reference_and_both_end_where_it_cannot_be_written(pairs, change, tmp_path):
    config = dataclasses.replace(change(pairs, "mesh", Mesh(data=2)), objective=DPO(reference="precomputed"))
    moved = change(config, "run_dir", str(tmp_path / "moved"))
    assert run(config) == 0
    run_on(moved, tmp_path, hosts=2, devices=1)
    assert record(moved) == record(config)
    for path in (tmp_path / "moved" / "reference").glob("*.npy"):
        path.unlink()
        path.with_suffix(".partial").mkdir()  # where the file would be written
    forget(moved, 4)
    file = tmp_path / "again.gin"
    file.write_text(bindings.render(moved))
    with started(file, hosts=2, devices=1) as processes:
        for process in processes:
            _, errors = process.communicate(timeout=TIMEOUT)
            assert process.returncode == FileError.exit_code and "cannot write" in errors, errors
