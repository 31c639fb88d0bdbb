"""The language of a document, as py3langid tells it from its beginning."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from qwen_jax.errors import ConfigError, FileError
from train.data.corpus.config import Language
from train.data.corpus.documents import Document

MAX_CHARACTERS = 4000  # more of a text does not change the answer


def keep(documents: Iterable[Document], counts: Counter[str], *, settings: Language) -> Iterator[tuple[Document, str]]:
    """Notes the language of each document, and keeps the wanted ones."""
    classifier = identifier()
    if unknown := set(settings.keep) - set(classifier.labels):
        raise ConfigError(f"language.keep has {sorted(unknown)}; there is {', '.join(sorted(classifier.labels))}")
    for document in documents:
        language, confidence = classifier.classify(document.text[:MAX_CHARACTERS])
        document.notes["language"] = language
        counts[language] += 1
        if settings.keep and language not in settings.keep:
            yield document, f"another language: {language}"
        elif confidence < settings.min_confidence:
            yield document, f"unsure of the language: {language} {confidence:.2f}"
        else:
            yield document, ""


@functools.cache
def identifier() -> Any:
    """The classifier, whose model is in its package; loading it takes a second. A FileError without py3langid."""
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        raise FileError("the stage `language` needs the package py3langid: pip install 'qwen-jax[corpus]'") from None
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
