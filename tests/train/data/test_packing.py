"""Best fit: every item in one bin, no bin too full, hardly any room left; whole documents as rows."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax.errors import DataError
from qwen_jax.text import Tokenizer
from qwen_jax.text.chat import FORMATS
from train.data import Conversations, Rows, conversations, sources
from train.data.documents import encode
from train.data.packing import best_fit
from train.data.rows import BestFit

END = 1
SHARED = Path(__file__).parents[4] / "shared/data"


def slow_best_fit(lengths, capacity):
    """How many bins best-fit decreasing takes, one item at a time."""
    rooms = []
    for length in sorted(lengths, reverse=True):
        fits = [room for room in rooms if room >= length]
        if fits:
            rooms.remove(min(fits))
        rooms.append((min(fits) if fits else capacity) - length)
    return sorted(rooms)


@given(st.lists(st.integers(1, 20), max_size=60), st.integers(0, 3))
@settings(deadline=None, max_examples=60)
def test_bins_are_those_of_the_slow_twin(lengths, seed):
    items, bounds = best_fit(np.array(lengths, np.int64), 20, seed=seed)
    assert sorted(items.tolist()) == list(range(len(lengths)))
    rooms = [20 - sum(lengths[i] for i in items[a:b]) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
    assert sorted(rooms) == slow_best_fit(lengths, 20)


def test_many_items_leave_hardly_any_room_and_the_seed_draws_among_equals():
    lengths = np.clip(np.random.default_rng(0).lognormal(5, 1, 20_000).astype(int), 1, 2048)
    items, bounds = best_fit(lengths, 2048, seed=0)
    assert lengths.sum() / ((len(bounds) - 1) * 2048) > 0.995
    again, other = (best_fit(lengths, 2048, seed=seed)[0] for seed in (0, 1))
    assert (items == again).all() and (items != other).any()


@pytest.mark.skipif(not (SHARED / "sft").exists(), reason="needs ../shared/data with the conversation sets")
def test_conversation_sets_fill_99_percent_of_their_rows(make_shards):
    source = Conversations(path=str(SHARED / "sft/*.json"))
    files = sources.find_files(source, print)
    chats = conversations.documents(files, source, FORMATS["qwen2.5"], sources.Tally(0))
    ids = [ids for ids, _ in encode(Tokenizer.load(SHARED / "tokenizer-qwen2.5"), chats)]
    layout = BestFit(make_shards(ids, vocab_size=2**18, dtype="uint32"), 2048, seed=0, too_long="truncate")
    assert len(files) == 4 and len(ids) > 1000 and layout.num_left_out == 0
    assert layout.num_columns / (layout.num_rows * 2048) >= 0.99


def documents(*lengths):
    """Documents of distinct ids; a document of n tokens fills n columns, the end of text being a target alone."""
    ids = iter(range(2, 1000))
    return [[next(ids) for _ in range(length)] for length in lengths]


def epoch(rows):
    batches = [rows.batch(step) for step in range(rows.num_batches)]
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def best_fit_rows(shards, length, **how):
    layout = BestFit(shards, length, seed=0, **how)
    return Rows(shards, sequence_length=length, batch_size=1, seed=0, layout=layout, shuffle=False)


def test_a_row_holds_whole_documents_apart(make_shards):
    made = documents(3, 7, 1, 5, 8, 2)
    rows = best_fit_rows(make_shards(made, limit=12), 8)
    found = epoch(rows)
    seen = []
    for row in range(rows.num_rows):
        segments = found["segments"][row]
        for segment in range(1, segments.max() + 1):
            (columns,) = np.nonzero(segments == segment)
            assert (np.diff(columns) == 1).all() and found["positions"][row][columns].tolist() == [*range(len(columns))]
            assert found["targets"][row][columns].tolist() == [*found["tokens"][row][columns].tolist()[1:], END]
            seen.append(found["tokens"][row][columns].tolist())
        assert not found["weights"][row][segments == 0].any() and not found["tokens"][row][segments == 0].any()
    assert sorted(seen) == sorted(made)
    assert found["weights"].sum() == sum(map(len, made))


@pytest.mark.parametrize(
    ("too_long", "columns", "cut", "left_out"), [("split", 38, 2, 0), ("truncate", 24, 2, 0), ("drop", 8, 0, 2)]
)
def test_documents_of_no_token_one_a_row_and_more(make_shards, too_long, columns, cut, left_out):
    """0, 1, exactly a row, a row and one more, two rows and more: what becomes of each is counted."""
    shards = make_shards(documents(1, 0, 7, 9, 21))
    layout = BestFit(shards, 8, seed=0, too_long=too_long)
    assert (layout.num_columns, layout.num_cut, layout.num_left_out) == (columns, cut, left_out + 1)
    found = epoch(best_fit_rows(shards, 8, too_long=too_long))
    assert found["weights"].sum() == columns


def test_a_document_with_nothing_left_to_train_is_left_out(write_shards, tmp_path):
    from train.data.shards import TokenShards

    made = documents(3, 12, 4)
    flags = [[False, True, True, False], [False] * 10 + [True] * 3, [True] * 5]
    folder, manifest = write_shards(made, trained=flags)
    shards = TokenShards(folder, "train", manifest)
    assert shards.num_trained == 10 and shards.trained(0, len(shards)).tolist() == sum(flags, [])
    layout = BestFit(shards, 8, seed=0, too_long="truncate")
    assert (layout.num_columns, layout.num_left_out) == (7, 1)
    found = epoch(best_fit_rows(shards, 8, too_long="truncate"))
    trained = [
        token
        for ids, flag in ((made[0], flags[0]), (made[2], flags[2]))
        for token, on in zip([*ids, END], flag, strict=True)
        if on
    ]
    assert sorted(found["targets"][found["weights"] > 0].tolist()) == sorted(trained[:2] + trained[3:]), (
        "no first token"
    )
    (folder / "train-00000.trained.bin").write_bytes(bytes(len(shards)))
    with pytest.raises(DataError, match=r"train-00000\.trained\.bin is not what was written"):
        manifest.verify(folder)


def test_fewer_rows_than_a_batch_are_refused_with_numbers(make_shards):
    shards = make_shards(documents(3, 4))
    with pytest.raises(DataError, match="fills 1 rows of 8 tokens, one batch needs 2"):
        Rows(shards, sequence_length=8, batch_size=2, seed=0, layout=BestFit(shards, 8, seed=0))
