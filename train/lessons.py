"""What a run learns of its episodes: advantages from rewards, and the rows of every update."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import numpy as np

from qwen_jax import sharding
from train import advantages, objectives
from train.adapter import Frozen
from train.config import TrainConfig
from train.episode import Batch, Episode
from train.feed import put_rows
from train.reinforcement import GRPO, PPO, Online, OnlineDPO
from train.step import State


class Lessons:
    """Episodes to batches.

    Attributes:
      moments: of all rewards there were, where they are normalised.
    """

    def __init__(self, config: TrainConfig) -> None:
        """`config` is that of a run with an objective that is Online."""
        assert isinstance(config.objective, Online)
        self._config, self._objective, self._rollout = config, config.objective, config.objective.rollout
        self._look = objectives.look(config)
        self.moments = advantages.RunningMoments()

    def prepared(self, episode: Episode, state: State, frozen: Frozen) -> Episode:
        """The episode with what the model says of its tokens before it learns from them, and their advantages."""
        objective, tokens, measures = self._objective, dict(episode.tokens), dict(episode.measures)
        tokens |= self._looked(episode, state, frozen)
        if isinstance(objective, PPO):
            tokens |= self._expected(objective, episode, tokens)
            judged = np.repeat(np.isfinite(episode.rewards), episode.lengths[:, 1])
            if judged.any():
                returns, values = tokens["returns"][judged], tokens["values"][judged]
                measures["explained_variance"] = 1 - float((returns - values).var() / max(returns.var(), 1e-8))
        elif isinstance(objective, GRPO):
            groups = np.arange(len(episode.rewards)) // self._rollout.completions
            each = advantages.group(episode.rewards, groups, scale=objective.scale)
            tokens["advantages"] = np.repeat(each, episode.lengths[:, 1]).astype(np.float32)
        return dataclasses.replace(episode, tokens=tokens, measures=measures)

    def rows(self, episode: Episode, update: int) -> Batch:
        """The rows of one of the updates of a prepared episode: a part of its completions, drawn anew in each pass."""
        objective, rollout, length = self._objective, self._rollout, self._config.data.sequence_length
        items = self._items(episode)
        per_pass = rollout.updates // rollout.passes
        draw = np.random.default_rng([self._config.seed, episode.number, update // per_pass])
        own = np.array_split(draw.permutation(len(items)), per_pass)[update % per_pass]
        chosen = [items[i] for i in sorted(own)]
        if isinstance(objective, OnlineDPO):
            ones = {"weights": np.ones(int(episode.bounds[-1]), np.float32)}
            return episode.rows(chosen, length, ones, pairs=True)
        lengths, shares = episode.lengths[:, 1], np.zeros(len(episode.lengths))
        numbers = [i for (i,) in chosen]
        average = objective.average if isinstance(objective, GRPO) else "token"
        shares[numbers] = advantages.shares(lengths[numbers], average, rollout.max_new_tokens)
        each = {"weights": 1 / lengths, "shares": shares}
        spread = {name: np.repeat(values, lengths).astype(np.float32) for name, values in each.items()}
        return episode.rows(chosen, length, {**episode.tokens, **spread})

    def _items(self, episode: Episode) -> list[list[int]]:
        """What is learned from together: each completion that was judged, or pairs of the best and the worst."""
        judged = np.isfinite(episode.rewards)
        if not isinstance(self._objective, OnlineDPO):
            return [[i] for i in np.flatnonzero(judged).tolist()]
        pairs, size = [], self._rollout.completions
        for start in range(0, len(judged), size):
            own = [i for i in range(start, start + size) if judged[i]]
            best, worst = (pick(own, key=episode.rewards.__getitem__, default=start) for pick in (max, min))
            if best != worst and episode.rewards[best] > episode.rewards[worst]:
                pairs.append([best, worst])
        return pairs

    def _expected(self, objective: PPO, episode: Episode, tokens: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The advantages and returns of tokens, 0 where there is no verdict; rewards are made to be alike first."""
        rewards, bounds = episode.rewards, episode.bounds
        if objective.normalise:
            self.moments = self.moments.including(rewards)
            rewards = self.moments.normalised(rewards)
        log_ratio = tokens["old"] - tokens["reference"] if objective.kl else np.zeros_like(tokens["old"])
        judged, found = np.flatnonzero(np.isfinite(rewards)).tolist(), []
        for i in judged:
            own = slice(bounds[i], bounds[i + 1])
            reward = advantages.token_rewards(float(rewards[i]), log_ratio[own], objective.kl)
            found.append(advantages.gae(reward, tokens["values"][own], gamma=objective.gamma, trace=objective.trace))
        whole = {name: np.zeros(bounds[-1], np.float32) for name in ("advantages", "returns")}
        if judged:
            whitened = advantages.whiten([each for each, _ in found])
            for i, advantage, (_, returns) in zip(judged, whitened, found, strict=True):
                own = slice(bounds[i], bounds[i + 1])
                whole["advantages"][own], whole["returns"][own] = advantage, returns
        return whole

    def _looked(self, episode: Episode, state: State, frozen: Frozen) -> dict[str, np.ndarray]:
        """What the models say of the tokens of an episode, a micro-batch at a time."""
        if not (names := objectives.look_names(self._config)):
            return {}
        items, length = [[i] for i in range(len(episode.rewards))], self._config.data.sequence_length
        rows = episode.rows(items, length, {})
        size, count = self._config.micro_batch_size, len(rows["tokens"])
        critic = state.critic and state.critic.params
        parts = []
        for start in range(0, count, size):
            micro = {name: x[start : start + size] for name, x in rows.items()}
            batch = jax.tree.map(lambda x: x[0], put_rows(micro, self._config, accumulation=1))
            parts.append(jax.device_get(self._look(state.params, frozen, critic, batch)))
        in_order = np.argsort(sharding.balanced_columns(length))
        whole = {name: np.concatenate([part[name] for part in parts])[:count, in_order] for name in names}
        return {name: episode.read_back(items, values) for name, values in whole.items()}
