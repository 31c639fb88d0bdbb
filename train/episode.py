"""An episode: completions that were sampled together, what is known of their tokens, and batches of them."""

from __future__ import annotations

import dataclasses
import io
import zipfile
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from qwen_jax.errors import DataError
from train.data.packing import best_fit

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Episode:
    """Completions and what is known of them; n of them, one after the other in the arrays of their tokens.

    Attributes:
      number: of the episode, from 0.
      prompts: int32 [n], the number of each completion's prompt.
      lengths: int32 [n, 2], tokens of its prompt and of itself, the one that ended it included.
      ids: int32, both, of all.
      finished: bool [n], whether it ended by itself.
      rewards: float64 [n]; NaN where nothing judged it.
      tokens: float32 arrays by name, of the tokens of the completions: `sampled`, and what the model says of them.
      measures: what people look at.
    """

    number: int
    prompts: np.ndarray
    lengths: np.ndarray
    ids: np.ndarray
    finished: np.ndarray
    rewards: np.ndarray
    tokens: Mapping[str, np.ndarray]
    measures: Mapping[str, float]

    @property
    def bounds(self) -> np.ndarray:
        """Where the tokens of each completion begin in `tokens`, and the last end, int64 [n + 1]."""
        return np.concatenate([[0], np.cumsum(self.lengths[:, 1], dtype=np.int64)])

    def rows(
        self, items: Sequence[Sequence[int]], length: int, tokens: Mapping[str, np.ndarray], *, pairs: bool = False
    ) -> Batch:
        """Completions with their prompts as packed rows [rows, length], as `data.Rows.batch` has them.

        Args:
          items: numbers of completions that are in one row; those of a pair are the better and the worse.
          length: of the rows.
          tokens: arrays like `tokens`, which are put where the target is of the completion, and are 0 elsewhere.
          pairs: whether items are pairs, whose texts are labelled and grouped.
        """
        ints = ("tokens", "targets", "positions", "segments", *(("labels", "groups") if pairs else ()))
        places = list(self._places(items, length))
        shape = (1 + max((row for row, *_ in places), default=-1), length)
        batch = {name: np.zeros(shape, np.int32) for name in ints}
        batch |= {name: np.zeros(shape, np.float32) for name in tokens}
        ends, starts = np.cumsum(self.lengths.sum(1)), self.bounds
        for row, group, place, i, segment, column in places:
            asked, made = self.lengths[i].tolist()
            ids = self.ids[ends[i] - asked - made : ends[i]]
            whole = slice(column, column + asked + made - 1)
            said = slice(column + asked - 1, whole.stop)
            batch["tokens"][row, whole], batch["targets"][row, whole] = ids[:-1], ids[1:]
            batch["positions"][row, whole] = np.arange(asked + made - 1)
            batch["segments"][row, whole] = segment
            for name, values in tokens.items():
                batch[name][row, said] = values[starts[i] : starts[i + 1]]
            if pairs:
                batch["groups"][row, whole], batch["labels"][row, whole.stop - 1] = group, 2 - place
        return batch

    def read_back(self, items: Sequence[Sequence[int]], values: np.ndarray) -> np.ndarray:
        """Of values [rows, length] of what `rows` made of the items, those of tokens of completions, as in `tokens`."""
        out, starts = np.zeros(self.bounds[-1], np.float32), self.bounds
        for row, _, _, i, _, column in self._places(items, values.shape[1]):
            asked, made = self.lengths[i].tolist()
            said = column + asked - 1
            out[starts[i] : starts[i + 1]] = values[row, said : said + made]
        return out

    def _places(self, items: Sequence[Sequence[int]], length: int) -> Iterator[tuple[int, int, int, int, int, int]]:
        """Where completions stand: row, item of the row from 1, place in it, completion, segment, and first column."""
        if not items:
            return
        columns = self.lengths.sum(1) - 1
        order, bounds = best_fit(np.array([int(columns[list(item)].sum()) for item in items]), length, seed=0)
        for row, (first, last) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
            column = segment = 0
            for group, item in enumerate(order[first:last], 1):
                for place, i in enumerate(items[item]):
                    segment += 1
                    yield row, group, place, i, segment, column
                    column += int(columns[i])

    def arrays(self) -> dict[str, np.ndarray]:
        """All of it as arrays."""
        fields = ("prompts", "lengths", "ids", "finished", "rewards")
        found = {name: getattr(self, name) for name in fields} | {"number": np.array(self.number)}
        found |= {f"tokens/{name}": values for name, values in self.tokens.items()}
        return found | {f"measures/{name}": np.array(value) for name, value in self.measures.items()}

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Episode:
        """What `arrays` gave."""
        below = lambda prefix: {name.removeprefix(prefix): x for name, x in arrays.items() if name.startswith(prefix)}
        plain = {name: x for name, x in arrays.items() if "/" not in name and name != "number"}
        measures = {name: float(value) for name, value in below("measures/").items()}
        return cls(number=int(arrays["number"]), tokens=below("tokens/"), measures=measures, **plain)


def pack(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Arrays as one file."""
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def unpack(data: bytes, name: str) -> dict[str, np.ndarray]:
    """The arrays of such a file; `name` says which in the DataError for one that is none."""
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            return dict(file)
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{name} cannot be read: {error}") from error
