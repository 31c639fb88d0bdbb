"""The engine in a thread of its own: orders go in through a queue, tokens come out on the event loop.

Whatever a client does, its rows are cancelled between two steps. If a step fails or does not end, every request that is
on its way is told, and the server ends: an engine that failed is never asked again.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence

from infer.server.errors import ApiError
from infer.server.metrics import Metrics
from qwen_jax.engine import Engine, Replicas, Request, Stats, Token
from qwen_jax.errors import UserError

# A step may compile, which takes minutes for the largest models; what takes longer does not end.
PATIENCE = 900.0


class Service:
    """What the routes know of the engine.

    All methods are called on the event loop that `start` was called on.

    Attributes:
      room: completions that may be on their way, made or waiting.
      metrics: the server's counters.
      error: what ended the engine; None while it is well.
      draining: new requests are refused, since the server ends.
      failed: set when `error` is.
    """

    def __init__(self, engine: Engine | Replicas, *, room: int, patience: float = PATIENCE) -> None:
        """`patience` is what a step may take, in seconds."""
        self.room = room
        self.metrics = Metrics(lambda: self._stats)
        self.error: BaseException | None = None
        self.draining = False
        self.failed = asyncio.Event()
        self._engine = engine
        self._patience = patience
        self._orders: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._jobs: set[Job] = set()
        self._rows: dict[int, tuple[Job, int]] = {}  # by number of the engine's request: its job, and which row of it
        self._num_rows = 0
        # Of the engine's thread, read by the loop:
        self._stats: Stats = engine.stats
        self._step_began: float | None = None

    def start(self) -> None:
        """Begins to work, and to watch the work."""
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()
        self._watch = self._loop.create_task(self._watch_steps())

    async def stop(self) -> None:
        """Ends the thread, after the step it is in."""
        self._watch.cancel()
        if not self.stuck:
            self._orders.put(None)
            await asyncio.to_thread(self._thread.join)

    @property
    def stuck(self) -> bool:
        """Whether the engine has failed in a step that does not end."""
        return self.error is not None and self._step_began is not None

    def open(self, rows: int) -> Job:
        """A job of so many rows. Raises ApiError, at once, where there is no room for it."""
        if self.error is not None:
            raise ApiError(500, "the engine has failed, and the server ends", close=True)
        if self.draining:
            raise ApiError(503, "the server is about to end", retry_after=5, close=True)
        if rows > self.room:
            message = f"{rows} completions are more than the {self.room} that may be made and wait together"
            raise ApiError(400, message, param="n")
        if self._num_rows + rows > self.room:
            raise ApiError(
                429, "too many completions are waiting; try again", code="rate_limit_exceeded", retry_after=1
            )
        job = Job(self, rows)
        self._jobs.add(job)
        self._num_rows += rows
        return job

    async def drain(self, seconds: float) -> None:
        """Refuses new requests, and waits so long for those on their way; what is left then is told and ended."""
        self.draining = True
        deadline = time.monotonic() + seconds
        while self._jobs and self.error is None and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        self._end_jobs(ApiError(503, "the server ended before the answer did", retry_after=5, close=True))

    # What jobs ask for.

    def submit(self, job: Job, requests: Sequence[Request]) -> None:
        """Adds the rows of a job to the engine, or has it fail if one can never be made."""
        self._orders.put(lambda: self._add(job, requests))

    def cancel(self, number: int) -> None:
        """Takes a row out of the engine."""
        self._rows.pop(number, None)
        self._orders.put(lambda: self._engine.cancel(number))

    def release(self, rows: int) -> None:
        """Rows of a job that have ended make room for others."""
        self._num_rows -= rows

    def forget(self, job: Job) -> None:
        self._jobs.discard(job)

    # On the engine's thread.

    def _work(self) -> None:
        try:
            while self._obey():
                if self._engine.busy:
                    self._step_began = time.monotonic()
                    tokens = self._engine.step()
                    self._step_began = None
                    self._tell(self._deliver, tokens)
                self._stats = self._engine.stats
        except BaseException as error:  # whatever it is, those who wait must hear of it
            self._step_began = None
            self._tell(self._fail, error)

    def _obey(self) -> bool:
        """Does what was ordered, waiting for an order if there is nothing else to do; False to end."""
        wait = not self._engine.busy
        while True:
            try:
                order = self._orders.get(block=wait)
            except queue.Empty:
                return True
            if order is None:
                return False
            order()
            wait = False

    def _add(self, job: Job, requests: Sequence[Request]) -> None:
        if job.closed:
            return
        numbers: list[int] = []
        try:
            for request in requests:
                numbers.append(self._engine.add(request))
        except UserError as error:
            for number in numbers:
                self._engine.cancel(number)
            self._tell(job.fail, ApiError(400, str(error)))
        else:
            self._tell(self._added, job, numbers)

    def _tell(self, what: Callable[..., None], *arguments: object) -> None:
        self._loop.call_soon_threadsafe(what, *arguments)

    # On the loop, by the engine's thread.

    def _added(self, job: Job, numbers: Sequence[int]) -> None:
        if job.closed:
            for number in numbers:
                self.cancel(number)
            return
        self._rows |= {number: (job, row) for row, number in enumerate(numbers)}
        job.added(numbers)

    def _deliver(self, tokens: Sequence[Token]) -> None:
        for token in tokens:
            if (found := self._rows.get(token.request)) is not None:
                if token.finish_reason:
                    del self._rows[token.request]
                job, row = found
                job.deliver(row, token)

    def _fail(self, error: BaseException) -> None:
        if self.error is None:
            self.error = error
            self._end_jobs(ApiError(500, "the engine failed; the server ends", close=True))
            self.failed.set()

    def _end_jobs(self, error: ApiError) -> None:
        for job in list(self._jobs):
            job.fail(error)

    async def _watch_steps(self) -> None:
        while True:
            await asyncio.sleep(min(1.0, self._patience / 4))
            began = self._step_began
            if began is not None and time.monotonic() - began > self._patience:
                self._fail(TimeoutError(f"a step of the engine has taken more than {self._patience:g} s"))


class Job:
    """The completions of one HTTP request; whoever opens one closes it.

    Attributes:
      closed: nobody waits for it any more.
    """

    def __init__(self, service: Service, rows: int) -> None:
        self.closed = False
        self._service = service
        self._numbers: Sequence[int] = ()  # of its rows in the engine, once they are there
        self._left = set(range(rows))
        self._arrived: asyncio.Queue[tuple[int, Token] | ApiError] = asyncio.Queue()
        self._ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._began = time.monotonic()
        self._last: dict[int, float] = {}  # when each row had its last token

    async def start(self, requests: Sequence[Request]) -> None:
        """Has the rows made, one for each of `requests`. Raises ApiError if the engine cannot."""
        self._service.submit(self, requests)
        await self._ready

    async def tokens(self) -> AsyncIterator[tuple[int, Token]]:
        """Each token as it comes, with the index of its row, until no row is left. Raises ApiError."""
        while self._left:
            item = await self._arrived.get()
            if isinstance(item, ApiError):
                raise item
            row, token = item
            if row in self._left:
                if token.finish_reason:
                    self._drop(row)
                yield row, token

    def cancel(self, row: int) -> None:
        """This row has enough."""
        if row in self._left:
            self._drop(row)
            self._service.cancel(self._numbers[row])

    def close(self) -> None:
        """Cancels what is left. Closing twice is as good as once."""
        if not self.closed:
            self.closed = True
            for row in list(self._left):
                if self._numbers:
                    self.cancel(row)
                else:
                    self._drop(row)
            self._service.forget(self)

    def added(self, numbers: Sequence[int]) -> None:
        """The engine has the rows, under these numbers."""
        self._numbers = numbers
        if not self._ready.done():
            self._ready.set_result(None)

    def deliver(self, row: int, token: Token) -> None:
        """Takes a token of the engine."""
        now = time.monotonic()
        metrics = self._service.metrics
        if (last := self._last.get(row)) is None:
            metrics.first_token.observe(now - self._began)
        else:
            metrics.next_token.observe(now - last)
        self._last[row] = now
        self._arrived.put_nowait((row, token))

    def fail(self, error: ApiError) -> None:
        """Ends it with an error for whoever waits."""
        if not self._ready.done():
            self._ready.set_exception(error)
            self._ready.exception()  # seen, whether or not somebody waits for this one
        self._arrived.put_nowait(error)

    def _drop(self, row: int) -> None:
        self._left.discard(row)
        self._service.release(1)
