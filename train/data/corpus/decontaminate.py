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
            self._count_words()
            sequences = (np.searchsorted(self._vocabulary, samples[i].words).tolist() for i in self._long)
            self._patterns = [Pattern(sequence) for sequence in sequences]

    def _count_words(self) -> None:
        """For each sample its distinct words, by their place among all, and how often it has them."""
        distinct = [np.unique(self._samples[i].words, return_counts=True) for i in self._long]
        self._vocabulary = np.unique(np.concatenate([np.empty(0, np.uint64), *(found for found, _ in distinct)]))
        self._places = np.concatenate([np.searchsorted(self._vocabulary, found) for found, _ in distinct] or [[]])
        self._times = np.concatenate([times for _, times in distinct] or [[]])
        self._starts = np.cumsum([0, *(len(found) for found, _ in distinct)])
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
        places = np.searchsorted(self._vocabulary, numbers).clip(max=len(self._vocabulary) - 1)
        places[self._vocabulary[places] != numbers] = len(self._vocabulary)  # no sample's
        for number in self._candidates(places):
            if length := self._longest(number, places):
                sample = self._samples[self._long[number]]
                return f"common subsequence: {length} of {len(sample.words)} words of {sample.where}"
        return ""

    def _least(self, shorter: np.ndarray) -> np.ndarray:
        # 0.6 * 25 is a little over 15 in binary.
        return np.maximum(self._settings.lcs or 0, np.ceil(self._settings.lcs_fraction * shorter - 1e-9))

    def _candidates(self, places: np.ndarray) -> list[int]:
        """Samples of which a document has enough words, as often: no common subsequence is longer than these."""
        have = np.bincount(places, minlength=len(self._vocabulary) + 1)
        common = np.add.reduceat(np.minimum(have[self._places], self._times), self._starts[:-1])
        return np.flatnonzero(common >= self._least(np.minimum(self._lengths, len(places)))).tolist()

    def _longest(self, number: int, places: np.ndarray) -> int:
        """The length of a common subsequence of a sample and a stretch of a document that is too long; 0 for none."""
        length, ratio = int(self._lengths[number]), self._settings.lcs_ratio
        whole = ratio is None or len(places) <= ratio * length
        step = len(places) if whole else math.ceil(ratio * length / 2)  # a stretch is two steps
        own = slice(self._starts[number], self._starts[number + 1])
        local = np.full(len(self._vocabulary) + 1, -1)
        local[self._places[own]] = np.arange(own.stop - own.start)
        local = local[places]
        at = np.flatnonzero(local >= 0)
        shape = (-(-len(places) // step), own.stop - own.start)
        have = np.bincount(at // step * shape[1] + local[at], minlength=shape[0] * shape[1]).reshape(shape)
        have = have if whole else have[:-1] + have[1:]
        starts = np.arange(len(have)) * step
        stops = np.minimum(starts + 2 * step, len(places))
        least = self._least(np.minimum(length, stops - starts))
        for stretch in np.flatnonzero(np.minimum(have, self._times[own]).sum(axis=1) >= least):
            inside = at[np.searchsorted(at, starts[stretch]) : np.searchsorted(at, stops[stretch])]
            if (found := self._patterns[number].lcs(places[inside].tolist())) >= least[stretch]:
                return found
        return 0
