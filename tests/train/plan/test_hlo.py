"""Reading a compiled program: on a text in the compiler's style (step.hlo), with every kind of line."""

from __future__ import annotations

from pathlib import Path

import pytest

from train.plan import hlo

TEXT = (Path(__file__).parent / "step.hlo").read_text()


@pytest.fixture(scope="module")
def program():
    return hlo.read(TEXT)


def test_cycles_of_a_loop_count_every_time(program):
    assert (program.matmul_cycles, program.other_cycles) == (28 * 100, 28 * 5 + 7)


def test_kernels(program):
    assert program.kernels == {"flash_forward": 28}


def test_collectives(program):
    found = {(c.kind, c.executions): c for c in program.collectives}
    overlapped, summed = found["all-gather", 28], found["all-reduce", 28]
    # Once, although it is spread over two fusions; the first of two groups of four.
    assert (overlapped.bytes, overlapped.group, overlapped.overlapped) == (128, (0, 1, 2, 3), True)
    assert (summed.bytes, summed.group, summed.overlapped) == (64 + 64, (0, 1, 2, 3), False)
    assert summed.where.endswith("layers/mlp/up/dot_general")
    scattered = found["reduce-scatter", 1]
    assert (scattered.bytes, scattered.group, scattered.overlapped) == (64, (0, 4), False)
    assert len(program.collectives) == 8


def test_a_channel_can_be_shared_outside_of_fusions(program):
    scattered = [c.bytes for c in program.collectives if (c.kind, c.executions) == ("reduce-scatter", 28)]
    # The last is a fusion that sums, and keeps the part of this device.
    assert scattered == [2 * 32 * 2, 2 * 16 * 2, 2 * 8 * 2]


def test_a_started_collective_is_overlapped_and_counts_its_result(program):
    (started,) = [c for c in program.collectives if c.kind == "all-gather" and c.executions == 1]
    assert started.overlapped and started.group == ()


def test_what_goes_between_slices(program):
    (sent,) = [c for c in program.collectives if c.between_slices]
    assert (sent.kind, sent.executions, sent.overlapped) == ("all-reduce", 1, False)
    assert sent.bytes == pytest.approx(4 * 8 * 128, abs=4)


@pytest.mark.parametrize(
    "notation, group",
    [
        ("replica_groups={{0,2},{1,3}}", (0, 2)),
        ("replica_groups=[2,4]<=[8]", (0, 1, 2, 3)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", (0, 4)),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", (0, 4)),
        ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}", (0, 1, 2, 3, 4, 5, 6, 7)),
        ("replica_groups=mesh['a'=16] {'a':(2)4}", (0, 2, 4, 6)),  # the middle of three parts: 2 x 4 x 2
        ("channel_id=1", ()),
    ],
)
def test_groups_in_every_notation(notation, group):
    line = f"  %r = f32[8]{{0}} all-reduce(%x), {notation}, to_apply=%add"
    (found,) = hlo.read(f"ENTRY %main (x: f32[8]) -> f32[8] {{\n{line}\n}}\n").collectives
    assert found.group == group
