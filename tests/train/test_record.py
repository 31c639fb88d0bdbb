"""metrics.jsonl: what it keeps on resume, and what a full disk does to it."""

from __future__ import annotations

import errno
import json
import os

import pytest

from train import record as record_module
from train.record import METRICS, Record, rows


def write(directory, steps, *, start=0, warn=pytest.fail):
    record = Record(directory, step=start, tokens_after=lambda step: 10 * step, warn=warn)
    for step in steps:
        record.train(step, {"grad_norm": 1.0, "loss": 1 / step})
        if step % 2 == 0:
            record.held_out(step, loss=0.5, bits_per_byte=0.7)
    record.close()


def test_rows_say_step_and_loss_first(tmp_path):
    write(tmp_path, [1, 2])
    one, two, evaluation = rows(tmp_path / METRICS)
    assert list(one)[:3] == ["step", "loss", "grad_norm"] and two["tokens"] == 20
    assert evaluation == {"step": 2, "held_out_loss": 0.5, "bits_per_byte": 0.7}


@pytest.mark.parametrize("torn", [0, 5])
def test_resuming_drops_later_rows_and_the_evaluation_that_is_done_again(tmp_path, torn):
    write(tmp_path, [1, 2, 3, 4, 5])
    path = tmp_path / METRICS
    path.write_bytes(path.read_bytes()[: -torn or None])
    write(tmp_path, [], start=4)
    assert [row["step"] for row in rows(path)] == [1, 2, 2, 3, 4]
    write(tmp_path, [], start=2)
    assert [row["step"] for row in rows(path)] == [1, 2]


def test_full_disk_delays_rows_and_loses_none(tmp_path, monkeypatch):
    warnings = []
    pwrite, full = os.pwrite, True

    def limited(file, data, offset):
        if full:
            pwrite(file, data[:3], offset)  # as a real disk: some of it still fits
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(file, data, offset)

    monkeypatch.setattr(record_module.os, "pwrite", limited)
    record = Record(tmp_path, step=0, tokens_after=lambda step: 10 * step, warn=warnings.append)
    record.train(1, {"loss": 3.0})
    record.train(2, {"loss": 2.0})
    full = False
    record.train(3, {"loss": 1.0})
    record.close()
    assert [row["loss"] for row in rows(tmp_path / METRICS)] == [3, 2, 1]
    assert len(warnings) == 1 and "No space left" in warnings[0]


def test_hosts_that_do_not_write_leave_nothing(tmp_path):
    record = Record(tmp_path, step=0, tokens_after=lambda step: 10 * step, warn=pytest.fail, writes=False)
    record.train(1, {"loss": 3.0})
    record.sync()
    record.close()
    assert not list(tmp_path.iterdir())


def test_tensorboard_gets_the_numbers_and_is_told_of_a_restart(tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    write(tmp_path, [1, 2, 3])
    write(tmp_path, [3], start=2)
    old, new = sorted(tmp_path.glob("events*"), key=lambda path: path.suffix)
    events = [Event.FromString(data) for data in _tfrecords(new.read_bytes())]
    assert [e.step for e in events if e.HasField("session_log")] == [3]
    values = {v.tag: (e.step, v.simple_value) for e in events for v in e.summary.value}
    assert values["train/loss"] == (3, pytest.approx(1 / 3))
    assert any(
        v.tag == "held_out/loss" for d in _tfrecords(old.read_bytes()) for v in Event.FromString(d).summary.value
    )
    json.loads((tmp_path / METRICS).read_text().splitlines()[0])


def _tfrecords(data: bytes):
    """The payloads of a TFRecord file: length (8 bytes), its checksum (4), payload, its checksum (4)."""
    while data:
        length = int.from_bytes(data[:8], "little")
        yield data[12 : 12 + length]
        data = data[16 + length :]
