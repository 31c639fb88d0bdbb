"""Reward functions of users: what they are given, and that nothing they do costs more than verdicts."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from qwen_jax.errors import DataError, FileError
from train.rewards.config import Function
from train.rewards.function import FunctionReward
from train.rewards.verdicts import Sample

ROOT = Path(__file__).parents[3]
HANG_SECONDS = 0.5  # of a call where one hangs: enough for those that do not, on a machine that is busy
FAULTS = """
import os, subprocess, sys, time

def reward(completions, **columns):
    words = [c.split()[0] for c in completions]
    if "raise" in words: raise ValueError("two\\nlines")
    if "exit" in words: sys.exit("done")
    if "die" in words: os._exit(3)
    if "abort" in words: os.abort()
    if "hang" in words: time.sleep(60)
    if "ask" in words: input("? ")
    if "print" in words: print("x" * 2**20); os.write(2, b"y" * 2**20)
    if "short" in words: return [1.0] * (len(words) - 1)
    if "huge" in words: return [1.0] * 10**6
    if "text" in words: return "1" * len(words)
    if "dict" in words: return {0: 1.0}
    if "fork" in words:
        child = subprocess.Popen(["sleep", "60"])
        with open(columns["path"][0], "a") as file: file.write(f"{os.getpid()} {child.pid} ")
        os.fork()
        time.sleep(60)
    values = {"nan": float("nan"), "inf": float("inf"), "none": None, "str": "1.0", "list": [1.0], "big": 10**400}
    return [values.get(word, len(words)) for word in words]
"""


@pytest.fixture
def judged(tmp_path):
    """Has a function judge completions, one call after the other; values, failures, and warnings."""
    opened, warnings = [], []

    def judge(*calls, source=FAULTS, columns=(), prompt="?", **options):
        path = tmp_path / "rewards.py"
        path.write_text(source)
        options = {"fraction": 0.99} | options
        opened.append(FunctionReward(Function(path=str(path), **options), warn=warnings.append))
        sample = lambda text: Sample(prompt=prompt, completion=text, columns=dict(columns))
        return [opened[-1]([sample(text) for text in texts]) for texts in calls], warnings

    yield judge
    for function in opened:
        function.close()


@pytest.mark.parametrize(
    "word, reason",
    [
        ("raise", "raised ValueError"), ("exit", "raised SystemExit"), ("die", "ended its process"),
        ("abort", "ended its process"), ("hang", "took too long"), ("ask", "raised EOFError"),
        ("short", "gave a list of another length"), ("huge", "gave a list of another length"),
        ("text", "gave no list"), ("dict", "gave no list"), ("nan", "gave nan"), ("inf", "gave an infinite number"),
        ("none", "gave None"), ("str", "gave a str, no number"), ("list", "gave a list, no number"),
        ("big", "gave what is no number (OverflowError)"),
    ],
)  # fmt: skip
def test_one_completion_that_cannot_be_judged_costs_no_other(judged, word, reason):
    seconds = HANG_SECONDS if word == "hang" else 60
    ((values, failures), (after, none)), warnings = judged(["a", word, "b"], ["a", "b"], seconds=seconds)
    np.testing.assert_array_equal(np.isnan(values), [False, True, False])
    assert failures == {reason: 1} and len(warnings) == 1 and "judged 2 of 3 completions" in warnings[0]
    np.testing.assert_array_equal(after, [2, 2])
    assert not none, "the next call is as if nothing had been"


def test_the_warning_is_one_line_that_ends_as_the_traceback_does(judged):
    _, (line,) = judged(["a", "raise", "b"])
    assert "ValueError: two" in line and "\n" not in line


def test_what_a_function_prints_is_no_answer(judged, capfd):
    ((values, failures),), warnings = judged(["print", "b"])
    assert values.tolist() == [2, 2] and not failures and not warnings
    out, err = capfd.readouterr()
    assert not out and len(err) >= 2**21


def test_a_function_that_always_hangs_is_given_up_in_time(judged):
    start = time.monotonic()
    with pytest.raises(DataError, match="judged 0 of 64 completions: it took more than 0.5 s"):
        judged(["hang"] * 64, seconds=HANG_SECONDS)
    assert time.monotonic() - start < 64 * HANG_SECONDS


def test_nothing_is_left_of_what_a_function_starts(judged, tmp_path):
    pids = tmp_path / "pids"
    (_,), _ = judged(["a", "fork"], columns={"path": str(pids)}, seconds=HANG_SECONDS)
    started = [int(pid) for pid in pids.read_text().split()]
    assert len(started) >= 2
    wait_for_end(started)


def wait_for_end(pids):
    """Until the processes have ended; then they may still wait for their parent to hear of it."""
    deadline = time.monotonic() + 30
    for path in (Path(f"/proc/{pid}/stat") for pid in pids):
        while path.exists() and path.read_text().rpartition(")")[2].split()[0] != "Z":
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_a_function_ends_with_the_process_that_asks_it(tmp_path):
    """Also while it is asked, and nobody is left to count its seconds."""
    (tmp_path / "rewards.py").write_text(FAULTS)
    code = f"""
