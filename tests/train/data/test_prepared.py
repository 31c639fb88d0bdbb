"""From text to tokens: the split, reuse, refusal of what changed, and recovery from a kill."""

import errno
import fcntl
import gzip
import json
import os
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from qwen_jax.errors import DataError, FileError, ModelError
from qwen_jax.text import Tokenizer
from train.data import Data, Text, TokenizerFile, TrainBPE, prepare, prepared, sources, tokenise
from train.data.manifest import MANIFEST, SPLITS, TOKENIZER, Manifest

NUM_DOCUMENTS = 60


def text_of(i):
    return f"Document {i}:\n" + "".join(f"{n} times {i} is {n * i}, isn't it?\n" for n in range(i % 5 + 2)) + "é你🙂"


@pytest.fixture
def folder(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for i in range(NUM_DOCUMENTS):
        (source / f"{i:02}.txt").write_text(text_of(i))
    return source


@pytest.fixture
def config(folder):
    return Data(source=Text(path=str(folder)), tokenizer=TrainBPE(vocab_size=280), sequence_length=8, held_out=0.2)


@pytest.fixture
def make(tmp_path):
    """A function: prepares `config` in tmp_path/run, to (corpus, reports)."""

    def make(config, **how):
        reports = []
        return prepare(config, tmp_path / "run", seed=0, report=reports.append, **how), reports

    return make


def documents(made, split):
    shards = getattr(made.parts[0], split)
    bounds = [shards.document(i) for i in range(shards.num_documents)]
    assert all(shards.tokens(stop - 1, stop) == shards.end_of_text for _, stop in bounds)
    return [made.tokenizer.decode(shards.tokens(start, stop - 1).tolist()) for start, stop in bounds]


def files_of(folder):
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


def contents(folder):
    return {name: content for name, (content, _) in files_of(folder).items()}


def test_every_document_is_in_one_split_in_order(config, make):
    made, reports = make(config)
    train, held_out = documents(made, "train"), documents(made, "held_out")
    texts = [text_of(i) for i in range(NUM_DOCUMENTS)]
    assert sorted([*train, *held_out]) == sorted(texts)
    assert train == [text for text in texts if text in train]
    assert 3 <= len(held_out) <= 25  # 12 expected
    assert made.parts[0].train.num_characters == sum(map(len, train))
    assert made.parts[0].held_out.num_bytes == sum(len(text.encode()) for text in held_out)
    assert made.tokenizer.num_tokens == 280
    assert len(reports) < 8


def test_the_content_decides_the_side(config, make, folder):
    before = set(documents(make(config)[0], "held_out"))
    for i in range(NUM_DOCUMENTS):  # copies under other names, and half of the originals away
        (folder / f"copy{i}.txt").write_text(text_of(i))
        if i % 2:
            (folder / f"{i:02}.txt").unlink()
    made, _ = make(replace(config, tokens=str(folder.parent / "other")))
    assert set(documents(made, "held_out")) == before
    assert not set(documents(made, "train")) & before


def test_a_second_start_reuses_the_folder(config, make, tmp_path):
    first, _ = make(config)
    before = files_of(tmp_path / "run/tokens")
    second, reports = make(config)
    assert files_of(tmp_path / "run/tokens") == before
    assert second.tokenizer.fingerprint == first.tokenizer.fingerprint
    assert len(reports) == 1


def test_the_folder_depends_on_the_source_alone(config, make, tmp_path):
    make(config)
    make(replace(config, tokens=str(tmp_path / "again")))
    assert contents(tmp_path / "run/tokens") == contents(tmp_path / "again")


def test_json_lines_give_the_same_documents(config, make, tmp_path):
    lines = "".join(json.dumps({"text": text_of(i)}) + "\n" for i in range(NUM_DOCUMENTS))
    (tmp_path / "all.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    made, _ = make(config)
    zipped, _ = make(replace(config, source=Text(path=str(tmp_path / "all.jsonl.gz")), tokens=str(tmp_path / "z")))
    for split in SPLITS:
        assert documents(zipped, split) == documents(made, split)


@pytest.mark.parametrize("change", ["content", "size", "added", "removed", "renamed"])
def test_a_changed_source_is_refused(config, make, folder, tmp_path, change):
    make(config)
    file = folder / "07.txt"
    if change == "content":
        file.write_text(file.read_text().replace("times", "TIMES"))
    elif change == "size":
        file.write_text("other")
    elif change == "added":
        (folder / "new.txt").write_text("new")
    elif change == "removed":
        file.unlink()
    else:
        file.rename(folder / "seven.txt")
    with pytest.raises(DataError, match=r"documents changed since .*data\.tokens = "):
        make(config)
    make(replace(config, tokens=str(tmp_path / "run/tokens")))  # the way out that the message names


def test_a_source_that_moved_is_the_same(config, make, folder):
    make(config)
    moved = folder.rename(folder.parent / "elsewhere")
    make(replace(config, source=Text(path=str(moved))))


def test_another_field_is_another_source(config, make, tmp_path):
    records = [{"text": text_of(i), "title": f"title {i} of a document"} for i in range(NUM_DOCUMENTS)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    make(replace(config, source=Text(path=str(tmp_path / "a.jsonl"))))
    with pytest.raises(DataError, match='field was "text" and is "title"'):
        make(replace(config, source=Text(path=str(tmp_path / "a.jsonl"), field="title")))


def test_another_tokenizer_or_split_is_refused(config, make, tmp_path):
    made, _ = make(config)
    with pytest.raises(DataError, match=r"280 tokens, data\.tokenizer\.vocab_size is 270"):
        make(replace(config, tokenizer=TrainBPE(vocab_size=270)))
    with pytest.raises(DataError, match=r"held_out=0\.2, not 0\.1"):
        make(replace(config, held_out=0.1))
    (tmp_path / "same.json").write_bytes(made.tokenizer.to_bytes())
    make(replace(config, tokenizer=TokenizerFile(path=str(tmp_path / "same.json"))))
    (tmp_path / "other.json").write_bytes(made.tokenizer.to_bytes() + b" ")
    with pytest.raises(DataError, match="another tokenizer than"):
        make(replace(config, tokenizer=TokenizerFile(path=str(tmp_path / "other.json"))))


def test_a_tokenizer_swapped_inside_the_folder_is_refused(config, make, tmp_path):
    make(config)
    file = tmp_path / "run/tokens" / TOKENIZER
    file.write_bytes(file.read_bytes() + b"\n")
    with pytest.raises(DataError, match="not the tokenizer that made the shards"):
        make(config)


def test_damaged_shards_are_refused(config, make, tmp_path):
    make(config)
    file = tmp_path / "run/tokens/train-00000.bin"
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"train-00000\.bin is not what was written"):
        make(config)


def test_a_named_folder_is_used_without_its_source(config, make, folder, tmp_path):
    named = replace(config, tokens=str(tmp_path / "tokens of my own"))
    first, _ = make(named)
    for path in folder.iterdir():
        path.unlink()
    second, reports = make(named)
    assert np.array_equal(*(made.parts[0].train.tokens(0, len(made.parts[0].train)) for made in (first, second)))
    assert not (tmp_path / "run").exists()
    assert str(folder) in reports[-1]


def test_an_existing_tokenizer_makes_the_tokens(config, make, tmp_path):
    trained, _ = make(config)
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / TOKENIZER).write_bytes(trained.tokenizer.to_bytes())
    made, _ = make(replace(config, tokenizer=TokenizerFile(path=str(tmp_path / "t")), tokens=str(tmp_path / "x")))
    assert contents(tmp_path / "x") == contents(tmp_path / "run/tokens")
    with pytest.raises(FileError, match="cannot read tokenizer"):
        make(replace(config, tokenizer=TokenizerFile(path=str(tmp_path / "no")), tokens=str(tmp_path / "y")))
    (tmp_path / "t" / TOKENIZER).write_text("{}")
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        make(replace(config, tokenizer=TokenizerFile(path=str(tmp_path / "t")), tokens=str(tmp_path / "y")))


@pytest.mark.parametrize("place", ["encode_batch", "finish", "write"])
def test_a_kill_in_the_middle_leaves_nothing_that_counts(config, make, tmp_path, monkeypatch, place):
    make(replace(config, tokens=str(tmp_path / "whole")))
    owner = {"encode_batch": Tokenizer, "finish": tokenise.ShardWriter, "write": Manifest}[place]
    monkeypatch.setattr(tokenise, "BATCH_CHARACTERS", 500)
    calls, real = [], getattr(owner, place)

    def killed(*args, **kwargs):
        calls.append(place)
        if len(calls) == 2 or place == "write":
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, place, killed)
        with pytest.raises(KeyboardInterrupt):
            make(config)
    assert not (tmp_path / "run/tokens" / MANIFEST).exists()
    (tmp_path / "run/tokens/train-00007.bin").write_text("left by a longer attempt")
    (tmp_path / "run/tokens/notes.md").write_text("not ours")
    make(config)
    after = contents(tmp_path / "run/tokens")
    assert after.pop("notes.md") == b"not ours"
    assert after == contents(tmp_path / "whole")


