"""Final answers: found in real solutions, the same however they are written, and never long in the reading."""

from __future__ import annotations

import json
import time
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_jax.text.expressions import values
from qwen_jax.text.final_answer import final_answer, marked_answer, same_answer

SHARED = Path(__file__).parents[3] / "shared/data"
# Of anything that is read, whatever it is: a real answer takes a thousandth of it.
SECONDS = 2.0

WAYS = [
    "{n:,}",
    "{n}.0",
    "${n:,}",
    "\\${n}.00",
    "{n} dollars",
    "x = {n}",
    "\\({n}\\)",
    "{n}\\text{{ cm}}^2",
    "{n}%",
    "{n}.",
]
WAYS += ["\\boxed{{{n}}}", "\\frac{{{m}}}{{3}}", "{m}/3", "{h}+{h}"]


@given(n=st.integers(-(10**9), 10**9))
def test_a_whole_number_is_itself_however_it_is_written(n):
    for way in WAYS:
        written = way.format(n=n, m=3 * n, h=Fraction(n, 2)).replace("+-", "-")
        written = marked_answer(written) or written
        assert same_answer(written, str(n)) and same_answer(str(n), written), written
        assert not same_answer(written, str(n + 1)), written


@pytest.mark.parametrize(
    "a, b",
    [
        ("\\frac12", "0.5"), ("\\dfrac{1}{2}", "1/2"), ("50\\%", "1/2"), ("50\\%", "50"), ("1\\frac{1}{2}", "1.5"),
        ("1 1/2", "\\frac{3}{2}"), ("-1\\frac14", "-1.25"), ("10^3", "1,000"), ("10{,}000", "10000"), ("2^{-1}", "0.5"),
        ("\\frac{\\sqrt{3}}{2}", "\\sqrt{3}/2"), ("\\sqrt{8}", "2\\sqrt2"), ("7\\pi", "\\pi \\cdot 7"),
        ("2x+3", "3 + 2x"), ("(x+1)^2", "x^2+2x+1"), ("4a-2", "2(2a-1)"), ("(1, 2)", "\\left(1,2\\right)"),
        ("1,-2", "-2,1"), ("\\{1,2\\}", "\\{2,1\\}"), ("[0,\\infty)", "[0, \\infty)"), ("\\text{(C)}", "C"),
        ("\\text{Yes}", "yes"), ("90^\\circ", "90"), ("5 apples", "5 apple"), ("12元", "12"), ("123_5", "123_{5}"),
        ("3\\times 10^{8}", "3e8"),
        ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}"),
    ],
)  # fmt: skip
def test_the_same_in_other_words(a, b):
    assert same_answer(a, b) and same_answer(b, a)


@pytest.mark.parametrize(
    "a, b",
    [
        ("0.5", "50"), ("0.333", "\\frac13"), ("3.14", "\\pi"), ("(1,2)", "(2,1)"), ("[1,2)", "(1,2)"),
        ("1,2", "1,2,2"), ("-3", "3"), ("5 cm", "5 m"), ("east", "seat"), ("A", "B"), ("x+1", "x-1"), ("4:30", "4.30"),
        ("", ""), ("2", ""), ("9**9**9", "1"), ("1,000", "1"), ("12", "1 2"), ("b", "a"), ("15 minutes and 3", "15"),
    ],
)  # fmt: skip
def test_what_is_not_the_same(a, b):
    assert not same_answer(a, b) and not same_answer(b, a)


@pytest.mark.parametrize(
    "solution, answer",
    [
        ("He has 3 + 4 = 7.\n#### 7", "7"),
        ("so \\boxed{\\frac{1}{2}}, not \\boxed{3", "\\frac{1}{2}"),
        ("#### Step 1\nWe get \\boxed{5}.", "5"),
        ("First 3. The answer is $1,234 a day. Good.", "$1,234"),
        ("The final answer is: \\frac{3}{4}.", "\\frac{3}{4}"),
        ("so the answer is therefore -12.", "-12"),
        ("所以答案是：12元。", "12元"),
        ("It takes 10-4 = 6 of 1,000", "1,000"),
        ("I do not know.", None),
        ("", None),
    ],
)
def test_where_a_solution_has_its_answer(solution, answer):
    assert final_answer(solution) == answer


HOSTILE = [
    "9**9**9", "9^9^9^9", "9^{9^{9}}", "1" * 100_000, "\\frac{1" * 1000, "\\frac{" * 1000 + "1" + "}{2}" * 1000,
    "(" * 1000 + "1" + ")" * 1000, "\\int_0^1 x dx", "\\boxed{" * 20_000, "#### " * 20_000, "answer is " * 20_000,
    "1," * 20_000, "-" * 100_000, "\\text{" * 20_000, " " * 100_000 + "x", "answer is" + " " * 100_000, "1e999",
    "1e-999", "(1e999)^9", "2^1000000", "0^0", "0^{-1}", "1/0", "(-8)^{1/3}", "\\text{a}" * 5000, "1 " * 50_000, "²",
    "٣", "1/" * 149, "+" * 299, "{}" * 50, "1,(" * 100, "%", "%%", "\\sqrt[0]{2}", "9^{99}" * 49, "\x00", "(" * 299,
    "\\boxed" + " " * 100_000,
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_nothing_takes_long(text):
    start = time.process_time()
    final_answer(text), marked_answer(text), values(text)
    assert not same_answer(text, "17") and not same_answer("17", text)
    same_answer(text, text + " ")
    assert time.process_time() - start < SECONDS


PIECES = [*"0123456789.,+-*/^()[]{}\\%$ exab_=", "\\frac", "\\sqrt", "####", "\\boxed{"]


@given(a=st.lists(st.sampled_from(PIECES)).map("".join), b=st.lists(st.sampled_from(PIECES)).map("".join))
def test_comparing_has_no_order_and_nothing_fails(a, b):
    assert same_answer(a, b) == same_answer(b, a)
    assert final_answer(a + b) is None or final_answer(a + b).strip()


@pytest.mark.skipif(not (SHARED / "math").exists(), reason="needs ../shared/data")
def test_real_solutions_are_judged_as_their_publishers_did():
    """100 problems of MATH, eight answers of Qwen2.5-Math to each, with its own grader's verdicts."""
    rows = [json.loads(line) for line in (SHARED / "math/qwen25math_rm_maj_example_100.jsonl").read_text().splitlines()]
    other = [
        (row["idx"], answer)
        for row in rows
        for text, right in zip(row["response"], row["score"], strict=True)
        if ((answer := final_answer(text)) is not None and same_answer(answer, row["gt"])) != right
    ]
    assert other == [(72, "10000")]  # to the publishers not 10{,}000


@pytest.mark.skipif(not (SHARED / "gsm8k").exists(), reason="needs ../shared/data")
def test_references_of_gsm8k_are_numbers():
    for line in (SHARED / "gsm8k/test_first200.jsonl").read_text().splitlines():
        solution = json.loads(line)["answer"]
        answer = marked_answer(solution)
        number = int(answer.replace(",", ""))
        assert answer == final_answer(solution)
        assert same_answer(f"\\frac{{{2 * number}}}{{2}}", answer) and same_answer(f"{number:,}.00", answer)
        assert final_answer(f"3 and 4. The answer is {number:,}.") == f"{number:,}" and not same_answer(
            f"{number}1", answer
        )
