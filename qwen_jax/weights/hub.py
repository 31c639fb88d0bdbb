"""Published models by name, downloaded once into the cache that other tools share. Needs the `hub` extra."""

from __future__ import annotations

import re
from pathlib import Path

from qwen_jax.errors import ConfigError, FileError, ModelError

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")

def is_name(reference: str) -> bool:
    """Whether a reference reads as "owner/name" or "owner/name@revision"."""
    return _NAME.fullmatch(reference) is not None