import os, signal, threading
from train.rewards.config import Function
from train.rewards.function import FunctionReward
from train.rewards.verdicts import Sample
function = FunctionReward(Function(path={str(tmp_path / "rewards.py")!r}), warn=print)
print(function._process._process.pid, flush=True)
sample = Sample(prompt="", completion="hang", columns={{}})
threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGKILL)).start()
function([sample])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert done.returncode == -signal.SIGKILL
    wait_for_end([int(done.stdout)])


def test_too_many_without_a_verdict_end_the_run(judged):
    (_,), warnings = judged(["nan", "a"], fraction=0.5)
    assert warnings
    with pytest.raises(DataError) as error:
        judged(["nan", "raise", "a"], fraction=0.5)
    assert "rewards.py: reward judged 1 of 3 completions: ValueError: two lines" in str(error.value)
    assert "fraction=0.5" in str(error.value) and "\n" not in str(error.value)


SHOW = """
import json
from beside import FACTOR
def score(prompts, completions, **columns):
    print(json.dumps([prompts, completions, columns]))
    return [FACTOR * len(p) for p in prompts]
"""


@pytest.mark.parametrize(
    "prompt, completion",
    [("2+2?", "4"), ([{"role": "user", "content": "2+2?"}], [{"role": "assistant", "content": "4"}])],
)
def test_it_is_called_as_trl_calls_it_and_imports_what_lies_beside_it(judged, tmp_path, capfd, prompt, completion):
    (tmp_path / "beside.py").write_text("FACTOR = 3")
    columns = {"prompt": prompt, "completion": "of the row", "answer": "4", "meta": {"level": 1}}
    ((values, _),), _ = judged(["4"], source=SHOW, name="score", prompt=prompt, columns=columns)
    assert values.tolist() == [3 * len(prompt)]
    assert json.loads(capfd.readouterr().err) == [[prompt], [completion], {"answer": ["4"], "meta": [{"level": 1}]}]


def test_text_that_is_no_text_arrives_as_it_is(judged):
    source = "def reward(completions, **_): return [len(completions[0])]"
    ((values, _),), _ = judged(["\udcff\0é"], source=source)
    assert values.tolist() == [3]


@pytest.mark.parametrize(
    "source, said",
    [
        ("import nothing_of_this_name", "ModuleNotFoundError: No module named 'nothing_of_this_name'"),
        ("def reward(:", "SyntaxError"), ("def other(**_): return []", "it has no function reward"),
        ("reward = 3", "it has no function reward"), ("import sys; sys.exit(1)", "SystemExit"),
        ("import os; os._exit(7)", "it ended its process (exit code 7)"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_used_is_refused_at_once(judged, source, said):
    with pytest.raises(DataError) as error:
        judged(source=source)
    assert said in str(error.value) and "rewards.py" in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(FileError, match="is no file"):
        FunctionReward(Function(path=str(tmp_path / "none.py")), warn=pytest.fail)
