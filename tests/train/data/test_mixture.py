"""Mixtures: shares, random access, one stream for any number of hosts."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax.errors import ConfigError
from train.data import Conversations, Data, Mixture, Part, Rows, Text, TrainBPE
from train.data.mixture import MixedRows, Schedule
from train.data.rows import BestFit, stream_seed

WEIGHTS = (0.7, 0.2, 0.1)


@given(
    st.lists(st.just(0.0) | st.floats(1e-3, 5), min_size=1, max_size=6).filter(lambda w: sum(w) > 0.1),
    st.integers(0, 10**9),
)
@settings(deadline=None, max_examples=20)
def test_each_part_has_its_share_at_any_time_and_its_rows_in_order(weights, far):
    schedule = Schedule(weights, seed=7)
    parts, numbers = schedule.rows(range(far, far + 50))
    counts = schedule.counts(far)
    share = np.array(weights) / sum(weights)
    assert counts.sum() == far and (abs(counts - far * share) <= len(weights)).all()
    for part, number in zip(parts, numbers, strict=True):
        assert number == counts[part], "the next row of its part"
        counts[part] += 1
    assert (schedule.counts(far + 50) == counts).all()
    assert not set(parts) & set(np.flatnonzero(np.array(weights) == 0))


@pytest.fixture
def mixed(make_shards_in):
    """A function: a new stream of windows of text, best-fit documents and conversations of which a part is trained."""
    split = []
    for number, trained in enumerate((False, False, True), 1):
        draw = np.random.default_rng(number)
        documents = [draw.integers(2, 1000, draw.integers(1, 14)).tolist() for _ in range(60)]
        flags = [[bool(i % 2) for i in range(len(ids) + 1)] for ids in documents] if trained else None
        split.append(make_shards_in(f"part{number}", documents, trained=flags))

    def make(first_step=0):
        how = dict(sequence_length=16, batch_size=1, first_step=first_step)
        layouts = [None, *(BestFit(shards, 16, seed=0) for shards in split[1:])]
        parts = [
            Rows(shards, seed=stream_seed(5, number), layout=layout, **how)
            for number, (shards, layout) in enumerate(zip(split, layouts, strict=True), 1)
        ]
        return MixedRows(parts, WEIGHTS, batch_size=8, seed=5, first_step=first_step)

    return make


def stream_hash(hosts_of_step, rows):
    """sha256 of the stream, each host's part of a batch read by a stream of its own."""
    digest = hashlib.sha256()
    for step, hosts in enumerate(hosts_of_step):
        size = 8 // hosts
        parts = [rows[host].batch(step, slice(host * size, (host + 1) * size)) for host in range(hosts)]
        for name in sorted(parts[0]):
            digest.update(np.concatenate([part[name] for part in parts]).tobytes())
    return digest.hexdigest()


def test_any_number_of_hosts_reads_the_same_stream_also_across_a_resize(mixed):
    rows = [mixed() for _ in range(8)]
    steps = 9
    expected = stream_hash([1] * steps, rows)
    for hosts in (2, 4, 8):
        assert stream_hash([hosts] * steps, rows) == expected
    assert stream_hash([8] * 4 + [2] * 3 + [1] * 2, rows) == expected
    assert stream_hash([1] * (steps - 1), rows) != expected


def test_realised_shares_are_the_weights(mixed):
    counts = mixed().schedule.counts(1000 * 8)
    assert (abs(counts / 8000 - WEIGHTS) < 0.005).all()


def test_a_mixed_batch_has_the_rows_of_its_parts(mixed):
    rows = mixed()
    parts, numbers = rows.schedule.rows(range(8, 16))
    batch = rows.batch(1)
    for place, (part, number) in enumerate(zip(parts, numbers, strict=True)):
        row = rows._parts[part].read([int(number)])
        assert all((batch[name][place] == row[name][0]).all() for name in batch)
    assert rows.batch(0, slice(0, 0))["tokens"].shape == (0, 16)
    with pytest.raises(IndexError):
        mixed(first_step=3).batch(2)


def part(name="a", weight=1.0, source=None):
    return Part(name=name, weight=weight, source=source or Text(path="x"))


def data(**changes):
    return Data(**{"source": Text(path="x"), "tokenizer": TrainBPE(vocab_size=300), "sequence_length": 8} | changes)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: part(weight=-1.0), "weight=-1.0"),
        (lambda: part(weight=float("nan")), "weight=nan"),
        (lambda: part(weight=float("inf")), "weight=inf"),
        (lambda: part(name="../x"), "it names a folder"),
        (lambda: Mixture(parts=()), "parts are none"),
        (lambda: Mixture(parts=(part(), part())), "a name of its own"),
        (lambda: Mixture(parts=(part(weight=0.0),)), "weights of 0 alone"),
        (lambda: data(packing="windows", source=Conversations(path="x")), "would cut conversations"),
        (lambda: data(packing="best_fit", full_length=0.5, shorter_lengths=(2,)), "best_fit has none"),
        (lambda: data(source=Mixture(parts=(part(),)), tokens="t"), "name those of the parts"),
    ],
)
def test_mixtures_that_mean_nothing_are_refused(make, words):
    with pytest.raises(ConfigError, match=words) as caught:
        make()
    assert "\n" not in str(caught.value)
