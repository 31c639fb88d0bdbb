"""Saves that fail: training goes on for a while, and never ends as if all were well."""

from __future__ import annotations

import jax.numpy as jnp
import pytest

from qwen_jax.errors import FileError
from train.saving import Saver
from train.step import State

STATE = State(jnp.int32(0), {"layers_0": {"w": jnp.zeros(2)}}, ())


class Disk:
    """Checkpoints and record in one; `full` says which saves fail, and whether at once or in the background."""

    def __init__(self, full):
        self.full, self.saved, self.failed, self.running = full, [], [], None

    def save(self, step, *, params, optimizer, critic, files, meta):
        if self.full.get(step) == "at once":
            raise FileError("disk full")
        self.running = step

    def wait(self):
        step, self.running = self.running, None
        if step in self.full:
            raise FileError("disk full")
        if step is not None:
            self.saved.append(step)

    def sync(self):
        pass

    def checkpoint_failed(self, step, times):
        self.failed.append((step, times))


def saver(disk, warnings):
    return Saver(disk, disk, files={}, meta={}, warn=warnings.append)


@pytest.mark.parametrize("when", ["at once", "later"])
def test_third_failure_in_a_row_ends_the_run(when):
    disk, warnings = Disk({2: when, 3: when, 4: when}), []
    with pytest.raises(FileError, match="3 saves in a row have failed.*disk full"), saver(disk, warnings) as saves:
        for step in (1, 2, 3, 4, 5):
            saves.save(step, STATE)
    assert disk.saved[0] == 1
    assert [times for _, times in disk.failed] == [1, 2, 3]
    assert len(warnings) >= 2 and "training goes on" in warnings[0]


def test_a_save_that_succeeds_starts_the_count_anew():
    disk, warnings = Disk({1: "later", 2: "at once", 4: "later", 5: "at once"}), []
    with saver(disk, warnings) as saves:
        for step in range(1, 7):
            saves.save(step, STATE)
    assert disk.saved == [3, 6]
    assert [times for _, times in disk.failed] == [1, 2, 1, 2]


@pytest.mark.parametrize("when", ["at once", "later"])
def test_the_last_save_must_succeed(when):
    disk = Disk({2: when})
    with pytest.raises(FileError, match="disk full"), saver(disk, []) as saves:
        saves.save(1, STATE)
        saves.save(2, STATE)
    assert disk.saved == [1]


def test_another_error_is_not_hidden_and_the_running_save_is_finished():
    disk, warnings = Disk({}), []
    with pytest.raises(ZeroDivisionError), saver(disk, warnings) as saves:
        saves.save(1, STATE)
        raise ZeroDivisionError
    assert disk.saved == [1] and not warnings
