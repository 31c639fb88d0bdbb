"""Programs that pass, fail, and pretend."""

from __future__ import annotations

import pytest

from qwen_jax.sandbox.grade import grade
from qwen_jax.sandbox.process import Limits

SQUARE = "from program import f\nassert f(2) == 4\nassert f(-3) == 9, 'of a negative number'\nassert not f(0)\n"
SHORT = Limits(wall_seconds=1)


def test_a_right_program_passes_and_a_wrong_one_does_not():
    assert grade("def f(x): return x * x", SQUARE).passed
    wrong = grade("def f(x): return x * abs(x)", SQUARE)
    assert (wrong.passed, wrong.reason, wrong.detail) == (False, "error", "AssertionError: of a negative number")
    assert grade("def f(x): return 0", SQUARE).detail == "AssertionError: assert f(2) == 4"


def test_a_problem_as_humaneval_writes_them():
    prompt = (
        'def poly(xs, x):\n    return sum(c * x**i for i, c in enumerate(xs))\n\ndef root(xs):\n    """Find it."""\n'
    )
    test = "def check(candidate):\n    assert abs(poly([-6, 3], candidate([-6, 3]))) < 1e-4\n"
    checker = f"{prompt}\n{test}\nfrom program import root\ncheck(root)"
    assert grade(prompt + "    return -xs[0] / xs[1]", checker).passed
    assert not grade(prompt + "    global poly\n    poly = lambda xs, x: 0\n    return 1.0", checker).passed


def test_plain_values_pass_as_they_are():
    checker = """
from program import same, Solution
class Int(int): pass
values = [None, True, 1, -10**40, 10**5000, 1.5, float("inf"), 2j, "é\\ud800", b"\\0", [1, [2]], (1, (2,)),
    {1: {"a": (1,)}}, {1, 2}, frozenset([3]), {(1, 2): [3]}]
for value in values:
    got = same(value)
    assert got == value and type(got) is type(value), value
assert same(x=Int(3)) == 3 and type(same(Int(3))) is int
assert str(same(float("nan"))) == "nan"
adder = Solution(2)
assert adder.add(3, to=4) == 9 and Solution.name() == "Solution"
assert same(adder).add(0, to=0) == 2
try:
    same(print)
except TypeError:
    pass
else:
    raise AssertionError("a function was passed")
for message, key in (("KeyError('k')", "k"), ("RuntimeError('Own', 'k')", None)):
    try:
        adder.fail(key)
    except Exception as error:
        assert repr(error) == message, repr(error)
    else:
        raise AssertionError("nothing was raised")
"""
    program = """
class Own(Exception): pass
class Solution:
    def __init__(self, start): self.start = start
    def add(self, x, *, to): return self.start + x + to
    @staticmethod
    def name(): return "Solution"
    def fail(self, key):
        if key: raise KeyError(key)
        raise Own("k")
def same(x): return x
"""
    verdict = grade(program, checker)
    assert verdict.passed, verdict


EQUAL = "def __eq__(self, other): return True\n    def __bool__(self): return True\n    __hash__ = None"
HACKS = {
    "exits": "import sys\nsys.exit(0)",
    "exits when called": "import sys\ndef f(x): sys.exit(0)",
    "exits hard when called": "import os\ndef f(x): os._exit(0)",
    "prints": "print('ok')\nprint('passed')\ndef f(x): print('{\"reason\": \"ok\"}')",
    "equal to everything": f"class A:\n    {EQUAL}\ndef f(x): return A()",
    "an int equal to everything": f"class A(int):\n    {EQUAL}\ndef f(x): return A()",
    "a list equal to everything": f"class A(list):\n    {EQUAL}\ndef f(x): return A()",
    "patches the asserts": (
        "import builtins, unittest\nunittest.TestCase.assertEqual = lambda *a: None\n"
        "builtins.AssertionError = KeyError\nbuiltins.abs = lambda x: 0\ndef f(x): return 1"
    ),
    "swallows the checker": "import sys\nsys.modules['__main__'].__dict__.clear()\ndef f(x): return 1",
    "writes to every pipe": (
        "import os\nfor fd in range(256):\n    try: os.write(fd, b'\\x0f' + bytes(7) + b'{\"reason\":\"ok\"}')\n"
        "    except OSError: pass\ndef f(x): return 1"
    ),
    "reads the answers": (
        "import os, gc\ntexts = [open(os.path.join(d, n), errors='replace').read() for d in ('/tmp', '/dev/shm') "
        "for n in os.listdir(d) if os.path.isfile(os.path.join(d, n))]\n"
        "texts += [o for o in gc.get_objects() if isinstance(o, str)]\n"
        "assert any('f(-3)' in t for t in texts)\ndef f(x): return {2: 4, -3: 9, 0: 0}[x]"
    ),
    "leaves a file for the checker": (
        "for name in ('json', 'os', 'traceback', 'types', 'sitecustomize', 'main'):\n"
        "    open(f'/tmp/{name}.py', 'w').write('import os; os._exit(0)')\ndef f(x): return 1"
    ),
    "answers before it is asked": (
        "import os\nvalue = b'{\"value\": 4}'\nos.write(6, len(value).to_bytes(8, 'little') + value)\n"
        "def f(x): return 9"
    ),
    "answers with code": (
        "import os\nvalue = b'{\"value\": {\"eval\": \"1\"}}'\n"
        "def f(x): os.write(6, len(value).to_bytes(8, 'little') + value)"
    ),
    "raises what ends the checker": "def f(x): raise SystemExit(0)",
    "raises a name": "class ProgramEnded(Exception): pass\ndef f(x): raise ProgramEnded()",
    "is no program": "def f(x: return",
    "is no text": "def f(x): return x * x\0",
    "is no Unicode": "def f(x): return x * x  # \ud800",
    "is too long": "x = '" + "x" * (65 << 20) + "'",
    "is nothing": "",
}  # fmt: skip


@pytest.mark.parametrize("name", HACKS)
def test_pretending_gives_nothing(name):
    verdict = grade(HACKS[name], SQUARE)
    assert not verdict.passed and verdict.reason == "error" and verdict.detail, verdict


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("def f(x):\n    while True: pass", "timeout"),
        ("import time\ntime.sleep(99)", "timeout"),
        ("import os\nos.write(6, b'x' * 50)\ndef f(x): return x * x", "timeout"),
        ("def f(x):\n    while True: print('x' * 9999)", "output"),
        ("import os\ndef f(x): os.kill(os.getpid(), 9)", "killed"),
        ("x = bytearray(9 << 30)", "memory"),
    ],
)
def test_the_reason_is_that_of_the_program(program, reason):
    verdict = grade(program, SQUARE, limits=SHORT if reason == "timeout" else None)
    assert (verdict.passed, verdict.reason) == (False, reason), verdict


def test_ending_is_not_the_exception_that_a_checker_expects():
    checker = "from program import f\ntry:\n    f(-1)\nexcept Exception:\n    pass\nelse:\n    raise AssertionError"
    assert grade("def f(x): raise ValueError(x)", checker).passed
    assert not grade("import os\ndef f(x): os._exit(1)", checker).passed


def test_a_checker_that_ends_early_gives_no_pass():
    for ending in ("import os\nos._exit(0)", "import sys\nsys.exit(0)", "raise KeyboardInterrupt"):
        verdict = grade("def f(x): return x * x", ending)
        assert not verdict.passed and verdict.reason == "error"
