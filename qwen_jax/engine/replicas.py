"""Several engines with the same weights, each on devices of its own, asked as if they were one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from qwen_jax.engine.engine import Engine, Stats
from qwen_jax.engine.request import Request, Token


class Replicas:
    """Engines whose steps run side by side. What a request draws is the same whichever of them it is given to.

    replicas = Replicas([Engine(config, params, mesh=mesh, ...) for params, mesh in ...])
    number = replicas.add(Request(...))
    while replicas.busy:
        tokens = replicas.step()
    """

    def __init__(self, engines: Sequence[Engine]) -> None:
        self._engines = engines
        self._last: tuple[Sequence[int], int] | None = None

    @property
    def busy(self) -> bool:
        """Whether anything is asked for that is not done."""
        return any(engine.busy for engine in self._engines)

    @property
    def stats(self) -> Stats:
        """The sums of theirs."""
        each = [dataclasses.asdict(engine.stats) for engine in self._engines]
        return Stats(**{name: sum(stats[name] for stats in each) for name in each[0]})

    def add(self, request: Request) -> int:
        """The number of the request, as `Engine.add` has it. Goes where it waits least, or where its prompt is."""
        count = len(self._engines)
        load = [stats.num_waiting + stats.num_running for stats in (engine.stats for engine in self._engines)]
        if self._last and self._last[0] == request.prompt and load[self._last[1]]:
            to = self._last[1]
        else:
            to = load.index(min(load))
        self._last = request.prompt, to
        return self._engines[to].add(request) * count + to

    def cancel(self, request: int) -> None:
        """Forgets a request, as `Engine.cancel` does."""
        own, to = divmod(request, len(self._engines))
        self._engines[to].cancel(own)

    def step(self) -> list[Token]:
        """The next step of every engine that has something to do; each was at work while the others were asked."""
        count = len(self._engines)
        return [
            dataclasses.replace(token, request=token.request * count + index)
            for index, engine in enumerate(self._engines)
            if engine.busy
            for token in engine.step()
        ]
