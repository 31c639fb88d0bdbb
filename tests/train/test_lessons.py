"""What a run learns of an episode: whom each update has, what each counts, and what is left out."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from qwen_jax import model, sharding
from tests.train.test_episode import completion, episode
from train import objectives
from train.lessons import Lessons
from train.reinforcement import GRPO, PPO, OnlineDPO

LENGTH, ASKED, SIZE = 16, 6, 4


@pytest.fixture
def lessons(judged_by_rule):
    """Lessons of an objective with three updates in each of two passes over 24 completions; nothing is computed."""
    return lambda kind, **changes: Lessons(judged_by_rule(kind, **changes))


def sampled(**changes):
    """An episode whose tokens have advantages of their own."""
    made = episode(4, count=ASKED * SIZE, longest=5)
    random = np.random.default_rng(0)
    names = ("sampled", "old", "reference", "values", "advantages", "returns")
    tokens = {name: random.normal(-1, 0.5, int(made.bounds[-1])).astype(np.float32) for name in names}
    return dataclasses.replace(made, tokens=tokens, **changes)


def of_rows(rows, made):
    """The numbers of the completions in rows, by their last tokens."""
    numbers = {int(completion(made, i)[-1]): i for i in range(len(made.lengths))}
    return [
        numbers[int(rows["targets"][row][rows["segments"][row] == segment][-1])]
        for row in range(len(rows["tokens"]))
        for segment in range(1, rows["segments"][row].max() + 1)
    ]


@pytest.mark.parametrize("kind", [GRPO, PPO])
def test_each_pass_has_every_judged_completion_once(lessons, kind):
    made, learns = sampled(), lessons(kind)
    judged = np.flatnonzero(np.isfinite(made.rewards)).tolist()
    assert 0 < len(judged) < ASKED * SIZE
    passes = [[of_rows(learns.rows(made, update), made) for update in updates] for updates in (range(3), range(3, 6))]
    for each in passes:
        assert sorted(sum(each, [])) == judged and max(map(len, each)) - min(map(len, each)) <= 1
    assert passes[0] != passes[1]


@pytest.mark.parametrize("average", ["completion", "token", "length"])
def test_weights_and_shares_make_the_mean_that_is_asked_for(lessons, average):
    made, learns = sampled(), lessons(GRPO, average=average)
    rows = learns.rows(made, 1)
    lengths = made.lengths[of_rows(rows, made), 1]
    each = rows["weights"] * rows["shares"] / rows["weights"].sum()
    assert rows["weights"].sum() == pytest.approx(len(lengths), rel=1e-6)
    total = {"completion": 1, "token": 1, "length": lengths.mean() / 5}[average]
    assert each.sum() == pytest.approx(total, rel=1e-5)
    if average != "completion":
        assert np.ptp(each[each > 0]) < 1e-6


def test_pairs_are_of_the_best_and_the_worst_that_were_judged(lessons):
    rewards = np.array([0.0, 1, 0.5, np.nan] * 4 + [2.0] * 4 + [np.nan] * 4)
    made, learns = sampled(rewards=rewards), lessons(OnlineDPO)
    rows = [learns.rows(made, update) for update in range(3)]
    assert sorted(sum((of_rows(each, made) for each in rows), [])) == sorted(
        4 * g + i for g in range(4) for i in (0, 1)
    )
    good = [int(each["targets"][each["labels"] == 2][n]) for each in rows for n in range((each["labels"] == 2).sum())]
    assert sorted(good) == sorted(int(completion(made, 4 * g + 1)[-1]) for g in range(4))
    assert rows[0].keys() == objectives.inputs(learns._config).keys()


@pytest.mark.parametrize("kind", [GRPO, PPO, OnlineDPO])
@pytest.mark.parametrize("reward", [np.nan, 1.0])
def test_what_teaches_nothing_is_finite(lessons, monkeypatch, kind, reward):
    """An episode without a verdict, or one whose rewards are all the same."""
    made = dataclasses.replace(episode(4, count=ASKED * SIZE, longest=5), rewards=np.full(ASKED * SIZE, reward))
    learns, names = lessons(kind), ("old", "reference", "values")
    zeros = {name: np.zeros(int(made.bounds[-1]), np.float32) for name in names}
    monkeypatch.setattr(learns, "_looked", lambda *_: zeros)
    ready = learns.prepared(made, None, None)
    assert all(np.isfinite(values).all() for values in ready.tokens.values())
    assert np.isfinite(list(ready.measures.values())).all()
    if kind is GRPO or np.isnan(reward):
        assert not ready.tokens.get("advantages", np.zeros(1)).any()
    rows = learns.rows(ready, 0)
    assert len(rows["tokens"]) == 0 or (kind is not OnlineDPO and np.isfinite(reward))


@pytest.mark.usefixtures("compiled")
def test_packed_completions_have_the_loss_that_they_have_alone(lessons, mesh):
    made, learns = sampled(rewards=np.ones(ASKED * SIZE)), lessons(PPO)
    config = learns._config
    packed = learns.rows(made, 0)
    numbers = of_rows(packed, made)
    one = {name: np.zeros((len(numbers), LENGTH), x.dtype) for name, x in packed.items()}
    n = 0
    for row in range(len(packed["tokens"])):
        for segment in range(1, packed["segments"][row].max() + 1):
            here = packed["segments"][row] == segment
            for name, x in packed.items():
                one[name][n, : here.sum()] = 1 if name == "segments" else x[row, here]
            n += 1
    assert len(packed["tokens"]) < n == len(numbers)
    like = model.abstract(config.model_config)
    waves = lambda x: 0.3 * np.cos(np.arange(x.size, dtype=np.float32)).reshape(x.shape)
    params = jax.tree.map(lambda x: jax.device_put(waves(x), x.sharding.spec), like)
    order = sharding.balanced_columns(LENGTH)
    of = jax.jit(objectives.make(config))
    found = [jax.device_get(of(params, {name: x[:, order] for name, x in rows.items()})) for rows in (packed, one)]
    (loss, sums), (alone, sums_alone) = jax.tree.map(float, found)
    assert loss == pytest.approx(alone, rel=1e-5) and np.abs(loss) > 1e-3
    assert sums == pytest.approx(sums_alone, rel=1e-4)
