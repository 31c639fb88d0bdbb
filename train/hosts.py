"""The hosts of a run, a process each: how they meet, and what one hands the others."""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from qwen_jax.errors import ConfigError

T = TypeVar("T")


def join() -> None:
    """Joins the other processes of a run on several hosts, before any device is touched.

    They are found through JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or on TPUs by jax itself, from
    the environment of GKE or the metadata of a Cloud TPU VM. Otherwise this process is the whole run.
    """
    if "JAX_COORDINATOR_ADDRESS" in os.environ:
        try:
            processes, process = (int(os.environ[name]) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
        except (KeyError, ValueError) as error:
            raise ConfigError(
                f"with JAX_COORDINATOR_ADDRESS set, JAX_NUM_PROCESSES and JAX_PROCESS_ID must be numbers: {error}"
            ) from error
        jax.distributed.initialize(os.environ["JAX_COORDINATOR_ADDRESS"], processes, process)
    elif (jax.config.jax_platforms or "").startswith("tpu"):  # which jax sets where there are TPUs
        try:
            jax.distributed.initialize()
        except (ValueError, OSError) as error:  # nobody knows of other hosts, as in a notebook
            print(f"train: this host is the whole run, since jax finds no others: {error}", file=sys.stderr)


def share(count: int) -> slice:
    """Which of so many things are this host's: one run of them, as long as that of any other, or one longer."""
    hosts, host = jax.process_count(), jax.process_index()
    return slice(count * host // hosts, count * (host + 1) // hosts)


def together(work: Callable[[], T]) -> list[T]:
    """What `work` gives on each host, in their order, which all of them get; all call this at the same point.

    What it raises on one is raised on all: none waits for what never comes.
    """
    if jax.process_count() == 1:
        return [work()]
    try:
        mine: tuple[Any, Exception | None] = work(), None
    except Exception as error:
        mine = None, _sendable(error)
    found = [pickle.loads(each) for each in _gathered(pickle.dumps(mine))]
    for _, error in found:
        if error is not None:
            raise error
    return [value for value, _ in found]


def _sendable(error: Exception) -> Exception:
    """The error, or one that says the same where it cannot be sent: the others would wait for ever."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _gathered(mine: bytes) -> list[bytes]:
    """The bytes of each host."""
    sizes = multihost_utils.process_allgather(np.int32(len(mine))).tolist()
    # The exchange is compiled for each size.
    room = np.zeros(1 << (max(sizes) - 1).bit_length(), np.uint8)
    room[: len(mine)] = np.frombuffer(mine, np.uint8)
    found = multihost_utils.process_allgather(room)
    return [row[:size].tobytes() for row, size in zip(found, sizes, strict=True)]
