"""What models are asked with: the texts in `prompts/`, or files of the user's, with {{names}} where something goes."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from qwen_jax.errors import ConfigError, FileError

FOLDER = Path(__file__).with_name("prompts")
_PLACE = re.compile(r"\{\{(\w+)\}\}")


class Prompt:
    """A text with places.

    Attributes:
      name: of the prompt, or of its file without the ending.
      text: all of it.
      words: the text without its places.
    """

    def __init__(self, name: str, wanted: Collection[str]) -> None:
        """
        Args:
          name: of a prompt of ours, or a path: what has a slash or ends in .txt.
          wanted: places that it must have, and no others.

        Raises ConfigError for an unknown name or place, FileError.
        """
        is_path = "/" in name or name.endswith(".txt")
        path = Path(name).expanduser() if is_path else FOLDER / f"{name}.txt"
        ours = sorted(prompt.stem for prompt in FOLDER.glob("*.txt"))
        if not is_path and name not in ours:
            raise ConfigError(f"there is no prompt {name!r}; there are {', '.join(ours)}, or give a .txt file")
        try:
            self.text = path.read_text("utf-8").strip()
        except (OSError, ValueError) as error:
            raise FileError(f"cannot read the prompt {path}: {error}") from error
        places = set(_PLACE.findall(self.text))
        if places != set(wanted):
            shown = lambda names: ", ".join(f"{{{{{place}}}}}" for place in sorted(names)) or "none"
            raise ConfigError(f"{path} has the places {shown(places)}; want {shown(wanted)}")
        self.name = path.stem
        self.words = _PLACE.sub("\n", self.text)

    def fill(self, **values: str) -> str:
        """The text with something in each place, which is put in as it is."""
        return _PLACE.sub(lambda match: values[match[1]], self.text)
