"""Words as duplicates and contaminations are told by: without case, punctuation and spacing, as 64-bit numbers."""

from __future__ import annotations

import hashlib
import re
import unicodedata

import numpy as np

# Scripts without spaces between words: every character counts as one. Thai, Lao, Burmese, Khmer, kana, Han.
_ALONE = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3041-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_WORD = re.compile(rf"[{_ALONE}]|[^\W_{_ALONE}]+")
# Words are few and come again; beyond this many the rare ones are forgotten.
_MAX_KNOWN = 1_000_000
_known: dict[str, int] = {}

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def words(text: str) -> list[str]:
    """The words of a text in order, case-folded, after NFKC."""
    return _WORD.findall((text if text.isascii() else unicodedata.normalize("NFKC", text)).casefold())


def hashes(found: list[str]) -> np.ndarray:
    """uint64 [n]: a number for each word, the same in every process and on every machine."""
    try:
        return np.array([_known[word] for word in found], np.uint64)
    except KeyError:
        if len(_known) > _MAX_KNOWN:
            _known.clear()
        for word in (word for word in set(found) if word not in _known):
            digest = hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest()
            _known[word] = int.from_bytes(digest, "little")
        return np.array([_known[word] for word in found], np.uint64)


def ngrams(numbers: np.ndarray, n: int) -> np.ndarray:
    """uint64 [max(1, m - n + 1)]: a number for every n words of m in a row; one for all of them if they are fewer."""
    length = len(numbers)
    if length < n:
        numbers, n, length = np.append(numbers, np.uint64(length)), length + 1, length + 1
    total = np.zeros(length - n + 1, np.uint64)
    for offset in range(n):  # a polynomial: the order of the words counts
        total = total * _GOLDEN + numbers[offset : offset + len(total)]
    return mix(total)


def mix(numbers: np.ndarray) -> np.ndarray:
    """The numbers with every bit depending on every bit: the end of splitmix64 (Steele et al. 2014)."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * _MIX_1
    numbers = (numbers ^ (numbers >> np.uint64(27))) * _MIX_2
    return numbers ^ (numbers >> np.uint64(31))
