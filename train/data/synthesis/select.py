"""Complexity-first diverse sampling (InsTag, algorithm 1): those with most tags first, as long as they add some."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from train.data.synthesis.config import Select
from train.data.synthesis.rows import Row
from train.data.synthesis.stages import Outcome, Outcomes, Stage, Work


class SelectStage(Stage):
    """Takes rows, in the order in which they are chosen: the first n of them are what a `count` of n would take."""

    def __init__(self, config: Select) -> None:
        super().__init__()
        self._config = config

    def check(self, row: Row) -> None:
        tags = row.get(self._config.field)
        if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
            raise ValueError(f'field "{self._config.field}" holds no list of tags; stage @Tag adds one')

    def work(self, row: Row, index: int) -> Work:
        yield from ()
        return Outcome(kept=[row])

    def collect(self, outcomes: Outcomes) -> Iterator[Row]:
        tags = [frozenset(outcome.kept[0][self._config.field]) for outcome in outcomes]
        chosen = select(tags, self._config.count)
        seen = frozenset().union(*(tags[index] for index in chosen))
        self.facts = {
            "tags": len(frozenset().union(*tags)),
            "tags of the selection": len(seen),
            "tags a row, before and after": [_mean(tags), _mean([tags[index] for index in chosen])],
        }
        for index in chosen:
            yield outcomes[index].kept[0]


def select(tags: Sequence[frozenset[str]], count: int) -> list[int]:
    """Numbers of the rows to take, in order.

    Again and again, through all that are left, from the one with most tags to the one with fewest (of equals, the
    earlier first), each is taken that has a tag which none has that was taken in this round. Rows without tags never
    are.
    """
    left = sorted((index for index in range(len(tags)) if tags[index]), key=lambda index: -len(tags[index]))
    chosen: list[int] = []
    while left and len(chosen) < count:
        seen: set[str] = set()
        rest = []
        for index in left:
            if tags[index] <= seen:
                rest.append(index)
            else:
                seen |= tags[index]
                chosen.append(index)
        left = rest
    return chosen[:count]


def _mean(tags: Sequence[frozenset[str]]) -> float:
    return round(sum(map(len, tags)) / max(len(tags), 1), 3)
