"""Rollouts: episodes sampled from the model being trained and judged, and the batches that it learns from them."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np

from qwen_jax import sharding
from qwen_jax.engine import Capacity, Engine, Request, Sampling
from qwen_jax.errors import NumericalError
from qwen_jax.text import Tokenizer
from qwen_jax.weights.usage import turn_ends
from train import advantages, objectives
from train.adapter import Frozen
from train.config import TrainConfig
from train.data.prompts import Order, Prompt
from train.data.rows import stream_seed
from train.episode import Batch, Episode, pack, unpack
from train.feed import put_rows
from train.reinforcement import GRPO, PPO, Online, OnlineDPO
from train.rewards.judge import Judge, Judged, Sample
from train.samples import Table
from train.sampling import Follower
from train.step import State

_PAGE, _MOST_ROWS = 32, 256
_TOLD = 2  # prompts of an episode, with their completions
SAVED = "rollouts.npz"
TABLE = "rollouts.jsonl"


class Made(NamedTuple):
    """A completion: its tokens, with the one that ended it, their log-probabilities, and whether it ended by itself."""

    ids: list[int]
    log_probs: list[float]
    finished: bool


def capacity(config: TrainConfig, longest: int) -> Capacity:
    """What the engine of a run has room for, where a prompt and its completion have so many tokens at most."""
    assert isinstance(config.objective, Online)
    rollout = config.objective.rollout
    rows = min(rollout.max_rows or _MOST_ROWS, config.completions_per_episode)
    tokens = rollout.cache_tokens or rows * -(-longest // _PAGE) * _PAGE
    return Capacity(max_rows=rows, max_length=longest, cache_tokens=tokens, page_size=_PAGE)


class Player:
    """Has prompts answered with weights as they are, and the answers judged; one at a time, in a thread of its own."""

    def __init__(
        self,
        config: TrainConfig,
        prompts: Sequence[Sequence[Prompt]],
        tokenizer: Tokenizer,
        judge: Judge,
        mesh: jax.sharding.Mesh,
    ) -> None:
        """
        Args:
          config: of the run, with an objective that is Online.
          prompts: all that may be asked.
          tokenizer: of the model.
          judge: of the completions.
          mesh: that of the training.
        """
        assert isinstance(config.objective, Online)
        rollout = self._rollout = config.objective.rollout
        self._tokenizer, self._judge = tokenizer, judge
        self._stop_ids = frozenset({tokenizer.end_of_text}) | turn_ends(tokenizer)
        longest = max(len(prompt.ids) for side in prompts for prompt in side) + rollout.max_new_tokens
        self._follower = Follower(
            config.model_config,
            num_tokens=tokenizer.num_tokens,
            mesh=mesh,
            capacity=capacity(config, longest),
            adapter=config.adapter,
        )
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="rollout")

    def start(self, play: Callable[[Engine], Any], state: State, frozen: Frozen) -> Future[Any]:
        """Begins to play with the engine at these weights, which may be donated once this returns."""
        stack = contextlib.ExitStack()
        engine = stack.enter_context(self._follower.at(state.params, frozen))

        def whole() -> Any:
            with stack:
                return play(engine)

        return self._worker.submit(whole)

    def complete(self, engine: Engine, prompts: Sequence[Prompt], *, seed: int, first: int, greedy: bool) -> list[Made]:
        """A completion of each prompt; what is drawn depends on the seed and the place from `first` on alone."""
        how = Sampling(temperature=0)
        if not greedy:
            how = Sampling(temperature=self._rollout.temperature, top_p=self._rollout.top_p, top_k=self._rollout.top_k)
        made: dict[int, Made] = {}
        for place, prompt in enumerate(prompts):
            request = Request(
                prompt=prompt.ids,
                max_new_tokens=self._rollout.max_new_tokens,
                sampling=how,
                seed=seed,
                row=first + place,
                stop_ids=self._stop_ids,
                logprobs=0,
            )
            made[engine.add(request)] = Made([], [], False)
        while engine.busy:
            for token in engine.step():
                if token.finish_reason == "error":
                    raise NumericalError("the logits of a rollout are not finite; lower optimizer.peak_lr")
                ids, log_probs, _ = made[token.request]
                ids.append(token.id)
                log_probs.append(token.logprob or 0.0)
                if token.finish_reason == "stop":
                    made[token.request] = Made(ids, log_probs, True)
        return list(made.values())

    def judge(self, prompts: Sequence[Prompt], made: Sequence[Made]) -> Judged:
        """What the rewards say of completions."""
        return self._judge(
            [
                Sample(prompt=prompt.asked, completion=self.text(each), columns=prompt.columns)
                for prompt, each in zip(prompts, made, strict=True)
            ]
        )

    def text(self, made: Made) -> str:
        """The words of a completion."""
        return self._tokenizer.decode(made.ids[:-1] if made.finished else made.ids)

    def close(self) -> None:
        """Waits for what is played, and ends the thread."""
        self._worker.shutdown(wait=True, cancel_futures=True)


class Rollouts:
    """The batches of a run on its own completions: `updates` of each episode, which is sampled when the first is asked.

    An episode is a function of the weights it is sampled with, the seed and what `files` keeps, so that a run goes on
    from a checkpoint as if it had not been stopped; of one in the middle of an episode, the episode is in the files.
    """

    def __init__(
        self,
        config: TrainConfig,
        prompts: Sequence[Prompt],
        player: Player,
        *,
        saved: bytes | None,
        table: Table,
    ) -> None:
        """
        Args:
          config: of the run.
          prompts: to train on.
          player: what samples.
          saved: what `files` gave at the checkpoint that the run goes on from.
          table: takes the first completions of each episode, for people.
        """
        assert isinstance(config.objective, Online)
        self._config, self._objective, self._rollout = config, config.objective, config.objective.rollout
        self._prompts, self._player, self._table = prompts, player, table
        self._look = objectives.look(config)
        self._episode: Episode | None = None
        self._next: Future[tuple[Episode, list[str]]] | None = None
        self._moments = advantages.RunningMoments()
        self._asked = Order(len(prompts), seed=config.seed, by_variance=self._rollout.order == "variance")
        if saved is not None:
            self._restore(saved)

    def batch(self, step: int, state: State, frozen: Frozen) -> tuple[objectives.Batch, Mapping[str, float]]:
        """Batch `step` on the current mesh, as `feed.put_batch` has it, and what is known of it beforehand."""
        number, update = divmod(step, self._rollout.updates)
        if self._episode is None or self._episode.number != number:
            self._begin(step, number, state, frozen)
        assert self._episode is not None
        arrays = self._arrays(self._episode, update)
        return put_rows(arrays, self._config, accumulation=self._config.accumulation), self._episode.measures

    def files(self, step: int) -> dict[str, bytes]:
        """What a checkpoint of the state after so many steps keeps."""
        arrays = self._asked.arrays() | {"moments": np.array(dataclasses.astuple(self._moments))}
        if self._episode is not None and step % self._rollout.updates:
            arrays |= {f"now/{name}": x for name, x in self._episode.arrays().items()}
        if self._next is not None:
            episode, texts = self._next.result()
            arrays |= {f"next/{name}": x for name, x in episode.arrays().items()} | {"texts": np.array(texts)}
        return {SAVED: pack(arrays)}

    def _restore(self, saved: bytes) -> None:
        arrays = unpack(saved, SAVED)
        below = lambda prefix: {name.removeprefix(prefix): x for name, x in arrays.items() if name.startswith(prefix)}
        self._asked.restore(arrays)
        count, mean, squares = arrays["moments"].tolist()
        self._moments = advantages.RunningMoments(int(count), mean, squares)
        if now := below("now/"):
            self._episode = Episode.of_arrays(now)
        if later := below("next/"):
            self._next = Future()
            self._next.set_result((Episode.of_arrays(later), arrays["texts"].tolist()))

    def _begin(self, step: int, number: int, state: State, frozen: Frozen) -> None:
        """The episode of this step, and with `ahead` the next one begun."""
        play = lambda number: self._player.start(lambda engine: self._play(number, engine), state, frozen)
        running, self._next = self._next or play(number), None
        episode, texts = running.result()
        more = step + self._rollout.updates < self._config.steps
        if self._rollout.ahead and more:
            self._next = play(number + 1)
        self._episode = self._completed(episode, state, frozen)
        self._tell(step, self._episode, texts)

    def _tell(self, step: int, episode: Episode, texts: Sequence[str]) -> None:
        rows = []
        for i, text in enumerate(texts[: _TOLD * self._rollout.completions]):
            reward = float(episode.rewards[i])
            row = {"step": step, "prompt": self._prompts[episode.prompts[i]].text, "completion": text}
            row |= {"reward": reward if np.isfinite(reward) else None, "tokens": int(episode.lengths[i, 1])}
            rows.append(row | {"finish_reason": "stop" if episode.finished[i] else "length"})
        self._table.add(rows)

    def _play(self, number: int, engine: Engine) -> tuple[Episode, list[str]]:
        """Samples and judges an episode."""
        groups, since = self._config.completions_per_episode // self._rollout.completions, time.monotonic()
        seed = stream_seed(self._config.seed, number, 1)
        kept: list[tuple[int, Made, float]] = []
        alike, sampled, judging = [], 0, 0.0
        parts: dict[str, list[np.ndarray]] = {}
        failures = 0
        resample = self._objective.resample if isinstance(self._objective, GRPO) else 0
        for attempt in range(1 + resample):
            asked = np.repeat(
                self._asked.take(groups - len(kept) // self._rollout.completions), self._rollout.completions
            )
            prompts = [self._prompts[i] for i in asked]
            made = self._player.complete(engine, prompts, seed=seed, first=sampled, greedy=False)
            before = time.monotonic()
            judged = self._player.judge(prompts, made)
            judging += time.monotonic() - before
            sampled, failures = sampled + len(made), failures + int(np.isnan(judged.total).sum())
            for name, values in judged.parts.items():
                parts.setdefault(name, []).append(values)
            spread = _spread(judged.total.reshape(-1, self._rollout.completions))
            self._asked.learn(asked[:: self._rollout.completions], spread)
            alike.append(spread == 0)
            last = attempt == resample
            chosen = np.repeat((spread > 0) | last, self._rollout.completions)
            rows = zip(asked.tolist(), made, judged.total.tolist(), strict=True)
            kept += [row for row, keep in zip(rows, chosen, strict=True) if keep]
            if len(kept) == groups * self._rollout.completions:
                break
        seconds = time.monotonic() - since
        rewards = np.array([reward for _, _, reward in kept])
        tokens = sum(len(each.ids) for _, each, _ in kept)
        measures = {
            "reward": mean(rewards),
            "reward_std": mean(_spread(rewards.reshape(-1, self._rollout.completions))),
            **{f"reward_{name}": mean(np.concatenate(values)) for name, values in parts.items() if len(parts) > 1},
            "alike": mean(np.concatenate(alike).astype(float)),
            "unjudged": failures / sampled,
            "completion_tokens": tokens / len(kept),
            "truncated": mean(np.array([not each.finished for _, each, _ in kept], float)),
            "rollout_seconds": seconds,
            "judge_seconds": judging,
            "rollout_tokens_per_second": tokens / (seconds - judging),
        }
        episode = Episode(
            number=number,
            prompts=np.array([i for i, _, _ in kept], np.int32),
            lengths=np.array([(len(self._prompts[i].ids), len(each.ids)) for i, each, _ in kept], np.int32),
            ids=np.concatenate([[*self._prompts[i].ids, *each.ids] for i, each, _ in kept]).astype(np.int32),
            finished=np.array([each.finished for _, each, _ in kept]),
            rewards=rewards,
            tokens={"sampled": np.concatenate([each.log_probs for _, each, _ in kept]).astype(np.float32)},
            measures=measures,
        )
        return episode, [self._player.text(each) for _, each, _ in kept]

    def _completed(self, episode: Episode, state: State, frozen: Frozen) -> Episode:
        """The episode with what the model says of its tokens before it learns from them, and their advantages."""
        objective, tokens = self._objective, dict(episode.tokens)
        if names := objectives.look_names(self._config):
            items = list(range(len(episode.rewards)))
            rows = episode.rows([[i] for i in items], self._config.data.sequence_length, {})
            found = self._looked(rows, state, frozen)
            tokens |= {name: episode.read_back(rows, items, found[name]) for name in names}
        measures = dict(episode.measures)
        if isinstance(objective, PPO):
            tokens |= self._expected(objective, episode, tokens)
            judged = np.repeat(np.isfinite(episode.rewards), episode.lengths[:, 1])
            unexplained, all_of_it = (
                x[judged].var() for x in (tokens["returns"] - tokens["values"], tokens["returns"])
            )
            measures["explained_variance"] = 1 - float(unexplained) / max(float(all_of_it), 1e-8)
        elif isinstance(objective, GRPO):
            groups = np.arange(len(episode.rewards)) // self._rollout.completions
            each = advantages.group(episode.rewards, groups, scale=objective.scale)
            tokens["advantages"] = np.repeat(each, episode.lengths[:, 1]).astype(np.float32)
        return dataclasses.replace(episode, tokens=tokens, measures=measures)

    def _expected(self, objective: PPO, episode: Episode, tokens: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The advantages and returns of tokens; rewards are first made to be alike from episode to episode."""
        rewards = episode.rewards
        if objective.normalise:
            self._moments = self._moments.including(rewards)
            rewards = self._moments.normalised(rewards)
        log_ratio = tokens["old"] - tokens["reference"] if objective.kl else np.zeros_like(tokens["old"])
        pairs, bounds = [], episode.bounds
        for reward, first, last in zip(rewards.tolist(), bounds[:-1], bounds[1:], strict=True):
            own = advantages.token_rewards(reward if np.isfinite(reward) else 0.0, log_ratio[first:last], objective.kl)
            found = advantages.gae(own, tokens["values"][first:last], gamma=objective.gamma, trace=objective.trace)
            pairs.append(found)
        judged = [i for i, reward in enumerate(rewards) if np.isfinite(reward)]
        whitened = dict(zip(judged, advantages.whiten([pairs[i][0] for i in judged]), strict=True)) if judged else {}
        each = [whitened.get(i, np.zeros_like(pair[0])) for i, pair in enumerate(pairs)]
        made = {"advantages": each, "returns": [pair[1] for pair in pairs]}
        return {name: np.concatenate(values).astype(np.float32) for name, values in made.items()}

    def _looked(self, rows: Batch, state: State, frozen: Frozen) -> dict[str, np.ndarray]:
        """What the compiled programs say of rows, a micro-batch at a time."""
        size, count = self._config.micro_batch_size, len(rows["tokens"])
        parts = []
        for start in range(0, count, size):
            micro = {name: x[start : start + size] for name, x in rows.items()}
            batch = jax.tree.map(lambda x: x[0], put_rows(micro, self._config, accumulation=1))
            parts.append(
                {
                    n: np.asarray(x)
                    for n, x in jax.device_get(
                        self._look(state.params, frozen, state.critic and state.critic.params, batch)
                    ).items()
                }
            )
        order = sharding.balanced_columns(self._config.data.sequence_length)
        whole = {name: np.concatenate([part[name] for part in parts])[:count] for name in parts[0]}
        found = {name: np.empty_like(x) for name, x in whole.items()}
        for name, x in whole.items():
            found[name][:, order] = x
        return found

    def _arrays(self, episode: Episode, update: int) -> Batch:
        """The rows of one of the updates of an episode, on the host."""
        objective, rollout, length = self._objective, self._rollout, self._config.data.sequence_length
        per_pass = rollout.updates // rollout.passes
        items = self._items(episode)
        draw = np.random.default_rng([self._config.seed, episode.number, update // per_pass])
        chosen = np.array_split(draw.permutation(len(items)), per_pass)[update % per_pass]
        own = [items[i] for i in sorted(chosen)]
        if isinstance(objective, OnlineDPO):
            ones = {"weights": np.ones(int(episode.bounds[-1]), np.float32)}
            return episode.rows(own, length, ones, pairs=True)
        lengths = episode.lengths[:, 1]
        average = objective.average if isinstance(objective, GRPO) else "token"
        shares = np.zeros(len(lengths), np.float32)
        chosen = [i for (i,) in own]
        shares[chosen] = advantages.shares(lengths[chosen], average, rollout.max_new_tokens)
        each = {"weights": 1 / lengths, "shares": shares}
        spread = {name: np.repeat(values, lengths).astype(np.float32) for name, values in each.items()}
        return episode.rows(own, length, {**episode.tokens, **spread})

    def _items(self, episode: Episode) -> list[list[int]]:
        """What is learned from together: each completion that was judged, or pairs of the best and the worst."""
        judged = np.isfinite(episode.rewards)
        if not isinstance(self._objective, OnlineDPO):
            return [[i] for i in np.flatnonzero(judged).tolist()]
        pairs, size = [], self._rollout.completions
        for start in range(0, len(judged), size):
            own = [i for i in range(start, start + size) if judged[i]]
            if own:
                best, worst = (pick(own, key=episode.rewards.__getitem__) for pick in (max, min))
                columns = int(episode.lengths[[best, worst]].sum()) - 2
                if episode.rewards[best] > episode.rewards[worst] and columns <= self._config.data.sequence_length:
                    pairs.append([best, worst])
        return pairs


def _spread(rewards: np.ndarray) -> np.ndarray:
    """The standard deviation of each group [g, n], of what was judged; 0 where less than two were."""
    known = np.isfinite(rewards)
    values = np.where(known, rewards, 0)
    count = np.maximum(known.sum(1), 1)
    mean = values.sum(1) / count
    return np.sqrt((np.where(known, rewards - mean[:, None], 0) ** 2).sum(1) / count)


def mean(values: np.ndarray) -> float:
    """Of what was judged; 0 where nothing was."""
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else 0.0
