"""Published models by name, downloaded once into the cache that other tools share. Needs the `hub` extra.

What huggingface_hub does well is left to it: retries, resumed transfers, the token (which stays with the hub when a
file is redirected to another host), file names that lead out of the cache. Here it is told what to fetch, its waiting
is bounded, and what goes wrong becomes one line.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from qwen_jax.errors import FileError, ModelError, UserError

# What the hub allows, and revisions that stay in the cache's folder of them.
_NAME = re.compile(r"(?!.*(\.\.|--))[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@\w[\w.-]*(/\w[\w.-]*)*)?", re.ASCII)
_SAFETENSORS = ("*.safetensors", "model.safetensors.index.json")
# Not every .bin: beside the weights lie optimizer states and training arguments, which are pickles too.
_PICKLES = ("pytorch_model*.bin", "pytorch_model.bin.index.json")
# Folders (a pattern's * takes in slashes), and names that are not printable ASCII.
_LEFT_OUT = ("*/*", "*[!!-~]*")


def is_name(reference: str) -> bool:
    """Whether a reference reads as "owner/name" or "owner/name@revision"."""
    return _NAME.fullmatch(reference) is not None


def download(reference: str, *, allow_pickle_format: bool) -> Path:
    """The folder of a published model in the cache; what it lacks is fetched. Never code.

    The environment variables of huggingface_hub hold: HF_TOKEN, HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE and so on. When
    the hub cannot be reached, what is in the cache is used if it is complete.

    Args:
      reference: a name (see is_name). Without a revision it is the newest.
      allow_pickle_format: fetch weights in PyTorch's own format if there are none in safetensors.

    Raises:
      FileError: there is no such model, or access to it, or it cannot be fetched now, or the package is missing.
      ModelError: what is published under the name is not a model, or the hub's answer is not to be trusted.
    """
    from qwen_jax.weights.source import SIDE_FILES  # which imports this module

    try:
        import huggingface_hub
    except ImportError as error:
        raise FileError(
            f"{reference} is no folder here; to download published models: pip install 'qwen-jax[hub]'"
        ) from error
    name, _, revision = reference.partition("@")
    try:
        with _guarded(huggingface_hub.get_session()):
            # Every file comes from the commit that this one came from.
            config = huggingface_hub.hf_hub_download(name, "config.json", revision=revision or None)
            commit = Path(config).parent.name
            wanted = [*SIDE_FILES, *_SAFETENSORS]
            folder = _snapshot(name, commit, wanted)
            if allow_pickle_format and not _has_safetensors(folder):
                _snapshot(name, commit, [*wanted, *_PICKLES])
    except UserError:
        raise
    except Exception as error:  # the library lets through what its own libraries raise
        raise _explained(error, reference) from error
    if not allow_pickle_format and not _has_safetensors(folder):
        raise ModelError(
            f"{reference} has no weights in safetensors in {folder}; --allow-pickle-format reads PyTorch's own format"
        )
    return folder


def _snapshot(name: str, commit: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, revision=commit, allow_patterns=patterns, ignore_patterns=list(_LEFT_OUT)))


def _has_safetensors(folder: Path) -> bool:
    return any(folder.glob("*.safetensors"))


@contextlib.contextmanager
def _guarded(session: Any) -> Iterator[None]:
    """Adds to the HTTP session of huggingface_hub what it lacks: a bound on each wait, and a check of file names."""
    hooks = session.event_hooks
    hooks["request"].append(_bound_waiting)
    hooks["response"].append(_check_names)
    try:
        yield
    finally:
        hooks["request"].remove(_bound_waiting)
        hooks["response"].remove(_check_names)


def _bound_waiting(request: Any) -> None:
    """The library asks for lists of files without a timeout: a hub that says nothing would be waited for forever."""
    from huggingface_hub import constants

    waits = request.extensions["timeout"]
    waits.update({kind: constants.HF_HUB_DOWNLOAD_TIMEOUT for kind, seconds in waits.items() if seconds is None})


def _check_names(response: Any) -> None:
    """The library names folders and files in the cache by the commit and the ETag of a file, as they come."""
    headers = response.headers
    if (commit := headers.get("X-Repo-Commit")) is None:
        return
    etag = headers.get("X-Linked-Etag") or headers.get("ETag") or ""
    if not re.fullmatch("[0-9a-f]{40}", commit) or not re.fullmatch(r'(W/)?"?[\w-]*"?', etag):
        raise ModelError(
            f"{response.request.url.host} answers with commit {commit[:80]!r} and ETag {etag[:80]!r}, and hexadecimal "
            "hashes are wanted: set HF_ENDPOINT to another host"
        )


def _explained(error: Exception, reference: str) -> UserError:
    """One line about what huggingface_hub raised. It quotes no server and no request: they could hold the token."""
    from huggingface_hub import constants, errors

    host = urlsplit(constants.ENDPOINT).hostname or constants.ENDPOINT
    name, _, revision = reference.partition("@")
    if isinstance(error, errors.LocalEntryNotFoundError):  # neither fetched nor in the cache
        cause = error.__cause__
        if isinstance(cause, errors.OfflineModeIsEnabled):
            return FileError(
                f"{reference} is not complete in {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE is set: unset it, or "
                "give a folder"
            )
        error = cause if isinstance(cause, Exception) else error
    if not isinstance(error, errors.HfHubHTTPError):
        # Messages of HTTP libraries may quote a header; those of the system and of huggingface_hub do not.
        what = next(iter(str(error).splitlines()), "") if isinstance(error, OSError) else type(error).__name__
        return FileError(
            f"{reference} cannot be downloaded from {host}: {what}; try again, set HF_ENDPOINT to a host that can be "
            "reached, or give a folder"
        )
    status = f"HTTP {error.response.status_code}"
    if isinstance(error, errors.GatedRepoError):
        return FileError(f"{name} is gated ({status}): accept its licence on its page on {host} and set HF_TOKEN")
    if isinstance(error, errors.RevisionNotFoundError):
        return FileError(f"{name} has no revision {revision} ({status}): its page on {host} lists branches and tags")
    if isinstance(error, errors.EntryNotFoundError):
        return ModelError(f"{reference} on {host} lacks a file of a model, such as config.json ({status})")
    if isinstance(error, errors.RepositoryNotFoundError) or error.response.status_code == 404:
        return FileError(
            f"{reference} is no folder here and no model on {host} ({status}); if it is private, set HF_TOKEN"
        )
    if error.response.status_code in (401, 403):
        return FileError(f"{host} refuses {reference} ({status}): check HF_TOKEN and what it may read")
    return FileError(f"{host} cannot give {reference} now ({status}): try again later, or give a folder")
