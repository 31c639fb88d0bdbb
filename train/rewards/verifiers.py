"""Rewards by rule: functions of a completion and of what is right, and what runs them on the rows of prompts."""

from __future__ import annotations

import ast
import math
import operator
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from typing import Any

import numpy as np

from qwen_jax.errors import DataError, SandboxError
from qwen_jax.sandbox.grade import grade
from qwen_jax.sandbox.problem import problem
from qwen_jax.sandbox.process import isolate
from qwen_jax.sandbox.verify import fraction_passed
from qwen_jax.text.final_answer import final_answer, reference_answer, same_answer
from train.rewards.config import Verifier
from train.rewards.verdicts import Sample, Verdicts

_EXPRESSION = re.compile(r"[0-9+\-*/() ]{1,200}")
_OPERATIONS: Mapping[type, Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_IN_SANDBOX = ("code", "instructions")
_WANTED = {
    "math": "a text or a number",
    "tagged": "a text or a number",
    "countdown": '{"numbers": [...], "target": ...} of whole numbers',
    "code": "the code of its tests",
    "instructions": "a program, or a list of them",
}


def math_answer(completion: str, answer: str | float) -> bool:
    """Whether a completion ends in an answer, which may be given as a whole solution."""
    final = final_answer(completion)
    return final is not None and same_answer(final, reference_answer(answer))


def tagged(completion: str, answer: str | float) -> bool:
    """Whether the last text between <answer> tags is that, but for white space."""
    found = in_tags(completion)
    return found is not None and found.split() == str(answer).split()


def countdown(completion: str, numbers: Sequence[int], target: int) -> bool:
    """Whether the last text between <answer> tags is an expression of value `target`, with each of `numbers` once."""
    text = (in_tags(completion) or "").strip()
    if not _EXPRESSION.fullmatch(text) or sorted(map(int, re.findall(r"[0-9]+", text))) != sorted(numbers):
        return False
    try:
        return _value(ast.parse(text, mode="eval").body) == target
    except (SyntaxError, KeyError, ZeroDivisionError):
        return False


def in_tags(text: str) -> str | None:
    """What stands in the last <answer>…</answer>; None without."""
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    return text[start + len("<answer>") : end] if start >= 0 else None


def _value(node: ast.expr) -> Fraction:
    """Exactly. A KeyError for what is no number, sum, difference, product or quotient."""
    match node:
        case ast.Constant(value=int(value)):
            return Fraction(value)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand)
        case ast.BinOp(left=left, op=op, right=right):
            return _OPERATIONS[type(op)](_value(left), _value(right))
    raise KeyError(type(node).__name__)


class Rule:
    """A verifier of the config. What runs in the sandbox runs several at a time."""

    def __init__(self, config: Verifier) -> None:
        """SandboxError where it needs a sandbox and none can be had."""
        self._config = config
        self._column = "meta" if config.name == "countdown" else config.column
        if config.name in _IN_SANDBOX:
            isolate(allow_weak=config.allow_weak)
        self._pool = ThreadPoolExecutor(os.cpu_count() if config.name in _IN_SANDBOX else 1)

    def check(self, columns: Mapping[str, Any]) -> None:
        """Raises DataError if a row of prompts lacks what completions are compared with."""
        name, column, wanted = self._config.name, self._column, _WANTED[self._config.name]
        if name == "code" and not isinstance(columns.get("entry_point", ""), str):
            column, wanted = "entry_point", "the name of a function"
        elif _fits(name, columns.get(column)):
            return
        found = f"holds a {type(columns[column]).__name__}" if column in columns else "is missing"
        raise DataError(f'column "{column}" {found}, and verifier {name} wants {wanted}')

    def __call__(self, samples: Sequence[Sample]) -> Verdicts:
        """1 where the rule is met, 0 where not. No verdict where a sandbox breaks; SandboxError if all do."""
        values, failures, broken = np.full(len(samples), math.nan), Counter[str](), None
        for i, judged in enumerate([self._pool.submit(self._judge, sample) for sample in samples]):
            try:
                values[i] = judged.result()
            except SandboxError as error:
                failures["the sandbox broke"] += 1
                broken = error
        if broken and np.isnan(values).all():
            raise broken
        return Verdicts(values, failures)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _judge(self, sample: Sample) -> float:
        config, completion = self._config, sample.completion
        found = sample.columns[self._column]
        sandbox: dict[str, Any] = {"limits": config.limits, "allow_weak": config.allow_weak}
        match config.name:
            case "math":
                return math_answer(completion, found)
            case "tagged":
                return tagged(completion, found)
            case "countdown":
                return countdown(completion, found["numbers"], found["target"])
            case "code":
                prompt = sample.prompt if isinstance(sample.prompt, str) else ""
                entry_point = sample.columns.get("entry_point", "")
                program, checker = problem(completion, prompt=prompt, test=found, entry_point=entry_point)
                return grade(program, checker, **sandbox).passed
            case "instructions":
                programs = [found] if isinstance(found, str) else found
                return fraction_passed(programs, completion, **sandbox) or 0.0


def _fits(name: str, found: Any) -> bool:
    """Whether a rule can compare completions with what is found in a row."""
    is_text = lambda value: isinstance(value, str) and bool(value.strip())
    match name:
        case "countdown":
            given = isinstance(found, Mapping) and isinstance(found.get("numbers"), list)
            return given and all(type(number) is int for number in [*found["numbers"], found.get("target")])
        case "instructions":
            return is_text(found) or (isinstance(found, list) and bool(found) and all(map(is_text, found)))
        case "code":
            return is_text(found)
    return is_text(found) or (isinstance(found, int | float) and not isinstance(found, bool))
