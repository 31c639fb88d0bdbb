"""The held-out prompts of reinforcement learning: what the answers to them are worth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from qwen_jax.engine import Replicas
from train.adapter import Frozen
from train.config import TrainConfig
from train.data.prompts import Prompt
from train.player import Made, Player
from train.rewards.judge import Judged
from train.rollout import mean
from train.samples import Table
from train.step import State


class Exam:
    """Has held-out prompts answered, by the likeliest token each time, and the answers judged."""

    entropies = None

    def __init__(
        self, config: TrainConfig, prompts: Sequence[Prompt], player: Player, frozen: Frozen, table: Table
    ) -> None:
        """
        Args:
          config: of the run.
          prompts: held out.
          player: that answers.
          frozen: beside what is trained.
          table: takes as many answers as the config asks for, each with its reward.
        """
        self._config, self._prompts, self._player, self._frozen, self._table = config, prompts, player, frozen, table
        self._last: dict[str, float] = {}

    def evaluate(self, state: State, *, whole: bool) -> tuple[dict[str, Any], str]:
        """Mean `reward`, and that of each of several, and a line about it.

        Of the prompts all are asked, or as many as are in the batches the config asks for, spread evenly. Raises
        Interrupted where the run is asked to stop before the answers are there.
        """
        count, batches = len(self._prompts), self._config.evaluation.batches
        wanted = min(count, batches * self._config.micro_batch_size) if batches and not whole else count
        prompts = [self._prompts[i * count // wanted] for i in range(wanted)]

        def play(replicas: Replicas) -> tuple[list[Made], Judged]:
            made = self._player.complete(replicas, prompts, seed=0, first=0, greedy=True)
            return made, self._player.judge(prompts, made)

        made, judged = self._player.result(self._player.start(play, state, self._frozen))
        rows = [
            {
                "step": int(state.step),
                "prompt": prompt.text,
                "answer": self._player.text(each),
                "reward": reward if math.isfinite(reward) else None,
                "finish_reason": "stop" if each.finished else "length",
            }
            for prompt, each, reward in zip(prompts, made, judged.total.tolist(), strict=True)
        ]
        self._table.add(rows[: self._config.evaluation.samples])
        each = {f"reward_{name}": mean(x) for name, x in judged.parts.items() if len(judged.parts) > 1}
        lengths = sum(len(each.ids) for each in made) / len(made)
        self._last = {"reward": mean(judged.total), **each, "completion_tokens": lengths}
        return self._last, f"held-out reward {self._last['reward']:.3f} over {wanted:,} prompts"

    def summary(self) -> str:
        """What was evaluated last, as lines of text."""
        return "\n".join(f"{f'held-out {name}':<28}{value:>12.4f}" for name, value in self._last.items())
