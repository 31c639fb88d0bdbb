"""Rollouts: episodes sampled from the model being trained and judged, as the batches that it learns from."""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import NamedTuple

import numpy as np

from qwen_jax.engine import Replicas
from qwen_jax.errors import DataError
from train import advantages, objectives
from train.adapter import Frozen
from train.config import TrainConfig
from train.data import Rows
from train.data.mixture import MixedRows
from train.data.prompts import Order, Prompt
from train.data.rows import stream_seed
from train.episode import Episode, pack, unpack
from train.feed import put_batch, put_rows
from train.lessons import Lessons
from train.player import Interrupted, Made, Player
from train.reinforcement import GRPO, PPO, Online
from train.rewards.judge import Judged
from train.samples import Table
from train.step import State

_TOLD = 2  # prompts of an episode, with their completions
SAVED = "rollouts.npz"
TABLE = "rollouts.jsonl"


class Played(NamedTuple):
    """An episode as it was sampled and judged, the words of its completions, and which prompts come after."""

    episode: Episode
    texts: list[str]
    order: Order


class Rollouts:
    """The batches of a run on its own completions: `updates` of each episode, which is sampled when the first is asked.

    The prompts that are asked, the rewards there were and an episode that is not learned from yet are part of the
    checkpoint, so that a run goes on bit for bit.
    """

    def __init__(
        self,
        config: TrainConfig,
        prompts: Sequence[Prompt],
        player: Player,
        *,
        saved: bytes | None,
        table: Table,
        text: Rows | MixedRows | None,
        warn: Callable[[str], None],
    ) -> None:
        """
        Args:
          config: of the run.
          prompts: to train on.
          player: what samples.
          saved: what `files` gave at the checkpoint that the run goes on from.
          table: takes the first completions of each episode, for people.
          text: that is learned from beside them, where there is any.
          warn: takes a line about an episode that teaches nothing.

        Raises DataError if the checkpoint is of other prompts.
        """
        assert isinstance(config.objective, Online)
        self._config, self._objective, self._rollout = config, config.objective, config.objective.rollout
        self._prompts, self._player, self._table, self._text, self._warn = prompts, player, table, text, warn
        self._lessons = Lessons(config)
        self._episode: Episode | None = None
        self._next: Future[Played] | None = None
        self._asked = Order(len(prompts), seed=config.seed, by_variance=self._rollout.order == "variance")
        if saved is not None:
            self._restore(saved)

    def batch(self, step: int, state: State, frozen: Frozen) -> tuple[objectives.Batch, Mapping[str, float]]:
        """Batch `step` on the current mesh, as `feed.put_batch` has it, and what is known of it beforehand.

        Raises Interrupted where the run is asked to stop while an episode is sampled; nothing has changed then.
        """
        number, update = divmod(step, self._rollout.updates)
        if self._episode is None or self._episode.number != number:
            self._begin(step, number, state, frozen)
        assert self._episode is not None
        rows = self._lessons.rows(self._episode, update)
        batch = put_rows(rows, self._config, accumulation=self._config.accumulation)
        if self._text:
            assert self._config.text_config
            batch = {**batch, "text": put_batch(self._text, step, self._config.text_config)}
        return batch, self._episode.measures

    def files(self, step: int) -> dict[str, bytes]:
        """What a checkpoint of the state after so many steps keeps."""
        ahead, order = self._ahead(), self._asked
        arrays = {"moments": np.array(dataclasses.astuple(self._lessons.moments)), "prompts": self._digest}
        if self._episode is not None and step % self._rollout.updates:
            arrays |= {f"now/{name}": x for name, x in self._episode.arrays().items()}
        if ahead:
            arrays |= {f"next/{name}": x for name, x in ahead.episode.arrays().items()}
            arrays["texts"], order = np.array(ahead.texts), ahead.order
        return {SAVED: pack(arrays | order.arrays())}

    def _ahead(self) -> Played | None:
        """The episode after this one, if it was begun and can be had; else it is sampled anew when its turn comes."""
        if self._next is None:
            return None
        try:
            return self._player.result(self._next)
        except Interrupted:
            self._warn("the next episode was not done: it is sampled anew, from newer weights, when the run goes on")
        except Exception:  # which is raised when its turn comes
            pass
        return None

    def _restore(self, saved: bytes) -> None:
        arrays = unpack(saved, SAVED)
        if not np.array_equal(arrays["prompts"], self._digest):
            raise DataError(
                "the prompts are not those that the checkpoint was trained on; restore them, or choose another run_dir"
            )
        below = lambda prefix: {name.removeprefix(prefix): x for name, x in arrays.items() if name.startswith(prefix)}
        self._asked.restore(arrays)
        count, mean, squares = arrays["moments"].tolist()
        self._lessons.moments = advantages.RunningMoments(int(count), mean, squares)
        if now := below("now/"):
            self._episode = Episode.of_arrays(now)
        if later := below("next/"):
            self._next = Future()
            self._next.set_result(Played(Episode.of_arrays(later), arrays["texts"].tolist(), self._asked))

    @functools.cached_property
    def _digest(self) -> np.ndarray:
        """What tells the prompts from others."""
        found = hashlib.sha256()
        for prompt in self._prompts:
            found.update(np.array([len(prompt.ids), *prompt.ids], np.int32).tobytes())
        return np.frombuffer(found.digest(), np.uint8)

    def _begin(self, step: int, number: int, state: State, frozen: Frozen) -> None:
        """The episode of this step, and with `ahead` the next one begun."""

        def play(number: int) -> Future[Played]:
            order = copy.deepcopy(self._asked)  # what is interrupted has asked nothing
            return self._player.start(lambda replicas: self._play(number, order, replicas), state, frozen)

        episode, texts, self._asked = self._player.result(self._next or play(number))
        self._next = None
        more = step + self._rollout.updates < self._config.steps
        if self._rollout.ahead and more:
            self._next = play(number + 1)
        self._episode = self._lessons.prepared(episode, state, frozen)
        if not isinstance(self._objective, PPO) and episode.measures["alike"] == 1:
            self._warn(f"step {step}: the completions of each prompt are worth the same, which teaches nothing")
        self._tell(step, self._episode, texts)

    def _tell(self, step: int, episode: Episode, texts: Sequence[str]) -> None:
        rows = []
        for i, text in enumerate(texts[: _TOLD * self._rollout.completions]):
            reward = float(episode.rewards[i])
            row = {"step": step, "prompt": self._prompts[episode.prompts[i]].text, "completion": text}
            row |= {"reward": reward if np.isfinite(reward) else None, "tokens": int(episode.lengths[i, 1])}
            rows.append(row | {"finish_reason": "stop" if episode.finished[i] else "length"})
        self._table.add(rows)

    def _play(self, number: int, order: Order, replicas: Replicas) -> Played:
        """Samples and judges an episode; prompts that teach nothing are replaced as often as the objective says."""
        size, wanted = self._rollout.completions, self._config.completions_per_episode
        resample = self._objective.resample if isinstance(self._objective, GRPO) else 0
        seed, began, judging = stream_seed(self._config.seed, number, 1), time.monotonic(), 0.0
        asked: list[int] = []
        made: list[Made] = []
        verdicts: list[Judged] = []
        kept = np.zeros(0, np.int64)
        for attempt in range(1 + resample):
            prompts = order.take((wanted - len(kept)) // size)
            new = np.repeat(prompts, size)
            questions = [self._prompts[i] for i in new]
            answers = self._player.complete(replicas, questions, seed=seed, first=len(made), greedy=False)
            before = time.monotonic()
            verdicts.append(self._player.judge(questions, answers))
            judging += time.monotonic() - before
            spread = _spread(verdicts[-1].total.reshape(-1, size))
            order.learn(prompts, spread)
            teaches = np.repeat((spread > 0) | (attempt == resample), size)
            kept = np.concatenate([kept, len(made) + np.flatnonzero(teaches)])
            asked, made = asked + new.tolist(), made + answers
            if len(kept) == wanted:
                break
        times = {"rollout_seconds": time.monotonic() - began, "judge_seconds": judging}
        episode = _episode(number, [(asked[i], self._prompts[asked[i]].ids, made[i]) for i in kept])
        rewards = np.concatenate([each.total for each in verdicts])[kept]
        episode = dataclasses.replace(episode, rewards=rewards, measures=_measures(made, verdicts, size, times))
        return Played(episode, [self._player.text(made[i]) for i in kept], order)


def _episode(number: int, rows: Sequence[tuple[int, list[int], Made]]) -> Episode:
    """The episode of completions, each with the number and the ids of its prompt, before it is judged."""
    return Episode(
        number=number,
        prompts=np.array([prompt for prompt, _, _ in rows], np.int32),
        lengths=np.array([(len(ids), len(made.ids)) for _, ids, made in rows], np.int32),
        ids=np.concatenate([[*ids, *made.ids] for _, ids, made in rows]).astype(np.int32),
        finished=np.array([made.finished for _, _, made in rows]),
        rewards=np.full(len(rows), np.nan),
        tokens={"sampled": np.concatenate([made.log_probs for _, _, made in rows]).astype(np.float32)},
        measures={},
    )


def _measures(
    made: Sequence[Made], verdicts: Sequence[Judged], size: int, times: Mapping[str, float]
) -> dict[str, float]:
    """Of all that was sampled, also for prompts that were replaced; `size` completions of each."""
    rewards = np.concatenate([each.total for each in verdicts])
    spread = _spread(rewards.reshape(-1, size))
    parts = {name: np.concatenate([each.parts[name] for each in verdicts]) for name in verdicts[0].parts}
    lengths = np.array([len(each.ids) for each in made])
    return {
        "reward": mean(rewards),
        "reward_std": mean(spread),
        **{f"reward_{name}": mean(values) for name, values in parts.items() if len(parts) > 1},
        "alike": float(np.mean(spread == 0)),
        "unjudged": float(np.mean(np.isnan(rewards))),
        "completion_tokens": float(lengths.mean()),
        "truncated": float(np.mean([not each.finished for each in made])),
        **times,
        "rollout_tokens_per_second": float(
            lengths.sum() / max(times["rollout_seconds"] - times["judge_seconds"], 1e-3)
        ),
    }


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
