"""What a short mathematical expression is worth, written in LaTeX or plainly.

A parser of a few rules, each bounded: text from anywhere is read in no time, and what goes beyond them has no value.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction

Number = Fraction | float

MAX_CHARACTERS = 300
_MAX_DEPTH = 24
_MAX_BITS = 4096  # of a numerator or a denominator

_TOKEN = re.compile(r"(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d{1,3}(?!\d))?|\\?[a-zA-Z]+|\S")
_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
# Expressions are compared where their letters have these values, of no meaning and nothing in common.
_POINTS = [{letter: Fraction(37 * i + 11 * p + 5, 41 + 2 * p) for i, letter in enumerate(_LETTERS)} for p in range(3)]
_SIGNS = {"\\cdot": "*", "\\times": "*", "×": "*", "\\div": "/", "÷": "/", "−": "-"}
_OPEN = {"(": ")", "{": "}", "[": "]"}


class _Unknown(Exception):
    pass


def values(text: str) -> tuple[Number, ...] | None:
    """What an expression is worth at a few points of its letters; None if it is none that is known here.

    Sums, products (written or not), quotients, powers, fractions, mixed numbers, roots and pi. Rational values are
    exact. A word of several letters is no product.
    """
    if len(text) > MAX_CHARACTERS:
        return None
    tokens = [_SIGNS.get(match[0], match[0]) for match in _TOKEN.finditer(text)]
    try:
        return tuple(_Parser(tokens, point).whole() for point in _POINTS)
    except (_Unknown, ArithmeticError, ValueError):
        return None


class _Parser:
    def __init__(self, tokens: Sequence[str], letters: Mapping[str, Fraction]) -> None:
        self._tokens = list(reversed(tokens))
        self._letters = letters
        self._depth = 0

    def whole(self) -> Number:
        value = self._sum()
        if self._tokens:
            raise _Unknown
        return value

    def _sum(self) -> Number:
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise _Unknown
        value = self._product()
        while self._next in ("+", "-"):
            sign = 1 if self._take() == "+" else -1
            value = _bounded(value + sign * self._product())
        self._depth -= 1
        return value

    def _product(self) -> Number:
        value = self._signed()
        while self._next in ("*", "/") or self._begins_factor():
            if self._next == "/":
                self._take()
                value = _bounded(value / self._signed())
            else:
                if self._next == "*":
                    self._take()
                value = _bounded(value * self._signed())
        return value

    def _signed(self) -> Number:
        sign = 1
        while self._next in ("+", "-"):
            sign = -sign if self._take() == "-" else sign
        return sign * self._power()

    def _power(self) -> Number:
        base = self._atom()
        if self._next != "^":
            return base
        self._take()
        negative = self._next == "-"
        if negative:
            self._take()
        exponent = self._group()
        return _power(base, -exponent if negative else exponent)

    def _atom(self) -> Number:
        token = self._take()
        if token[0].isdecimal() or token[0] == ".":
            number = _bounded(Fraction(token))
            return number + self._mixed() if token.isdecimal() and self._next == "\\frac" else number
        if token in _OPEN:
            return self._inside(_OPEN[token])
        if token == "\\frac":
            numerator = self._group()
            return _bounded(numerator / self._group())
        if token in ("\\sqrt", "sqrt"):
            degree: Number = Fraction(2)
            if self._next == "[":
                self._take()
                degree = self._inside("]")
            return _power(self._group(), 1 / degree)
        if token in ("\\pi", "π", "pi"):
            return math.pi
        if token in self._letters:
            return self._letters[token]
        raise _Unknown

    def _mixed(self) -> Number:
        """The fraction of a mixed number, which a whole one stands before."""
        self._take()
        parts = [self._group(), self._group()]
        if not all(isinstance(part, Fraction) and part.denominator == 1 for part in parts):
            raise _Unknown
        return _bounded(parts[0] / parts[1])

    def _group(self) -> Number:
        """What a command or a power takes: something in brackets, or the next sign."""
        token = self._next
        if token in _OPEN:
            return self._inside(_OPEN[self._take()])
        if len(token) > 1 and token.isdecimal():  # \frac12
            self._take()
            self._tokens += [token[1:], token[0]]
        return self._atom()

    def _inside(self, end: str) -> Number:
        value = self._sum()
        if self._take() != end:
            raise _Unknown
        return value

    def _begins_factor(self) -> bool:
        token = self._next
        return token in ("(", "{", "\\frac", "\\sqrt", "sqrt", "\\pi", "π", "pi") or token in self._letters

    @property
    def _next(self) -> str:
        return self._tokens[-1] if self._tokens else ""

    def _take(self) -> str:
        if not self._tokens:
            raise _Unknown
        return self._tokens.pop()


def _power(base: Number, exponent: Number) -> Number:
    if isinstance(base, Fraction) and isinstance(exponent, Fraction):
        bits = max(abs(base.numerator), base.denominator).bit_length()
        if exponent.denominator == 1 and bits * abs(exponent) <= _MAX_BITS:
            return base**exponent.numerator
        if exponent == Fraction(1, 2) and base >= 0:
            roots = math.isqrt(base.numerator), math.isqrt(base.denominator)
            if roots[0] ** 2 == base.numerator and roots[1] ** 2 == base.denominator:
                return Fraction(*roots)
    return _bounded(float(base) ** float(exponent))


def _bounded(value: Number | complex) -> Number:
    if isinstance(value, Fraction):
        if max(abs(value.numerator), value.denominator).bit_length() <= _MAX_BITS:
            return value
    elif isinstance(value, float) and math.isfinite(value):
        return value
    raise _Unknown
