"""Points for documents, from a Qwen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from train.data.corpus.config import Quality
from train.data.corpus.documents import Document

POINTS = ("0", "1", "2", "3", "4", "5")


def keep(documents: Iterable[Document], counts: Counter[str], *, settings: Quality) -> Iterator[tuple[Document, str]]:
    """Notes the score of each document, and keeps those that have enough."""
    from train.data.corpus.judge import ask  # jax is loaded only by those who ask a model

    for document, shares in ask(documents, settings, settings.question, POINTS):
        score = round(sum(int(points) * share for points, share in shares.items()), 3)
        document.notes["quality"] = score
        counts[f"score {int(score)} to {int(score) + 1}"] += 1
        yield document, f"quality: {score}" if score < settings.min_score else ""
