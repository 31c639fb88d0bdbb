"""Token shards written by hand, without text or tokenizer."""

import pytest

from train.data import shards as shards_module
from train.data.manifest import Manifest, Source
from train.data.shards import ShardWriter, TokenShards

END = 1


@pytest.fixture
def write_shards(tmp_path, monkeypatch):
    """A function: documents (lists of ids without END) to (folder, manifest), at most `limit` tokens per shard."""

    def write(documents, *, vocab_size=1000, dtype="uint16", limit=2**28, held_out=()):
        monkeypatch.setattr(shards_module, "MAX_SHARD_TOKENS", limit)
        splits = {}
        for split, content in (("train", documents), ("held_out", held_out)):
            with ShardWriter(tmp_path, split, dtype=dtype, end_of_text=END) as writer:
                for ids in content:
                    writer.add(ids, "x" * len(ids))
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
        manifest.write(tmp_path)
        return tmp_path, manifest

    return write


@pytest.fixture
def make_shards(write_shards):
    """As `write_shards`, opened: documents to the TokenShards of the train split."""

    def make(documents, **how):
        folder, manifest = write_shards(documents, **how)
        return TokenShards(folder, "train", manifest)

    return make
