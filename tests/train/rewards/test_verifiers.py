"""Rules: what meets them, what only pretends to, and text that is meant to break them."""

from __future__ import annotations

import json
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_jax.errors import DataError, SandboxError
from qwen_jax.sandbox.process import isolate
from train.rewards import verifiers
from train.rewards.config import Verifier
from train.rewards.verdicts import Sample
from train.rewards.verifiers import Rule, countdown, in_tags, math_answer, tagged

SHARED = Path(__file__).parents[4] / "shared/data"
TEST = "def check(f):\n    assert f(2) == 4 and f(3) == 9"
SQUARE = "```python\ndef square(x):\n    return x * x\n```"


@pytest.fixture(scope="module")
def sandbox():
    try:
        isolate(allow_weak=False)
    except SandboxError as error:
        pytest.skip(str(error))


def rule(name, completions, columns, **options):
    """The verdicts of a verifier, which finds its row to be in order."""
    verifier = Rule(Verifier(name=name, **options))
    try:
        verifier.check(columns)
        samples = [Sample(prompt="?", completion=completion, columns=columns) for completion in completions]
        values, failures = verifier(samples)
    finally:
        verifier.close()
    assert not failures
    return values.tolist()


def test_math_compares_final_answers_with_solutions_and_with_bare_answers():
    said = ["3 + 4 = 7\n#### 7", r"\boxed{7.0} apples", "The answer is 7.", "8", "", "7 or 8"]
    for answer in ("5 + 2\n#### 7", "7", 7, 7.0):
        assert rule("math", said, {"answer": answer}) == [1, 1, 1, 0, 0, 0]


@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{9**9**9}", r"\boxed{9^{9^{9}}}", "#### " + "9" * 10**5, r"\boxed{" + r"\frac{1}" * 1000 + "}",
        r"\boxed{\int_0^1 x}", "####" + " " * 50_000, r"\boxed" * 10**5, "the answer is" + " " * 50_000,
    ],
)  # fmt: skip
def test_math_is_quick_whatever_it_is_given(text):
    start = time.process_time()
    assert not math_answer(text, "7") and not tagged(text, "7")
    assert time.process_time() - start < 5, "which others need a process to kill for"


def test_the_last_text_in_tags_counts():
    assert in_tags("<answer>1</answer> no, <answer> 4,\n 5 </answer> done") == " 4,\n 5 "
    assert in_tags("<answer>1</answer> <answer>2") == "1" and in_tags("</answer><answer>") is None
    said = ["<answer> 4,\n5</answer>", "<answer>4, 5</answer><answer>4</answer>", "4, 5", "<answer>4,5</answer>"]
    assert rule("tagged", said, {"answer": "4, 5"}) == [1, 0, 0, 0]
    assert tagged("<answer>12</answer>", 12) and not tagged("<answer></answer>", "0")


@pytest.mark.skipif(not (SHARED / "rl-micro").exists(), reason="needs ../shared/data")
def test_answers_of_the_micro_tasks_meet_their_rules():
    rows = [json.loads(line) for line in (SHARED / "rl-micro/dev.jsonl").read_text().splitlines()][::9]
    assert {row["task"] for row in rows} >= {"countdown", "sort"}
    for row in rows:
        name = "countdown" if row["task"] == "countdown" else "tagged"
        (met,) = rule(name, [f"<answer>{row['answer']}</answer>"], row)
        assert met, row


OPERATIONS = {
    "+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b, "/": lambda a, b: a / b
}  # fmt: skip


@given(numbers=st.lists(st.integers(1, 9), min_size=2, max_size=5), signs=st.lists(st.sampled_from("+-*/"), min_size=4))
def test_countdown_is_exact_arithmetic_on_all_of_the_numbers(numbers, signs):
    text, value = str(numbers[0]), Fraction(numbers[0])
    for number, sign in zip(numbers[1:], signs, strict=False):
        text, value = f"({text} {sign} {number})", OPERATIONS[sign](value, number)
    said = f"<answer>{text}</answer>"
    assert countdown(said, numbers[::-1], value)
    assert not countdown(said, numbers, value + Fraction(1, 10**30)), "not a float is taken for another"
    assert not countdown(said, [*numbers, 1], value) and not countdown(said, numbers[1:], value)


@pytest.mark.parametrize(
    "text",
    [
        "24", "2**3*3", "2*3*4 = 24", "4*6", "2 3*4", "(2*3*4", "4//2*3", "2*3*4 or 1", "__import__('os')", "23+4-3",
        "2*(3*4)/(2-2)", "2/(3-3)*4", "2*3*4\0", "٢*3*4", "2*3*04", "-" * 500 + "2*3*4",
        "9" * 10**6, "", "2*3*4+", "2,3*4", "2*3*4;1",
    ],
)  # fmt: skip
def test_countdown_takes_nothing_else_for_an_expression(text):
    assert not countdown(f"<answer>{text}</answer>", [2, 3, 4], 24)


