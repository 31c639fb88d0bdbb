"""Interpreters that keep their variables."""

from __future__ import annotations

import pytest

from qwen_jax.sandbox.process import Limits, Warden
from qwen_jax.sandbox.session import Session
from tests.sandbox.conftest import wait_for


@pytest.fixture(scope="module")
def session():
    with Session(limits=Limits(wall_seconds=30, output_bytes=20_000)) as session:
        yield session


def test_variables_stay_and_the_last_line_has_a_value(session):
    first = session.run("x = 6\nprint('says')\ndef f(y):\n    return x * y\nf(7)")
    assert (first.stdout, first.value, first.reason, first.exit_code) == ("says\n", "42", "ok", None)
    assert session.run("x = 'é'").value is None
    assert session.run("f(2)").value == "'éé'"
    assert session.run("None").value is None
    assert session.run("").reason == "ok"
    assert session.run("open('f', 'w').write('kept')").value == "4"
    assert session.run("open('f').read()").value == "'kept'"
    assert session.run("import pickle\nclass A: pass\ntype(pickle.loads(pickle.dumps(A()))) is A").value == "True"


@pytest.mark.parametrize(
    ("cell", "words"),
    [
        ("y = 1\n1 / 0", 'File "<cell '),
        ("def g():\n    raise ValueError('here')\ng()", "line 2, in g\n    raise ValueError('here')"),
        ("def g(:", "SyntaxError"),
        ("raise SystemExit(0)", "SystemExit"),
        ("x = [0] * 10**10", "MemoryError"),
        ("def r(): r()\nr()", "RecursionError"),
        ("1\0", "null bytes"),
        ("\ud800", "UnicodeDecodeError"),
        ("'" + "x" * (1 << 20) + "'", "524288 are allowed"),
        ("class A:\n    def __repr__(self): raise KeyError('r')\nA()", "KeyError"),
    ],
)
def test_a_cell_that_fails_leaves_the_interpreter_as_it_was(session, cell, words):
    session.run("x = 5")
    failed = session.run(cell)
    assert failed.reason == "error" and words in failed.stderr and failed.value is None
    assert "grade_child" not in failed.stderr and '"<string>"' not in failed.stderr
    assert session.run("x").value == "5"


def test_what_a_cell_starts_writes_and_forks_is_the_cells(session):
    output = session.run(
        "import os\nprint('a')\nos.system\nif os.fork() == 0: os._exit(os.write(1, b'b'))\nos.wait()[1] >> 8"
    )
    assert (sorted(output.stdout), output.value) == (["\n", "a", "b"], "1")
    assert session.run("import os\nchild = os.fork()\nprint('both', flush=True)").reason == "ok"
    assert session.run("child > 0").value == "True"
    assert len(session.run("'x' * 10**6").value) == 10_000


@pytest.mark.parametrize(
    ("cell", "reason"),
    [
        ("print('so far')\nwhile True: pass", "timeout"),
        ("while True: print('x' * 99)", "output"),
        ("import os\nos._exit(0)", "killed"),
        ("import os\nos.kill(os.getpid(), 9)", "killed"),
        ("import os\nos.close(3)\nos.close(4)", "killed"),
    ],
)
def test_after_a_limit_a_new_interpreter_begins(cell, reason):
    with Session(limits=Limits(wall_seconds=1 if reason == "timeout" else 20, output_bytes=9999)) as session:
        session.run("x = 1")
        ended = session.run(cell)
        assert ended.reason == reason
        assert reason != "timeout" or ended.stdout == "so far\n"
        assert "NameError" in session.run("x").stderr


def test_a_cell_can_answer_what_it_wants_to_nobodys_harm():
    with Session() as session:
        forged = session.run("import os\nos.write(4, (3).to_bytes(8, 'little') + b'{}}')\nimport time\ntime.sleep(9)")
        assert (forged.reason, forged.value) == ("error", None)


def test_between_cells_nothing_runs(traces):
    with Session(limits=Limits(wall_seconds=20)) as session:
        start = (
            "import os, subprocess, sys, threading\ndef count():\n    while True: pass\n"
            "threading.Thread(target=count, daemon=True).start()\n"
            f"child = subprocess.Popen([sys.executable, '-c', 'while True: pass', {traces.word!r}])\nprint('started')"
        )
        assert session.run(start).stdout == "started\n"
        assert len(traces.processes()) == 1 and wait_for(lambda: traces.states() == {"T"})
        assert session.run("child.poll() is None").value == "True"
    assert traces.vanish()


def test_an_interrupted_cell_takes_the_interpreter_with_it(monkeypatch, traces):
    with Session() as session:
        session.run("x = 1")
        receive = Warden.receive

        def interrupted(warden):
            assert wait_for(traces.processes)
            raise KeyboardInterrupt

        monkeypatch.setattr(Warden, "receive", interrupted)
        with pytest.raises(KeyboardInterrupt):
            session.run(
                f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', 'while 1: 1', {traces.word!r}])"
            )
        assert not traces.processes()
        monkeypatch.setattr(Warden, "receive", receive)
        assert session.run("2").value == "2"
