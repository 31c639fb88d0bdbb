"""Published rules that tell good text by counting. Each has a name, under which it is counted."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from qwen_jax.errors import FileError
from train.data.corpus.config import C4, FineWeb, GopherQuality, GopherRepetition, Rules
from train.data.corpus.documents import Document
from train.data.corpus.words import hashes, ngrams

STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))
POLICY = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
_BULLETS = ("•", "-", "*", "‣", "⁃", "◦", "●")
_ELLIPSES = ("...", "…")
_BLANK_LINES = re.compile(r"\n{3,}")
_CITATION = re.compile(r"\[\d*\]|\[edit\]|\[citation needed\]")
_C4_ENDS = (".", "!", "?", '"', "'", "”", "’")
_SENTENCE_END = re.compile(r"""[.!?。！？]+["'”’)\]]*(?=\s|$)""")
_FINEWEB_ENDS = (*_C4_ENDS, ")", "]", "»", "。", "！", "？", "」", "』", ":", ";", "।", "۔", "؟", "።", "៖", "…")


def keep(documents: Iterable[Document], counts: Counter[str], *, settings: Rules) -> Iterator[tuple[Document, str]]:
    """Keeps documents that break no rule; those of C4 also take lines out, which `counts` has by rule."""
    bad_words = _bad_words(settings.c4.bad_words) if settings.c4 else None
    for document in documents:
        if settings.languages and document.notes.get("language") not in settings.languages:
            counts["documents of other languages"] += 1
            yield document, ""
            continue
        yield document, next(_broken(document, counts, settings, bad_words), "")


def _broken(document: Document, counts: Counter[str], settings: Rules, bad_words: re.Pattern | None) -> Iterator[str]:
    """The rules that a document breaks, in order. C4's come first: they take out lines that the others would count."""
    if settings.c4:
        yield from c4(document, counts, settings.c4, bad_words)
    if settings.gopher_quality:
        yield from gopher_quality(document.text, settings.gopher_quality)
    if settings.gopher_repetition:
        yield from gopher_repetition(document.text, settings.gopher_repetition)
    if settings.fineweb:
        yield from fineweb(document.text, settings.fineweb)


def _over(value: float, limit: float | None) -> bool:
    return limit is not None and value > limit


def _under(value: float, limit: float | None) -> bool:
    return limit is not None and value < limit


# ----------------------------------------------------------------------------------------------------- Gopher


def gopher_quality(text: str, limits: GopherQuality) -> Iterator[str]:
    """The rules of `GopherQuality` that a text breaks, with what was measured."""
    words = text.split()
    lines = text.splitlines() or [""]
    if _under(len(words), limits.min_words):
        yield f"gopher min_words: {len(words)}"
    if _over(len(words), limits.max_words):
        yield f"gopher max_words: {len(words)}"
    count = max(1, len(words))
    length = sum(map(len, words)) / count
    if _under(length, limits.min_word_length):
        yield f"gopher min_word_length: {length:.2f}"
    if _over(length, limits.max_word_length):
        yield f"gopher max_word_length: {length:.2f}"
    if _over(share := text.count("#") / count, limits.max_hashes):
        yield f"gopher max_hashes: {share:.2f}"
    if _over(share := sum(map(text.count, _ELLIPSES)) / count, limits.max_ellipses):
        yield f"gopher max_ellipses: {share:.2f}"
    if _over(share := sum(line.lstrip().startswith(_BULLETS) for line in lines) / len(lines), limits.max_bullet_lines):
        yield f"gopher max_bullet_lines: {share:.2f}"
    if _over(share := sum(line.rstrip().endswith(_ELLIPSES) for line in lines) / len(lines), limits.max_ellipsis_lines):
        yield f"gopher max_ellipsis_lines: {share:.2f}"
    if _under(share := sum(any(map(str.isalpha, word)) for word in words) / count, limits.min_alphabetic):
        yield f"gopher min_alphabetic: {share:.2f}"
    found = len(STOP_WORDS.intersection(word.strip(".,;:!?\"'()").lower() for word in words))
    if _under(found, limits.min_stop_words):
        yield f"gopher min_stop_words: {found}"


def gopher_repetition(text: str, limits: GopherRepetition) -> Iterator[str]:
    """The rules of `GopherRepetition` that a text breaks, with what was measured."""
    for name, pieces in (("line", text.split("\n")), ("paragraph", re.split(r"\n{2,}", text))):
        pieces = [piece.strip() for piece in pieces if piece.strip()]
        number, characters = _repeated_pieces(pieces)
        if _over(share := number / max(1, len(pieces)), getattr(limits, f"{name}s")):
            yield f"gopher repeated {name}s: {share:.2f}"
        if _over(share := characters / max(1, len(text)), getattr(limits, f"{name}_characters")):
            yield f"gopher repeated {name}_characters: {share:.2f}"
    words = text.split()
    numbers, ends = hashes(words), np.cumsum([0, *map(len, words)])
    for n, limit in limits.top:
        if (share := _top_share(numbers, ends, n)) > limit:
            yield f"gopher top {n}-gram: {share:.2f}"
    for n, limit in sorted(limits.repeated):
        if (share := _repeated_share(numbers, ends, n)) > limit:
            yield f"gopher repeated {n}-grams: {share:.2f}"
        if not share:
            return  # without a repeated n-gram there is no longer one


