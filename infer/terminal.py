"""What goes to the terminal besides the text of a model."""

from __future__ import annotations

import os
import sys

FAINT, PLAIN = "\033[2m", "\033[0m"
# A model's text may hold sequences that a terminal obeys: control characters are shown as pictures of them.
_PICTURES = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"} | {0x7F: 0x2421}
_PICTURES |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


def has_colour() -> bool:
    """Whether standard output is a terminal with styles, and the user has not said NO_COLOR."""
    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb" and not os.environ.get("NO_COLOR")


def faint(text: str) -> str:
    """`text` in faint letters, where there are styles."""
    return f"{FAINT}{text}{PLAIN}" if has_colour() else text


def safe(text: str) -> str:
    """`text` as it is, but on a terminal with nothing in it that the terminal would obey."""
    return text.translate(_PICTURES) if sys.stdout.isatty() else text


def warn(line: str) -> None:
    print(f"infer: warning: {line}", file=sys.stderr)


def note(text: str) -> None:
    """Tells on standard error what a tool is asked and answers, which is no text of the model's to its user."""
    if sys.stderr.isatty():
        text = text.translate(_PICTURES)
    print(faint(text), file=sys.stderr)
