"""Common subsequences against the textbook's recurrence, and documents against samples."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax.errors import ConfigError, DataError, FileError
from tests.train.data.corpus.conftest import prose, write_lines
from train.data.corpus import decontaminate
from train.data.corpus.config import Decontaminate, EvaluationSet
from train.data.corpus.documents import Document
from train.data.corpus.lcs import Pattern
from train.data.corpus.words import hashes, words

sequences = st.lists(st.integers(0, 5), max_size=40)


def lcs(a, b):
    """The textbook's recurrence."""
    row = [0] * (len(b) + 1)
    for x in a:
        before, row = row, [0]
        for j, y in enumerate(b):
            row.append(before[j] + 1 if x == y else max(before[j + 1], row[j]))
    return row[-1]


@given(sequences, sequences)
@settings(deadline=None)
def test_is_the_textbooks_length(a, b):
    assert Pattern(a).lcs(b) == lcs(a, b)


def test_long_sequences_carry_over_machine_words():
    draw = random.Random(0)
    a, b = ([draw.randrange(30) for _ in range(300)] for _ in range(2))
    assert Pattern(a).lcs(b) == lcs(a, b)


@pytest.fixture
def keep(tmp_path):
    """A function: reasons for texts, against a sample of 30 words and one of 20."""
    write_lines(tmp_path / "test.jsonl", {"question": prose(1, 30), "n": 3, "answer": "4"}, {"question": prose(2, 20)})

    def keep(*texts, **how):
        found = Decontaminate(sets=(EvaluationSet(path=str(tmp_path / "test.jsonl")),), **how)
        documents = [Document(text, "") for text in texts]
        return [reason for _, reason in decontaminate.keep(documents, Counter(), settings=found)]

    return keep


def with_holes(text, every):
    return " ".join(word for i, word in enumerate(text.split()) if i % every)


def test_thirteen_words_in_a_row_are_enough_and_twelve_are_not(keep):
    sample = prose(1, 30).split()
    around = [f"{prose(8, 40)} {' '.join(sample[5 : 5 + n])} {prose(9, 40)}" for n in (12, 13)]
    assert keep(*around, lcs=None) == ["", "13-gram: of test.jsonl:1"]
    assert keep(around[1].upper().replace(" ", "; "), lcs=None) == ["13-gram: of test.jsonl:1"]
    assert keep(around[0], ngram=12, lcs=None) == ["12-gram: of test.jsonl:1"]


def test_a_subsequence_counts_by_the_shorter_of_the_two(keep):
    holes = with_holes(prose(1, 30), 3)  # 20 of 30 words
    assert keep(holes, ngram=None) == ["common subsequence: 20 of 30 words of test.jsonl:1"]
    assert keep(holes, ngram=None, lcs=21) == [""]
    assert keep(f"{holes} {'new ' * 10}", ngram=None, lcs_fraction=0.7) == [""]
    assert keep(prose(2, 20), ngram=None, lcs_fraction=1.0) != [""]


def test_a_long_document_is_compared_in_stretches(keep):
    rare = " ".join(f"w{i}" for i in range(400))
    holes = with_holes(prose(1, 30), 3)
    assert keep(f"{rare} {holes} {rare}", ngram=None) == ["common subsequence: 20 of 30 words of test.jsonl:1"]
    scattered = " ".join(f"{word} {' '.join(rare.split()[:6])}" for word in prose(1, 30).split())
    assert keep(scattered, ngram=None) == [""]
    assert keep(scattered, ngram=None, lcs_ratio=None) != [""]


@pytest.mark.parametrize("ratio", [None, 1.0, 1.5, 3.0])
def test_the_short_cuts_find_what_the_definition_finds(tmp_path, ratio):
    draw = random.Random(5)
    alphabet = [f"w{i}" for i in range(12)]
    samples = [" ".join(draw.choices(alphabet, k=draw.randrange(13, 30))) for _ in range(6)]
    (tmp_path / "t.txt").write_text("\n".join(samples))
    settings = Decontaminate(
        sets=(EvaluationSet(path=str(tmp_path / "t.txt")),), ngram=None, lcs_fraction=0.8, lcs_ratio=ratio
    )
    known = decontaminate.read_samples(settings)
    results = set()
    for _ in range(60):
        before, after = (draw.choices(alphabet, k=draw.randrange(0, 40)) for _ in range(2))
        copied = [word for word in draw.choice(samples).split() if draw.random() < 0.8]
        numbers = hashes([*before, *copied, *after])
        sequence = numbers.tolist()
        found = any(too_long(sequence, hashes(words(sample)).tolist(), ratio) for sample in samples)
        assert bool(known.subsequence_of(numbers)) == found
        results.add(found)
    assert results == {True, False}


def too_long(sequence, sample, ratio):
    stretches = [sequence]
    if ratio is not None and len(sequence) > ratio * len(sample):
        step = int(np.ceil(ratio * len(sample) / 2))
        stretches = [sequence[start : start + 2 * step] for start in range(0, max(1, len(sequence) - step), step)]
    return any(lcs(s, sample) >= max(13, 0.8 * min(len(s), len(sample)) - 1e-9) for s in stretches)


def test_sets_that_cannot_be_looked_for_are_refused(tmp_path, keep):
    of = lambda **how: Decontaminate(sets=(EvaluationSet(**how),))
    with pytest.raises(FileError, match="nothing"):
        decontaminate.read_samples(of(path=str(tmp_path / "nothing*")))
    with pytest.raises(DataError, match='no field "title"'):
        decontaminate.read_samples(of(path=str(tmp_path / "test.jsonl"), fields=("title",)))
    write_lines(tmp_path / "short.jsonl", {"question": "2 + 2?"})
    with pytest.raises(DataError, match="no text long enough"):
        decontaminate.read_samples(of(path=str(tmp_path / "short.jsonl")))
    with pytest.raises(ConfigError, match="nothing to look for"):
        Decontaminate()
