"""From rewards to advantages, against sums written out."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.advantages import RunningMoments, gae, group, shares, token_rewards, whiten

# Of a group with a standard deviation near 1, 1e-4 beside it is that much.
BESIDE_THE_DEVIATION = 2e-4
numbers = st.floats(-8, 8, width=32)


@given(st.lists(st.tuples(st.integers(0, 3), numbers | st.just(float("nan"))), min_size=1))
def test_advantages_of_a_group_add_up_to_nothing(rows):
    groups, rewards = np.array([row[0] for row in rows]), np.array([row[1] for row in rows])
    for scale in (True, False):
        found = group(rewards, groups, scale=scale)
        assert found.shape == rewards.shape and np.isfinite(found).all()
        assert not found[np.isnan(rewards)].any()
        for each in set(groups):
            assert found[groups == each].sum() == pytest.approx(0, abs=1e-9)
    judged = ~np.isnan(rewards)
    for each in set(groups):
        own = judged & (groups == each)
        np.testing.assert_allclose(found[own], rewards[own] - rewards[own].mean() if own.any() else [], atol=1e-12)


def test_a_group_has_a_deviation_of_one_and_none_where_all_are_equal():
    rewards, groups = np.array([1.0, 0.1, 3.0, 0.1, 2.0, 0.1, np.nan, 7.0]), np.array([5, 2, 5, 2, 5, 2, 5, 3])
    found = group(rewards, groups, scale=True)
    np.testing.assert_allclose(found[groups == 5], [-1, 1, 0, 0], atol=BESIDE_THE_DEVIATION)
    assert (found[groups != 5] == 0).all()


@pytest.mark.parametrize("lengths", [[3, 1, 4], [3, 0, 4]])
def test_shares_make_averages(lengths):
    """Weighted by 1 / length and divided by the completions that have tokens, as a step does it."""
    lengths, rng = np.array(lengths), np.random.default_rng(0)
    losses = [rng.normal(size=n) for n in lengths]
    there = [x for x in losses if x.size]
    wanted = {
        "completion": np.mean([x.mean() for x in there]),
        "token": np.concatenate(losses).mean(),
        "length": np.mean([x.sum() / 16 for x in there]),
    }
    for average, value in wanted.items():
        each = shares(lengths, average, 16)
        total = sum(share * x.sum() / max(x.size, 1) for share, x in zip(each, losses, strict=True))
        assert total / len(there) == pytest.approx(value)
    assert not shares(np.zeros(2, int), "token", 16).any()


@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=9), st.floats(0, 1), st.floats(0, 1))
def test_advantages_are_sums_of_what_was_not_expected(rows, gamma, trace):
    rewards, values = np.array(rows).T
    after = np.append(values, 0)[1:]
    delta = rewards + gamma * after - values
    ahead = lambda t: sum((gamma * trace) ** k * delta[t + k] for k in range(len(rows) - t))
    advantages, returns = gae(rewards, values, gamma=gamma, trace=trace)
    np.testing.assert_allclose(advantages, [ahead(t) for t in range(len(rows))], atol=1e-9)
    np.testing.assert_allclose(returns - values, advantages, atol=1e-9)


def test_with_a_trace_of_one_returns_are_what_rewards_come_to():
    log_ratio = np.array([0.5, -1.0, 2.0])
    rewards = token_rewards(3.0, log_ratio, 0.1)
    np.testing.assert_allclose(rewards, [-0.05, 0.1, 2.8])
    returns = gae(rewards, np.array([9.0, -9.0, 4.0]), gamma=1.0, trace=1.0)[1]
    np.testing.assert_allclose(returns, [2.85, 2.9, 2.8])


def test_whitened_over_all_completions():
    parts = [np.array([1.0, 5.0]), np.array([2.0]), np.array([]), np.array([9.0, -3.0])]
    found = whiten(parts)
    assert [len(x) for x in found] == [2, 1, 0, 2]
    tokens = np.concatenate(found)
    assert tokens.mean() == pytest.approx(0, abs=1e-12) and tokens.std(ddof=1) == pytest.approx(1)
    assert whiten([np.array([4.0])])[0] == [0]


@given(st.lists(st.lists(numbers | st.just(float("nan")), max_size=5)))
def test_moments_are_those_of_all_batches_and_go_through_json(batches):
    moments = RunningMoments()
    for batch in batches:
        moments = moments.including(np.array(batch, np.float32))
        assert RunningMoments(**json.loads(json.dumps(dataclasses.asdict(moments)))) == moments
    rewards = np.array([x for batch in batches for x in batch if x == x])
    assert moments.count == rewards.size
    if rewards.size > 1:
        assert moments.mean == pytest.approx(rewards.mean(), abs=1e-9)
        assert moments.squares == pytest.approx(rewards.var() * rewards.size, abs=1e-9)
        wanted = (rewards - rewards.mean()) / np.sqrt(rewards.var(ddof=1) + 1e-8)
        np.testing.assert_allclose(moments.normalised(rewards), wanted, rtol=1e-6, atol=1e-6)


def test_a_first_reward_alone_is_normal():
    moments = RunningMoments().including(np.array([7.0]))
    assert moments.normalised(np.array([7.0])) == [0]
