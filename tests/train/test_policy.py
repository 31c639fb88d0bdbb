"""Losses of policies and critics: against loops written out, however completions are packed and split."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax import model, sharding
from qwen_jax.config import Score
from tests.conftest import tiny_config
from train.objectives import dpo, policy, value
from train.reinforcement import GRPO, PPO, Critic, Rollout
from train.rewards.config import RewardSource, Verifier

LENGTH = 24
# Of the completions of each row: the tokens of prompt and completion. The last has been left out: nothing is trained.
ROWS = [[(2, 5), (3, 4), (1, 3)], [(4, 7)], [], [(3, 6), (2, 1), (5, 0)]]
# float32 sums in another order.
ROUNDING = dict(rtol=1e-5, atol=1e-6)
REWARDS = (RewardSource(source=Verifier(name="math")),)
FLOATS = ("weights", "shares", "advantages", "sampled", "old", "reference", "values", "returns")


def policy_batch(rows=ROWS, vocab_size=96):
    """Completions packed into rows. What a completion holds depends on its number alone, not on its row."""
    shape = (len(rows), LENGTH)
    batch = {name: np.zeros(shape, np.int32) for name in ("tokens", "targets", "positions", "segments")}
    batch |= {name: np.zeros(shape, np.float32) for name in FLOATS}
    number = 0
    for row, sizes in enumerate(rows):
        column = 0
        for segment, (before, count) in enumerate(sizes, 1):
            rng, size = np.random.default_rng(number), before + count
            here, trained = slice(column, column + size), slice(column + before - 1, column + size - 1)
            batch["segments"][row, here], batch["positions"][row, here] = segment, np.arange(size)
            for name in ("tokens", "targets"):
                batch[name][row, here] = rng.integers(0, vocab_size, size)
            for name in FLOATS[2:]:
                batch[name][row, trained] = rng.normal(-1 if name in ("sampled", "old", "reference") else 0, 0.4, count)
            batch["weights"][row, trained], batch["shares"][row, trained] = 1 / max(count, 1), rng.uniform(0.5, 2)
            number, column = number + 1, column + size
    return batch


def written_out(objective, found, batch):
    """The sums, token by token."""
    sums = dict.fromkeys(("ratio", "clip_fraction", "entropy", "gap", "kl", "loss", "weight"), 0.0)
    for row, segments in enumerate(batch["segments"]):
        for segment in range(1, segments.max() + 1):
            trained = [t for t in range(LENGTH) if segments[t] == segment and batch["weights"][row, t] > 0]
            log_ratios = [float(found[row, t]) - float(batch["old"][row, t]) for t in trained]
            for log_ratio, t in zip(log_ratios, trained, strict=True):
                sampled, old, reference, advantage = (
                    float(batch[name][row, t]) for name in ("sampled", "old", "reference", "advantages")
                )
                by_completion = getattr(objective, "ratio", "token") == "completion"
                ratio = math.exp(np.mean(log_ratios) if by_completion else log_ratio)
                high = getattr(objective, "clip_high", None)
                near = min(max(ratio, 1 - objective.clip), 1 + (objective.clip if high is None else high))
                surrogate = min(ratio * advantage, near * advantage)
                away = reference - float(found[row, t])
                kl = math.exp(away) - away - 1
                correction = min(math.exp(old - sampled), objective.rollout.importance_cap)
                loss = -correction * surrogate + (objective.kl * kl if isinstance(objective, GRPO) else 0)
                values = (ratio, surrogate != ratio * advantage, -sampled, abs(old - sampled), kl)
                values += (loss * float(batch["shares"][row, t]), 1)
                for name, each in zip(sums, values, strict=True):
                    sums[name] += each / len(trained)
    return sums


OBJECTIVES = {
    "tokens": GRPO(rewards=REWARDS, kl=0.3, clip=0.2, clip_high=0.28),
    "completions": GRPO(rewards=REWARDS, kl=0.3, clip=0.1, ratio="completion", rollout=Rollout(importance_cap=1.1)),
    "ppo": PPO(rewards=REWARDS, clip=0.3),
}
WARM = dataclasses.replace(OBJECTIVES["completions"], rollout=Rollout(temperature=0.7))


@functools.partial(jax.jit, static_argnums=0)
def sums_and_gradient(objective, found, batch):
    """Of the log-probabilities `found`, on the current mesh."""

    def of(found):
        sums = policy.of_log_probs(objective, found, batch)
        return sums["loss"], sums

    gradient, sums = jax.grad(of, has_aux=True)(found)
    return sums, gradient


@pytest.fixture(scope="module")
def found():
    return np.float32(np.random.default_rng(99).normal(-1, 0.4, (len(ROWS), LENGTH)))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_sums_are_those_written_out(mesh, name, found):
    objective, batch = OBJECTIVES[name], policy_batch()
    sums = {name: float(x) for name, x in sums_and_gradient(objective, found, batch)[0].items()}
    wanted = written_out(objective, found, batch)
    assert sums == pytest.approx(wanted, rel=1e-5)
    assert 0 < wanted["clip_fraction"] < wanted["weight"] and wanted["weight"] == pytest.approx(6)


def test_a_clipped_token_teaches_nothing_and_only_that(mesh, found):
    """Nor does one of advantage 0."""
    batch = policy_batch()
    batch["advantages"][0, 2] = 0
    objective = dataclasses.replace(OBJECTIVES["tokens"], kl=0.0)
    _, gradient = sums_and_gradient(objective, found, batch)
    ratio = np.exp(found - batch["old"])
    up, down = batch["advantages"] > 0, batch["advantages"] < 0
    teaches = (batch["weights"] > 0) & ((up & (ratio < 1.28)) | (down & (ratio > 0.8)))
    np.testing.assert_array_equal(gradient != 0, teaches)
    assert (np.sign(gradient) == -np.sign(batch["advantages"]))[teaches].all()


def test_the_ratio_of_a_completion_teaches_its_tokens_alike(mesh, found):
    batch = policy_batch()
    objective = dataclasses.replace(OBJECTIVES["completions"], kl=0.0)
    _, gradient = sums_and_gradient(objective, found, batch)
    for row, segment in ((0, 1), (0, 2), (3, 1)):
        own = gradient[row][(batch["segments"][row] == segment) & (batch["weights"][row] > 0)]
        np.testing.assert_allclose(own, own[0], rtol=1e-5)
    assert np.unique(np.asarray(gradient)).size > 3


def test_what_has_just_been_sampled_is_its_own_past(mesh, found):
    """Ratios are 1, and the gradient is that of the log-probabilities times the advantages."""
    batch = {name: x for name, x in policy_batch().items() if name not in ("old", "reference")}
    batch["sampled"] = found * (batch["weights"] > 0)
    sums, gradient = sums_and_gradient(OBJECTIVES["tokens"], found, batch)
    counts = batch["weights"] * batch["shares"]
    np.testing.assert_allclose(gradient, -counts * batch["advantages"], **ROUNDING)
    assert sums["loss"] == pytest.approx(-(counts * batch["advantages"]).sum(), rel=1e-5)
    assert sums["gap"] == sums["clip_fraction"] == 0 and "kl" not in sums
    assert sums["ratio"] == pytest.approx(float(sums["weight"]))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_what_is_not_trained_counts_nothing_whatever_it_holds(mesh, name, found):
    batch, objective = policy_batch(), OBJECTIVES[name]
    sums, gradient = sums_and_gradient(objective, found, batch)
    prompts = batch["weights"] == 0
    for name, noise in {"sampled": -np.inf, "old": -1e4, "reference": 1e4, "advantages": np.nan}.items():
        batch[name] = np.where(prompts, np.float32(noise), batch[name])
    others, its_gradient = sums_and_gradient(objective, found, batch)
    assert others == sums and np.isfinite(list(sums.values())).all()
    np.testing.assert_array_equal(its_gradient, gradient)
    assert not gradient[prompts].any()


def test_the_policy_is_that_of_its_temperature(mesh, monkeypatch):
    batch, hidden = policy_batch(vocab_size=7), np.random.default_rng(8).normal(size=(len(ROWS), LENGTH, 7))
    log_probs = hidden / 0.7 - np.log(np.exp(hidden / 0.7).sum(-1, keepdims=True))
    found = np.take_along_axis(log_probs, batch["targets"][..., None], -1)[..., 0]
    monkeypatch.setattr(dpo, "forward", lambda config, params, *inputs, **how: params)
    monkeypatch.setattr(dpo, "head", lambda params: jnp.eye(7))
    of = jax.jit(lambda hidden, batch: policy.loss(tiny_config(), WARM, hidden, batch))
    total, sums = of(hidden.astype(np.float32), batch)
    wanted, _ = sums_and_gradient(WARM, found.astype(np.float32), batch)
    assert total == sums["loss"] and sums.keys() == wanted.keys()
    assert [float(sums[name]) for name in wanted] == pytest.approx([float(x) for x in wanted.values()], rel=1e-5)


@pytest.mark.parametrize("clip", [0.0, 0.3])
def test_a_value_that_went_too_far_teaches_no_more(clip):
    batch, rng = policy_batch(), np.random.default_rng(5)
    found = np.float32(rng.normal(0, 0.5, batch["values"].shape))
    names = ("weights", "shares", "values", "returns")

    def of(found):
        each = jax.vmap(lambda *row: value._of_row(Critic(clip=clip), *row))(found, *(batch[n] for n in names))
        sums = jax.tree.map(jnp.sum, each)
        return sums["loss"], sums

    gradient, sums = jax.grad(of, has_aux=True)(jnp.asarray(found))
    moved, error = found - batch["values"], found - batch["returns"]
    # Further from where it was than allowed, and past what it is to be.
    stopped = (np.abs(moved) > clip) & (moved * (batch["values"] + np.sign(moved) * clip - batch["returns"]) < 0)
    stopped &= np.abs(batch["values"] + np.sign(moved) * clip - batch["returns"]) > np.abs(error)
    stopped &= (batch["weights"] > 0) & (clip > 0)
    counts = batch["weights"] * batch["shares"]
    np.testing.assert_allclose(gradient, np.where(stopped, 0, counts * error), **ROUNDING)
    assert sums["value_clip_fraction"] == pytest.approx((batch["weights"] * stopped).sum(), rel=1e-5)
    assert sums["value"] == pytest.approx((batch["weights"] * found).sum(), rel=1e-5)
    assert stopped.any() == (clip > 0)


LOSSES = {
    "policy": lambda config, *args: policy.loss(config, WARM, *args, balanced=True),
    "critic": lambda config, *args: value.loss(config, OBJECTIVES["ppo"], *args, balanced=True),
}


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("name", LOSSES)
def test_packed_apart_and_split_alike(name):
    """Rows of several completions in two micro-batches, each completion in a row of its own, and all on 8 devices."""
    score = Score(labels=1, hidden=False) if name == "critic" else None
    config = tiny_config(num_layers=1, tie_embeddings=score is None, score=score)

    def run(batches, mesh):
        with jax.set_mesh(mesh):
            waves = lambda x: 0.3 * np.cos(np.arange(x.size, dtype=np.float32)).reshape(x.shape)
            params = jax.tree.map(lambda x: jax.device_put(waves(x), x.sharding.spec), model.abstract(config))
            order = sharding.balanced_columns(LENGTH)
            place = lambda x: jax.device_put(x[:, order], sharding.activation("bt", x.shape))
            of = jax.jit(jax.value_and_grad(lambda *args: LOSSES[name](config, *args), has_aux=True))
            each = [jax.device_get(of(params, jax.tree.map(place, batch))) for batch in batches]
            return jax.tree.map(lambda *x: sum(x), *each)

    in_pairs = lambda batch: [{k: x[i : i + 2] for k, x in batch.items()} for i in range(0, len(batch["tokens"]), 2)]
    packed, apart = policy_batch(), policy_batch([[completion] for row in ROWS for completion in row] + [[]])
    one, eight = sharding.make_mesh(devices=jax.devices()[:1]), sharding.make_mesh(fsdp=2, context=2, tensor=2)
    (total, sums), gradient = run(in_pairs(packed), one)
    assert np.isfinite(total) and total == sums["loss"] and sums["weight"] == pytest.approx(6)
    for (other, its_sums), its_gradient in (run(in_pairs(apart), one), run([packed], eight)):
        assert other == pytest.approx(total, rel=1e-5)
        assert its_sums == pytest.approx(sums, rel=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), its_gradient, gradient)
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(gradient))
