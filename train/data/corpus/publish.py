"""The documents that are left, in as many copies as they are to be read, and their tokens."""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections import Counter

from train.data.config import Data, Text
from train.data.corpus.config import Tokens
from train.data.corpus.documents import LinesWriter, read_documents
from train.data.corpus.domains import copies
from train.data.corpus.filtering import DOCUMENTS
from train.data.corpus.tasks import Summary, Task
from train.data.manifest import MANIFEST, Manifest

DOCUMENTS_FOLDER, TOKENS_FOLDER = "documents", "tokens"
LEVEL = 6


def run_publish(task: Task, *, previous: str, weights: dict[str, float], seed: int) -> Summary:
    """Writes each document once, its second copy into a file of second copies, and so on: copies lie far apart."""
    summary = Summary()
    with contextlib.ExitStack() as stack:
        writers: list[LinesWriter] = []
        for document in read_documents(task.input(previous, DOCUMENTS)):
            count = copies(document, weights, seed)
            summary.read += 1
            summary.characters_read += len(document.text)
            while len(writers) < count:
                suffix = f"copy{len(writers) + 1}.{DOCUMENTS}" if writers else DOCUMENTS
                writers.append(stack.enter_context(LinesWriter(task.output(suffix), level=LEVEL)))
            for writer in writers[:count]:
                writer.write(document.to_json())
            summary.kept += count
            summary.characters_kept += count * len(document.text)
    return summary


def run_tokens(task: Task, *, settings: Tokens, seed: int) -> Summary:
    """Token shards of all that was published."""
    from train.data.prepared import prepare

    folder = task.corpus / TOKENS_FOLDER
    shutil.rmtree(folder, ignore_errors=True)
    source = Text(path=str(task.corpus / DOCUMENTS_FOLDER))
    data = Data(source=source, tokenizer=settings.tokenizer, sequence_length=1, held_out=settings.held_out)
    prepare(data, task.corpus, seed=seed, report=lambda line: print(line, file=sys.stderr))
    manifest = Manifest.read(folder)
    task.keep(MANIFEST)
    documents = sum(split.documents for split in manifest.splits.values())
    counts = Counter({f"{name} tokens": split.tokens for name, split in manifest.splits.items()})
    characters = sum(split.characters for split in manifest.splits.values())
    return Summary(
        read=documents, kept=documents, characters_read=characters, characters_kept=characters, counts=counts
    )
