"""A shard through a filter: what is kept, what is dropped and why."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from train.data.corpus.documents import Document, LinesWriter, read_documents
from train.data.corpus.tasks import DROPPED, EXCERPT, Summary, Task

DOCUMENTS = "jsonl.gz"
# Documents in, documents and reasons out; the reason is "" for what is kept. It may change a document, and count.
Filter = Callable[[Iterable[Document], Counter[str]], Iterator[tuple[Document, str]]]
# Between stages, speed counts; zlib's quickest level is four times as quick as its usual one.
LEVEL = 1


def run_filter(task: Task, *, keep: Filter, previous: str) -> Summary:
    """Runs a filter over the task's shard of the phase `previous`."""
    summary = Summary()

    def documents() -> Iterator[Document]:
        for document in read_documents(task.input(previous, DOCUMENTS)):
            summary.read += 1
            summary.characters_read += len(document.text)
            yield document

    write(task, keep(documents(), summary.counts), summary)
    return summary


def write(task: Task, judged: Iterable[tuple[Document, str]], summary: Summary) -> None:
    """Writes documents where they belong, and counts them."""
    with (
        LinesWriter(task.output(DOCUMENTS), level=LEVEL) as kept,
        LinesWriter(task.output(DROPPED), level=LEVEL) as dropped,
    ):
        for document, reason in judged:
            if not reason:
                kept.write(document.to_json())
                summary.kept += 1
                summary.characters_kept += len(document.text)
                continue
            name, _, detail = reason.partition(": ")
            notes = {"detail": detail} if detail else {}
            example = {"id": document.id, "reason": name, **notes, "text": document.text[:EXCERPT]}
            dropped.write(json.dumps(example, ensure_ascii=False) + "\n")
            summary.drop(name, example)
