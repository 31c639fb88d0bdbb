"""The engine: requests in, tokens out, many rows at a time."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from qwen_jax import sharding
from qwen_jax.config import ModelConfig
from qwen_jax.engine.packing import MOST_PIECES, Capacity, Packing, Wanted, allowed, row_multiple
from qwen_jax.engine.pages import Pages
from qwen_jax.engine.request import MAX_LOGPROBS, Request, Token
from qwen_jax.engine.scheduler import Row, Scheduler
from qwen_jax.engine.speculative import Drafter, DraftModel, PromptLookup
from qwen_jax.engine.steps import Chosen, Inputs, choose, compute, remember
from qwen_jax.errors import DataError
from qwen_jax.model import Params, make_cache, repeat_kv_heads
from qwen_jax.ops.pages import kv_heads
from qwen_jax.ops.rope import kind
from qwen_jax.ops.sampling import Seen
from qwen_jax.ops.vertical_slash import VerticalSlash


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stats:
    """How the engine is doing.

    Attributes:
      num_waiting, num_running: requests.
      pages_used, pages_total: pages that rows hold, and all there are.
      prompt_tokens, generated_tokens: tokens of the prompts that were asked for, and tokens made, since the beginning.
      prefix_hits: tokens that were found in pages instead of being computed.
      preemptions: how often a row gave up its pages and was computed again.
      steps: steps of the model.
    """

    num_waiting: int
    num_running: int
    pages_used: int
    pages_total: int
    prompt_tokens: int
    generated_tokens: int
    prefix_hits: int
    preemptions: int
    steps: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Flight:
    """A step that was launched, and what it makes.

    Attributes:
      rows: those that decode, in the order of the tokens that are made.
      usable: for each of them, how many guesses after its first token may be kept.
      guesses: [R, width - 1].
      ending: the rows whose prompts end in this step, and the numbers of the tokens that they make.
      chosen: the tokens; None if none are made.
    """

    rows: Sequence[Row] = ()
    usable: Sequence[int] = ()
    guesses: Any = None
    ending: Sequence[tuple[Row, int]] = ()
    chosen: Chosen | None = None


class Engine:
    """A model ready to decode. Not for several threads at once.

    Attributes:
      config: shape and constants, with at least one kv head for each device along `tensor`; `dtype` is the type of its
        parameters and of the computation.
      mesh: the devices it runs on.
      max_length: tokens of a request at most, its prompt and what follows.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        *,
        num_tokens: int,
        mesh: Mesh,
        capacity: Capacity,
        sparse: VerticalSlash | None = None,
        speculate: PromptLookup | DraftModel | None = None,
    ) -> None:
        """
        Args:
          config: shape and constants.
          params: one entry per layer (`unstack_layers`), in the config's dtype, on `mesh`.
          num_tokens: tokens the tokenizer has; later rows of the embedding are padding.
          mesh: the devices.
          capacity: how much is done at a time.
          sparse: how prompts above its threshold are taken in, whole; None for full attention, which is what the model
            computes.
          speculate: how tokens are guessed beforehand, which changes none of them; None for not at all.
        """
        self.mesh, self._num_tokens, self._sparse = mesh, num_tokens, sparse
        self.max_length = min(capacity.max_length or config.max_position, config.max_position)
        size = capacity.page_size
        width = -(-self.max_length // size)
        num_pages = -(-capacity.cache_tokens // size) if capacity.cache_tokens else capacity.max_rows * width
        self.max_length = min(self.max_length, num_pages * size)
        with jax.set_mesh(mesh):
            self.config = dataclasses.replace(config, num_kv_heads=kv_heads(config.num_kv_heads))
            self._params = repeat_kv_heads(params)
            least = row_multiple(config.dtype)
            padding_costs = sharding.platform() == "cpu"
            self._make_cache = functools.partial(make_cache, config, num_pages, size, int8=capacity.int8)
            self._cache = self._make_cache()
            # One more than there are rows: the place of whatever nobody asked for.
            self._last = jnp.zeros(capacity.max_rows + 1, jnp.int32)
            self._drafter = (
                Drafter(speculate, num_pages=num_pages, page_size=size, num_tokens=num_tokens)
                if isinstance(speculate, DraftModel)
                else None
            )
        configs = [config, speculate.config] if isinstance(speculate, DraftModel) else [config]
        lengths = sparse is not None or any(config.rope.by_length for config in configs)
        self._packing = Packing(
            capacity=capacity, width=width, least=least, prompts=lengths, padding_costs=padding_costs
        )
        pages = Pages(num_pages, size)
        self._scheduler = Scheduler(
            pages,
            max_rows=capacity.max_rows,
            block=self._packing.block,
            most_pieces=MOST_PIECES,
            room=self._packing.room,
        )
        self._speculate = speculate
        self._seen: Seen | None = None
        self._flight: _Flight | None = None
        self._early: list[Token] = []
        self._requests: dict[int, Row] = {}
        self._num_requests = self._prompt_tokens = self._generated_tokens = self._steps = 0

    @property
    def busy(self) -> bool:
        """Whether anything is asked for that is not done."""
        return bool(self._requests or self._early or self._flight)

    @property
    def stats(self) -> Stats:
        scheduler, pages = self._scheduler, self._scheduler.pages
        return Stats(
            num_waiting=scheduler.num_waiting,
            num_running=scheduler.num_running,
            pages_used=pages.count - pages.free,
            pages_total=pages.count,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
            prefix_hits=scheduler.reused,
            preemptions=scheduler.preemptions,
            steps=self._steps,
        )

    def add(self, request: Request) -> int:
        """The number of the request, which waits for its turn.

        Raises DataError if it can never fit, or if a token of it is none of the tokenizer's.
        """
        length = len(request.prompt)
        if length + request.max_new_tokens > self.max_length:
            room = self.max_length - length
            way_out = f"ask for at most {room} new tokens" if room > 0 else "shorten the prompt"
            raise DataError(
                f"a prompt of {length} tokens and {request.max_new_tokens} new ones do not fit into "
                f"{self.max_length} positions; {way_out}"
            )
        outside = next((token for token in request.prompt if not 0 <= token < self._num_tokens), None)
        if outside is not None:
            raise DataError(f"the prompt has the token {outside}; ids from 0 to {self._num_tokens - 1} are wanted")
        outside = next((token for token, _ in request.sampling.logit_bias if token >= self._num_tokens), None)
        if outside is not None:
            raise DataError(f"logit_bias has the token {outside}; ids from 0 to {self._num_tokens - 1} are wanted")
        number, self._num_requests = self._num_requests, self._num_requests + 1
        sparse = self._sparse is not None and length > self._sparse.threshold
        row = Row(request, number, None if sparse else kind(self.config.rope, length), list(request.prompt))
        self._requests[number] = row
        self._scheduler.add(row)
        self._prompt_tokens += length
        return number

    def cancel(self, request: int) -> None:
        """Forgets a request, whose pages are free at once; one that is done or unknown is none."""
        row = self._requests.pop(request, None)
        if row is not None:
            self._scheduler.publish(row)
            self._scheduler.finish(row)

    def swap(self, params: Params) -> None:
        """Goes on with other weights of the same shapes. What requests have so far is computed anew."""
        self._early += self._collect()
        with jax.set_mesh(self.mesh):
            self._params = repeat_kv_heads(params)
            self._cache = self._make_cache() if self._cache is None else self._cache
        self._scheduler.restart()

    def release(self) -> None:
        """Gives back the memory of weights and cache, until `swap` brings other weights; no step before that."""
        self._early += self._collect()
        self._params = self._cache = None
        self._scheduler.restart()

    def step(self) -> list[Token]:
        """Launches the next step, and gives the tokens of the one before: the device never waits for the host.

        Where guesses and grammars must know the last tokens first, the next step waits for them.
        """
        made, self._early = self._early, []
        if self._speculate or any(row.request.constraint for row in self._scheduler):
            made += self._collect()
            self._flight = self._launch()
        else:
            flight = self._launch()
            made += self._collect()
            self._flight = flight
        return made

    def _launch(self) -> _Flight | None:
        ahead = self._speculate.num_guesses if self._speculate else 0
        # Every row has room to look ahead, or none does.
        ahead = 0 if any(row.target + ahead > self.max_length for row in self._scheduler) else ahead
        plan = self._scheduler.plan(ahead)
        if plan is None:
            return None
        self._steps += 1
        with jax.set_mesh(self.mesh):
            inputs = self._packing.inputs(plan.rows, plan.pieces)
            guesses, usable = None, [0] * len(plan.rows)
            if self._speculate:
                inputs, guesses, usable = self._look_ahead(inputs, plan.rows, ahead)
            sparse = self._sparse if plan.pieces and plan.pieces[0].row.kind is None else None
            scores, self._cache = compute(self.config, self._params, self._cache, self._last, inputs, sparse=sparse)
            if not plan.rows and not any(piece.last for piece in plan.pieces):
                return _Flight()
            width = 1 if guesses is None else 1 + guesses.shape[1]
            wanted: list[Wanted] = [(row, i) for row in plan.rows for i in range(width)]
            wanted += [None] * (len(scores) - len(wanted))
            first = len(scores) - (0 if inputs.ends is None else len(inputs.ends))
            ending = [(piece.row, first + i) for i, piece in enumerate(plan.pieces) if piece.last]
            for row, index in ending:
                wanted[index] = row, 0
                self._remember(row)
            chosen = self._choose(scores, wanted)
        return _Flight(rows=plan.rows, usable=usable, guesses=guesses, ending=ending, chosen=chosen)

    def _look_ahead(
        self, inputs: Inputs, rows: Sequence[Row], ahead: int
    ) -> tuple[Inputs, jax.Array | np.ndarray | None, Sequence[int]]:
        """The inputs with guesses at what follows the rows, the guesses, and how many of each row's may be kept."""
        count, usable = 0, [0] * len(rows)
        guesses: Any = None
        if rows and inputs.rows is not None:
            count = len(inputs.rows.lengths)
            inputs = self._packing.known(rows, inputs)
            # Where what is chosen depends on the tokens before it, they are made one by one.
            free = [not (row.request.constraint or row.request.sampling.needs_seen) for row in rows]
            usable = [
                min(ahead, row.request.max_new_tokens - row.made) * ok for row, ok in zip(rows, free, strict=True)
            ]
        if any(usable) and isinstance(self._speculate, PromptLookup):
            guesses, usable = self._speculate.guess([row.tokens for row in rows], usable, count)
        elif any(usable) and self._drafter:
            wanted = [(row, 0) if most else None for row, most in zip(rows, usable, strict=True)]
            guesses = self._drafter.guess(inputs, self._packing.choice([*wanted, *[None] * (count - len(rows))]))
        if self._drafter:
            self._drafter.follow(inputs if guesses is None else inputs.without_rows())
        if guesses is not None:
            inputs = inputs.with_guesses(guesses)
        return inputs, guesses, usable

    def _choose(self, scores: jax.Array, wanted: Sequence[Wanted]) -> Chosen:
        """The tokens after rows of logits."""
        words: Any = allowed(wanted, self._num_tokens)
        choice = dataclasses.replace(self._packing.choice(wanted), allowed=words)
        asked = [of[0].request.logprobs for of in wanted if of and of[0].request.logprobs is not None]
        seen = self._seen if choice.stages.needs_seen else None
        top = None if not asked else 0 if max(asked) == 0 else MAX_LOGPROBS
        how = dict(num_tokens=self._num_tokens, top=top)
        chosen, self._last, seen = choose(scores, self._last, seen, choice, **how)
        self._seen = self._seen if seen is None else seen
        return chosen

    def _remember(self, row: Row) -> None:
        """Has the device count the tokens of a row from here on, if anything looks at them."""
        if not row.request.sampling.needs_seen:
            return
        size = self.config.vocab_size
        if self._seen is None:
            shape = (len(self._last), size)
            self._seen = Seen(prompt=jnp.zeros(shape, bool), generated=jnp.zeros(shape, jnp.int32))
        length = len(row.request.prompt)
        prompt, made = (np.bincount(part, minlength=size) for part in (row.tokens[:length], row.tokens[length:] or [0]))
        made = made if len(row.tokens) > length else np.zeros_like(made)
        assert row.place is not None
        self._seen = remember(self._seen, np.int32(row.place), prompt.astype(np.int32), made.astype(np.int32))

    def _collect(self) -> list[Token]:
        """The tokens of the step that was launched last."""
        flight, self._flight = self._flight, None
        if flight is None or flight.chosen is None:
            return []
        chosen, guesses = jax.device_get((flight.chosen, flight.guesses))
        guesses = np.empty((len(flight.rows), 0)) if guesses is None else guesses
        made, width = [], 1 + guesses.shape[1]
        for index, (row, usable) in enumerate(zip(flight.rows, flight.usable, strict=True)):
            for ahead in range(usable + 1):
                if row.done or (ahead and guesses[index, ahead - 1] != row.tokens[-1]):
                    break
                if ahead:
                    row.made, row.length = row.made + 1, row.length + 1
                made.append(self._emit(row, index * width + ahead, chosen))
        made += [self._emit(row, index, chosen) for row, index in flight.ending if not row.done]
        return made

    def _emit(self, row: Row, index: int, chosen: Chosen) -> Token:
        """A row's next token, with which it may be done."""
        request, token = row.request, int(chosen.tokens[index])
        row.tokens.append(token)
        self._generated_tokens += 1
        reason = None
        if token < 0:
            reason = "error"
        elif token in request.stop_ids:
            reason = "stop"
        elif len(row.tokens) == len(request.prompt) + request.max_new_tokens:
            reason = "length"
        if reason is None and request.constraint:
            request.constraint.accept(token)
        if reason != "error":
            self._scheduler.publish(row)
        if reason is not None:
            self._scheduler.finish(row)
            del self._requests[row.number]
        if request.logprobs is None or chosen.own is None:
            return Token(row.number, token, reason)
        own, ids, top = (np.asarray(x)[index].tolist() for x in chosen.own)
        return Token(row.number, token, reason, own, list(zip(ids, top, strict=True))[: request.logprobs])