def test_countdown_takes_signs_and_brackets():
    for text in ("2*3*4", " -2*3*-4 ", "(" * 90 + "2*3*4" + ")" * 90):
        assert countdown(f"<answer>{text}</answer>", [2, 3, 4], 24)


WRONG = "def square(x):\n    return x + 2"
CHEATS = [
    "import sys; sys.exit(0)",
    "import os; os._exit(0)",
    "class Yes(int):\n    def __eq__(self, other): return True\ndef square(x): return Yes()",
    f"{WRONG}\nimport unittest, builtins\nbuiltins.AssertionError = None\ndef check(f): pass",
    f"{WRONG}\nprint('passed', flush=True)\nopen('checker.py', 'w').write('')",
    "import inspect\ndef square(x):\n    return inspect.stack()[-1].frame.f_globals['expected']",
]


def test_code_is_rewarded_for_what_it_computes_and_not_for_what_it_pretends(sandbox):
    columns = {"test": TEST, "entry_point": "square"}
    said = [SQUARE, WRONG, "while True: pass", "\0", "\udcff", *CHEATS]
    verdicts = rule("code", said, columns, column="test", seconds=1)
    assert verdicts == [1] + [0] * (len(said) - 1)


def test_a_long_answer_is_no_program_and_costs_no_time(sandbox):
    columns = {"test": TEST, "entry_point": "square"}
    start = time.process_time()
    said = ["1" * (1 << 20), "```" + "a" * 10**5]
    assert rule("code", said, columns, column="test") == [0, 0]
    assert time.process_time() - start < 5, "blocks are looked for in linear time"


def test_instructions_give_the_part_of_the_programs_that_pass(sandbox):
    short = "def evaluate(response):\n    return len(response) < 5"
    lower = "def evaluate(response):\n    return response.islower()"
    broken = "def evaluate(response):\n    raise ValueError"
    columns = {"verifiers": [short, lower, broken, "while True: pass"]}
    verdicts = rule("instructions", ["abc", "ABCDE"], columns, column="verifiers", seconds=0.5)
    assert verdicts == [0.5, 0]
    assert rule("instructions", ["abc"], {"verifiers": short}, column="verifiers") == [1]


@pytest.mark.parametrize(
    "name, columns, wanted",
    [
        ("math", {}, 'column "answer" is missing, and verifier math wants a text or a number'),
        ("math", {"answer": True}, 'column "answer" holds a bool'),
        ("tagged", {"answer": " "}, 'column "answer" holds a str'),
        ("countdown", {"answer": "1"}, 'column "meta" is missing, and verifier countdown wants {"numbers'),
        ("countdown", {"meta": {"numbers": [1, "2"], "target": 3}}, 'column "meta" holds a dict'),
        ("countdown", {"meta": {"numbers": [1, 2]}}, 'column "meta" holds a dict'),
    ],
)
def test_a_row_that_lacks_what_is_compared_with_is_refused(name, columns, wanted):
    with pytest.raises(DataError) as error:
        Rule(Verifier(name=name)).check(columns)
    assert wanted in str(error.value)


def test_rows_of_programs_are_checked_too(sandbox):
    for name, columns in [("code", {"answer": [TEST]}), ("code", {"answer": TEST, "entry_point": 1}),
                          ("instructions", {"answer": []}), ("instructions", {"answer": [1]})]:  # fmt: skip
        with pytest.raises(DataError, match="column"):
            Rule(Verifier(name=name)).check(columns)


def test_without_a_sandbox_nothing_is_judged(monkeypatch, sandbox):
    def refuse(*, allow_weak):
        raise SandboxError("this machine cannot lock untrusted code in")

    monkeypatch.setattr(verifiers, "isolate", refuse)
    with pytest.raises(SandboxError) as error:
        Rule(Verifier(name="code"))
    assert error.value.exit_code == 4


def test_a_sandbox_that_breaks_costs_one_verdict_and_all_of_them_the_run(monkeypatch, sandbox):
    grade = lambda program, checker, **options: broken() if "bad" in program else Passed()

    class Passed:
        passed = True

    def broken():
        raise SandboxError("a sandbox's process died")

    monkeypatch.setattr(verifiers, "grade", grade)
    judge = Rule(Verifier(name="code"))
    sample = lambda text: Sample(prompt="", completion=text, columns={"answer": TEST})
    values, failures = judge([sample("good"), sample("bad")])
    np.testing.assert_array_equal(values, [1, np.nan])
    assert failures == {"the sandbox broke": 1}
    with pytest.raises(SandboxError):
        judge([sample("bad"), sample("bad")])
