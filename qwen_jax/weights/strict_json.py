"""JSON objects out of files that nobody vouches for: no key twice, and no more memory than the text is worth."""

from __future__ import annotations

import collections
import json
from typing import Any, NoReturn

MAX_BYTES = 10 * 2**20
MAX_MARKS = 400_000
MAX_DIGITS = 31  # of int(1e30), which transformers writes where a length has no limit


def loads(text: bytes) -> dict[str, Any]:
    """The object that `text` holds, in UTF-8.

    Raises ValueError in a clause that can follow a colon. A text of over MAX_BYTES, or of over MAX_MARKS braces,
    brackets and commas, is refused before it is parsed. That is room for 50,000 tensors, where the largest published
    models have 40,000 in 5 MB, while text takes up to 12 times its bytes when parsed and a value like `{}` 30 times.
    """
    if len(text) > MAX_BYTES:
        raise ValueError(f"{len(text)} bytes of JSON, where {MAX_BYTES} is the limit")
    if sum(map(text.count, (b"{", b"[", b","))) > MAX_MARKS:
        raise ValueError(f"over {MAX_MARKS} braces, brackets and commas in its JSON")
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_object, parse_int=_int, parse_constant=_constant)
    except RecursionError:
        raise ValueError("JSON is nested too deeply") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"JSON is not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"JSON is malformed at character {error.pos}") from None
    if not isinstance(value, dict):
        raise ValueError("JSON is not an object")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        [(name, _)] = collections.Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the key {name[:200]!r} appears twice")
    texts = "".join([*value, *[item for item in value.values() if type(item) is str]])
    try:
        texts.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can escape half of a surrogate pair, which is no character
        raise ValueError(f"{texts[error.start : error.end]!a} is not Unicode text") from None
    return value


def _int(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits)


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
