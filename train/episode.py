"""An episode: completions that were sampled together, what is known of their tokens, and batches of them."""

from __future__ import annotations

import dataclasses
import io
import zipfile
from collections.abc import Mapping, Sequence

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

    def completion(self, index: int) -> np.ndarray:
        """The ids of a completion."""
        end = int(self.lengths[: index + 1].sum())
        return self.ids[end - self.lengths[index, 1] : end]

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
        ends = np.cumsum(self.lengths.sum(1))
        columns = np.array([sum(int(self.lengths[i].sum()) - 1 for i in item) for item in items])
        order, bounds = best_fit(columns, length, seed=0) if len(items) else (columns, np.zeros(1, np.int64))
        ints = ("tokens", "targets", "positions", "segments", *(("labels", "groups") if pairs else ()))
        shape = (len(bounds) - 1, length)
        batch = {name: np.zeros(shape, np.int32) for name in ints}
        batch |= {name: np.zeros(shape, np.float32) for name in tokens}
        starts = self.bounds
        for row, (first, last) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
            column = segment = 0
            for group, item in enumerate(order[first:last], 1):
                for place, i in enumerate(items[item]):
                    asked, made = self.lengths[i].tolist()
                    ids, segment = self.ids[ends[i] - asked - made : ends[i]], segment + 1
                    whole = slice(column, column + asked + made - 1)
                    said = slice(column + asked - 1, whole.stop)
                    batch["tokens"][row, whole], batch["targets"][row, whole] = ids[:-1], ids[1:]
                    batch["positions"][row, whole] = np.arange(asked + made - 1)
                    batch["segments"][row, whole] = segment
                    for name, values in tokens.items():
                        batch[name][row, said] = values[starts[i] : starts[i + 1]]
                    if pairs:
                        batch["groups"][row, whole], batch["labels"][row, whole.stop - 1] = group, 2 - place
                    column = whole.stop
        return batch

    def read_back(self, batch: Batch, items: Sequence[int], values: np.ndarray) -> np.ndarray:
        """Of values [rows, length] that `rows` was made for, those of the tokens of completions, as in `tokens`."""
        order, bounds = best_fit(self.lengths[items].sum(1) - 1, batch["tokens"].shape[1], seed=0)
        out, starts = np.zeros(self.bounds[-1], np.float32), self.bounds
        for row, (first, last) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
            column = 0
            for item in order[first:last]:
                i = items[item]
                asked, made = self.lengths[i].tolist()
                column += asked + made - 1
                out[starts[i] : starts[i + 1]] = values[row, column - made : column]
        return out

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
