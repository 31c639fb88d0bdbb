"""Signals become exit codes at step boundaries."""

from __future__ import annotations

import os
import signal

import pytest

from train.stop import Stop


@pytest.mark.parametrize(
    "sent, code",
    [
        ((), 0),
        ((signal.SIGTERM,), 75),
        ((signal.SIGTERM, signal.SIGTERM), 75),
        ((signal.SIGINT,), 130),
        ((signal.SIGTERM, signal.SIGINT), 130),
    ],
)
def test_exit_code(sent, code):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with Stop() as stop:
        for number in sent:
            os.kill(os.getpid(), number)
        assert stop.exit_code() == code
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_second_interrupt_is_left_to_the_system():
    with Stop():
        os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
