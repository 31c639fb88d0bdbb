"""Losses and advantages of GRPO and PPO against TRL's, written out in PyTorch, on the same tensors, and gradients.

GRPO is that of trl 1.16, `trl/trainer/grpo_trainer.py`; PPO that of its last release with one, 1.12, in
`trl/experimental/ppo/ppo_trainer.py`. There the reward stands one column behind the end token, whose value is then a
state of its own; here it stands at the end token, as there for a completion that was cut.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.ops.loss import token_log_probs
from tests.train.test_policy import LENGTH, REWARDS, ROWS, policy_batch
from train.advantages import gae, group, shares, token_rewards, whiten
from train.objectives import policy, value
from train.reinforcement import GRPO, PPO, Critic, Rollout

torch = pytest.importorskip("torch", reason="the oracle: pip install -e '.[parity]'")

# float32 sums in another order.
ROUNDING = dict(rtol=1e-5, atol=1e-6)
VOCAB, LONGEST, MAX_NEW_TOKENS = 11, 8, 12
SAMPLED = dict(temperature=0.7, importance_cap=1.3, max_new_tokens=MAX_NEW_TOKENS)


def places(batch):
    """Of each completion with tokens, its row and columns."""
    for row, segments in enumerate(batch["segments"]):
        for segment in range(1, segments.max() + 1):
            columns = np.flatnonzero((segments == segment) & (batch["weights"][row] > 0))
            if columns.size:
                yield row, columns


def padded(x, batch):
    """Rows of completions [B, T, ...] as [n, LONGEST, ...], one in each row."""
    x = x if isinstance(x, torch.Tensor) else torch.tensor(x)
    rows = [x[row, columns] for row, columns in places(batch)]
    return torch.stack([torch.cat([row, row.new_zeros(LONGEST - len(row), *row.shape[1:])]) for row in rows])


def theirs_grpo(objective, average, logits, batch):
    """`GRPOTrainer._compute_loss`, with the "token_truncate" of `_generate_and_score_completions`."""
    of = lambda name: padded(batch[name], batch)
    mask, advantages, old = padded(np.sign(batch["weights"]), batch), of("advantages"), of("old")
    log_probs = torch.log_softmax(padded(logits, batch) / objective.rollout.temperature, -1)
    log_probs = log_probs.gather(-1, of("targets").long()[..., None])[..., 0]
    log_weights = log_probs - old
    if objective.ratio == "completion":  # importance_sampling_level == "sequence"
        log_weights = ((log_weights * mask).sum(-1) / mask.sum(-1).clamp(min=1.0))[:, None]
    coef_1 = torch.exp(log_weights)
    high = objective.clip if objective.clip_high is None else objective.clip_high
    coef_2 = torch.clamp(coef_1, 1 - objective.clip, 1 + high)
    per_token = -torch.min(coef_1 * advantages, coef_2 * advantages)
    per_token = per_token * torch.exp((old - of("sampled")) * mask).clamp(max=objective.rollout.importance_cap)
    if objective.kl:
        away = of("reference") - log_probs
        per_token = per_token + objective.kl * (torch.exp(away) - away - 1)
    match average:
        case "completion":  # loss_type == "grpo"
            return ((per_token * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).mean()
        case "token":  # "dapo"
            return (per_token * mask).sum() / mask.sum().clamp(min=1.0)
        case "length":  # "dr_grpo"
            return (per_token * mask).sum() / (per_token.size(0) * MAX_NEW_TOKENS)


def theirs_ppo(objective, average, logits, batch):
    """The policy's loss of `PPOTrainer.train`, which averages over tokens and knows of no other sampler."""
    assert average == "token"
    of = lambda name: padded(batch[name], batch)
    mask = padded(np.sign(batch["weights"]), batch)
    log_probs = torch.log_softmax(padded(logits, batch) / objective.rollout.temperature, -1)
    log_probs = log_probs.gather(-1, of("targets").long()[..., None])[..., 0]
    ratio = torch.exp(log_probs - of("old"))
    near = torch.clamp(ratio, 1.0 - objective.clip, 1.0 + objective.clip)
    losses = torch.max(-of("advantages") * ratio, -of("advantages") * near)
    return (losses * mask).sum() / mask.sum()


OBJECTIVES = {
    "tokens": GRPO(rewards=REWARDS, kl=0.3, clip=0.2, clip_high=0.28, rollout=Rollout(**SAMPLED)),
    "completions": GRPO(rewards=REWARDS, kl=0.05, clip=0.03, ratio="completion", rollout=Rollout(**SAMPLED)),
    "without a reference": GRPO(rewards=REWARDS, kl=0.0, rollout=Rollout(**SAMPLED)),
    "ppo": PPO(rewards=REWARDS, clip=0.15, rollout=Rollout(completions=2, **SAMPLED)),
}


def batch_of(objective):
    """Completions whose tokens are close enough to what they were that not all of them are clipped."""
    batch = policy_batch(vocab_size=VOCAB)
    logits = np.float32(np.random.default_rng(7).normal(0, 1, (len(ROWS), LENGTH, VOCAB)))
    log_probs = np.log(np.exp(logits / 0.7) / np.exp(logits / 0.7).sum(-1, keepdims=True))
    now = np.take_along_axis(log_probs, batch["targets"][..., None], -1)[..., 0]
    for name in ("old", "sampled", "reference"):
        batch[name] = np.where(batch["weights"] > 0, now + (batch[name] + 1) / 2, 0).astype(np.float32)
    if isinstance(objective, PPO):
        batch["sampled"] = batch["old"]
    if objective.kl == 0:
        del batch["reference"]
    return batch, logits


