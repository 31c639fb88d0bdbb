"""What a person reads on stderr."""

from __future__ import annotations

import time

import pytest

from train.progress import Report


def run(report, monkeypatch, *, seconds_per_step, steps=4):
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with report.follow(0, steps, tokens_per_step=5000):
        for step in range(1, steps + 1):
            now += seconds_per_step
            report.step(step, f"loss {1 / step:.3f}")


def test_a_pipe_gets_a_line_now_and_then_and_the_last(monkeypatch, capsys):
    run(Report(), monkeypatch, seconds_per_step=4.0, steps=5)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "step 1/5  loss 1.000",
        "step 4/5  loss 0.250  1.25k tokens/s  4 s left",
        "step 5/5  loss 0.200  1.25k tokens/s  0 s left",
    ]


def test_long_lines_and_brackets_stay_as_they_are(capsys):
    text = "[bold]" + "x" * 200 + " :smile: /a/path"
    Report().line(text)
    Report().warn(text)
    assert capsys.readouterr().err == f"{text}\nwarning: {text}\n"


def test_other_hosts_say_nothing(monkeypatch, capsys):
    report = Report(quiet=True)
    report.fact("model", "small")
    report.warn("never seen")
    run(report, monkeypatch, seconds_per_step=60.0)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("rate, shown", [(0.5, "2.5k"), (0.01, "50 tokens"), (5000, "25M"), (0.199, "995 tokens")])
def test_speed_is_readable(monkeypatch, capsys, rate, shown):
    run(Report(), monkeypatch, seconds_per_step=1 / rate)
    assert shown in capsys.readouterr().err
