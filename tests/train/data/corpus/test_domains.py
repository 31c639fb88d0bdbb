"""Domains by patterns, and copies by weights."""

from __future__ import annotations

from collections import Counter

import pytest

from train.data.corpus import domains
from train.data.corpus.config import Patterns
from train.data.corpus.documents import Document

DOCUMENTS = [
    Document("a", "x/a.txt", {"url": "https://en.wikipedia.org/wiki/A"}),
    Document("b", "x/b.txt", {"url": "https://shop.com/wikipedia"}),
    Document("c", "y/c.txt"),
]


@pytest.mark.parametrize(
    ("by", "expected"),
    [
        (Patterns(field="url", patterns=((r"wikipedia\.org", "wiki"), (r"shop", "trade"))), ["wiki", "trade", "other"]),
        (Patterns(field="url", patterns=(("wikipedia", "wiki"), ("shop", "trade"))), ["wiki", "wiki", "other"]),
        (Patterns(field="id", patterns=(("^x/", "x"),), other="rest"), ["x", "x", "rest"]),
        (Patterns(field="none"), ["other"] * 3),
        (Patterns(field="id"), ["x/a.txt", "x/b.txt", "y/c.txt"]),
    ],
)
def test_the_first_pattern_that_is_found_decides(by, expected):
    counts = Counter()
    found = [document.notes["domain"] for document, _ in domains.keep(DOCUMENTS, counts, settings=by)]
    assert found == expected and counts == Counter(expected)


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0, 2.6])
def test_copies_are_as_many_as_the_weight_says_on_average(weight):
    documents = [Document("text", f"{i}", {"domain": "a"}) for i in range(2000)]
    counts = [domains.copies(document, {"a": weight}, 0) for document in documents]
    assert set(counts) <= {int(weight), int(weight) + 1}
    assert abs(sum(counts) / 2000 - weight) < 5 * (weight % 1 * (1 - weight % 1) / 2000) ** 0.5 + 1e-9
    assert counts == [domains.copies(document, {"a": weight}, 0) for document in documents]
    if weight % 1:
        assert counts != [domains.copies(document, {"a": weight}, 1) for document in documents]


def test_domains_without_a_weight_have_one_copy():
    assert domains.copies(Document("t", "i", {"domain": "b"}), {"a": 0.0}, 0) == 1
    assert domains.copies(Document("t", "i"), {"a": 0.0}, 0) == 1
