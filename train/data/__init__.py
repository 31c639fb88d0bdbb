"""From text to batches: the schema (config), documents (sources), tokens (prepared, shards), batches (rows).

The schema is here at once; the rest is imported at first use, because a config is read without numpy or grain.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from train.data.config import (
    Conversations,
    Data,
    Mixture,
    Part,
    Preferences,
    PythonStdlib,
    Text,
    TokenizerFile,
    TrainBPE,
)

if TYPE_CHECKING:
    from train.data.entropy import ngram_entropy
    from train.data.prepared import Corpus, prepare
    from train.data.rows import Rows
    from train.data.shards import TokenShards

_HOME = {
    "Corpus": "train.data.prepared",
    "prepare": "train.data.prepared",
    "ngram_entropy": "train.data.entropy",
    "Rows": "train.data.rows",
    "TokenShards": "train.data.shards",
}

__all__ = [
    # schema
    "Conversations",
    "Data",
    "Mixture",
    "Part",
    "Preferences",
    "PythonStdlib",
    "Text",
    "TokenizerFile",
    "TrainBPE",
    # tokens on disk
    "Corpus",
    "TokenShards",
    "prepare",
    # batches
    "Rows",
    # what simple models reach
    "ngram_entropy",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
