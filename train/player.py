"""Completions of the model as it is: sampled by engines that follow its weights, in a thread beside the loop."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from typing import Any, NamedTuple

import jax

from qwen_jax.engine import Capacity, Replicas, Request, Sampling
from qwen_jax.errors import ConfigError, NumericalError
from qwen_jax.text import Tokenizer
from qwen_jax.weights.usage import turn_ends
from train import hosts
from train.adapter import Frozen
from train.config import TrainConfig
from train.data.prompts import Prompt
from train.reinforcement import ROLLOUT, Online
from train.rewards.judge import Judge, Judged, Sample
from train.sampling import Follower, engines_mesh
from train.step import State

_PAGE, _MOST_ROWS = 32, 256
_GLANCE = 0.2  # seconds between looks at whether it is done
_PATIENCE = 10.0  # seconds for what cannot be sampled again as it was, once the run is asked to stop
_FAREWELL = 5.0  # seconds for whatever is still judged then


class Interrupted(Exception):
    """The run was asked to stop before there were completions. The state is as it was."""


class Made(NamedTuple):
    """A completion: its tokens, with the one that ended it, their log-probabilities, and whether it ended by itself."""

    ids: list[int]
    log_probs: list[float]
    finished: bool


def capacity(config: TrainConfig, longest: int, engines: int) -> Capacity:
    """What each of the engines of a run has room for; a prompt and its completion have so many tokens at most."""
    assert isinstance(config.objective, Online)
    rollout = config.objective.rollout
    most = -(-config.completions_per_episode // engines)
    rows = min(rollout.max_rows or _MOST_ROWS, most)
    tokens = rollout.cache_tokens or rows * -(-longest // _PAGE) * _PAGE
    return Capacity(max_rows=rows, max_length=longest, cache_tokens=tokens, page_size=_PAGE)


class Player:
    """Has prompts answered with weights as they are, and the answers judged; one thing at a time.

    playing = player.start(lambda replicas: player.complete(replicas, prompts, ...), state, frozen)
    made = player.result(playing)

    Attributes:
      engines: what it samples with, in words.
    """

    def __init__(
        self,
        config: TrainConfig,
        prompts: Sequence[Sequence[Prompt]],
        tokenizer: Tokenizer,
        judge: Judge,
        mesh: jax.sharding.Mesh,
        *,
        stopping: Callable[[], bool],
        show: Callable[[str], None],
    ) -> None:
        """
        Args:
          config: of the run, with an objective that is Online.
          prompts: all that may be asked.
          tokenizer: of the model.
          judge: of the completions.
          mesh: that of the training.
          stopping: whether the run is asked to stop.
          show: takes how far it is, again and again.

        Raises ConfigError where engines cannot be had on these devices, or have a cache that is too small.
        """
        assert isinstance(config.objective, Online)
        self._hosts = jax.process_count()
        if self._hosts > 1 and config.objective.rollout.ahead:
            # What is computed on all hosts must begin in the same order on each, which two threads cannot promise.
            raise ConfigError(f"objective.rollout.ahead=1 is for one host, and there are {self._hosts}; set it to 0")
        rollout = self._rollout = config.objective.rollout
        self._tokenizer, self._judge, self._stopping, self._show = tokenizer, judge, stopping, show
        self._stop_ids = frozenset({tokenizer.end_of_text}) | turn_ends(tokenizer)
        longest = max(len(prompt.ids) for side in prompts for prompt in side) + rollout.max_new_tokens
        whole = -(-longest // _PAGE) * _PAGE
        if rollout.cache_tokens and rollout.cache_tokens < whole:
            raise ConfigError(
                f"objective.rollout.cache_tokens={rollout.cache_tokens} has no room for the longest prompt and its "
                f"completion; set it to {whole} or more"
            )
        engines = engines_mesh(mesh, config.model_config, rollout.tensor).shape["data"]
        room = capacity(config, longest, engines)
        self.engines = (
            f"{engines:,} of {mesh.size // engines} devices each, with {room.max_rows:,} rows and "
            f"{room.cache_tokens:,} tokens in cache"
        )
        self._follower = Follower(
            config.model_config,
            num_tokens=tokenizer.num_tokens,
            mesh=mesh,
            capacity=room,
            adapter=config.adapter,
            tensor=rollout.tensor,
        )
        # What weights of a while ago have begun to say, a run that goes on cannot have again.
        self._patience = _PATIENCE if rollout.ahead else 0.0
        self._thread: threading.Thread | None = None
        self._playing: Future[Any] = Future()
        self._playing.set_result(None)
        self._given_up = threading.Event()
        self._doing = "compiling"

    def start(self, play: Callable[[Replicas], Any], state: State, frozen: Frozen) -> Future[Any]:
        """Begins to play with the engines at these weights, which may be donated once this returns.

        They do one thing at a time: what is played before is waited for. Raises Interrupted as `result` does.
        """
        self._settle(self._playing)
        stack = contextlib.ExitStack()
        replicas = stack.enter_context(self._follower.at(state.params, frozen))
        playing = self._playing = Future()

        def whole() -> None:
            try:
                with stack:
                    made = play(replicas)
                if self._hosts > 1 and any(hosts.together(self._given_up.is_set)):
                    raise Interrupted
            except BaseException as error:
                playing.set_exception(error)
            else:
                playing.set_result(made)

        # Not one of a pool, which the end of the process would wait for, however long a judge takes.
        self._thread = threading.Thread(target=whole, name=ROLLOUT, daemon=True)
        self._thread.start()
        return playing

    def result(self, playing: Future[Any]) -> Any:
        """What was played, or an exception as it was raised. Raises Interrupted if the run is asked to stop before."""
        self._settle(playing)
        return playing.result()

    def _settle(self, playing: Future[Any]) -> None:
        asked = None
        while not playing.done():
            now = time.monotonic()
            if self._stopping():
                asked = now if asked is None else asked
                if now - asked >= self._patience or self._given_up.is_set():
                    self._given_up.set()
                    if self._hosts == 1:
                        raise Interrupted
                    # Else what is played tells the other hosts, who may not have been asked, and then ends.
            self._show(self._doing)
            wait([playing], timeout=_GLANCE)

    def complete(
        self, replicas: Replicas, prompts: Sequence[Prompt], *, seed: int, first: int, greedy: bool
    ) -> list[Made]:
        """A completion of each prompt, on every host the same; each host makes a share of them.

        What is drawn depends on the seed and the place from `first` on alone.
        """
        own = hosts.share(len(prompts))
        asked = [
            self._request(prompt, seed=seed, row=first + place, greedy=greedy)
            for place, prompt in enumerate(prompts[own], own.start)
        ]
        return list(itertools.chain(*hosts.together(lambda: self._complete(replicas, asked))))

    def _request(self, prompt: Prompt, *, seed: int, row: int, greedy: bool) -> Request:
        rollout = self._rollout
        drawn = Sampling(temperature=rollout.temperature, top_p=rollout.top_p, top_k=rollout.top_k)
        return Request(
            prompt=prompt.ids,
            max_new_tokens=rollout.max_new_tokens,
            sampling=Sampling(temperature=0) if greedy else drawn,
            seed=seed,
            row=row,
            stop_ids=self._stop_ids,
            logprobs=0,
            tempered=True,
        )

    def _complete(self, replicas: Replicas, asked: Sequence[Request]) -> list[Made]:
        made = {replicas.add(request): Made([], [], False) for request in asked}
        where = f" on each of {self._hosts} hosts" if self._hosts > 1 else ""
        tokens, done, began = 0, 0, time.monotonic()
        while replicas.busy:
            if self._given_up.is_set():
                raise Interrupted
            for token in replicas.step():
                if token.finish_reason == "error":
                    raise NumericalError("the logits of a rollout are not finite; lower optimizer.peak_lr")
                ids, log_probs, _ = made[token.request]
                ids.append(token.id)
                log_probs.append(token.logprob or 0.0)
                if token.finish_reason == "stop":
                    made[token.request] = Made(ids, log_probs, True)
                tokens, done = tokens + 1, done + (token.finish_reason is not None)
            speed = f"{tokens:,} tokens, {tokens / max(time.monotonic() - began, 1e-3):,.0f} tokens/s"
            self._doing = f"sampling{where}: {done:,} of {len(made):,} completions, {speed}"
        return list(made.values())

    def judge(self, prompts: Sequence[Prompt], made: Sequence[Made]) -> Judged:
        """What the rewards say of completions."""
        self._doing = f"judging {len(made):,} completions"
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
        """Ends what is played; a judge that takes long is left behind."""
        self._given_up.set()
        if self._thread:
            self._thread.join(_FAREWELL)
