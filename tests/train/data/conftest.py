"""Token shards written by hand, without text or tokenizer."""

import pytest

from train.data import shards as shards_module
from train.data.manifest import Manifest, Source
from train.data.shards import ShardWriter, TokenShards

END = 1


@pytest.fixture
def write_shards(tmp_path, monkeypatch):
    """A function: documents (lists of ids without END) to (folder, manifest), at most `limit` tokens per shard."""

    def write(documents, *, name=".", vocab_size=1000, dtype="uint16", limit=2**28, held_out=(), trained=None):
        monkeypatch.setattr(shards_module, "MAX_SHARD_TOKENS", limit)
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        splits = {}
        for split, content in (("train", documents), ("held_out", held_out)):
            flags = trained if trained and split == "train" else [None] * len(content)
            with ShardWriter(folder, split, dtype=dtype, end_of_text=END, masked=bool(trained)) as writer:
                for ids, flag in zip(content, flags, strict=True):
                    writer.add(ids, "x" * len(ids), flag)
                splits[split] = writer.finish()
        manifest = Manifest(
            dtype=dtype,
            vocab_size=vocab_size,
            end_of_text=END,
            tokenizer="none",
            source=Source(description="by hand", options={}, files=0, bytes=0, listing="", content=""),
            held_out=0.0,
            splits=splits,
        )
        manifest.write(folder)
        return folder, manifest

    return write


@pytest.fixture
def make_shards(write_shards):
    """As `write_shards`, opened: documents to the TokenShards of the train split."""

    def make(documents, **how):
        folder, manifest = write_shards(documents, **how)
        return TokenShards(folder, "train", manifest)

    return make


@pytest.fixture
def make_shards_in(write_shards):
    """As `make_shards`, in a folder of that name."""

    def make(name, documents, **how):
        folder, manifest = write_shards(documents, name=name, **how)
        return TokenShards(folder, "train", manifest)

    return make