def _repeated_pieces(pieces: Sequence[str]) -> tuple[int, int]:
    """How many pieces were there before, and their characters."""
    counts = Counter(pieces)
    return sum(counts.values()) - len(counts), sum((count - 1) * len(piece) for piece, count in counts.items())


def _top_share(numbers: np.ndarray, ends: np.ndarray, n: int) -> float:
    """Characters of the n-gram that takes up most, over those of all words [m]; `ends` [m + 1] counts them."""
    if len(numbers) < n:
        return 0.0
    found, first, counts = np.unique(ngrams(numbers, n), return_index=True, return_counts=True)
    characters = (ends[first + n] - ends[first]) * np.where(counts > 1, counts, 0)
    return float(characters.max() / ends[-1])


def _repeated_share(numbers: np.ndarray, ends: np.ndarray, n: int) -> float:
    """Characters of words in n-grams that were there before, each counted once, over those of all words."""
    if len(numbers) < n:
        return 0.0
    found = ngrams(numbers, n)
    again = np.ones(len(found), bool)
    again[np.unique(found, return_index=True)[1]] = False
    steps = np.zeros(len(numbers) + 1, np.int64)
    starts = np.flatnonzero(again)
    np.add.at(steps, starts, 1)
    np.add.at(steps, starts + n, -1)
    covered = np.cumsum(steps[:-1]) > 0
    return float(np.diff(ends)[covered].sum() / ends[-1])


# --------------------------------------------------------------------------------------------------------- C4


def c4(document: Document, counts: Counter[str], limits: C4, bad_words: re.Pattern | None) -> Iterator[str]:
    """Takes out of the document the lines that `C4` is against; the rules that break it as a whole."""
    lower = document.text.lower()
    if limits.lorem_ipsum and "lorem ipsum" in lower:
        yield "c4 lorem_ipsum"
    if limits.curly_bracket and "{" in document.text:
        yield "c4 curly_bracket"
    if bad_words and (found := bad_words.search(lower)):
        yield f"c4 bad_words: {found[0].strip()}"
    kept = []
    for line in document.text.splitlines():
        line = _CITATION.sub("", line).strip() if limits.citations else line.strip()
        if broken := _c4_line(line, limits):
            counts[f"lines: c4 {broken}"] += 1
        else:
            kept.append(line)
    document.text = _BLANK_LINES.sub("\n\n", "\n".join(kept)).strip()
    sentences = len(_SENTENCE_END.findall(document.text))
    if _under(sentences, limits.min_sentences):
        yield f"c4 min_sentences: {sentences}"
    if not document.text:
        yield "c4 no line left"


def _c4_line(line: str, limits: C4) -> str:
    """The rule that a line breaks; a blank one, which parts paragraphs, breaks none."""
    words, lower = line.split(), line.lower()
    if not words:
        return ""
    if _over(max(map(len, words)), limits.max_word_characters):
        return "max_word_characters"
    if limits.terminal_punctuation and (not line.endswith(_C4_ENDS) or line.endswith("...")):
        return "terminal_punctuation"
    if _under(len(words), limits.min_line_words):
        return "min_line_words"
    if limits.javascript and "javascript" in lower:
        return "javascript"
    return "policy" if limits.policy and any(phrase in lower for phrase in POLICY) else ""


def _bad_words(path: str) -> re.Pattern | None:
    if not path:
        return None
    try:
        phrases = [line.strip().lower() for line in Path(path).expanduser().read_text("utf-8").splitlines()]
    except OSError as error:
        raise FileError(f"cannot read rules.c4.bad_words = {path!r}: {error.strerror}") from error
    return re.compile(rf"(?<!\w)(?:{'|'.join(re.escape(phrase) for phrase in phrases if phrase)})(?!\w)")


# ---------------------------------------------------------------------------------------------------- FineWeb


def fineweb(text: str, limits: FineWeb) -> Iterator[str]:
    """The rules of `FineWeb` that a text breaks, with what was measured."""
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if not lines:
        yield "fineweb no text"
        return
    if _under(share := sum(line.endswith(_FINEWEB_ENDS) for line in lines) / len(lines), limits.min_punctuated_lines):
        yield f"fineweb min_punctuated_lines: {share:.2f}"
    if _over(share := sum(len(line) <= limits.short_line for line in lines) / len(lines), limits.max_short_lines):
        yield f"fineweb max_short_lines: {share:.2f}"
    repeated = _repeated_pieces(lines)[1] / sum(map(len, lines))
    if _over(repeated, limits.max_repeated_characters):
        yield f"fineweb max_repeated_characters: {repeated:.2f}"
    if _over(share := text.strip().count("\n") / max(1, len(text.split())), limits.max_lines_per_word):
        yield f"fineweb max_lines_per_word: {share:.2f}"
