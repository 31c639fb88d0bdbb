"""A training run, from its config to its last checkpoint, read downwards."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from qwen_jax.errors import ConfigError, DataError, NumericalError
from qwen_jax.sharding import make_mesh
from qwen_jax.weights.checkpoint import Checkpoint, Checkpoints
from train import directory as run_directory
from train import objectives, optim
from train.config import TrainConfig
from train.data import Corpus, Rows, ngram_entropy, prepare
from train.feed import put_batch
from train.progress import Report
from train.record import Record
from train.saving import Saver
from train.step import State, initial_state, make_eval_step, make_train_step, restored_state
from train.stop import Stop

T = TypeVar("T")


def run(config: TrainConfig, text: str, *, resume: bool = False, fresh: bool = False) -> int:
    """Trains, from the newest valid checkpoint in the run directory or from the start, and prints how it went.

    Args:
      config: the run.
      text: the config as it is to be kept in the run directory and in every checkpoint.
      resume: there must be a checkpoint to go on from.
      fresh: there must be nothing in the run directory.

    Returns:
      The exit code: 0 when all steps are done; 75 or 130 when asked to stop, with the state saved.
    """
    join_hosts()
    first_host = jax.process_index() == 0
    report = Report(quiet=not first_host)
    with contextlib.ExitStack() as stack:
        # Directory: ours alone, writable, and not of another run.
        directory = Path(config.run_dir)
        if first_host:
            stack.enter_context(run_directory.claim(directory, warn=report.warn))
            if fresh:
                run_directory.check_empty(directory)
            run_directory.check_same_run(directory, config)
        checkpoints = Checkpoints(directory / "checkpoints", keep=config.checkpoint.keep, warn=report.warn)
        checkpoint = checkpoints.latest_valid()
        if resume and checkpoint is None:
            raise ConfigError(f"--resume wants a checkpoint in {directory}, and there is none; leave --resume away")

        # Mesh
        mesh = make_mesh(**dataclasses.asdict(config.mesh))
        stack.enter_context(jax.set_mesh(mesh))
        unroll = unrolled(config, mesh)

        # Data
        corpus = first_host_first(lambda: prepare(config.data, directory, seed=config.seed, report=report.line))
        check_corpus(corpus, config, checkpoint)
