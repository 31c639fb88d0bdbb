"""Published models by name, downloaded once into the cache that other tools share. Needs the `hub` extra.

What huggingface_hub does well is left to it: retries, resumed transfers, the token (which stays with the hub when a
file is redirected to another host). Here it is told what to fetch, its waiting is bounded, and what goes wrong becomes
one line.
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
    the hub cannot be reached, a model that is in the cache is used.

    Args:
      reference: a name (see is_name). Without a revision it is the newest.
      allow_pickle_format: fetch weights in PyTorch's own format if there are none in safetensors.

    Raises:
      FileError: there is no such model, or access to it, or it cannot be fetched now, or the package is missing.
      ModelError: what is published under the name is not a model, or the hub's answer is not to be trusted.
    """
    try:
        import huggingface_hub  # noqa: F401  (an extra)
    except ImportError as error:
        raise FileError(
            f"{reference} is no folder here; to download published models: pip install 'qwen-jax[hub]'"
        ) from error
    try:
        return _fetch(reference, allow_pickle_format)
    except UserError:
        raise
    except Exception as error:  # the library lets through what its own libraries raise
        raise _explained(error, reference) from error


def _fetch(reference: str, allow_pickle_format: bool) -> Path:
    import huggingface_hub

    from qwen_jax.weights.source import SIDE_FILES  # which imports this module

    name, _, revision = reference.partition("@")
    wanted = [*SIDE_FILES, *_SAFETENSORS]
    with _guarded():
        config = huggingface_hub.hf_hub_download(name, "config.json", revision=revision or None)
    commit = Path(config).parent.name  # and every other file comes from it, too
    folder = _snapshot(name, commit, wanted)
    if allow_pickle_format and not any(folder.glob("*.safetensors")):
        _snapshot(name, commit, [*wanted, *_PICKLES])
    if not any(path.match(pattern) for path in folder.iterdir() for pattern in (*_SAFETENSORS, *_PICKLES)):
        # A snapshot may be what was in the cache, and says nothing of a hub that did not list its files. This does.
        with _guarded():
            huggingface_hub.HfApi().list_repo_files(name, revision=commit)
        raise ModelError(
            f"{reference} has no weights in safetensors; --allow-pickle-format reads PyTorch's own format, where there "
            "is that"
        )
    return folder


def _snapshot(name: str, commit: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    with _guarded():
        return Path(snapshot_download(name, revision=commit, allow_patterns=patterns, ignore_patterns=list(_LEFT_OUT)))


@contextlib.contextmanager
def _guarded() -> Iterator[None]:
    """Adds to the HTTP session of huggingface_hub what it lacks: a bound on each wait, and a check of file names."""
    from huggingface_hub import get_session

    hooks = get_session().event_hooks
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

    limit = constants.HF_HUB_DOWNLOAD_TIMEOUT
    waits = request.extensions["timeout"]
    waits.update({kind: limit if seconds is None else min(seconds, limit) for kind, seconds in waits.items()})


def _check_names(response: Any) -> None:
    """The library names folders and files in the cache by the commit and the ETag of a file, just as they come."""
    if response.request.method != "HEAD":  # by which it asks for them
        return
    commit = response.headers.get("X-Repo-Commit", "")
    etag = response.headers.get("X-Linked-Etag") or response.headers.get("ETag", "")
    # Some hashes are in base64, with slashes inside; without dots they lead nowhere.
    if re.fullmatch("([0-9a-f]{40})?", commit) and re.fullmatch(r'((W/)?"?[\w+=-][\w+/=-]{,127}"?)?', etag):
        return
    raise ModelError(
        f"{response.request.url.host} gives a file the commit {commit[:80]!r} and the ETag {etag[:80]!r}, which are no "
        "hashes: set HF_ENDPOINT to another host"
    )


def _explained(error: Exception, reference: str) -> UserError:
    """One line about what huggingface_hub raised."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # what kept the library from the hub before it looked into the cache
    if isinstance(error, errors.OfflineModeIsEnabled):
        return FileError(
            f"{reference} is not complete in {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE is set: unset it, or give a "
            "folder"
        )
    if isinstance(error, errors.HfHubHTTPError):
        return _refused(error, reference)
    if isinstance(error, OSError) and error.strerror:
        return FileError(
            f"{reference} cannot be kept in {constants.HF_HUB_CACHE}: {error.strerror}; HF_HOME may be another folder"
        )
    # A plain OSError is about the size of a file. What others say may quote a header or an address, secrets included.
    what = str(error).partition("\n")[0] if type(error) is OSError else type(error).__name__
    return FileError(
        f"{reference} cannot be fetched from {_host()}: {what}; try again, set HF_ENDPOINT to a host that can be "
        "reached, or give a folder"
    )


def _refused(error: Any, reference: str) -> UserError:
    """One line about an HfHubHTTPError."""
    from huggingface_hub import errors

    host, code = _host(), error.response.status_code
    name, _, revision = reference.partition("@")
    if isinstance(error, errors.GatedRepoError):
        return FileError(f"{name} is gated (HTTP {code}): accept its licence on its page on {host} and set HF_TOKEN")
    if isinstance(error, errors.RevisionNotFoundError):
        return FileError(f"{name} has no revision {revision} (HTTP {code}): its page on {host} lists what it has")
    if isinstance(error, errors.EntryNotFoundError):
        return ModelError(f"{reference} on {host} lacks config.json, or another file that it lists (HTTP {code})")
    if isinstance(error, errors.RepositoryNotFoundError) or code == 404:
        return FileError(
            f"{reference} is no folder here and no model on {host} (HTTP {code}); if it is private, set HF_TOKEN"
        )
    if code in (401, 403):
        return FileError(f"{host} refuses {reference} (HTTP {code}): check HF_TOKEN and what it may read")
    return FileError(f"{host} cannot give {reference} now (HTTP {code}): try again later, or give a folder")


def _host() -> str:
    """The hub's host, without what else HF_ENDPOINT may hold, such as a password."""
    from huggingface_hub import constants

    return urlsplit(constants.ENDPOINT).hostname or "HF_ENDPOINT"
