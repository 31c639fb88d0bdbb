"""Completions as packed rows, and back."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from qwen_jax.errors import DataError
from train.episode import Episode, pack, unpack

LENGTH = 12


def episode(seed: int, *, count: int = 20, longest: int = LENGTH // 2) -> Episode:
    """Completions whose ids tell them apart."""
    random = np.random.default_rng(seed)
    lengths = random.integers(1, longest + 1, (count, 2)).astype(np.int32)
    size = int(lengths[:, 1].sum())
    return Episode(
        number=3,
        prompts=random.integers(0, 9, count).astype(np.int32),
        lengths=lengths,
        ids=np.arange(lengths.sum(), dtype=np.int32),
        finished=random.random(count) < 0.5,
        rewards=np.where(random.random(count) < 0.2, np.nan, random.random(count)),
        tokens={"sampled": random.random(size).astype(np.float32)},
        measures={"reward": 0.25},
    )


def completion(made: Episode, index: int) -> np.ndarray:
    """The ids of a completion."""
    end = int(made.lengths[: index + 1].sum())
    return made.ids[end - made.lengths[index, 1] : end]


@pytest.mark.parametrize("seed", range(5))
def test_each_text_is_in_the_rows_once_as_it_was_made(seed):
    made = episode(seed)
    ends, seen = np.cumsum(made.lengths.sum(1)), []
    rows = made.rows([[i] for i in range(20)], LENGTH, made.tokens)
    for row in range(len(rows["tokens"])):
        for segment in range(1, rows["segments"][row].max() + 1):
            here = {name: values[row][rows["segments"][row] == segment] for name, values in rows.items()}
            i = int(np.searchsorted(ends, here["tokens"][0], side="right"))
            asked, said = made.lengths[i]
            ids = made.ids[ends[i] - asked - said : ends[i]]
            assert here["tokens"].tolist() == ids[:-1].tolist() and here["targets"].tolist() == ids[1:].tolist()
            assert here["positions"].tolist() == list(range(asked + said - 1))
            own = made.tokens["sampled"][made.bounds[i] : made.bounds[i + 1]]
            assert here["sampled"].tolist() == [0] * (asked - 1) + own.tolist()
            assert completion(made, i).tolist() == here["targets"][asked - 1 :].tolist()
            seen.append(i)
    assert sorted(seen) == list(range(20))
    padding = rows["segments"] == 0
    assert all(not values[padding].any() for values in rows.values())


@pytest.mark.parametrize("seed", range(5))
def test_what_is_said_of_rows_is_read_back_by_completion(seed):
    made, some = episode(seed), [3, 1, 17, 4]
    rows = made.rows([[i] for i in some], LENGTH, {})
    found = made.read_back([[i] for i in some], rows["targets"].astype(np.float32))
    for i in range(20):
        own = found[made.bounds[i] : made.bounds[i + 1]]
        assert own.tolist() == (completion(made, i).tolist() if i in some else [0] * len(own))


def test_pairs_stay_together_and_say_which_is_better():
    made = episode(0, longest=LENGTH // 4)
    rows = made.rows([[1, 0], [2, 3], [5, 9]], LENGTH, {"weights": np.ones(int(made.bounds[-1]))}, pairs=True)
    better = {completion(made, i)[-1] for i in (1, 2, 5)}
    judged = rows["labels"] > 0
    assert {int(x): int(y) for x, y in zip(rows["targets"][judged], rows["labels"][judged], strict=True)} == {
        int(completion(made, i)[-1]): 2 if completion(made, i)[-1] in better else 1 for i in (0, 1, 2, 3, 5, 9)
    }
    for row in range(len(rows["labels"])):
        for group in range(1, rows["groups"][row].max() + 1):
            assert sorted(rows["labels"][row][judged[row] & (rows["groups"][row] == group)].tolist()) == [1, 2]


def test_no_items_are_no_rows():
    assert episode(0).rows([], LENGTH, {})["tokens"].shape == (0, LENGTH)


def test_an_episode_is_kept_as_it_is():
    made = episode(1)
    again = Episode.of_arrays(unpack(pack(made.arrays()), "x"))
    for field in dataclasses.fields(Episode):
        here, there = getattr(made, field.name), getattr(again, field.name)
        if field.name == "tokens":
            assert here.keys() == there.keys()
            here, there = here["sampled"], there["sampled"]
        np.testing.assert_array_equal(there, here)
    with pytest.raises(DataError, match="rollouts.npz cannot be read"):
        unpack(b"PK\x03\x04 and no more", "rollouts.npz")
