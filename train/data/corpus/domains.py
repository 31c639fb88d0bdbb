"""What documents are about, and how many copies of each are published."""

from __future__ import annotations

import hashlib
import re
import string
from collections import Counter
from collections.abc import Iterable, Iterator

from train.data.corpus.config import Judged, Patterns
from train.data.corpus.documents import Document


def keep(
    documents: Iterable[Document], counts: Counter[str], *, settings: Patterns | Judged
) -> Iterator[tuple[Document, str]]:
    """Notes the domain of each document, and keeps all."""
    found = _patterns(documents, settings) if isinstance(settings, Patterns) else _judged(documents, settings)
    for document, domain in found:
        document.notes["domain"] = domain
        counts[domain] += 1
        yield document, ""


def _patterns(documents: Iterable[Document], by: Patterns) -> Iterator[tuple[Document, str]]:
    patterns = [(re.compile(pattern), domain) for pattern, domain in by.patterns]
    for document in documents:
        value = str(document.id if by.field == "id" else document.notes.get(by.field, ""))
        default = by.other if patterns or not value else value
        yield document, next((domain for pattern, domain in patterns if pattern.search(value)), default)


def _judged(documents: Iterable[Document], by: Judged) -> Iterator[tuple[Document, str]]:
    from train.data.corpus.judge import ask  # jax is loaded only by those who ask a model

    labels = dict(zip(string.ascii_uppercase, by.labels, strict=False))
    choices = "\n".join(f"{letter}. {label}" for letter, label in labels.items())
    for document, shares in ask(documents, by, by.question.replace("{choices}", choices), list(labels)):
        yield document, labels[max(shares, key=lambda letter: shares[letter])]


def copies(document: Document, weights: dict[str, float], seed: int) -> int:
    """How many copies of a document are published: by the weight of its domain, its fraction drawn by `seed`."""
    weight = weights.get(document.notes.get("domain", ""), 1.0)
    digest = hashlib.blake2b(f"{document.id}\n{document.text}".encode(), digest_size=6, key=str(seed).encode()).digest()
    return int(weight) + (int.from_bytes(digest, "little") / 2**48 < weight % 1)
