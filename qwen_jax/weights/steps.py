"""The step folders of a run: their names, whether they verify, which is the newest, what becomes of broken ones."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Collection
from pathlib import Path

from qwen_jax.errors import FileError, ModelError
from qwen_jax.weights.manifest import FILE_NAME, Broken, Manifest

ARRAYS = "arrays"  # the part of a step that Orbax writes, with a folder for each item
ITEMS = ("params", "optimizer", "critic")
STEP_NAME = "[0-9]{8}|[1-9][0-9]{8,}"


def folder_name(step: int) -> str:
    return f"{step:08d}"


def step_folders(root: Path) -> dict[int, Path]:
    """The folders with the name of a step, oldest first; there may be no checkpoint in them."""
    try:
        paths = [path for path in root.iterdir() if re.fullmatch(STEP_NAME, path.name) and path.is_dir()]
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise FileError(f"checkpoints in {root} cannot be listed: {error.strerror}") from error
    return {int(path.name): path for path in sorted(paths, key=lambda path: int(path.name))}


def verify(folder: Path, items: Collection[str]) -> int:
    """The step in a folder whose files are right; arrays of other items than `items` are checked by size alone.

    Raises Broken with the reason, ModelError if a newer release wrote it.
    """
    contents = Manifest.read(folder)
    others = tuple(f"{ARRAYS}/{item}/" for item in ITEMS if item not in items)
    contents.check(folder, lambda name: not name.startswith(others))
    return contents.step


def newest_valid(
    root: Path, items: Collection[str], warn: Callable[[str], None], set_aside: Callable[[Path], str]
) -> int | None:
    """The newest step that verifies, the arrays of `items` included; None if there is no step.

    Broken steps newer than it go through `set_aside`, and `warn` gets a line for each.

    Raises ModelError if there are steps and all are broken; nothing is set aside then.
    """
    broken: list[tuple[Path, Broken]] = []
    for step, folder in reversed(step_folders(root).items()):
        try:
            if verify(folder, items) != step:
                raise Broken(folder, f"{FILE_NAME} belongs to another step")
        except Broken as error:
            if not folder.exists():  # a running training has just deleted it as too old: look again
                return newest_valid(root, items, warn, set_aside)
            if any(folder.iterdir()):  # else an empty folder, which no save of ours leaves
                broken.append((folder, error))
            continue
        for path, error in broken:
            warn(f"{error}; {set_aside(path)}, step {step} is used instead")
        return step
    if broken:
        reasons = "; ".join(f"{path.name}: {error.reason}" for path, error in broken)
        raise ModelError(f"every checkpoint in {root} is broken: {reasons}")
    return None


def quarantine(folder: Path) -> str:
    """Renames a broken step to NAME.corrupt, or .corrupt-2 and so on; returns what became of it, in words."""
    names = (f"{folder.name}.corrupt" + (f"-{n}" if n > 1 else "") for n in itertools.count(1))
    free = next(path for path in map(folder.with_name, names) if not path.exists())
    try:
        folder.rename(free)
    except OSError as error:  # what is wanted is the valid step, and that can be read
        return f"it cannot be renamed ({error.strerror})"
    return f"renamed to {free.name}"
