"""Stop strings in text that arrives in pieces."""

from __future__ import annotations

from collections.abc import Sequence

from qwen_jax.errors import ConfigError


class StopStrings:
    """Passes text through up to the first occurrence of any stop string, wherever the pieces are cut.

    Text that may still turn out to begin a stop string is held back until it is decided. What comes out, joined, is
    `text[:min(text.find(stop))]` over the stops that occur, whatever the pieces were.

    Attributes:
      found: whether a stop string has been reached; what is pushed after that is ignored.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if "" in stops:
            raise ConfigError("a stop string must not be empty: it would stop every text before it begins")
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """The text that is now certain to stand before any stop string."""
        if self.found:
            return ""
        text = self._held + text
        first = self._first(text)
        # A stop string may have begun before one that is complete, as "abc" before "b" in "ab".
        undecided = next((i for i in range(min(first, len(text))) if self._may_begin(text[i:])), len(text))
        self.found = first < undecided
        shown = min(first, undecided)
        self._held = "" if self.found else text[shown:]
        return text[:shown]

    def finish(self) -> str:
        """The text held back, once no more can come; sets `found` if a stop string was in it."""
        text, self._held = self._held, ""
        first = self._first(text)
        self.found |= first < len(text)
        return text[:first]

    def _first(self, text: str) -> int:
        """Where the first stop string in `text` begins, or its length."""
        return min((i for stop in self._stops if (i := text.find(stop)) >= 0), default=len(text))

    def _may_begin(self, text: str) -> bool:
        return any(stop.startswith(text) for stop in self._stops)