@pytest.mark.parametrize("name", OBJECTIVES)
def test_policies_are_trls(mesh, name):
    objective = OBJECTIVES[name]
    theirs, averages = theirs_grpo, ("completion", "token", "length")
    if isinstance(objective, PPO):
        theirs, averages = theirs_ppo, ("token",)
    batch, logits = batch_of(objective)
    lengths = np.array([len(columns) for _, columns in places(batch)])

    @jax.jit
    def ours(logits, batch):
        def of(logits):
            found = token_log_probs(logits / objective.rollout.temperature, jnp.eye(VOCAB), batch["targets"])
            sums = policy.of_log_probs(objective, found, batch)
            return sums["loss"] / sums["weight"], sums

        return jax.value_and_grad(of, has_aux=True)(logits)

    for average in averages:
        for (row, columns), share in zip(places(batch), shares(lengths, average, MAX_NEW_TOKENS), strict=True):
            batch["shares"][row, columns] = share
        (total, sums), gradient = ours(jnp.asarray(logits), jax.tree.map(jnp.asarray, batch))
        tensor = torch.tensor(logits, requires_grad=True)
        wanted = theirs(objective, average, tensor, batch)
        wanted.backward()
        np.testing.assert_allclose(total, wanted.item(), **ROUNDING)
        np.testing.assert_allclose(gradient, tensor.grad.numpy(), **ROUNDING)
        assert 0 < sums["clip_fraction"] < sums["weight"]


def test_values_are_trls(mesh):
    """The critic's loss of `PPOTrainer.train`."""
    batch, clip = policy_batch(), 0.15
    found = np.float32(np.random.default_rng(5).normal(0, 0.5, batch["values"].shape))
    lengths = np.array([len(columns) for _, columns in places(batch)])
    for (row, columns), share in zip(places(batch), shares(lengths, "token", MAX_NEW_TOKENS), strict=True):
        batch["shares"][row, columns] = share
    names = ("weights", "shares", "values", "returns")

    def ours(found):
        each = jax.vmap(lambda *row: value._of_row(Critic(clip=clip), *row))(found, *(batch[n] for n in names))
        return each["loss"].sum() / each["weight"].sum()

    total, gradient = jax.value_and_grad(ours)(jnp.asarray(found))
    tensor = torch.tensor(found, requires_grad=True)
    mask, before, returns = (padded(x, batch) for x in (np.sign(batch["weights"]), batch["values"], batch["returns"]))
    now = padded(tensor, batch)
    near = torch.clamp(now, before - clip, before + clip)
    losses = torch.max(torch.square(now - returns), torch.square(near - returns))
    wanted = 0.5 * (losses * mask).sum() / mask.sum()
    wanted.backward()
    np.testing.assert_allclose(total, wanted.item(), **ROUNDING)
    np.testing.assert_allclose(gradient, tensor.grad.numpy(), **ROUNDING)


def test_advantages_of_groups_are_trls():
    """`GRPOTrainer._generate_and_score_completions`, with the `nanstd` of `trl/trainer/utils.py` (n - 1)."""
    rewards = np.random.default_rng(3).normal(size=(5, 4))
    rewards[1, 2] = rewards[3, 0] = np.nan
    tensor = torch.tensor(rewards)
    for scale in (True, False):
        away = tensor - torch.nanmean(tensor, dim=1, keepdim=True)
        count = (~torch.isnan(tensor)).sum(1, keepdim=True)
        deviation = (torch.nanmean(away**2, dim=1, keepdim=True) * count / (count - 1)).sqrt()
        wanted = torch.nan_to_num(away / (deviation + 1e-4) if scale else away, nan=0.0)
        found = group(rewards.ravel(), np.repeat(np.arange(5), 4), scale=scale)
        np.testing.assert_allclose(found.reshape(5, 4), wanted.numpy(), **ROUNDING)


def test_advantages_of_tokens_are_trls():
    """Rewards of tokens, generalised advantages and returns, and `masked_whiten`, of `PPOTrainer.train`."""
    rng, lengths = np.random.default_rng(4), [5, 1, 8, 3]
    mask = torch.arange(LONGEST)[None] < torch.tensor(lengths)[:, None]
    values, log_ratio = (torch.tensor(rng.normal(size=(4, LONGEST))) * mask for _ in range(2))
    scores, kl, gamma, trace = torch.tensor(rng.normal(size=4)), 0.04, 0.97, 0.9
    rewards = -kl * log_ratio
    rewards[torch.arange(4), torch.tensor(lengths) - 1] += scores
    last, reversed_ = 0, []
    for t in reversed(range(LONGEST)):
        after = values[:, t + 1] if t < LONGEST - 1 else 0.0
        last = rewards[:, t] + gamma * after - values[:, t] + gamma * trace * last
        reversed_.append(last)
    advantages = torch.stack(reversed_[::-1], axis=1)
    returns, mean = advantages + values, (advantages * mask).sum() / mask.sum()
    variance = ((advantages - mean) ** 2 * mask).sum() / mask.sum() * (mask.sum() / (mask.sum() - 1))
    white = (advantages - mean) * torch.rsqrt(variance + 1e-8)

    own = [(row[:n].numpy(), v[:n].numpy()) for row, v, n in zip(log_ratio, values, lengths, strict=True)]
    found = [
        gae(token_rewards(float(score), ratio, kl), v, gamma=gamma, trace=trace)
        for score, (ratio, v) in zip(scores, own, strict=True)
    ]
    ours = (whiten([each[0] for each in found]), [each[1] for each in found])
    for rows, wanted in zip(ours, (white, returns), strict=True):
        for row, theirs, n in zip(rows, wanted, lengths, strict=True):
            np.testing.assert_allclose(row, theirs[:n].numpy(), **ROUNDING)
