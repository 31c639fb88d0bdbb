r"""The final answer of a solution, and whether it is the one of the reference.

`#### 72`, `\boxed{72}`, "the answer is 72", or else the last number. Two answers are the same if they say so in the
same characters, or are numbers, expressions or lists of the same value: 1,000 and 10^3, 0.5 and \frac12, 50% and 1/2.
Nothing is evaluated as a program, and nothing takes long, whatever the text is.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from qwen_jax.text.expressions import MAX_CHARACTERS, Number, values

_TAIL = 4000  # characters at the end of a solution in which its answer is looked for
_BOXES = 4  # tried, from the last, until one is closed and not empty
_PRECISION = 1e-9  # of what is not rational: the rounding of a few dozen operations, and far below any digit written

_BOX = re.compile(r"\\f?boxed\s*(?=\{)|\\f?boxed\s+(\S+)")
_HASHES = re.compile(r"(?<!#)####(?!#)[ \t]*+([^\n]*\S)")
_STATED = re.compile(r"(?:\banswer\s*(?:is|=|:)|答案\s*(?:是|为|：|:))[ \t:：]*([^\n]*\S)", re.IGNORECASE)
_SENTENCE = re.compile(r"[.。!！](?=\s|$)")
_NUMBER = re.compile(r"(?:(?<![\w)}.])-)?\$?(?:\d[\d,]*\d|\d)(?:\.\d+)?(?:/\d+)?(?:\s?\\?%)?")

_NOTHING = re.compile(r"(?<!\\)\\(?:left|right|displaystyle|[!,;: ()\[\]$])|\$|~|\^\{?\\circ\}?|°")
_SPELLINGS = [
    (re.compile(r"\\[dt]frac"), r"\\frac"),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\%|％"), "%"),
    (re.compile("−"), "-"),
    (re.compile(r"\\(?:leq|le)(?![a-z])"), "≤"),
    (re.compile(r"\\(?:geq|ge)(?![a-z])"), "≥"),
]
_TEXT = r"\\(?:text|mathrm|textbf|mathbf|mbox)\s*\{([^{}]*)\}"
_TEXTS = re.compile(_TEXT)
_TEXT_UNIT = re.compile(rf"(.*\S)\s*{_TEXT}(?:\^\{{?[23]\}}?)?", re.DOTALL)
_WORD_UNIT = re.compile(
    r"([-+]?[\d.][\d.,/ ]*)\s*((?!pi\b|sqrt\b)[a-zA-Z一-鿿]{2,}[^\d=+*]*(?:\^\{?[23]\}?|(?<=[a-z])[23])?|[一-鿿])"
)
_NAMED = re.compile(r"[a-zA-Z]\s*=(.*)", re.DOTALL)
_THOUSANDS = re.compile(r"[-+]?\d{1,3}(?:,\d{3})+(?:\.\d+)?%?")
_MIXED = re.compile(r"([-+]?)(\d+)\s+(\d+)\s*/\s*(\d+)")
_CHOICE = re.compile(r"\(([A-Za-z])\)")


def final_answer(solution: str) -> str | None:
    """What a solution gives as its answer, as it is written; None if there is none."""
    if (marked := marked_answer(solution)) is not None:
        return marked
    tail = solution[-_TAIL:]
    for stated in reversed(_STATED.findall(tail)):
        answer = _SENTENCE.split(stated)[0].strip()
        if values(_clean(answer)[0]) is not None or not (numbers := _NUMBER.findall(answer)):
            return answer or None
        return numbers[-1]
    numbers = _NUMBER.findall(tail)
    return numbers[-1] if numbers else None


def marked_answer(text: str) -> str | None:
    r"""What stands in the last \boxed{}, or else follows the last `####`; None without either."""
    for match in list(_BOX.finditer(text))[: -1 - _BOXES : -1]:
        content = match[1] or _in_braces(text, match.end())
        if content and content.strip():
            return content.strip()
    hashes = _HASHES.findall(text)
    return hashes[-1] if hashes else None


def reference_answer(reference: str | float) -> str:
    """The answer of a reference, which is a whole solution that marks it, or the answer itself."""
    return marked_answer(reference) or reference.strip() if isinstance(reference, str) else repr(reference)


def same_answer(answer: str, reference: str) -> bool:
    """Whether two answers are the same. Units count where both have one; a percentage is also its number."""
    (a, a_unit), (b, b_unit) = _clean(answer), _clean(reference)
    if a_unit and b_unit and a_unit != b_unit:
        return False
    return bool(a) and bool(b) and _same(a, b)


def _same(a: str, b: str) -> bool:
    if _plain(a) == _plain(b):
        return True
    if max(len(a), len(b)) > MAX_CHARACTERS:
        return False
    if (a[-1] == "%") != (b[-1] == "%"):
        percentage, other = (a, b) if a[-1] == "%" else (b, a)
        percentage = percentage[:-1].strip()
        return bool(percentage) and (_same(percentage, other) or _same_value(f"({percentage})/100", other))
    a, b = a.removesuffix("%"), b.removesuffix("%")
    if _same_value(_number(a), _number(b)):
        return True
    (opened, parts), (other_opened, others) = _parts(a), _parts(b)
    if opened != other_opened or len(parts) != len(others) or (len(parts) == 1 and not opened):
        return False
    if opened in ("", "\\{"):  # a set, or what lists its elements
        return _same_set(parts, others)
    return all(x and y and _same(x, y) for x, y in zip(parts, others, strict=True))


def _same_set(parts: Sequence[str], others: Sequence[str]) -> bool:
    left = list(others)
    for part in parts:
        match = next((i for i, other in enumerate(left) if part and other and _same(part, other)), None)
        if match is None:
            return False
        del left[match]
    return True


def _same_value(a: str, b: str) -> bool:
    first, second = values(a), values(b)
    return first is not None and second is not None and all(map(_close, first, second))


def _close(a: Number, b: Number) -> bool:
    if isinstance(a, float) or isinstance(b, float):
        return math.isclose(a, b, rel_tol=_PRECISION, abs_tol=_PRECISION)
    return a == b


def _clean(text: str) -> tuple[str, str]:
    """An answer without what does not change it, and the unit it is in."""
    text, unit = text.strip()[: 4 * MAX_CHARACTERS], ""
    for pattern, spelling in _SPELLINGS:
        text = pattern.sub(spelling, text)
    text = _NOTHING.sub(" ", text).strip().rstrip(".").strip()
    if (match := _TEXT_UNIT.fullmatch(text)) and match[2].strip():
        text, unit = match[1], match[2]
    text = _TEXTS.sub(r"\1", text).strip()
    if match := _NAMED.fullmatch(text):
        text = match[1].strip()
    if match := _WORD_UNIT.fullmatch(text):
        text, unit = match[1].strip(), unit or match[2]
    if match := _CHOICE.fullmatch(text):
        text = match[1]
    return text, re.sub(r"[^\w^]|s(?!\w)", "", unit.casefold())


def _plain(text: str) -> str:
    text = re.sub(r"(?<!\d)\s|\s(?!\d)|(?<=_)\{(?=\w\})|(?<=_\{\w)\}", "", text)
    return text.casefold() if len(text) > 1 and text.isalpha() else text


def _number(text: str) -> str:
    """A number in the form that expressions have."""
    if match := _MIXED.fullmatch(text):
        return f"{match[1]}({match[2]}+{match[3]}/{match[4]})"
    return text.replace(",", "") if _THOUSANDS.fullmatch(text) else text


def _parts(text: str) -> tuple[str, list[str]]:
    """The brackets around a list, "" for none, and what stands between its commas."""
    opened = ""
    for left, right in (("\\{", "\\}"), ("(", ")"), ("[", "]"), ("(", "]"), ("[", ")")):
        if text.startswith(left) and text.endswith(right) and len(text) > len(left):
            opened, text = left + right if left != "\\{" else left, text[len(left) : -len(right)]
            break
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth <= 0:
            parts.append("")
        else:
            parts[-1] += character
    return opened, [part.strip() for part in parts]


def _in_braces(text: str, start: int) -> str | None:
    """What stands between the brace at `start` and the one that closes it."""
    depth = 0
    for place in range(start, min(len(text), start + _TAIL)):
        depth += (text[place] == "{") - (text[place] == "}")
        if depth == 0:
            return text[start + 1 : place]
    return None