def test_one_bad_document_stops_it_and_leaves_no_manifest(config, make, folder, tmp_path):
    (folder / "30.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"30\.txt"):
        make(config)
    assert not (tmp_path / "run/tokens" / MANIFEST).exists()
    _, reports = make(replace(config, max_bad_fraction=0.05))
    assert sum("skipped 1 unreadable" in line and "30.txt" in line for line in reports) == 1


def test_a_source_that_changes_under_way_is_refused(config, make, folder, monkeypatch):
    encode = Tokenizer.encode_batch

    def meanwhile(self, texts):
        (folder / "59.txt").write_text("changed")
        return encode(self, texts)

    monkeypatch.setattr(Tokenizer, "encode_batch", meanwhile)
    with pytest.raises(DataError, match=r"59\.txt changed while it was read"):
        make(config)


@pytest.mark.parametrize(("held_out", "words"), [(0.001, "held_out 0"), (0.999, "train 0")])
def test_an_empty_split_is_refused(config, make, tmp_path, held_out, words):
    tokenizer, _ = make(config)
    (tmp_path / "t.json").write_bytes(tokenizer.tokenizer.to_bytes())
    config = replace(config, tokenizer=TokenizerFile(path=str(tmp_path / "t.json")), tokens=str(tmp_path / "x"))
    with pytest.raises(DataError, match=f"splits 60 documents into .*{words}"):
        make(replace(config, held_out=held_out))


def test_nothing_held_out(config, make):
    made, _ = make(replace(config, held_out=0.0))
    assert len(made.parts[0].held_out) == 0
    assert made.parts[0].train.num_documents == NUM_DOCUMENTS


def test_wide_ids_for_large_vocabularies(config, make, monkeypatch, tmp_path):
    narrow, _ = make(config)
    monkeypatch.setattr(tokenise, "MAX_UINT16_TOKENS", 279)
    wide, _ = make(replace(config, tokens=str(tmp_path / "wide")))
    assert (narrow.parts[0].train.dtype, wide.parts[0].train.dtype) == ("<u2", "<u4")
    assert documents(wide, "train") == documents(narrow, "train")


def test_other_processes_wait_for_the_writer(config, make, monkeypatch):
    monkeypatch.setattr(prepared, "POLL_SECONDS", 0.01)
    made = []
    waiting = threading.Thread(target=lambda: made.append(make(config, is_writer=False)[0]))
    waiting.start()
    time.sleep(0.05)
    assert not made
    first, _ = make(config)
    waiting.join(10)
    assert made[0].tokenizer.fingerprint == first.tokenizer.fingerprint


def test_other_processes_do_not_wait_for_ever(config, make, monkeypatch):
    monkeypatch.setattr(prepared, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(prepared, "WAIT_SECONDS", 0.05)
    with pytest.raises(FileError, match="did not appear"):
        make(config, is_writer=False)


def test_two_writers_make_one_folder(config, make, tmp_path):
    (tmp_path / "run/tokens").mkdir(parents=True)
    found = []
    with open(tmp_path / "run/tokens/lock", "wb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        second = threading.Thread(target=lambda: found.append(make(config)))
        second.start()
        second.join(0.2)
        assert second.is_alive()
        assert sorted(path.name for path in (tmp_path / "run/tokens").iterdir()) == ["lock"]
    second.join(10)
    assert any("another process" in line for line in found[0][1])


def test_a_folder_that_cannot_be_made_is_a_file_error(config, make, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(FileError, match="cannot write .*file/tokens"):
        make(replace(config, tokens=str(tmp_path / "file/tokens")))


def test_a_full_disk_is_a_file_error_and_leaves_no_manifest(config, make, tmp_path, monkeypatch):
    def full(file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("train.data.shards.to_disk", full)
    with pytest.raises(FileError, match="cannot write .*No space left on device"):
        make(config)
    assert not (tmp_path / "run/tokens" / MANIFEST).exists()


def test_the_tokenizer_learns_from_the_training_split_only(config, make, folder, monkeypatch):
    learnt = []
    train_bpe = tokenise.train_bpe
    monkeypatch.setattr(tokenise, "train_bpe", lambda texts, **how: train_bpe(_noted(texts, learnt), **how))
    made, _ = make(config)
    assert learnt == documents(made, "train")


def test_a_large_source_is_sampled(config, make, monkeypatch, tmp_path):
    total = sum(file.size for file in sources.find_files(config.source, print))
    monkeypatch.setattr(tokenise, "MAX_TRAINING_BYTES", total // 2)
    learnt = []
    train_bpe = tokenise.train_bpe
    monkeypatch.setattr(tokenise, "train_bpe", lambda texts, **how: train_bpe(_noted(texts, learnt), **how))
    made, _ = make(config)
    assert 0.25 * total < sum(len(text.encode()) for text in learnt) <= total / 2
    assert set(learnt) < set(documents(made, "train"))
    assert learnt[-1] > text_of(40)  # not the first half of the files


def _noted(texts, noted):
    for text in texts:
        noted.append(text)
        yield text
