"""Batches: every target once, labels that know the documents, an order that is a function of (seed, step)."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen_jax.errors import ConfigError, DataError
from train.data import Rows

END = 1
QUICK = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=12)


def numbered(lengths, first=2):
    """Documents of distinct ids, so that every token names its place."""
    documents = []
    for length in lengths:
        documents.append(list(range(first, first + length)))
        first += length
    return documents


def epoch(rows, first=0):
    batches = [rows.batch(step) for step in range(first, first + rows.num_batches)]
    return {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}


def label(window, length):
    """One row by hand, a list of up to T+1 tokens: {name: list of T}."""
    out = {name: [] for name in ("tokens", "targets", "positions", "segments", "weights")}
    segment, position = 1, 0
    for token, target in zip(window, window[1:], strict=False):
        values = (token, target, position, segment, float(token != END))
        for name, value in zip(out, values, strict=True):
            out[name].append(value)
        position += 1
        if token == END:
            segment, position = segment + 1, 0
    return {name: values + [0] * (length - len(values)) for name, values in out.items()}


@given(
    lengths=st.lists(st.integers(0, 9), min_size=2, max_size=9),
    length=st.integers(1, 7),
    batch_size=st.integers(1, 4),
    limit=st.integers(4, 40),
)
@QUICK
def test_evaluation_reads_the_split_once_and_in_order(make_shards, lengths, length, batch_size, limit):
    documents = numbered(lengths)
    flat = [token for ids in documents for token in (*ids, END)]
    shards = make_shards(documents, limit=limit)
    rows = Rows(shards, sequence_length=length, batch_size=batch_size, seed=0, shuffle=False)
    found = epoch(rows)
    windows = [flat[start : start + length + 1] for start in range(0, len(flat) - 1, length)]
    windows += [[]] * (-len(windows) % batch_size)
    expected = [label(window, length) for window in windows]
    for name, values in found.items():
        assert values.tolist() == [row[name] for row in expected], name
    assert found["weights"].sum() == sum(lengths)  # every token but the first of its document, END included


@given(seed=st.integers(0, 2**32 - 1), length=st.integers(1, 5), limit=st.integers(13, 50))
@QUICK
def test_a_training_epoch_uses_each_target_once(make_shards, seed, length, limit):
    lengths = [7, 3, 1, 12, 5, 2]
    rows = Rows(
        make_shards(numbered(lengths), limit=limit), sequence_length=length, batch_size=1, seed=seed, shuffle=True
    )
    for first in (0, rows.num_batches):  # the second epoch too
        found = epoch(rows, first)
        weighted = found["targets"][found["weights"] == 1]
        inner = [token for ids in numbered(lengths) for token in ids[1:]]
        assert sorted(weighted.tolist()) == [END] * len(lengths) + inner


def test_batches_are_a_pure_function_of_seed_and_step(make_shards):
    shards = make_shards(numbered([50, 30, 45]))

    def make(seed):
        return Rows(shards, sequence_length=4, batch_size=8, seed=seed)

    forward = [make(7).batch(step) for step in range(12)]  # past three epochs
    rows = make(7)
    for step in (11, 3, 0, 7):
        for name, values in rows.batch(step).items():
            assert np.array_equal(values, forward[step][name])
    assert any(not np.array_equal(forward[s]["tokens"], make(8).batch(s)["tokens"]) for s in range(3))


def test_epochs_differ_in_order(make_shards):
    rows = Rows(make_shards(numbered([200])), sequence_length=4, batch_size=10, seed=0)
    assert rows.num_rows == 50
    first, second = (epoch(rows, step)["tokens"] for step in (0, rows.num_batches))
    assert first.tolist() != second.tolist()
    assert sorted(first.tolist()) == sorted(second.tolist())
    assert first.tolist() != sorted(first.tolist())


@pytest.mark.parametrize("rows", [slice(0, 3), slice(3, 8), slice(2, None, 3), slice(0, 0), slice(-1, None)])
@pytest.mark.parametrize("shuffle", [True, False])
def test_a_host_reads_its_rows_only(make_shards, monkeypatch, rows, shuffle):
    shards = make_shards(numbered([50, 30, 45]))
    made = Rows(shards, sequence_length=4, batch_size=8, seed=1, shuffle=shuffle)
    whole = made.batch(made.num_batches - 1)
    reads, read = [], shards.tokens
    monkeypatch.setattr(shards, "tokens", lambda *bounds: reads.append(bounds) or read(*bounds))
    part = made.batch(made.num_batches - 1, rows)
    for name, values in part.items():
        assert np.array_equal(values, whole[name][rows])
    assert len(reads) <= len(range(8)[rows])


def test_types_and_shapes(make_shards):
    batch = Rows(make_shards(numbered([50])), sequence_length=4, batch_size=8, seed=1).batch(0)
    assert {name: (str(values.dtype), values.shape) for name, values in batch.items()} == {
        "tokens": ("int32", (8, 4)),
        "targets": ("int32", (8, 4)),
        "positions": ("int32", (8, 4)),
        "segments": ("int32", (8, 4)),
        "weights": ("float32", (8, 4)),
    }


def test_the_last_batch_of_an_evaluation_is_filled_with_nothing(make_shards):
    rows = Rows(make_shards(numbered([9])), sequence_length=4, batch_size=8, seed=0, shuffle=False)
    assert (rows.num_rows, rows.num_batches) == (3, 1)
    batch = rows.batch(0)
    assert batch["weights"].sum(axis=1).tolist() == [4, 4, 1] + [0] * 5
    assert not batch["segments"][3:].any()
    with pytest.raises(IndexError):
        rows.batch(1)
    with pytest.raises(IndexError):
        rows.batch(-1)


def test_a_split_smaller_than_a_batch_is_refused_with_numbers(make_shards):
    shards = make_shards(numbered([31]))
    assert Rows(shards, sequence_length=4, batch_size=7, seed=0).num_batches == 1
    with pytest.raises(DataError, match="has 32 tokens, one batch needs 33"):
        Rows(shards, sequence_length=4, batch_size=8, seed=0)
    for documents in ([], [[]]):
        with pytest.raises(DataError, match="tokens, one batch needs 2"):
            Rows(make_shards(documents), sequence_length=4, batch_size=8, seed=0, shuffle=False)


def test_a_token_the_tokenizer_has_not_is_refused(make_shards):
    for dtype, token in (("uint16", 1000), ("uint32", 2**31 + 5)):
        shards = make_shards([[5, 999], [token, 6]], dtype=dtype)
        rows = Rows(shards, sequence_length=2, batch_size=1, seed=0, shuffle=False)
        rows.batch(0)
        with pytest.raises(DataError, match=f"holds token id {token}, its tokenizer has 1000"):
            [rows.batch(step) for step in range(rows.num_batches)]


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_grain_cannot_take_is_refused(make_shards, seed):
    with pytest.raises(ConfigError, match=f"seed={seed}"):
        Rows(make_shards(numbered([50])), sequence_length=4, batch_size=8, seed=seed)


def test_rows_that_are_not_whole_are_cut_as_if_documents_ended(make_shards):
    shards = make_shards(numbered([90, 400]))
    cut = Rows(shards, sequence_length=12, batch_size=5, seed=3, full_length=0.5, shorter_lengths=(3, 5))
    whole = Rows(shards, sequence_length=12, batch_size=5, seed=3)
    found, plain = epoch(cut), epoch(whole)
    assert (found["tokens"] == plain["tokens"]).all() and (found["targets"] == plain["targets"]).all()
    lengths = []
    for row in range(len(found["tokens"])):
        if END in found["tokens"][row] or plain["segments"][row, -1] == 0:
            continue
        starts = np.flatnonzero(found["positions"][row] == 0)
        size = starts[1] if len(starts) > 1 else 12
        lengths.append(int(size))
        place = np.arange(12)
        assert (found["positions"][row] == place % size).all()
        assert (found["segments"][row] == place // size + 1).all()
        assert (found["weights"][row] == ((place % size < size - 1) | (place == 11))).all()
    assert set(lengths) == {3, 5, 12} and 0.25 < np.mean(np.array(lengths) == 12) < 0.75
    some = cut.batch(4, slice(1, 3))
    assert all((some[name] == cut.batch(4)[name][1:3]).all() for name in some), "a row does not depend on the others"


def test_a_stream_that_begins_later_has_another_order(make_shards):
    how = dict(sequence_length=4, batch_size=8, seed=1)
    base, later = (Rows(make_shards(numbered([200])), first_step=step, **how) for step in (0, 7))
    assert (base.batch(0)["tokens"] != later.batch(7)["tokens"]).any()
    with pytest.raises(IndexError):
        later.batch(6)
