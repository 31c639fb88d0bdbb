"""Published folders to checkpoints and back: the same bytes, or a reason."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from qwen_jax import sharding
from qwen_jax.config import Moe, Score
from qwen_jax.errors import ConfigError, FileError, ModelError
from qwen_jax.model import abstract, stack_layers
from qwen_jax.weights import convert as command
from qwen_jax.weights import source as sources
from qwen_jax.weights.checkpoint import Checkpoints, open_checkpoint
from qwen_jax.weights.convert import CERTIFICATE, convert
from qwen_jax.weights.load import load_params
from qwen_jax.weights.sinks import PublishedSink
from qwen_jax.weights.source import SIDE_FILES, open_model, read_config
from qwen_jax.weights.verify import main as verify
from tests.conftest import tiny_config
from tests.published import publish, save_safetensors, tiny_tokenizer

SHAPE = dict(vocab_size=260, head_dim=10)
MODELS = {
    "qwen1": ("qwen", tiny_config(**SHAPE | dict(head_dim=8, num_kv_heads=4, tie_embeddings=False))),
    "qwen2 tied": ("qwen2", tiny_config(**SHAPE)),
    "qwen2 untied": ("qwen2", tiny_config(**SHAPE, tie_embeddings=False, num_kv_heads=1)),
    "qwen3": ("qwen3", tiny_config(**SHAPE, qk_norm=True, qkv_bias=False)),
    "qwen2 experts": (
        "qwen2_moe",
        tiny_config(
            **SHAPE,
            num_layers=2,
            mlp_width=0,
            moe=Moe(num_experts=4, top_k=2, expert_width=12, shared_width=20, normalize_top_k=False),
        ),
    ),
    "reward": ("qwen2", tiny_config(**SHAPE, score=Score(labels=1, hidden=True))),
    "classifier": ("qwen2", tiny_config(**SHAPE, score=Score(labels=3, hidden=False))),
}


def quiet(line: str) -> None:
    pass


def to(form: str, source: Path, target: Path, dtype: str | None = None) -> Path:
    convert(open_model(source), target, to=form, dtype=dtype, say=quiet)
    return target


@pytest.fixture(params=MODELS)
def published(request, tmp_path):
    model_type, config = MODELS[request.param]
    tensors = publish(tmp_path / "published", config, model_type, files=2)
    return tmp_path / "published", config, tensors


def test_there_and_back_is_byte_identical(published, tmp_path):
    folder, _, _ = published
    back = to("hf", to("native", folder, tmp_path / "native"), tmp_path / "back")
    for path in folder.iterdir():
        assert (back / path.name).read_bytes() == path.read_bytes(), path.name
    assert {path.name for path in back.iterdir()} == {path.name for path in folder.iterdir()} | {CERTIFICATE}
    assert verify([str(folder), str(tmp_path / "native")]) == 0
    assert read_config(tmp_path / "native") == read_config(folder) == open_model(folder).config


def test_small_pieces_make_the_same_files(tmp_path, monkeypatch):
    model_type, config = MODELS["qwen1"]
    publish(tmp_path / "published", config, model_type)
    monkeypatch.setattr(sources, "PIECE_BYTES", 1000)  # a few rows at a time, and cut between heads
    back = to("hf", to("native", tmp_path / "published", tmp_path / "native"), tmp_path / "back")
    assert (back / "model.safetensors").read_bytes() == (tmp_path / "published/model.safetensors").read_bytes()


@pytest.mark.parametrize("axes", [{}, dict(fsdp=2, tensor=2)], ids=["one device", "fsdp 2, tensor 2"])
def test_a_checkpoint_and_its_published_form_load_equal(published, tmp_path, axes):
    folder, config, _ = published
    native = to("native", folder, tmp_path / "native")
    if config.num_kv_heads == 1 and axes:
        pytest.skip("covered with two kv heads")
    if config.moe and axes:
        axes = dict(fsdp=2, expert=2)
    count = 4 if axes else 1
    with jax.set_mesh(sharding.make_mesh(**axes, devices=jax.devices()[:count])):
        ours, theirs = (load_params(open_model(p), dtype="float32", stacked=True) for p in (native, folder))
        single = load_params(open_model(folder), dtype="float32", stacked=False)
        wanted = abstract(config)
        for other in (theirs, stack_layers(single)):
            jax.tree.map(np.testing.assert_array_equal, ours, other)
        same_split = jax.tree.map(lambda x, like: x.sharding.spec == like.sharding.spec, theirs, wanted)
        assert jax.tree.all(same_split)


def test_each_expert_is_where_the_model_looks_for_it(tmp_path, mesh):
    model_type, config = MODELS["qwen2 experts"]
    tensors = publish(tmp_path / "published", config, model_type)
    params = load_params(open_model(tmp_path / "published"), dtype="float32", stacked=True)
    for ours, theirs in {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}.items():
        found = params["layers"]["mlp"]["experts"][ours]["w"]
        for layer, expert in ((0, 3), (1, 0), (1, 2)):
            name = f"model.layers.{layer}.mlp.experts.{expert}.{theirs}.weight"
            np.testing.assert_array_equal(found[layer, expert], tensors[name])


def test_each_published_tensor_is_where_the_model_looks_for_it(tmp_path, mesh):
    _, config = MODELS["qwen1"]
    tensors = publish(tmp_path / "published", config, "qwen")
    params = load_params(open_model(tmp_path / "published"), dtype="float32", stacked=True)
    layer = params["layers"]
    q, k, v = np.split(tensors["transformer.h.2.attn.c_attn.weight"], 3)
    for name, rows in (("q", q), ("k", k), ("v", v)):
        np.testing.assert_array_equal(layer["attention"][name]["w"][2].reshape(rows.shape), rows)
    np.testing.assert_array_equal(layer["mlp"]["up"]["w"][1], tensors["transformer.h.1.mlp.w1.weight"])
    np.testing.assert_array_equal(layer["mlp"]["gate"]["w"][1], tensors["transformer.h.1.mlp.w2.weight"])


def test_a_slice_is_read_and_no_more(tmp_path, mesh, monkeypatch):
    _, config = MODELS["qwen2 untied"]
    publish(tmp_path / "published", config, "qwen2")
    model, counted = open_model(tmp_path / "published"), []
    read = model.files.read
    monkeypatch.setattr(model.files, "read", lambda name, index: counted.append(out := read(name, index)) or out)
    from qwen_jax.weights.load import _parts, _reader

    part = _reader(model, _parts(model.table))
    got = part("layers/mlp/gate/w", (3, 40, 32), (slice(1, 3), slice(10, 20), slice(16, 32)))
    assert got.shape == (2, 10, 16)
    assert sum(out.nbytes for out in counted) == got.nbytes


def test_cast(tmp_path):
    model_type, config = MODELS["qwen3"]
    tensors = publish(tmp_path / "published", config, model_type)
    native = to("native", tmp_path / "published", tmp_path / "native", "bfloat16")
    assert open_model(native).config == dataclasses.replace(config, param_dtype="bfloat16", dtype="bfloat16")
    back = to("hf", native, tmp_path / "back", "float32")
    model = open_model(back)
    assert json.loads((back / "config.json").read_text())["torch_dtype"] == "float32"
    for name, array in tensors.items():
        rounded = array.astype("bfloat16").astype(np.float32)
        np.testing.assert_array_equal(model.files.read(name), rounded)


def test_weights_of_two_types_need_a_choice(tmp_path):
    model_type, config = MODELS["qwen2 tied"]
    tensors = publish(tmp_path / "published", config, model_type)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float16)
    save_safetensors(tmp_path / "published/model.safetensors", tensors)
    with pytest.raises(ModelError, match="float16 and float32.*--dtype"):
        to("native", tmp_path / "published", tmp_path / "native")
    back = to("hf", tmp_path / "published", tmp_path / "back")
    assert (back / "model.safetensors").read_bytes() == (tmp_path / "published/model.safetensors").read_bytes()


def test_a_tied_head_that_is_stored_too(tmp_path):
    model_type, config = MODELS["qwen2 tied"]
    tensors = publish(tmp_path / "published", config, model_type)
    path = tmp_path / "published/model.safetensors"
    save_safetensors(path, {"lm_head.weight": tensors["model.embed_tokens.weight"], **tensors})
    back = to("hf", to("native", tmp_path / "published", tmp_path / "native"), tmp_path / "back")
    assert (back / "model.safetensors").read_bytes() == path.read_bytes()
    save_safetensors(path, {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1, **tensors})
    with pytest.raises(ModelError, match="lm_head.weight differs from model.embed_tokens.weight"):
        open_model(tmp_path / "published")


def test_old_buffers_are_left_out(tmp_path):
    model_type, config = MODELS["qwen1"]
    tensors = publish(tmp_path / "published", config, model_type)
    path = tmp_path / "published/model.safetensors"
    save_safetensors(path, {**tensors, "transformer.h.0.attn.rotary_emb.inv_freq": np.ones(4, np.float32)})
    back = to("hf", tmp_path / "published", tmp_path / "back")
    assert set(open_model(back).files.tensors) == set(tensors)


@pytest.fixture
def run(tmp_path, mesh):
    """A checkpoint as training leaves it."""
    config = tiny_config(**SHAPE)
    params = jax.jit(lambda: jax.tree.map(lambda s: jax.numpy.ones(s.shape, s.dtype), abstract(config)))()

    def save(**meta) -> Path:
        checkpoints = Checkpoints(tmp_path / "run/checkpoints", warn=quiet)
        files = {"model.json": config.to_json().encode(), "tokenizer.json": tiny_tokenizer().to_bytes()}
        checkpoints.save(len(checkpoints.steps()), params=params, files=files, meta=meta)
        checkpoints.wait()
        return tmp_path / "run"

    return save


@pytest.mark.parametrize(
    ("meta", "ends", "last"), [({}, [257], "<|endoftext|>"), ({"chat": True}, [259, 257], "<|im_end|>")]
)
def test_a_run_is_published_with_where_it_ends(run, tmp_path, meta, ends, last):
    assert [tiny_tokenizer().control[t] for t in ("<|endoftext|>", "<|im_end|>")] == [257, 259]
    back = to("hf", run(**meta), tmp_path / "back")
    read = lambda name: json.loads((back / name).read_text())
    assert read("generation_config.json") == {"pad_token_id": 257, "eos_token_id": ends}
    assert read("config.json")["eos_token_id"] == ends[0]
    assert read("tokenizer_config.json")["eos_token"] == last
    assert verify([str(tmp_path / "run"), str(back)]) == 0


def test_a_certificate_tells_models_apart(tmp_path):
    model_type, config = MODELS["qwen2 tied"]
    for seed, name in enumerate("ab"):
        publish(tmp_path / name, config, model_type, seed=seed)
    with pytest.raises(ModelError, match="model.embed_tokens.weight has other values"):
        verify([str(tmp_path / "a"), str(tmp_path / "b")])
    assert verify([str(tmp_path / "a"), str(tmp_path / "a"), "--output", str(tmp_path / "out.json")]) == 0
    entry = json.loads((tmp_path / "out.json").read_text())["model.norm.weight"]
    assert entry["shape"] == [32] and entry["dtype"] == "float32" and len(entry["blake2b"]) == 64


def test_where_it_cannot_be_written(tmp_path):
    model_type, config = MODELS["qwen2 tied"]
    folder = tmp_path / "published"
    publish(folder, config, model_type)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    for target, error, message in [
        (folder, ConfigError, "overlap"),
        (folder / "inside", ConfigError, "overlap"),
        (tmp_path, ConfigError, "overlap"),
        (tmp_path / "full", FileError, "not an empty folder"),
        (tmp_path / "full/file", FileError, "not an empty folder"),
        (Path("/proc/none"), FileError, "cannot be written"),
    ]:
        with pytest.raises(error, match=message):
            to("native", folder, target)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full", "published"]


def test_a_disk_without_room_is_noticed_first(tmp_path, monkeypatch):
    model_type, config = MODELS["qwen2 tied"]
    publish(tmp_path / "published", config, model_type)
    monkeypatch.setattr(command.shutil, "disk_usage", lambda path: type("", (), dict(free=1000)))
    with pytest.raises(FileError, match="GB left; make room"):
        to("hf", tmp_path / "published", tmp_path / "back")
    assert not list(tmp_path.glob("*back*")) and not list(tmp_path.glob(".*back*"))


@pytest.mark.parametrize("form", ["hf", "native"])
def test_a_conversion_that_is_cut_leaves_nothing(tmp_path, monkeypatch, form):
    model_type, config = MODELS["qwen2 tied"]
    publish(tmp_path / "published", config, model_type)
    model = open_model(tmp_path / "published")
    read, calls = model.read, []

    def cut(piece):
        calls.append(piece)
        if len(calls) > 5:
            raise KeyboardInterrupt
        return read(piece)

    monkeypatch.setattr(model, "read", cut)
    with pytest.raises(KeyboardInterrupt):
        convert(model, tmp_path / "out", to=form, dtype=None, say=quiet)
    assert [p.name for p in tmp_path.iterdir()] == ["published"]
    # What a killed one leaves behind is in the way of nobody.
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial/model.safetensors").write_text("half")
    to(form, tmp_path / "published", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "published"]


def test_what_reads_back_wrong_is_not_kept(tmp_path, monkeypatch):
    model_type, config = MODELS["qwen2 tied"]
    publish(tmp_path / "published", config, model_type)
    write = PublishedSink.write
    monkeypatch.setattr(PublishedSink, "write", lambda self, piece, values: write(self, piece, values * 2))
    with pytest.raises(ModelError, match="reads back with other values"):
        to("hf", tmp_path / "published", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["published"]


def test_side_files_are_those_that_are_known(tmp_path):
    model_type, config = MODELS["qwen2 tied"]
    publish(tmp_path / "published", config, model_type)
    for name in ("LICENSE", "modeling_qwen.py", "README.md", "extra.json"):
        (tmp_path / "published" / name).write_text("text")
    native = to("native", tmp_path / "published", tmp_path / "native")
    kept = set(open_checkpoint(native).files)
    assert "LICENSE" in kept and not kept & {"modeling_qwen.py", "README.md", "extra.json"}
    assert kept <= {*SIDE_FILES, "model.json"}


def test_weights_without_a_config_are_named(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(FileError, match="has weights and no config.json"):
        open_model(tmp_path)
