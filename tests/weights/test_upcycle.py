"""A mixture of experts made of a dense model: where each number is from."""

from __future__ import annotations

import numpy as np
import pytest

from qwen_jax.config import Moe
from qwen_jax.errors import ConfigError, ModelError
from qwen_jax.weights import source as sources
from qwen_jax.weights.source import open_model
from qwen_jax.weights.upcycle import Upcycled, main
from qwen_jax.weights.verify import certify
from tests.conftest import tiny_config
from tests.published import publish

SIZES = ["--experts", "6", "--top-k", "2", "--expert-ffn", "16"]
SHARED = ["--shared-ffn", "50"]


@pytest.fixture
def dense(tmp_path):
    """40 inner columns: six experts of 16 are two copies of them and a part of a third."""
    return tmp_path / "dense", publish(tmp_path / "dense", tiny_config(vocab_size=260, num_layers=2), "qwen2")


def upcycled(dense, target, *options):
    assert main([str(dense), str(target), *SIZES, *SHARED, "--to", "hf", *options]) == 0
    model = open_model(target)
    return model, {tensor.name: model.files.read(tensor.name, (slice(0, tensor.shape[0]),)) for tensor in model.table}


def columns(tensors, prefix):
    """Of an MLP, one row for each inner column: what it takes in, twice, and what it adds."""
    gate, up, down = (tensors[f"{prefix}{name}_proj.weight"] for name in ("gate", "up", "down"))
    return np.concatenate([gate, up, down.T], axis=1)


def test_experts_are_slices_of_shuffled_copies(dense, tmp_path):
    folder, tensors = dense
    _, made = upcycled(folder, tmp_path / "out", "--reinit", "0")
    for layer in range(2):
        prefix = f"model.layers.{layer}.mlp."
        all_columns = columns(tensors, prefix)
        number = {row.tobytes(): i for i, row in enumerate(all_columns)}
        experts = np.concatenate([columns(made, f"{prefix}experts.{e}.") for e in range(6)])
        cut = [number[row.tobytes()] for row in experts]
        for copy in (cut[:40], cut[40:80]):
            assert sorted(copy) == list(range(40)) != copy
        assert cut[:40] != cut[40:80] and len(set(cut[80:])) == 16
        shared = [number[row.tobytes()] for row in columns(made, f"{prefix}shared_expert.")]
        assert sorted(shared[:40]) == list(range(40)) and shared[:40] != cut[:40]
    for name in tensors.keys() & made.keys():
        np.testing.assert_array_equal(made[name], tensors[name])
    assert made.keys() - tensors.keys() == {name for name in made if ".mlp." in name}


def test_a_part_of_the_experts_is_drawn_anew(dense, tmp_path):
    folder, _ = dense
    _, kept = upcycled(folder, tmp_path / "kept", "--reinit", "0")
    _, made = upcycled(folder, tmp_path / "made", "--reinit", "0.25")
    names = [name for name in made if ".experts." in name]
    new = np.concatenate([(made[name] != kept[name]).ravel() for name in names])
    assert new.mean() == pytest.approx(0.25, abs=0.02)
    for kind, std in {"gate_proj": 32**-0.5, "down_proj": (16 * 4) ** -0.5}.items():
        drawn = np.concatenate([made[name][made[name] != kept[name]] for name in names if kind in name])
        assert drawn.std() == pytest.approx(std, rel=0.1) and abs(drawn.mean()) < std / 10
    router = made["model.layers.1.mlp.gate.weight"]
    assert router.shape == (6, 32) and router.std() == pytest.approx(32**-0.5, rel=0.2)
    assert not np.array_equal(router, made["model.layers.0.mlp.gate.weight"])


def test_pieces_of_any_size_are_of_the_same_model(dense, monkeypatch):
    moe = Moe(num_experts=6, top_k=2, expert_width=16, shared_width=50, normalize_top_k=False)
    with open_model(dense[0]) as opened:
        certificates = []
        for size, seed in ((2**20, 1), (500, 1), (2**20, 2)):
            monkeypatch.setattr(sources, "PIECE_BYTES", size)
            certificates.append(certify(Upcycled(opened, moe, reinit=0.5, seed=seed)))
    assert certificates[0] == certificates[1] != certificates[2]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (SIZES, ModelError, "'qwen2_moe' has a shared expert, and this model shared_width=0"),
        ([*SIZES, *SHARED, "--reinit", "2"], ConfigError, "--reinit 2.0 must be between 0 and 1"),
        ([*SIZES, *SHARED, "--top-k", "7"], ConfigError, "top_k=7 must not exceed num_experts=6"),
    ],
)
def test_what_cannot_be_is_refused(dense, tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        main([str(dense[0]), str(tmp_path / "out"), *options])


def test_only_dense_models_become_mixtures(dense, tmp_path):
    upcycled(dense[0], tmp_path / "once")
    with pytest.raises(ModelError, match="is a qwen2_moe; a qwen2 or qwen3 can become"):
        main([str(tmp_path / "once"), str(tmp_path / "twice"), *SIZES, *SHARED])
