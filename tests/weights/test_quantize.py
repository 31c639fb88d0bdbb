"""Models that are quantised here: what of them is, how far it is off, and that others read the same."""

from __future__ import annotations

import json

import numpy as np
import pytest

from qwen_jax.command import run_command
from qwen_jax.weights import convert, verify
from qwen_jax.weights.source import open_model
from tests.published import publish
from tests.weights.test_quantized import DENSE, EXPERTS, QWEN1, TIED, UP, spoil

MODELS = {
    "dense": ("qwen2", DENSE),
    "tied": ("qwen2", TIED),
    "experts": ("qwen2_moe", EXPERTS),
    "Qwen1": ("qwen", QWEN1),
}
KEPT = ("embed", "wte", "norm", "ln_", "bias", "mlp.gate.weight", "shared_expert_gate")


def run(*arguments) -> int:
    return run_command("convert", lambda: convert.main(list(map(str, arguments))))


def numbers(tensors: dict[str, np.ndarray], stem: str, bits: int) -> np.ndarray:
    """What GPTQ's tensors stand for [outputs, inputs], word by word, as AutoGPTQ has it."""
    n, mask = 32 // bits, 2**bits - 1
    qweight, qzeros, scales, g_idx = (tensors[f"{stem}.{end}"] for end in ("qweight", "qzeros", "scales", "g_idx"))
    found = np.zeros((len(g_idx), qweight.shape[1]), np.float32)
    for i, group in enumerate(g_idx):
        for o in range(found.shape[1]):
            q = int(qweight[i // n, o]) >> bits * (i % n) & mask
            zero = (int(qzeros[group, o // n]) >> bits * (o % n) & mask) + 1
            found[i, o] = (q - zero) * np.float32(scales[group, o])
    return found.T


@pytest.mark.parametrize(
    "model, how, apart",
    [
        ("dense", "int4-g16", ["head"]),
        ("dense", "int4-g16", ["head", "embedding"]),
        ("tied", "int4-g16", ["embedding"]),
        ("experts", "int8", []),
        ("Qwen1", "int4-g8", []),
        ("Qwen1", "int4-g8", ["embedding"]),
    ],
)
def test_matrices_are_rounded_and_all_else_is_kept(tmp_path, capfd, model, how, apart):
    model_type, config = MODELS[model]
    named = publish(tmp_path / "model", config, model_type)
    assert run(tmp_path / "model", tmp_path / "out", "--quantize", how, *[f"--quantize-{each}" for each in apart]) == 0
    assert "are quantised: " in capfd.readouterr().err
    source = open_model(tmp_path / "out")
    assert source.config == config
    tensors = {name: source.files.read(name) for name in source.files.tensors}
    bits, group = int(how[3]), int(how.partition("-g")[2] or 0)
    for name, array in named.items():
        is_head, is_embedding = name == "lm_head.weight", "embed" in name or "wte" in name
        if any(kept in name for kept in KEPT) or (is_head and "head" not in apart):
            if not (is_embedding and "embedding" in apart):
                np.testing.assert_array_equal(tensors[name], array, err_msg=name)
                continue
        stem, own = name.removesuffix(".weight"), 8 if is_head or is_embedding else bits
        size = array.shape[1] if is_embedding or not group else group
        found = numbers(tensors, stem, own)
        largest = np.abs(array.reshape(len(array), -1, size)).max(-1)
        # As others round: the largest of a group is half a step out of range. Ours loses no more than that.
        step = np.repeat(largest / (2 ** (own - 1) - 0.5), size, axis=1)
        plain = np.clip(np.round(array / step), -(2 ** (own - 1)), 2 ** (own - 1) - 1) * step
        assert np.square(found - array).sum() <= 1.001 * np.square(plain - array).sum(), name
    said = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert (said["bits"], said["group_size"], said["lm_head"]) == (bits, group or -1, "head" in apart)


def test_a_tied_head_is_the_embedding(tmp_path, capfd):
    publish(tmp_path / "model", TIED, "qwen2")
    assert run(tmp_path / "model", tmp_path / "out", "--quantize", "int8", "--quantize-head") == 2
    assert "no output head of its own; leave it out, or take --quantize-embedding" in capfd.readouterr().err


def test_there_and_back_is_what_it_stands_for(tmp_path):
    publish(tmp_path / "model", TIED, "qwen2")
    how = ["--quantize", "int4-g16", "--quantize-embedding"]
    assert run(tmp_path / "model", tmp_path / "small", *how) == 0
    assert run(tmp_path / "small", tmp_path / "wide", "--to", "hf", "--dtype", "float32") == 0
    assert "quantization_config" not in json.loads((tmp_path / "wide/config.json").read_text())
    assert verify.main([str(tmp_path / "small"), str(tmp_path / "wide")]) == 0
    # Numbers that are on the grid stay where they are.
    assert run(tmp_path / "wide", tmp_path / "again", *how) == 0
    assert verify.main([str(tmp_path / "small"), str(tmp_path / "again")]) == 0


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--quantize", ""], 2, "'' is none of int4, int8"),
        (["--quantize", "int3"], 2, "'int3' is none of int4, int8"),
        (["--quantize", "int4-g12"], 2, "'int4-g12' is none of"),
        (["--quantize", "int4-g24"], 3, "must be multiples of 24 and 8"),
        (["--quantize", "int8", "--to", "native"], 2, "leave one out"),
        (["--quantize-head"], 2, "goes with --quantize"),
        (["--quantize-embedding"], 2, "--quantize-embedding goes with --quantize"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, capfd, arguments, code, words):
    publish(tmp_path / "model", DENSE, "qwen2")
    assert run(tmp_path / "model", tmp_path / "out", *arguments) == code
    assert words in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", [np.nan, -np.inf, 1e6])
def test_what_no_scale_fits_is_refused(tmp_path, capfd, number):
    publish(tmp_path / "model", DENSE, "qwen2")
    spoil(
        tmp_path / "model",
        f"{UP}.weight",
        lambda x: np.where(np.arange(x.size).reshape(x.shape) == 5, np.float32(number), x),
    )
    assert run(tmp_path / "model", tmp_path / "out", "--quantize", "int4-g16") == 3
    assert f"{UP}.weight holds NaN, infinity" in capfd.readouterr().err
    assert not list(tmp_path.glob("*out*"))


def test_a_quantised_model_is_converted_to_a_type_that_is_chosen(tmp_path, capfd):
    publish(tmp_path / "model", DENSE, "qwen2")
    assert run(tmp_path / "model", tmp_path / "small", "--quantize", "int8") == 0
    assert run(tmp_path / "small", tmp_path / "out") == 3
    assert "choose with --dtype" in capfd.readouterr().err
    assert run(tmp_path / "small", tmp_path / "out", "--quantize", "int8") == 3
    assert "quantised already" in capfd.readouterr().err
