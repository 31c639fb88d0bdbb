"""Merges of models: each method against its formula written out, on whole tensors."""

from __future__ import annotations

import json

import numpy as np
import pytest

from qwen_jax.errors import ConfigError, ModelError
from qwen_jax.weights import source as sources
from qwen_jax.weights.merge import Merged, Recipe, main
from qwen_jax.weights.source import open_model
from qwen_jax.weights.verify import certify
from tests.conftest import tiny_config
from tests.published import publish

# float32 sums in another order, of numbers of about 1.
ROUNDING = dict(rtol=1e-5, atol=1e-6)
CONFIG = tiny_config(vocab_size=260, num_layers=1)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base and two models, by name: folder and tensors in float64."""
    root = tmp_path_factory.mktemp("models")
    made = {name: publish(root / name, CONFIG, "qwen2", seed=seed) for seed, name in enumerate(("base", "a", "b"))}
    return root, {name: {key: x.astype(np.float64) for key, x in each.items()} for name, each in made.items()}


def merged(models, out, *options):
    root, _ = models
    assert main([str(root / "a"), str(root / "b"), str(out), *options]) == 0
    with open_model(out) as model:
        return {tensor.name: model.files.read(tensor.name, (slice(0, tensor.shape[0]),)) for tensor in model.table}


def kept(learned, density):
    """The largest numbers of a tensor."""
    order = np.argsort(-np.abs(learned), axis=None, kind="stable")[: max(1, round(density * learned.size))]
    mask = np.zeros(learned.size, bool)
    mask[order] = True
    return np.where(mask.reshape(learned.shape), learned, 0)


def arc(a, b, t):
    angle = np.arccos(np.sum(a * b) / np.sqrt(np.sum(a * a) * np.sum(b * b)))
    return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)


def ties(base, a, b):
    learned = [kept(a - base, 0.3), kept(b - base, 0.3)]
    sign = np.sign(learned[0] + 2 * learned[1])
    agree = [(np.sign(each) == sign) & (sign != 0) for each in learned]
    total = agree[0] * learned[0] + 2 * agree[1] * learned[1]
    return base + 0.5 * total / np.maximum(agree[0] + 2.0 * agree[1], 1)


FORMULAS = {
    "linear --weights 3 1": lambda base, a, b: 0.75 * a + 0.25 * b,
    "slerp --t 0.3": lambda base, a, b: arc(a, b, 0.3),
    "task_arithmetic --weights 0.5 -1 --scale 0.5": lambda base, a, b: base + 0.25 * (a - base) - 0.5 * (b - base),
    "ties --weights 1 2 --scale 0.5 --density 0.3": ties,
}


@pytest.mark.parametrize("options", FORMULAS)
def test_each_method_is_its_formula(models, tmp_path, options):
    root, tensors = models
    method, *rest = options.split()
    base = ["--base", str(root / "base")] if method in ("ties", "task_arithmetic") else []
    found = merged(models, tmp_path / "out", "--method", method, *rest, *base)
    for name, values in found.items():
        wanted = FORMULAS[options](*(tensors[each][name] for each in ("base", "a", "b")))
        np.testing.assert_allclose(values, wanted, **ROUNDING, err_msg=name)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "qwen2"


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_keeps_a_part_and_scales_it(models, tmp_path, method):
    root, tensors = models
    found = merged(
        models, tmp_path / "out", "--method", method, "--density", "0.25", "--seed", "5", "--base", str(root / "base")
    )
    name = "model.embed_tokens.weight"
    base, a, b = (tensors[each][name] for each in ("base", "a", "b"))
    learned = found[name] - base
    # Of a number neither, either or both are kept; where both and they disagree, ties keeps the larger.
    options = {"neither": 0 * a, "a": 4 * (a - base), "b": 4 * (b - base)}
    both = options["a"] + options["b"]
    if method == "dare_ties":
        same = np.sign(options["a"]) == np.sign(options["b"])
        larger = np.where(np.abs(options["a"]) > np.abs(options["b"]), options["a"], options["b"])
        both = np.where(same, both / 2, larger)
    options["both"] = both
    near = {key: np.isclose(learned, value, rtol=1e-4, atol=1e-5) for key, value in options.items()}
    assert np.all(np.any(list(near.values()), axis=0))
    assert near["neither"].mean() == pytest.approx(0.75**2, abs=0.03)
    assert near["a"].mean() == pytest.approx(near["b"].mean(), abs=0.05)


@pytest.mark.parametrize("method", ["slerp", "ties", "dare_ties"])
def test_pieces_of_any_size_are_of_the_same_model(models, monkeypatch, method):
    root, _ = models
    density = {} if method == "slerp" else {"density": 0.3}
    with open_model(root / "a") as a, open_model(root / "b") as b, open_model(root / "base") as base:
        certificates = []
        for size in (2**20, 500):
            monkeypatch.setattr(sources, "PIECE_BYTES", size)
            recipe = Recipe(method=method, weights=(1.0, 1.0), **density)
            certificates.append(certify(Merged([a, b], recipe, None if method == "slerp" else base)))
    assert certificates[0] == certificates[1]


def test_equal_models_stay_what_they_are(models):
    root, tensors = models
    with open_model(root / "a") as a, open_model(root / "base") as base:
        for method in ("slerp", "ties"):
            recipe = Recipe(method=method, weights=(1.0, 1.0))
            found = Merged([a, a], recipe, None if method == "slerp" else base)
            piece = next(sources.pieces(found.table[0], 4))
            np.testing.assert_allclose(found.read(piece), tensors["a"][piece.tensor.name][piece.rows], **ROUNDING)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("slerp --density 0.5", "--density is not of --method slerp"),
        ("ties", "--method ties wants --density"),
        ("ties --density 0.5", "method ties wants a base"),
        ("ties --density 1.5", "density 1.5 must be above 0 and at most 1"),
        ("linear --weights 1 -1", "have the sum 0"),
        ("linear --weights 1 2 3", "are 3, and there are 2 models"),
        ("linear --base {root}/base", "method linear has no base"),
    ],
)
def test_what_does_not_fit_is_refused(models, tmp_path, options, message):
    root, _ = models
    method, *rest = options.format(root=root).split()
    with pytest.raises(ConfigError, match=message):
        main([str(root / "a"), str(root / "b"), str(tmp_path / "out"), "--method", method, *rest])


def test_models_that_compute_other_things_are_refused(models, tmp_path):
    root, _ = models
    publish(tmp_path / "other", tiny_config(vocab_size=260, num_layers=1, norm_eps=1e-6), "qwen2")
    with pytest.raises(ModelError, match="cannot be merged: norm_eps is 3e-05 and 1e-06"):
        main([str(root / "a"), str(tmp_path / "other"), str(tmp_path / "out"), "--method", "linear"])
