"""Checkpoints of a run: saved in the background, all or nothing, and verified before they are used.

    checkpoints/
      00000100/            one step: a whole checkpoint, or it is not there
        arrays/            written by Orbax: params and, for training, optimizer, each in a folder of its own
        model.json ...     the files given to save()
        manifest.json      written last (manifest.py)
      .00000200-1.tmp/     being written; renamed when all of it is on the disk
      00000150.corrupt/    did not verify when the run resumed; kept for people to look at

Arrays are stored under their path in the tree ("layers/attention/q/w"), so what a step holds does not depend on the
containers of the library that made it, on the mesh, or on the number of devices and processes.

With several processes (`jax.distributed`, one shared file system) all of them call save, wait, latest_valid,
open_checkpoint and load, in the same order: each writes and reads its shards, process 0 does the rest and decides.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import warnings
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from qwen_jax.errors import ConfigError, FileError, ModelError, UserError
from qwen_jax.weights import manifest
from qwen_jax.weights.manifest import Manifest
from qwen_jax.weights.steps import ARRAYS, ITEMS, folder_name, newest_valid, quarantine, step_folders, verify

DATA_FILE_BYTES = 256 * 2**20  # a large checkpoint becomes many files, so that threads can share the hashing
SAVE_TIMEOUT = 1800  # seconds; of several processes, it is also when the others learn that one could not write

# Orbax logs a traceback per thread for each failure. All of them reach us as exceptions, which become one line.
logging.getLogger("absl").addFilter(lambda record: "/orbax/" not in record.pathname)


class Checkpoint:
    """One verified step; made by latest_valid() and open_checkpoint().

    Attributes:
      path: its folder.
      step: training step.
      meta: what was given to save() as `meta`.
      files: names of the files given to save().
    """

    def __init__(self, path: Path, *, verified: Collection[str]) -> None:
        self.path = path
        self._manifest = Manifest.read(path)
        self._verified = set(verified)
        self.step = self._manifest.step
        self.meta = self._manifest.meta
        self.files = [file for file in self._manifest.files if "/" not in file]

    def read(self, name: str) -> bytes:
        """The contents of a file given to save(). Raises ModelError if there is none of that name."""
        if name not in self.files:
            raise ModelError(f"checkpoint {self.path} has no file {name}; it has {', '.join(self.files) or 'none'}")
        try:
            return (self.path / name).read_bytes()
        except OSError as error:
            raise FileError(f"{self.path / name} cannot be read: {reason(error)}") from error

    def shapes(self, item: str) -> dict[str, tuple[int, ...]]:
        """The shape of each array of an item, by its path in the tree."""
        return {path: tuple(array["shape"]) for path, array in self._manifest.arrays.get(item, {}).items()}

    def load(self, item: str, like: Any) -> Any:
        """The arrays of an item, in the tree and on the shardings of `like`; nothing of other items is read.

        Args:
          item: "params", "optimizer" or "critic".
          like: tree of jax.ShapeDtypeStruct with sharding (without: the first device), or of arrays.

        Raises ModelError if a name, shape or dtype differs (nothing is cast), or if the files are damaged.
        """
        stored, wanted = self._manifest.arrays.get(item), _by_path(like)
        if stored is None:
            raise ModelError(f"checkpoint {self.path} has {' and '.join(self._manifest.arrays)} but no {item}")
        if found := _differences(item, stored, wanted):
            more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
            raise ModelError(f"checkpoint {self.path} does not fit what is asked: {'; '.join(found[:3])}{more}")
        if item not in self._verified:
            _on_first_process(lambda: verify(self.path, [item]))
            self._verified.add(item)
        if not wanted:  # an optimizer may have no state, and Orbax refuses a tree without arrays
            return like
        alone = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        target = {k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or alone) for k, x in wanted.items()}
        try:
            arrays = ocp.load(str(self.path / ARRAYS), target, checkpointable_name=item)
        except Exception as error:  # TensorStore's errors have no class of their own
            raise ModelError(f"checkpoint {self.path}: {item} cannot be loaded: {reason(error)}") from error
        return jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in wanted])


def open_checkpoint(
    path: Path, *, items: Collection[str] = ("params",), warn: Callable[[str], None] = warnings.warn
) -> Checkpoint:
    """A checkpoint to load weights from; nothing on the disk is changed.

    Args:
      path: a step folder; or a checkpoints folder or a run folder, for the newest valid step.
      items: those whose arrays are verified here, the others when they are loaded.
      warn: takes one line about each newer step that was passed over because it is broken.

    Raises FileError if the path does not exist, ModelError if there is no valid checkpoint.
    """
    path = Path(path).expanduser().absolute()
    if not path.exists():
        raise FileError(f"{path} does not exist; wanted a step folder, a checkpoints folder or a run folder")
    if (path / manifest.FILE_NAME).exists():
        _on_first_process(lambda: verify(path, items))
        return Checkpoint(path, verified=items)
    root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    step = _on_first_process(lambda: newest_valid(root, items, warn, lambda _: "left as it is"))
    if step is None:
        raise ModelError(
            f"{path} is not a checkpoint: it has no {manifest.FILE_NAME}, no step folder such as {folder_name(100)}, "
            "and no checkpoints folder with one"
        )
    return Checkpoint(root / folder_name(step), verified=items)


class Checkpoints:
    """The checkpoints folder of a run, which has one writer. Call wait() before leaving, or the last save is lost.

    Attributes:
      best: a step that stays although there are newer ones; None for none.
    """

    def __init__(self, root: Path, *, keep: int = 3, warn: Callable[[str], None]) -> None:
        """Touches no file yet.

        Args:
          root: the folder; made by the first save.
          keep: how many of the newest steps stay.
          warn: takes one line about something that was survived, possibly from another thread.
        """
        if keep < 1:
            raise ConfigError(f"keep={keep} must be at least 1: it counts the newest checkpoints that stay")
        self._root = Path(root).expanduser().absolute()
        self._keep = keep
        self._warn = warn
        self.best: int | None = None
        self._saves = 0
        self._pending: Future[None] | None = None
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")

    def save(
        self,
        step: int,
        *,
        params: Any,
        optimizer: Any = None,
        critic: Any = None,
        files: Mapping[str, bytes],
        meta: Mapping[str, Any],
    ) -> None:
        """Copies the arrays to the host and returns; the rest happens in the background.

        The arrays may be donated or deleted at once. No two saves overlap: this waits for the one before.

        Args:
          step: training step, one that is not saved yet.
          params: tree of jax.Array.
          optimizer: tree of jax.Array; None for weights alone.
          critic: likewise, of a run that trains another model beside its own.
          files: plain name -> contents, stored beside the arrays.
          meta: JSON values.

        Raises FileError if the step exists, if the folder cannot be written, or if the save before this one failed;
        in that last case nothing was started, and the next call will try.
        """
        self.wait()
        given = {"params": params, "optimizer": optimizer, "critic": critic}
        items = {item: _by_path(tree) for item, tree in given.items() if tree is not None}
        arrays = {item: {path: _describe(x) for path, x in named.items()} for item, named in items.items()}
        if reserved := [name for name in files if "/" in name or name in (ARRAYS, manifest.FILE_NAME)]:
            raise ValueError(f"files named {reserved} cannot be stored: a plain name is wanted, none of ours")
        # Copies, since they are written later; of meta in the form in which it will be read back.
        files, notes = dict(files), json.loads(json.dumps(meta, allow_nan=False))
        # A new name each time: after a failure, threads of Orbax may still be writing to the old one.
        self._saves += 1
        temporary = self._root / f".{folder_name(step)}-{self._saves}.tmp"
        _on_first_process(lambda: self._make_room(step, temporary))
        try:
            response = _start(temporary / ARRAYS, items)
        except OSError as error:
            raise self._not_saved(step, error) from error

        def finish() -> None:
            try:
                response.result()  # of all processes: Orbax ends with a barrier
                if jax.process_index() == 0:
                    for name, contents in files.items():
                        (temporary / name).write_bytes(contents)
                    Manifest.seal(temporary, step=step, meta=notes, arrays=arrays)
                    os.rename(temporary, self._root / folder_name(step))
                    manifest.sync(self._root)
                    self._delete_older_than(step)
            except Exception as error:  # TensorStore's errors have no class of their own
                with contextlib.suppress(OSError):  # the next save removes what is left
                    _delete(temporary)
                raise self._not_saved(step, error) from error

        self._pending = self._worker.submit(finish)

    def wait(self) -> None:
        """Returns once the last save is on the disk under its name. Raises FileError, once, if it failed."""
        if self._pending is None:
            return
        error = self._pending.exception()
        self._pending = None
        failed = _on_first_process(lambda: int(error is not None))
        if error:
            raise error
        if failed:
            raise FileError("the last checkpoint could not be saved: process 0 failed, and says why")

    def steps(self) -> list[int]:
        """The finished steps, oldest first, not verified."""
        return [step for step, folder in step_folders(self._root).items() if (folder / manifest.FILE_NAME).exists()]

    def folder(self, step: int) -> Path:
        """Where a step is, or will be."""
        return self._root / folder_name(step)

    def latest_valid(self) -> Checkpoint | None:
        """The newest step that verifies, or None if there is no step.

        Newer ones that do not are renamed NAME.corrupt, with a line to `warn` for each.

        Raises ModelError, and renames nothing, if there are steps and all are broken: the run must not start anew.
        """
        step = _on_first_process(lambda: newest_valid(self._root, ITEMS, self._warn, quarantine))
        return None if step is None else Checkpoint(self._root / folder_name(step), verified=ITEMS)

    def _not_saved(self, step: int, error: Exception) -> FileError:
        return FileError(f"step {step} could not be saved in {self._root}: {reason(error)}")

    def _make_room(self, step: int, temporary: Path) -> None:
        """Makes the temporary folder, and removes those of saves that were killed."""
        final = self._root / folder_name(step)
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            for path in self._root.iterdir():
                if re.fullmatch(r"\.[0-9]{8,}.*\.(tmp|deleted)", path.name):
                    shutil.rmtree(path, ignore_errors=True)
            if final.exists() and any(final.iterdir()):
                raise FileError(f"{final} exists: step {step} is saved already, or the folder is not ours")
            temporary.mkdir()
        except OSError as error:
            raise FileError(f"checkpoints cannot be written to {self._root}: {reason(error)}") from error

    def _delete_older_than(self, step: int) -> None:
        """Leaves, of the steps up to this one, as many as are to be kept, and the best."""
        older = [other for other in self.steps() if other < step and other != self.best]
        for old in older[: max(0, len(older) + 1 - self._keep)]:
            folder = self._root / folder_name(old)
            try:
                _delete(folder)
            except OSError as error:
                self._warn(f"old checkpoint {folder} could not be deleted: {reason(error)}")


def _by_path(tree: Any) -> dict[str, Any]:
    """The leaves by their path in the tree, as in "layers/attention/q/w" or "1/0/mu/embed/w"."""
    leaves = jax.tree.leaves_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    if len(named) != len(leaves):
        raise ValueError("two arrays of the tree have the same path: there is a slash in a key")
    return named


def _describe(array: Any) -> dict[str, Any]:
    return {"shape": list(array.shape), "dtype": str(array.dtype)}


def _differences(item: str, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """What keeps `stored` from being loaded as `wanted`, a phrase for each difference."""
    found = [f"{item}/{path} is not in the checkpoint" for path in wanted if path not in stored]
    found += [f"{item}/{path} is in the checkpoint only" for path in stored if path not in wanted]
    for path in [path for path in wanted if path in stored]:
        asked = _describe(wanted[path])
        found += [
            f"{item}/{path} has {key} {value} in the checkpoint, {asked[key]} is asked"
            for key, value in stored[path].items()
            if value != asked[key]
        ]
    return found


def _start(path: Path, items: Mapping[str, Mapping[str, jax.Array]]) -> ocp.AsyncResponse[None]:
    """Copies arrays to the host and begins to write them; result() waits for the end."""
    context = ocp.Context()
    context.asynchronous.timeout_secs = SAVE_TIMEOUT
    context.asynchronous.create_directories_asynchronously = False  # else leaving without wait() hangs for 5 minutes
    context.array.saving.ocdbt_target_data_file_size = DATA_FILE_BYTES
    context.array.saving.use_compression = False  # makes float32 weights 8 % smaller, and takes 3 times as long
    with context:
        return ocp.save_checkpointables_async(str(path), {item: dict(named) for item, named in items.items() if named})


def _delete(folder: Path) -> None:
    """Deletes a folder; renamed first, so that whoever opens or publishes it meanwhile has all of it or nothing."""
    shutil.rmtree(folder.rename(folder.with_name(f".{folder.name.lstrip('.')}.deleted")))


def reason(error: Exception) -> str:
    """Why a file could not be read or written, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if code := re.search(r"os_error_code='(\d+)'", str(error)):  # how TensorStore hands on what the system said
        return os.strerror(int(code[1]))
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def _on_first_process(compute: Callable[[], int | None]) -> int | None:
    """`compute()` of process 0, on all processes; where it raises, the others raise too."""
    if not jax.distributed.is_initialized():
        return compute()
    result, failure = None, None
    if jax.process_index() == 0:
        try:
            result = compute()
        except Exception as error:  # whatever it is, the other processes are waiting
            failure = error
    exit_code = getattr(failure, "exit_code", UserError.exit_code) if failure else 0
    sent = np.array([exit_code, -1 if result is None else result], np.int32)
    exit_code, number = multihost_utils.broadcast_one_to_all(sent).tolist()
    if failure:
        raise failure
    if exit_code:
        known = {error.exit_code: error for error in (FileError, ModelError)}
        raise known.get(exit_code, UserError)("process 0 cannot go on with its checkpoints, and says why")
    return None if number < 0 else number
