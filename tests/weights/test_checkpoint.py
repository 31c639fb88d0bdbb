"""Checkpoints when nothing goes wrong but the caller: what is saved comes back bit for bit, or is refused in words."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from qwen_jax.errors import ConfigError, FileError, ModelError
from qwen_jax.weights.checkpoint import Checkpoints, open_checkpoint
from qwen_jax.weights.manifest import Manifest

FILES = {"model.json": b'{"width": 4}\n', "config.gin": b"", "tokenizer.json": bytes(range(256))}


def make_params(seed: int = 0):
    random = np.random.default_rng(seed)
    return {
        "embed": {"w": jnp.asarray(random.normal(size=(16, 8)).astype(np.float32))},
        "layers": {"attention": {"q": {"w": jnp.asarray(random.normal(size=(3, 8, 4)).astype(jnp.bfloat16))}}},
        "final_norm": {"scale": jnp.asarray(np.array([1, -0.0, np.nan, np.inf, 1e-40, 0, seed], np.float32))},
    }


def make_state(params):
    """A state with namedtuples, an empty one, int32 scalars, and moments that are not zero."""
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.constant_schedule(1e-3)))
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x) + np.ones((), x.dtype)), optimizer.init(params))


def save(root: Path, step: int = 1, *, keep: int = 3, **items) -> Checkpoints:
    store = Checkpoints(root, keep=keep, warn=pytest.fail)
    items.setdefault("params", make_params(step))
    store.save(step, files=FILES, meta={"cursor": step}, **items)
    store.wait()
    return store


def bits(tree):
    return [(str(x.dtype), x.shape, np.asarray(x).tobytes()) for x in jax.tree.leaves(tree)]


def place(tree, sharding):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def test_all_comes_back_bit_for_bit(tmp_path):
    params = make_params()
    state = make_state(params)
    meta = {"cursor": {"epoch": 1, "row": 2**40}, "loss": 0.1, "none": None, "text": "é"}
    store = Checkpoints(tmp_path / "run" / "checkpoints", warn=pytest.fail)
    store.save(7, params=params, optimizer=state, files=FILES, meta=meta)
    store.wait()
    checkpoint = store.latest_valid()
    assert (checkpoint.step, checkpoint.meta, checkpoint.path.name) == (7, meta, "00000007")
    assert {name: checkpoint.read(name) for name in FILES} == FILES
    for item, tree in [("params", params), ("optimizer", state)]:
        loaded = checkpoint.load(item, tree)
        assert bits(loaded) == bits(tree)
        assert jax.tree.structure(loaded) == jax.tree.structure(tree)


def test_an_optimizer_without_arrays(tmp_path):
    state = optax.chain(optax.scale(1.0), optax.identity()).init(make_params())
    checkpoint = save(tmp_path, optimizer=state).latest_valid()
    assert checkpoint.load("optimizer", state) == state


@pytest.mark.parametrize("shape", [(8, 1), (2, 4), (1, 1)])
def test_arrays_land_on_the_shardings_asked(tmp_path, shape):
    saved_on = NamedSharding(jax.make_mesh((4, 2), ("a", "b")), PartitionSpec("b", "a"))
    params = {"w": jax.device_put(jnp.arange(64, dtype=jnp.float32).reshape(8, 8), saved_on)}
    devices = jax.devices()[: shape[0] * shape[1]]
    wanted = NamedSharding(jax.make_mesh(shape, ("a", "b"), devices=devices), PartitionSpec("a", "b"))
    loaded = save(tmp_path, params=params).latest_valid().load("params", place(params, wanted))
    assert loaded["w"].sharding == wanted
    assert bits(loaded) == bits(params)


def test_values_are_those_at_the_time_of_save(tmp_path):
    overwrite = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    overwrite(jnp.ones((512, 1024)))  # compiled before, so that the donation follows the save at once
    store = Checkpoints(tmp_path, warn=pytest.fail)
    meta, files = {"cursor": [1]}, {"a": b"1"}
    for step in range(1, 4):
        donated, deleted = jnp.full((512, 1024), float(step)), jnp.full((512, 1024), float(-step))
        store.save(step, params={"donated": donated, "deleted": deleted}, files=files, meta=meta)
        gone = overwrite(donated)
        deleted.delete()
        meta["cursor"].append(2)
        files["a"] = b"2"
        store.wait()
        checkpoint = store.latest_valid()
        loaded = checkpoint.load("params", {"donated": gone, "deleted": gone})
        assert (loaded["donated"] == step).all() and (loaded["deleted"] == -step).all()
        assert checkpoint.meta["cursor"] == [1] + [2] * (step - 1)
        assert checkpoint.read("a") == (b"1" if step == 1 else b"2")


def test_save_returns_early_and_the_next_one_waits(tmp_path, monkeypatch):
    store, go_on, seal = Checkpoints(tmp_path, warn=pytest.fail), threading.Event(), Manifest.seal

    def slow(*arguments, **keywords):
        go_on.wait(10)
        seal(*arguments, **keywords)

    monkeypatch.setattr(Manifest, "seal", slow)
    store.save(1, params=make_params(), files={}, meta={})
    assert store.steps() == [] and store.latest_valid() is None  # nothing is seen of what is not finished
    threading.Timer(0.2, go_on.set).start()
    store.save(2, params=make_params(), files={}, meta={})
    assert store.steps()[:1] == [1]
    store.wait()
    assert store.steps() == [1, 2]


def test_the_newest_steps_stay(tmp_path):
    for step in [9, 10, 100, 99999999, 100000000]:
        store = save(tmp_path, step, keep=2)
    assert store.steps() == [99999999, 100000000]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["100000000", "99999999"]
    with pytest.raises(ConfigError, match="keep=0"):
        Checkpoints(tmp_path, keep=0, warn=pytest.fail)


def test_a_step_is_not_overwritten(tmp_path):
    store = save(tmp_path)
    with pytest.raises(FileError, match="00000001 exists"):
        store.save(1, params=make_params(2), files={}, meta={})
    assert bits(store.latest_valid().load("params", make_params())) == bits(make_params(1))


def mismatch(item, stored, like, tmp_path):
    checkpoint = save(tmp_path, **{"params": make_params(), item: stored}).latest_valid()
    with pytest.raises(ModelError) as caught:
        checkpoint.load(item, like)
    assert "\n" not in str(caught.value) and "00000001" in str(caught.value)
    return str(caught.value)


def test_differences_are_named(tmp_path):
    stored = make_params()
    like = {
        "embed": {"w": jnp.zeros((16, 9))},
        "layers": {"attention": {"q": {"w": jnp.zeros((3, 8, 4))}, "k": {"w": jnp.zeros(2)}}},
    }
    message = mismatch("params", stored, like, tmp_path)
    assert "params/layers/attention/k/w is not in the checkpoint" in message
    assert "params/final_norm/scale is in the checkpoint only" in message
    assert "params/embed/w has shape [16, 8] in the checkpoint, [16, 9] is asked" in message
    assert message.endswith("and 1 more")


@pytest.mark.parametrize("stored, asked", [("float32", "bfloat16"), ("bfloat16", "float32"), ("int32", "float32")])
def test_nothing_is_cast(tmp_path, stored, asked):
    message = mismatch("params", {"w": jnp.ones(4, stored)}, {"w": jnp.ones(4, asked)}, tmp_path)
    assert f"params/w has dtype {stored} in the checkpoint, {asked} is asked" in message


def test_another_optimizer_is_refused(tmp_path):
    params = make_params()
    message = mismatch("optimizer", make_state(params), optax.chain(optax.adam(1.0)).init(params), tmp_path)
    assert "optimizer/0/0/count is not in the checkpoint" in message
    checkpoint = save(tmp_path / "weights").latest_valid()
    with pytest.raises(ModelError, match="has params but no optimizer"):
        checkpoint.load("optimizer", make_state(params))


def test_what_cannot_be_stored_is_refused_at_once(tmp_path):
    store = Checkpoints(tmp_path, warn=pytest.fail)
    with pytest.raises(ValueError):
        store.save(1, params=make_params(), files={}, meta={"loss": float("nan")})
    with pytest.raises(ValueError, match="same path"):
        store.save(1, params={"a/b": jnp.ones(1), "a": {"b": jnp.ones(1)}}, files={}, meta={})
    for name in ["manifest.json", "arrays", "a/b"]:
        with pytest.raises(ValueError, match=name):
            store.save(1, params=make_params(), files={name: b""}, meta={})
    assert not list(tmp_path.iterdir())


def test_open_takes_a_step_a_store_or_a_run(tmp_path):
    root = tmp_path / "run" / "checkpoints"
    save(root, 1), save(root, 2)
    for path, step in [(root / "00000001", 1), (root, 2), (tmp_path / "run", 2)]:
        checkpoint = open_checkpoint(path)
        assert checkpoint.step == step
        assert bits(checkpoint.load("params", make_params())) == bits(make_params(step))
    moved = (root / "00000001").rename(tmp_path / "best")
    assert open_checkpoint(moved).step == 1


def test_open_says_what_it_looked_for(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    with pytest.raises(FileError, match="missing does not exist"):
        open_checkpoint(tmp_path / "missing")
    for name in ["empty", "empty/checkpoints"]:
        with pytest.raises(ModelError, match="not a checkpoint: it has no manifest.json"):
            open_checkpoint(tmp_path / name)
    with pytest.raises(FileError, match="Not a directory"):
        open_checkpoint(tmp_path / "file")


def test_unknown_file(tmp_path):
    checkpoint = save(tmp_path).latest_valid()
    for name in ["vocab.json", "../00000001/model.json", "arrays/params/_METADATA"]:
        with pytest.raises(ModelError, match="config.gin, model.json, tokenizer.json"):
            checkpoint.read(name)


@pytest.mark.parametrize("name", ["with space", "ünï😀", "~/run", "link/run", "trailing/"])
def test_paths(tmp_path, monkeypatch, name):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to("target")
    assert save(Path(name)).latest_valid().step == 1
    assert bits(open_checkpoint(Path(name)).load("params", make_params())) == bits(make_params(1))


def test_orbax_is_not_imported_before_it_is_needed():
    code = "import sys, qwen_jax.weights; sys.exit('orbax' in sys.modules or 'jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0
