"""Objectives on preferences: their sums against loops written out, on one device and on many."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax import model, sharding
from qwen_jax.config import Score
from qwen_jax.errors import ConfigError
from train import objectives
from train.adapter import Frozen
from train.alignment import DPO, ProcessReward, Reward
from train.config import LoRA, Pretrained
from train.data import Preferences
from train.objectives import dpo, reward

BAD, GOOD = 1, 2
LENGTH = 24
# Rows of groups of texts: their labels. The second group of the second row has nothing to compare.
ROWS = [[(GOOD, BAD), (GOOD, BAD)], [(GOOD, GOOD, BAD), (BAD, BAD)], [(GOOD, BAD, BAD)], []]
# float32 sums in another order.
ROUNDING = dict(rtol=1e-5, atol=1e-6)


def judged_batch(vocab_size=264):
    """Texts of three and four tokens, of which the last two targets are trained."""
    rng = np.random.default_rng(0)
    ints = {name: np.zeros((len(ROWS), LENGTH), np.int32) for name in ("segments", "groups", "labels", "positions")}
    weights = np.zeros((len(ROWS), LENGTH), np.float32)
    for row, groups in enumerate(ROWS):
        column = segment = 0
        for group, labels in enumerate(groups, 1):
            for label in labels:
                segment += 1
                count = 3 + segment % 2
                here = slice(column, column + count)
                ints["segments"][row, here], ints["groups"][row, here] = segment, group
                ints["positions"][row, here] = np.arange(count)
                ints["labels"][row, column + count - 1] = label
                weights[row, column + count - 2 : column + count] = 1
                column += count
    tokens, targets = rng.integers(0, vocab_size, (2, len(ROWS), LENGTH), dtype=np.int32)
    return {**ints, "weights": weights, "tokens": tokens, "targets": targets}


def texts_of(batch, values):
    """Of each group of each row its texts, as (label, columns of it)."""
    for row in range(len(ROWS)):
        for group in range(1, batch["groups"][row].max() + 1):
            segments = sorted(set(batch["segments"][row][batch["groups"][row] == group]))
            columns = [np.flatnonzero(batch["segments"][row] == segment) for segment in segments]
            labels = [int(batch["labels"][row][each].sum()) for each in columns]
            yield [(label, values(row, each)) for label, each in zip(labels, columns, strict=True)]


def expected(groups, loss):
    """The sums, pair by pair."""
    sums = dict.fromkeys(("loss", "accuracy", "margin", "chosen", "rejected", "weight"), 0.0)
    for group in groups:
        good, bad = ([value for label, value in group if label == wanted] for wanted in (GOOD, BAD))
        pairs = list(itertools.product(good, bad))
        if pairs:
            found = [np.mean([loss(*pair) for pair in pairs]), np.mean([a > b for a, b in pairs])]
            found += [np.mean([a - b for a, b in pairs]), np.mean(good), np.mean(bad), 1]
            sums = {name: value + each for (name, value), each in zip(sums.items(), found, strict=True)}
    return sums


def log_sigmoid(x):
    return -np.log1p(np.exp(-x))


@pytest.fixture
def small(config):
    source = Preferences(path="x", format="qwen2")
    small = dataclasses.replace(config.model, num_layers=1)
    data = dataclasses.replace(config.data, source=source)
    return lambda objective: dataclasses.replace(config, model=small, data=data, objective=objective)


def values_of(config, batch, mesh=None):
    """Sums and gradients of the objective of a config, and the scores."""
    with jax.set_mesh(mesh or sharding.make_mesh(devices=jax.devices()[:1])):
        place = lambda x: jax.device_put(x, sharding.activation("bt", x.shape))
        like = model.abstract(config.model_config)
        waves = lambda x: 0.3 * np.cos(np.arange(x.size, dtype=np.float32)).reshape(x.shape)
        params = jax.tree.map(lambda x: jax.device_put(waves(x), x.sharding.spec), like)

        @jax.jit
        def of(params, batch):
            found = jax.value_and_grad(objectives.make(config), has_aux=True)(params, batch)
            places = (batch["tokens"], batch["positions"])
            hidden = model.forward(config.model_config, params, *places, segments=batch["segments"], balanced=True)
            return found, model.scores(config.model_config, params, hidden)

        ((total, sums), gradient), scores = jax.device_get(of(params, jax.tree.map(place, batch)))
        return float(total), sums, gradient, scores


@pytest.mark.usefixtures("compiled")
def test_rewards_are_compared_within_their_group(small):
    objective, batch = Reward(margin=0.1, centre=0.2), judged_batch()
    config = small(objective)
    total, sums, gradient, scores = values_of(config, batch)
    groups = list(texts_of(batch, lambda row, columns: float(scores[row, columns[-1], 0])))
    wanted = expected(groups, lambda a, b: -log_sigmoid(a - b - 0.1) + 0.2 * (a + b) ** 2)
    assert {name: float(value) for name, value in sums.items()} == pytest.approx(wanted, rel=1e-5)
    assert total == pytest.approx(wanted["loss"], rel=1e-5) and wanted["weight"] == 4
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(gradient["score"]))
    other = values_of(config, batch, sharding.make_mesh(fsdp=2, context=2, devices=jax.devices()[:4]))
    assert other[0] == pytest.approx(total, rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), other[2], gradient)


PAIRS = {
    "sigmoid": (DPO(beta=0.3), lambda a, b: -log_sigmoid(a - b)),
    "smoothed": (
        DPO(beta=0.3, label_smoothing=0.2),
        lambda a, b: -0.8 * log_sigmoid(a - b) - 0.2 * log_sigmoid(b - a),
    ),
    "ipo": (DPO(beta=0.3, loss="ipo"), lambda a, b: ((a - b) / 0.3 - 1 / 0.6) ** 2),
}


@pytest.mark.parametrize("name", PAIRS)
def test_rewards_of_dpo_are_log_ratios_of_completions(mesh, name):
    objective, loss = PAIRS[name]
    batch, rng = judged_batch(), np.random.default_rng(1)
    found, reference = np.float32(rng.normal(-2, 1, (2, len(ROWS), LENGTH)))

    def value(row, columns):
        trained = [at for at in columns if batch["weights"][row, at]]
        ratio = (found - reference)[row, trained]
        return 0.3 * float(ratio.mean() if name == "ipo" else ratio.sum())

    wanted = expected(texts_of(batch, value), loss)
    names = ("weights", "labels", "segments", "groups")
    of_row = jax.vmap(lambda *row: dpo._of_row(objective, *row))
    sums = {k: float(v.sum()) for k, v in of_row(found, reference, *(batch[n] for n in names)).items()}
    assert {name: sums[name] for name in wanted} == pytest.approx(wanted, rel=1e-5)
    assert np.isfinite(list(sums.values())).all() and sums["log_probs_chosen"] < 0


@pytest.mark.usefixtures("compiled")
def test_before_the_first_step_dpo_is_where_its_reference_is_whatever_the_mesh(small, tmp_path, monkeypatch):
    """The loss is log 2, but not its gradient; beside an adapter the reference is the base."""
    config = small(Reward())
    shape = dataclasses.replace(config.model, score=None)
    monkeypatch.setattr("qwen_jax.weights.source.read_config", lambda path: shape)
    config = dataclasses.replace(config, model=Pretrained(path="x", dtype="float32"), objective=DPO(), adapter=None)
    refer, objective, batch = objectives.refer(config), objectives.make(config), judged_batch()

    def run(mesh):
        with jax.set_mesh(mesh):
            like = model.abstract(config.model_config)
            waves = lambda x: 0.3 * np.cos(np.arange(x.size, dtype=np.float32)).reshape(x.shape)
            params = jax.tree.map(lambda x: jax.device_put(waves(x), x.sharding.spec), like)
            micro = jax.tree.map(lambda x: jax.device_put(x, sharding.activation("bt", x.shape)), batch)
            of = lambda params, frozen: objective(params, refer(frozen, micro))
            found = jax.jit(jax.value_and_grad(of, has_aux=True))(params, Frozen(reference=params))
            return jax.device_get(found)

    (total, sums), gradient = run(sharding.make_mesh(devices=jax.devices()[:1]))
    assert total == pytest.approx(4 * np.log(2), rel=1e-6) and sums["weight"] == 4
    assert sums["margin"] == sums["accuracy"] == sums["log_ratio"] == 0
    assert np.abs(gradient["embed"]["w"]).max() > 1e-3
    (other, _), spread = run(sharding.make_mesh(fsdp=2, tensor=2, devices=jax.devices()[:4]))
    assert other == pytest.approx(total, rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), spread, gradient)


@pytest.mark.usefixtures("compiled")
def test_steps_are_a_choice_of_two(small):
    source = Preferences(path="x", format="qwen2", kind="steps")
    config = small(Reward())
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, source=source), objective=ProcessReward()
    )
    batch = judged_batch()
    total, sums, _, scores = values_of(config, batch)
    judged = batch["labels"] > 0
    chosen = np.take_along_axis(scores, (batch["labels"] == GOOD)[..., None].astype(int), -1)[..., 0]
    wanted = (np.log(np.exp(scores).sum(-1)) - chosen)[judged].sum()
    assert total == pytest.approx(wanted, rel=1e-5) and sums["weight"] == judged.sum()
    right = (scores.argmax(-1) == (batch["labels"] == GOOD))[judged].sum()
    assert sums["accuracy"] == right


def test_equal_texts_and_empty_rows_are_finite(mesh):
    """A pair of scores that are the same teaches what it can: 2 log 2, and a gradient that is finite."""
    batch = judged_batch()
    names = ("labels", "segments", "groups")
    of = lambda score: jax.vmap(lambda *row: reward._of_row(Reward(), *row)["loss"])(score, *(batch[n] for n in names))
    loss, gradient = jax.value_and_grad(lambda score: of(score).sum())(jnp.zeros((len(ROWS), LENGTH)))
    assert loss == pytest.approx(4 * np.log(2), rel=1e-6) and np.isfinite(gradient).all()
    assert not gradient[3].any() and gradient[0].any()


REFUSED = {
    "objective LM reads texts or conversations; data.source has completions": lambda c: dataclasses.replace(
        c(Reward()), objective=type(c(Reward())).__dataclass_fields__["objective"].default
    ),
    "leave adapter out": lambda c: dataclasses.replace(c(Reward()), adapter=LoRA()),
    "objective ProcessReward reads solutions whose steps are judged": lambda c: c(ProcessReward()),
    "trains a model with a score of 1 labels, and this one has a score of 3 labels": lambda c: dataclasses.replace(
        c(Reward()), model=dataclasses.replace(c(Reward()).model, score=Score(labels=3, hidden=False))
    ),
    "beta=0.0 must be above 0": lambda c: DPO(beta=0.0),
    "label_smoothing=0.5 must be at least 0 and below 0.5": lambda c: DPO(label_smoothing=0.5),
    "is of loss='sigmoid'": lambda c: DPO(label_smoothing=0.1, loss="ipo"),
    "margin=-1.0 must not be negative": lambda c: Reward(margin=-1.0),
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_refused(small, sentence):
    with pytest.raises(ConfigError, match=sentence):
        REFUSED[sentence](small)
