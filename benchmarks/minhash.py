"""Near duplicates among 5,000 documents, ours beside datatrove's and datasketch's: what is found, and how fast.

    pip install -e '.[corpus]' datasketch 'xxhash<4'
    python benchmarks/minhash.py [--documents 5000] [--rounds 3]

The documents are pieces of the Python standard library and, of half of them, copies in which words are replaced: from
none to half. Every pair of a piece and its copies is labelled by its exact Jaccard similarity of 5-grams. All sides
cut the same words, have 14 bands of 8 64-bit hashes, and run in turn on one core; the best of the rounds counts.
Throughput, in processor time, is from text to signatures, which is all of the work but a few sorts.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence

os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}

import numpy as np
from side_by_side import require

from train.data import sources
from train.data.config import PythonStdlib
from train.data.corpus import minhash
from train.data.corpus.config import MinHash
from train.data.corpus.documents import Document
from train.data.corpus.words import words

NGRAM, BANDS, ROWS = 5, 14, 8
SETTINGS = MinHash(ngram=NGRAM, bands=BANDS, rows=ROWS)
THRESHOLD = 0.8
WORDS = (100, 400)  # of a document
Pairs = set[tuple[int, int]]
Grams = set[tuple[str, ...]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    require("datatrove", "datasketch", "xxhash")
    texts, families = planted(options.documents)
    grams = [set(zip(*(text.split()[i:] for i in range(NGRAM)), strict=False)) for text in texts]
    similarity = exact(grams, families)
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    print(
        f"{len(texts)} documents, {megabytes:.1f} MB, {len(similarity)} labelled pairs; {NGRAM}-grams, {BANDS} x {ROWS}"
    )
    sides = {"ours": ours, "ours, verified": verified, "datatrove": datatrove, "datasketch": datasketch}
    found: dict[str, Pairs] = {}
    seconds: dict[str, list[float]] = defaultdict(list)
    for _ in range(options.rounds):
        for name, side in sides.items():
            took, found[name] = side(texts)
            seconds[name].append(took)
    print(
        f"\n| | recall at J >= {THRESHOLD} | at the band's curve | precision | documents/s | MB/s |\n"
        "|---|---|---|---|---|---|"
    )
    rows = {name: measure(pairs, similarity, grams) for name, pairs in found.items()}
    speed = {name: len(texts) / min(each) for name, each in seconds.items()}
    for name, (recall, expected, precision) in rows.items():
        rate = f"{speed[name]:.0f} | {speed[name] * megabytes / len(texts):.2f}"
        print(f"| {name} | {recall:.4f} | {expected:+.4f} | {precision:.4f} | {rate} |")
    print()
    peer = max(rows["datatrove"][0], rows["datasketch"][0])
    bars = [
        ("recall: ours >= the peers' less 0.01", rows["ours"][0] >= peer - 0.01),
        ("recall: within 0.02 of what the curve promises", abs(rows["ours"][1]) <= 0.02),
        ("precision, verified: 1", rows["ours, verified"][2] == 1),
        ("documents/s: ours >= datatrove's", speed["ours"] >= speed["datatrove"]),
    ]
    for name, reached in bars:
        print(f"BAR {'ok' if reached else 'SHORT'}: {name}")
    return int(not all(reached for _, reached in bars))


def planted(count: int) -> tuple[list[str], list[list[int]]]:
    """Texts in a drawn order, and the numbers of those that come from the same piece."""
    rng = random.Random(0)
    files = sources.find_files(PythonStdlib(), lambda line: None)
    tally = sources.new_tally(PythonStdlib(), 0.0)
    every: list[str] = []
    for _, text in sources.documents(files, field="", tally=tally):
        every += words(text)
        if len(every) > count * WORDS[1] // 2:
            break
    made: list[tuple[int, str]] = []
    family = start = 0
    while len(made) < count:
        length = rng.randint(*WORDS)
        piece = every[start : start + length]
        start += length
        assert len(piece) == length, "the standard library is too small for so many documents"
        made.append((family, " ".join(piece)))
        for _ in range(rng.choice((0, 1, 1, 2))):
            share = rng.choice((0.0, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5))
            made.append((family, " ".join(rng.choice(every) if rng.random() < share else word for word in piece)))
        family += 1
    made = made[:count]
    rng.shuffle(made)
    families: dict[int, list[int]] = defaultdict(list)
    for number, (which, _) in enumerate(made):
        families[which].append(number)
    return [text for _, text in made], [each for each in families.values() if len(each) > 1]


def exact(grams: Sequence[Grams], families: Sequence[Sequence[int]]) -> dict[tuple[int, int], float]:
    """Jaccard similarity of families, and of pairs that share much besides: an index of n-grams finds them."""
    pairs = {pair for family in families for pair in itertools.combinations(sorted(family), 2)}
    holders: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for number, own in enumerate(grams):
        for gram in own:
            holders[gram].append(number)
    counts: dict[tuple[int, int], int] = defaultdict(int)
    for numbers in holders.values():
        if len(numbers) <= 50:  # a phrase of so many documents makes none of them similar on its own
            for pair in itertools.combinations(numbers, 2):
                counts[pair] += 1
    pairs |= {
        pair for pair, common in counts.items() if common >= 0.3 * min(map(len, (grams[pair[0]], grams[pair[1]])))
    }
    return {(a, b): jaccard(grams[a], grams[b]) for a, b in pairs}


def jaccard(one: Grams, other: Grams) -> float:
    return len(one & other) / len(one | other)


def measure(
    found: Pairs, similarity: dict[tuple[int, int], float], grams: Sequence[Grams]
) -> tuple[float, float, float]:
    """Recall of the similar pairs, recall of all less what the bands promise, precision at half the curve."""
    similar = [pair for pair, value in similarity.items() if value >= THRESHOLD]
    promised = [1 - (1 - value**ROWS) ** BANDS for value in similarity.values()]
    caught = [pair in found for pair in similarity]
    middle = (1 / BANDS) ** (1 / ROWS) - 0.15  # below, no more than one in fourteen is caught
    right = sum(jaccard(grams[a], grams[b]) >= middle for a, b in found)
    recall = sum(pair in found for pair in similar) / len(similar)
    return recall, statistics.mean(caught) - statistics.mean(promised), right / max(1, len(found))


def ours(texts: Sequence[str], settings: MinHash = SETTINGS) -> tuple[float, Pairs]:
    documents = [Document(text, "") for text in texts]
    began = time.process_time()
    tables = minhash.signatures(documents, settings)
    took = time.process_time() - began
    known = minhash.Shingles([(tables["shingles"], tables["ends"])]) if settings.verify is not None else None
    found: Pairs = set()
    for band in tables["bands"]:
        buckets: dict[int, list[int]] = defaultdict(list)
        for number, value in enumerate(band.tolist()):
            buckets[value].append(number)
        for bucket in buckets.values():
            for pair in itertools.combinations(bucket, 2):
                if known is None or minhash.jaccard(known.of(pair[0]), known.of(pair[1])) >= (settings.verify or 0):
                    found.add(pair)
    return took, found


def verified(texts: Sequence[str]) -> tuple[float, Pairs]:
    return ours(texts, MinHash(ngram=NGRAM, bands=BANDS, rows=ROWS, verify=0.7))


def _met(rows: Sequence[Sequence[object]]) -> Pairs:
    """Pairs that are equal in a band, of the bands of each document."""
    found: Pairs = set()
    for band in range(BANDS):
        buckets: dict[object, list[int]] = defaultdict(list)
        for number, row in enumerate(rows):
            buckets[row[band]].append(number)
        found.update(pair for bucket in buckets.values() for pair in itertools.combinations(bucket, 2))
    return found


def datatrove(texts: Sequence[str]) -> tuple[float, Pairs]:
    from datatrove.pipeline.dedup import minhash as theirs
    from datatrove.utils.hashing import HashConfig

    class Spaces:
        """The words of these texts: theirs would need spaCy, and more time."""

        def word_tokenize(self, text: str) -> list[str]:
            return text.split()

    theirs.load_word_tokenizer = lambda language: Spaces()
    config = theirs.MinhashConfig(
        n_grams=NGRAM, num_buckets=BANDS, hashes_per_bucket=ROWS, hash_config=HashConfig(precision=64)
    )
    with tempfile.TemporaryDirectory() as folder:
        step = theirs.MinhashDedupSignature(folder, config)
        began = time.process_time()
        rows = [[tuple(band) for band in step.get_signature(step.get_shingles(text))] for text in texts]
        return time.process_time() - began, _met(rows)


def datasketch(texts: Sequence[str]) -> tuple[float, Pairs]:
    from datasketch import MinHash as Theirs

    began = time.process_time()
    hashed = []
    for text in texts:
        split = text.split()
        one = Theirs(num_perm=BANDS * ROWS, seed=1)
        one.update_batch([" ".join(split[i : i + NGRAM]).encode() for i in range(len(split) - NGRAM + 1)])
        hashed.append(one.hashvalues)
    took = time.process_time() - began
    return took, _met([[band.tobytes() for band in np.split(row, BANDS)] for row in hashed])


if __name__ == "__main__":
    raise SystemExit(main())
