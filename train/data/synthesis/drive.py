"""Works through many rows at a time: their questions share the engine, and what they do beside runs in threads."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from train.data.synthesis.asking import Asker
from train.data.synthesis.stages import Answer, Ask, Outcome, Work

_POLL_SECONDS = 0.5  # for progress to be shown


class _Row:
    """The work on one row, and the answers that it waits for.

    Attributes:
      round: how often it has asked.
    """

    def __init__(self, index: int, work: Work) -> None:
        self.index, self.round = index, 0
        self._work = work
        self._answers: dict[int, Answer] = {}
        self._wanted = 0

    def go_on(self) -> list[Ask] | Outcome:
        """What it asks next, or what came of it."""
        try:
            if not self.round:
                return list(next(self._work))
            return list(self._work.send([self._answers[place] for place in range(self._wanted)]))
        except StopIteration as end:
            return end.value

    def expect(self, count: int) -> None:
        """Waits for so many answers."""
        self.round += 1
        self._answers, self._wanted = {}, count

    def take(self, place: int, answer: Answer) -> bool:
        """Takes an answer; whether it was the last."""
        self._answers[place] = answer
        return len(self._answers) == self._wanted


def drive(
    works: Iterable[tuple[int, Work]],
    asker: Asker | None,
    done: Callable[[int, Outcome], None],
    *,
    tick: Callable[[], None],
    workers: int,
    window: int,
) -> None:
    """Brings all works to their ends.

    Args:
      works: numbers of rows and the work on each; taken one by one, so there may be any number.
      asker: answers what they ask; None where nothing is asked.
      done: takes what came of a row, in any order, in this thread.
      tick: called again and again.
      workers: threads.
      window: rows that are begun at a time.
    """
    waiting = iter(works)
    asking: dict[int, _Row] = {}
    going: dict[Future[list[Ask] | Outcome], _Row] = {}
    pool = ThreadPoolExecutor(workers)
    try:
        while True:
            while len(asking) + len(going) < window and (item := next(waiting, None)):
                row = _Row(*item)
                going[pool.submit(row.go_on)] = row
            if not (asking or going):
                return
            tick()
            if going:
                busy = asker is not None and asker.busy
                for future in wait(going, 0 if busy else _POLL_SECONDS, FIRST_COMPLETED).done:
                    row = going.pop(future)
                    said = future.result()
                    if isinstance(said, Outcome):
                        done(row.index, said)
                    elif said:
                        assert asker is not None
                        row.expect(len(said))
                        asking[row.index] = row
                        for place, ask in enumerate(said):
                            asker.add((row.index, row.round, place), ask)
                    else:
                        row.expect(0)
                        going[pool.submit(row.go_on)] = row
            if asker is None:
                continue
            for (index, _, place), answer in asker.step():
                if asking[index].take(place, answer):
                    row = asking.pop(index)
                    going[pool.submit(row.go_on)] = row
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
