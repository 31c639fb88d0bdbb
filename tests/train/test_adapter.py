"""Runs that train an adapter: what they change, what they keep, and what their model is afterwards."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qwen_jax import model
from qwen_jax.errors import SAVED_PLEASE_RESTART, ConfigError, ModelError
from qwen_jax.sharding import make_mesh
from qwen_jax.weights import convert
from qwen_jax.weights.load import load_adapter, load_params
from qwen_jax.weights.source import open_model
from tests.published import assert_close, logits, publish
from tests.train.conftest import record
from tests.train.test_run import run, when_step
from tests.train.test_step import batch
from train import adapter, objectives
from train.config import LoRA, Noise, Pretrained
from train.data.config import TokenizerFile
from train.step import State, configured

pytestmark = pytest.mark.usefixtures("enough_devices")


@pytest.fixture
def adapted(config, tmp_path):
    """A run beside a published base."""
    publish(tmp_path / "base", config.model_config, "qwen2")
    data = dataclasses.replace(config.data, tokenizer=TokenizerFile(path=str(tmp_path / "base" / "tokenizer.json")))
    config = dataclasses.replace(config, model=Pretrained(path=str(tmp_path / "base"), dtype="float32"), data=data)
    return dataclasses.replace(config, adapter=LoRA(rank=4, targets=("q_proj", "down_proj")), steps=4)


def test_a_stopped_run_goes_on_bit_for_bit_and_its_model_is_the_merged_one(adapted, change, tmp_path, mesh):
    noise = Noise(neftune_alpha=5.0, embedding_dropout=0.1, attention_dropout=0.1)
    config = dataclasses.replace(adapted, noise=noise, accumulation=2)
    broken = change(config, "run_dir", str(tmp_path / "broken"))
    assert run(config) == 0
    with when_step(2, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        assert run(broken) == SAVED_PLEASE_RESTART
    assert run(broken) == 0
    assert record(broken) == record(config)
    with open_model(config.run_dir) as here, open_model(broken.run_dir) as there:
        trained = here.adapter.arrays
        jax.tree.map(np.testing.assert_array_equal, trained, there.adapter.arrays)
        merged = load_params(here, dtype="float32", stacked=True)
        plain = load_params(here.base, dtype="float32", stacked=True)
        adapter = load_adapter(here.adapter, dtype="float32", stacked=True)
        beside = model.attach(plain, adapter, scale=16 / 4)
        side_files = here.side_files()
    assert all(path.endswith(("lora_a", "lora_b")) and array.any() for path, array in trained.items())
    tokens, positions = np.arange(16, dtype=np.int32)[None] * 7, np.arange(16, dtype=np.int32)[None]
    found, wanted, before = (logits(here.config, params, tokens, positions) for params in (merged, beside, plain))
    assert_close(found, wanted)
    assert np.abs(np.subtract(before, wanted)).max() > 1e-3
    assert "config.json" in side_files


def test_beside_a_quantised_base(adapted, change, tmp_path, capsys):
    """QLoRA, embeddings and all; what it made can be generated with and merged."""
    quantised, merged = tmp_path / "int4", tmp_path / "merged"
    assert convert.main([adapted.model.path, str(quantised), "--quantize", "int4-g8"]) == 0
    full = dataclasses.replace(adapted, model=Pretrained(path=str(quantised), dtype="float32"), adapter=None)
    with pytest.raises(ModelError, match="no gradient: train an adapter beside them with adapter = @LoRA"):
        run(full)
    config = dataclasses.replace(full, adapter=LoRA(rank=4, train_embeddings=True), layers="scan")
    assert run(change(config, "run_dir", str(tmp_path / "qlora"))) == 0
    rows = [row["loss"] for row in record(change(config, "run_dir", str(tmp_path / "qlora"))) if "loss" in row]
    assert rows[-1] < rows[0]
    assert convert.main([str(tmp_path / "qlora"), str(merged), "--dtype", "float32"]) == 0
    with open_model(tmp_path / "qlora") as ours, open_model(merged) as whole:
        assert "quantization_config" not in json.loads(whole.side_files()["config.json"])
        assert ours.adapter.arrays.keys() > {"embed/w"}
        assert whole.model_type == ours.model_type


@pytest.mark.parametrize("layers", ["scan", "unroll"])
def test_beside_a_quantised_embedding(adapted, tmp_path, layers):
    """It is looked up like any other. A head that is quantised too, or tables that are to be trained, are refused."""
    published = dataclasses.replace(adapted.model_config, tie_embeddings=False)
    publish(tmp_path / "untied", published, "qwen2")
    for name, base in (("tied", adapted.model.path), ("table", tmp_path / "untied")):
        assert convert.main([str(base), str(tmp_path / name), "--quantize", "int4-g8", "--quantize-embedding"]) == 0

    def on(name, run_dir, **more):
        base = Pretrained(path=str(tmp_path / name), dtype="float32")
        return dataclasses.replace(adapted, model=base, run_dir=str(tmp_path / run_dir), layers=layers, **more)

    with pytest.raises(ModelError, match="a quantised head, and training wants it whole"):
        run(on("tied", "head"))
    with pytest.raises(ModelError, match="a quantised embedding, and train_embeddings wants it whole"):
        run(on("table", "trained", adapter=LoRA(rank=4, train_embeddings=True)))
    assert run(on("table", "run")) == 0
    rows = [row["loss"] for row in record(on("table", "run")) if "loss" in row]
    assert rows[-1] < rows[0]


def values(config, mesh, *, unroll):
    """Loss, and the moments after a step, of an adapter that is not zero."""
    with jax.set_mesh(make_mesh(**mesh, devices=jax.devices()[: math.prod(mesh.values())])):
        _, optimizer, step = configured(config)
        split = lambda x: jax.NamedSharding(jax.sharding.get_mesh(), x.sharding.spec)
        waves = lambda x: jax.device_put(0.3 * np.cos(np.arange(x.size, dtype=np.float32)).reshape(x.shape), split(x))
        trained, frozen = jax.tree.map(waves, adapter.abstract(config.model_config, config.adapter))
        state = State(jnp.zeros((), jnp.int32), trained, jax.jit(optimizer.init)(trained))
        if unroll:
            state, frozen = model.unstack_layers((state, frozen))
        state, metrics = step(state, batch(config, config.accumulation), adapter.Frozen(base=frozen))
        moments = optax.tree_utils.tree_get(model.stack_layers(jax.device_get(state.optimizer)), "mu")
        return float(metrics["loss"]), jax.device_get(moments)


def test_the_step_is_the_same_on_a_mesh_and_in_both_layouts(config):
    """With its random numbers. Tables and matrices, all that can be trained."""
    config = dataclasses.replace(config, adapter=LoRA(rank=4, train_embeddings=True), noise=Noise(neftune_alpha=5.0))
    loss, moments = values(config, {}, unroll=True)
    other_loss, others = values(config, dict(fsdp=2, tensor=2), unroll=False)
    assert loss == pytest.approx(other_loss, rel=1e-5)
    assert moments.keys() == {"embed", "layers"}
    for one, other in zip(jax.tree.leaves(moments), jax.tree.leaves(others), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5 * np.abs(one).max())


@pytest.mark.usefixtures("mesh")
def test_every_field_of_an_adapter_changes_what_the_loss_is_of(config):
    def parameters(**fields):
        lora = LoRA(**{"rank": 4} | fields)
        trained, frozen = adapter.abstract(config.model_config, lora)
        joined = jax.eval_shape(
            adapter.join(lora), trained, adapter.Frozen(base=frozen), jax.eval_shape(jax.random.key, 0)
        )
        return str((jax.tree.structure(joined), jax.tree.map(jnp.shape, trained)))

    changes = [{}, {"rank": 2}, {"alpha": 8.0}, {"dropout": 0.0}, {"targets": ("v_proj",)}, {"train_embeddings": True}]
    assert len({parameters(**change) for change in changes}) == len(changes)


@pytest.mark.usefixtures("mesh")
def test_every_kind_of_noise_is_in_training_alone(config, change):
    config = change(config, "model.num_layers", 1)

    def program(*, key=True, **fields):
        ints = {
            name: jax.ShapeDtypeStruct((2, 8), jnp.int32) for name in ("tokens", "targets", "positions", "segments")
        }
        micro = ints | {"weights": jax.ShapeDtypeStruct((2, 8), jnp.float32)}
        micro |= {"key": jax.eval_shape(jax.random.key, 0)} if key else {}
        loss = objectives.make(dataclasses.replace(config, noise=Noise(**fields)))
        return str(jax.make_jaxpr(loss)(model.abstract(config.model_config), micro))

    every = dict(neftune_alpha=5.0, embedding_dropout=0.1, attention_dropout=0.1)
    changes = [{name: value} for name, value in every.items()]
    assert len({program(), *(program(**change) for change in changes)}) == 1 + len(changes)
    assert "random_bits" not in program(key=False, **every)


REFUSED = {
    "rank=0 must be at least 1": lambda config: LoRA(rank=0),
    "alpha=0.0 must be above 0": lambda config: LoRA(alpha=0.0),
    "dropout=1.0 must be at least 0 and below 1": lambda config: LoRA(dropout=1.0),
    "targets=.. adapts nothing": lambda config: LoRA(targets=()),
    "'c_attn' names no matrix of this model; there are q_proj": lambda config: dataclasses.replace(
        config, adapter=LoRA(targets=("c_attn",))
    ),
    "attention_dropout=-0.1 must be at least 0 and below 1": lambda config: Noise(attention_dropout=-0.1),
    "attention='pallas' has no dropout of attention": lambda config: run(
        dataclasses.replace(config, noise=Noise(attention_dropout=0.1), attention="pallas")
    ),
    "set model = @Pretrained": lambda config: run(dataclasses.replace(config, adapter=LoRA())),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_is_refused_before_anything_is_read(message, config):
    with pytest.raises(ConfigError, match=message):
        REFUSED[message](config)
