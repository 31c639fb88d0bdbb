"""A small raw corpus, with something in it for every stage."""

from __future__ import annotations

import gzip
import json
import random

import pytest

from train.data.config import Text, TrainBPE
from train.data.corpus.config import (
    Corpus,
    Decontaminate,
    Domains,
    EvaluationSet,
    Exact,
    GopherQuality,
    MinHash,
    Patterns,
    Rules,
    Tokens,
)
from train.data.corpus.documents import Document, read_documents
from train.data.corpus.phases import output_of

WORDS = (
    "the of and to that with river stone cloud paper lamp engine garden winter copper signal morning harbour".split()
)


def prose(seed: int, length: int = 60) -> str:
    """Words that no other seed has in this order."""
    return " ".join(random.Random(seed).choices(WORDS, k=length))


def write_lines(path, *records) -> None:
    data = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
    path.write_bytes(gzip.compress(data) if path.name.endswith(".gz") else data)


@pytest.fixture(scope="session")
def raw(tmp_path_factory):
    """Twenty documents in four shards of a few kilobytes, with copies, near copies, a leak and what rules drop."""
    folder = tmp_path_factory.mktemp("raw")
    for i in range(6):
        (folder / f"{i}.txt").write_text(prose(i))
    leak = prose(99, 30)
    write_lines(
        folder / "a.jsonl.gz",
        *({"text": prose(i, 90), "url": f"https://{'news' if i % 2 else 'wiki'}.org/{i}"} for i in range(10, 16)),
        {"text": prose(3).upper().replace(" ", ",  "), "url": "https://copy.org"},
        {"text": prose(12, 90) + " and a few words more", "url": "https://near.org"},
        {"text": "too short"},
        {"text": ""},
        {"text": f"{prose(20)} {leak} {prose(21)}"},
    )
    write_lines(folder / "b.jsonl", *({"text": prose(i, 70)} for i in range(30, 33)), {"text": prose(31, 70)})
    write_lines(folder.parent / "test.jsonl", {"question": leak, "answer": "4"})
    return folder


@pytest.fixture
def config(raw, tmp_path) -> Corpus:
    """All stages that need neither a package nor a model."""
    return Corpus(
        source=Text(path=str(raw)),
        output=str(tmp_path / "corpus"),
        workers=1,
        exact=Exact(),
        minhash=MinHash(bands=20, rows=4, verify=0.6),
        rules=Rules(gopher_quality=GopherQuality(min_words=20)),
        decontaminate=Decontaminate(sets=(EvaluationSet(path=str(raw.parent / "test.jsonl")),)),
        domains=Domains(by=Patterns(field="url", patterns=((r"wiki\.", "wiki"),)), weights={"wiki": 2.5, "other": 0.9}),
        tokens=Tokens(tokenizer=TrainBPE(vocab_size=270), held_out=0.0),
    )


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    """Shards of two kilobytes instead of as many megabytes."""
    from train.data.corpus import phases, read

    monkeypatch.setattr(phases, "shard_files", lambda files, megabytes: read.shard_files(files, megabytes / 32_000))


def published(config) -> list[Document]:
    """What a corpus holds in the end."""
    folder = output_of(config) / "documents"
    return [document for path in sorted(folder.iterdir()) for document in read_documents(path)]


def tree(config) -> dict[str, bytes]:
    """Every file of a corpus but the lock and the config, which names the folder."""
    folder = output_of(config)
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if not name.endswith(("lock", "config.gin"))}
