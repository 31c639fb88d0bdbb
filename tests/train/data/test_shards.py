"""Shards: what is written is read back, from any position, and damage is found."""

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen_jax.errors import DataError, FileError
from train.data.manifest import MANIFEST, Manifest
from train.data.shards import TokenShards

END = 1
DOCUMENTS = [[5, 6, 7], [], [8], [9] * 10, [10, 11]]
FLAT = [5, 6, 7, END, END, 8, END, *[9] * 10, END, 10, 11, END]


@given(
    documents=st.lists(st.lists(st.integers(2, 999), max_size=6), max_size=8),
    limit=st.integers(1, 12),
    cut=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20)
def test_any_range_across_shards(make_shards, documents, limit, cut):
    shards = make_shards(documents, limit=limit)
    flat = [token for ids in documents for token in (*ids, END)]
    assert len(shards) == len(flat)
    start, stop = sorted(int(part * len(flat)) for part in cut)
    assert shards.tokens(start, stop).tolist() == flat[start:stop]
    assert shards.tokens(0, len(flat)).tolist() == flat
    bounds = [shards.document(i) for i in range(shards.num_documents)]
    assert [flat[start : stop - 1] for start, stop in bounds] == documents


def test_no_document_lies_in_two_shards(write_shards):
    folder, manifest = write_shards(DOCUMENTS, limit=6)
    assert [shard.tokens for shard in manifest.splits["train"].shards] == [5, 2, 11, 3]
    assert [shard.documents for shard in manifest.splits["train"].shards] == [2, 1, 1, 1]
    assert manifest.splits["train"].tokens == len(FLAT)
    assert sorted(path.name for path in folder.glob("*.bin")) == [
        f"train-0000{i}{kind}.bin" for i in range(4) for kind in ("", ".documents")
    ]


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_both_widths(make_shards, dtype):
    largest = np.iinfo(dtype).max
    shards = make_shards([[2, largest]], dtype=dtype, vocab_size=2**32)
    assert shards.tokens(0, 3).tolist() == [2, largest, END]


def test_ranges_outside_are_errors(make_shards):
    shards = make_shards(DOCUMENTS)
    for start, stop in ((-1, 2), (0, len(FLAT) + 1), (3, 2)):
        with pytest.raises(IndexError):
            shards.tokens(start, stop)
    with pytest.raises(IndexError):
        shards.document(5)


def test_the_manifest_comes_back(write_shards):
    folder, manifest = write_shards(DOCUMENTS, limit=8)
    assert Manifest.read(folder) == manifest
    manifest.verify(folder)


@pytest.mark.parametrize("name", ["train-00001.bin", "train-00001.documents.bin"])
@pytest.mark.parametrize("damage", ["cut", "longer", "bit", "gone"])
def test_damage_is_found(write_shards, name, damage):
    folder, manifest = write_shards(DOCUMENTS, limit=8)
    file = folder / name
    content = bytearray(file.read_bytes())
    if damage == "gone":
        file.unlink()
    else:
        content[3] ^= damage == "bit"
        file.write_bytes({"cut": content[:-2], "longer": content + b"\0\0", "bit": content}[damage])
    with pytest.raises(DataError, match=name):
        manifest.verify(folder)


def test_large_folders_are_checked_by_size_only(write_shards, monkeypatch):
    folder, manifest = write_shards(DOCUMENTS)
    monkeypatch.setattr("train.data.manifest.MAX_DIGEST_BYTES", 10)
    (folder / "train-00000.bin").write_bytes(bytes(2 * len(FLAT)))
    manifest.verify(folder)
    (folder / "train-00000.bin").write_bytes(bytes(2 * len(FLAT) - 2))
    with pytest.raises(DataError, match="bytes, its manifest says"):
        manifest.verify(folder)
    with pytest.raises(DataError, match="has not the"):
        TokenShards(folder, "train", manifest)


def change(values, path, value):
    *parents, last = path
    for key in parents:
        values = values[key]
    values[last] = value


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("format",), 3, "format is 3"),
        (("dtype",), "int64", "int64"),
        (("splits", "train", "shards", 0, "name"), "../train-00000.bin", "no name of a shard"),
        (("splits", "train", "shards", 0, "name"), "/etc/passwd", "no name of a shard"),
        (("splits", "train", "shards", 0, "size"), 3, "unexpected keyword"),
        (("splits",), {}, "splits"),
        (("splits", "train"), None, "TypeError"),
        (("source",), [], "manifest"),
        (("extra",), 1, "extra"),
    ],
)
def test_a_manifest_that_was_tampered_with_is_refused(write_shards, path, value, words):
    folder, _ = write_shards(DOCUMENTS)
    values = json.loads((folder / MANIFEST).read_text())
    change(values, path, value)
    (folder / MANIFEST).write_text(json.dumps(values))
    with pytest.raises(DataError, match=words) as caught:
        Manifest.read(folder)
    assert "\n" not in str(caught.value)


def test_a_manifest_that_counts_wrongly_is_refused(write_shards):
    folder, _ = write_shards(DOCUMENTS)
    for key in ("tokens", "documents", "bytes"):
        values = json.loads((folder / MANIFEST).read_text())
        values["splits"]["train"]["shards"][0][key] += 1
        (folder / MANIFEST).write_text(json.dumps(values))
        with pytest.raises(DataError):
            Manifest.read(folder).verify(folder)


def test_missing_and_broken_manifests(tmp_path):
    with pytest.raises(FileError, match=r"manifest\.json"):
        Manifest.read(tmp_path)
    for text in ("", "{", "[]", "null", "[" * 100_000):
        (tmp_path / MANIFEST).write_text(text)
        with pytest.raises(DataError, match="no manifest of token shards"):
            Manifest.read(tmp_path)
