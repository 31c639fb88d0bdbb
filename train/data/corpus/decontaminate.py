"""Documents that hold a sample of an evaluation set: by n-grams, and by longest common subsequences."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from qwen_jax.errors import DataError
from train.data import sources
from train.data.config import Text
from train.data.corpus.config import Decontaminate, EvaluationSet
from train.data.corpus.documents import Document
from train.data.corpus.lcs import Pattern
from train.data.corpus.words import hashes, ngrams, words
from train.data.sources import LINES, SourceFile


def evaluation_files(settings: Decontaminate) -> list[list[SourceFile]]:
    """The files of each set."""
    return [sources.find_files(Text(path=each.path), lambda line: None) for each in settings.sets]


def keep(
    documents: Iterable[Document], counts: Counter[str], *, settings: Decontaminate
) -> Iterator[tuple[Document, str]]:
    """Keeps documents that share no sample of the sets."""
    samples = read_samples(settings)
    for document in documents:
        numbers = hashes(words(document.text))
        yield document, samples.ngram_of(numbers) or samples.subsequence_of(numbers)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """Words of one text of an evaluation set, and where that is."""

    where: str
    words: np.ndarray


def read_samples(settings: Decontaminate) -> Samples:
    """What is looked for. A DataError where a set has nothing to look for."""
    found: dict[bytes, Sample] = {}
    for each, files in zip(settings.sets, evaluation_files(settings), strict=True):
        before = len(found)
        for where, text in _texts(files, each):
            numbers = hashes(words(text))
            if len(numbers) >= min(settings.ngram or len(numbers), settings.lcs or len(numbers)):
                found.setdefault(numbers.tobytes(), Sample(where=where, words=numbers))
        if len(found) == before:
            raise DataError(f"{each.path} has no text long enough to look for; name other fields, or leave it out")
    return Samples(settings, list(found.values()))


def _texts(files: Sequence[SourceFile], each: EvaluationSet) -> Iterator[tuple[str, str]]:
    for file in files:
        lines = file.name.lower().endswith(LINES)
        for number, (_, raw) in enumerate(sources.records(file, lines=True), 1):
            where = f"{file.name}:{number}"
            try:
                if not lines:
                    yield where, raw.decode("utf-8", "replace")
                elif raw.strip():
                    record = sources.json_object(raw)
                    fields = each.fields or [name for name, value in record.items() if isinstance(value, str)]
                    yield from ((where, sources.text_of(record, field)) for field in fields)
            except ValueError as error:
                raise DataError(f"{file.path}:{number}: {error}; a set must be whole, so mend it") from None


class Samples:
    """Samples, as tables to look documents up in."""

    def __init__(self, settings: Decontaminate, samples: Sequence[Sample]) -> None:
        self._settings, self._samples = settings, samples
        if settings.ngram is not None:
            long = [(i, each) for i, each in enumerate(samples) if len(each.words) >= settings.ngram]
            parts = [ngrams(each.words, settings.ngram) for _, each in long] or [np.empty(0, np.uint64)]
            owners = np.repeat([i for i, _ in long], [len(part) for part in parts][: len(long)]).astype(np.int64)
            self._ngrams, first = np.unique(np.concatenate(parts), return_index=True)
            self._owners = owners[first]
        if settings.lcs is not None:
            self._long = [i for i, each in enumerate(samples) if len(each.words) >= settings.lcs]
            self._patterns = [Pattern(samples[i].words.tolist()) for i in self._long]
            self._count_words()

    def _count_words(self) -> None:
        """For each sample its distinct words, by their place among all, and how often it has them."""
        distinct = [np.unique(self._samples[i].words, return_counts=True) for i in self._long]
        self._vocabulary = np.unique(np.concatenate([np.empty(0, np.uint64), *(found for found, _ in distinct)]))
        self._places = np.concatenate([np.searchsorted(self._vocabulary, found) for found, _ in distinct] or [[]])
        self._times = np.concatenate([times for _, times in distinct] or [[]])
        self._starts = np.cumsum([0, *(len(found) for found, _ in distinct)])[:-1]
        self._lengths = np.array([len(self._samples[i].words) for i in self._long])

    def ngram_of(self, numbers: np.ndarray) -> str:
        """The sample that shares an n-gram with the words of a document, as a reason; "" for none."""
        n = self._settings.ngram
        if n is None or len(numbers) < n or not len(self._ngrams):
            return ""
        found = ngrams(numbers, n)
        places = np.searchsorted(self._ngrams, found).clip(max=len(self._ngrams) - 1)
        hits = np.flatnonzero(self._ngrams[places] == found)
        return f"{n}-gram: of {self._samples[self._owners[places[hits[0]]]].where}" if len(hits) else ""

    def subsequence_of(self, numbers: np.ndarray) -> str:
        """Likewise, the sample with which there is too long a common subsequence."""
        if self._settings.lcs is None or not self._long:
            return ""
        sequence = numbers.tolist()
        for place in self._candidates(numbers):
            pattern = self._patterns[place]
            for stretch in self._stretches(sequence, pattern.length):
                length = pattern.lcs(stretch)
                if length >= self._least(min(pattern.length, len(stretch))):
                    where = self._samples[self._long[place]].where
                    return f"common subsequence: {length} of {pattern.length} words of {where}"
        return ""

    def _least(self, shorter: int) -> int:
        # 0.6 * 25 is a little over 15 in binary.
        return max(self._settings.lcs or 0, math.ceil(self._settings.lcs_fraction * shorter - 1e-9))

    def _candidates(self, numbers: np.ndarray) -> list[int]:
        """Samples of which a document has enough words, as often: no common subsequence is longer than these."""
        places = np.searchsorted(self._vocabulary, numbers).clip(max=len(self._vocabulary) - 1)
        known = places[self._vocabulary[places] == numbers]
        have = np.bincount(known, minlength=len(self._vocabulary))
        common = np.add.reduceat(np.minimum(have[self._places], self._times), self._starts)
        shorter = np.minimum(self._lengths, len(numbers))
        least = np.maximum(self._settings.lcs or 0, np.ceil(self._settings.lcs_fraction * shorter - 1e-9))
        return np.flatnonzero(common >= least).tolist()

    def _stretches(self, sequence: list[int], length: int) -> Iterator[list[int]]:
        """What of a document is compared with a sample of so many words."""
        ratio = self._settings.lcs_ratio
        if ratio is None or len(sequence) <= ratio * length:
            yield sequence
            return
        size = math.ceil(ratio * length)
        for start in range(0, len(sequence) - size // 2, max(1, size // 2)):
            yield sequence[start : start + size]
