"""A training run, from its config to its last checkpoint, read downwards."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import sys
from pathlib import Path

import jax
from jax.sharding import Mesh

from qwen_jax.errors import ConfigError, DataError, NumericalError
from qwen_jax.sharding import make_mesh
from qwen_jax.weights.checkpoint import Checkpoint, Checkpoints
from train import directory as run_directory
from train import plot
from train.config import TrainConfig
from train.data import Corpus, Rows, prepare
from train.evaluation import HeldOut
from train.feed import abstract_batch, put_batch
from train.profiler import Profiler
from train.progress import Report
from train.record import Record
from train.saving import Saver
from train.step import Metrics, abstract_state, configured, initial_state, restored_state, unrolled
from train.stop import Stop


def run(config: TrainConfig, text: str, *, resume: bool = False, fresh: bool = False) -> int:
    """Trains from the newest valid checkpoint of the run directory, or from the start, and prints how it went.

    Args:
      config: the run.
      text: the config as it is to be kept in the run directory and in every checkpoint.
      resume: there must be a checkpoint to go on from.
      fresh: there must be nothing in the run directory.

    Returns:
      The exit code: 0 when all steps are done; 75 or 130 when asked to stop, with the state saved.

    Raises:
      UserError: of every kind; NumericalError at the first loss or gradient that is not finite.
    """
    join_hosts()
    first_host = jax.process_index() == 0
    report = Report(quiet=not first_host)
    with contextlib.ExitStack() as stack:
        # Directory: writable, ours alone, and of no other run; all this before anything is compiled.
        directory = Path(config.run_dir).expanduser()
        if first_host:
            stack.enter_context(run_directory.claim(directory, warn=report.warn))
            if fresh:
                run_directory.check_empty(directory)
            run_directory.check_same_run(directory, config)
        checkpoints = Checkpoints(directory / "checkpoints", keep=config.checkpoint.keep, warn=report.warn)
        checkpoint = checkpoints.latest_valid()
        if resume and checkpoint is None:
            raise ConfigError(f"--resume wants a checkpoint in {directory}, and there is none; leave --resume out")

        # Mesh
        mesh = make_mesh(**dataclasses.asdict(config.mesh))
        stack.enter_context(jax.set_mesh(mesh))
        objective, optimizer, train_step = configured(config)
        # What the step cannot do it says while it is traced: now, and not after hours of preparing data.
        jax.eval_shape(train_step, abstract_state(config.model_config, optimizer), abstract_batch(config))

        # Data
        corpus = prepare(config.data, directory, seed=config.seed, report=report.line, is_writer=first_host)
        check_corpus(corpus, config, checkpoint)
        rows = Rows(
            corpus.train,
            sequence_length=config.data.sequence_length,
            batch_size=config.batch_size,
            seed=config.seed,
        )

        # State
        unroll = unrolled(config, mesh)
        if checkpoint:
            state = restored_state(checkpoint, config.model_config, optimizer, unroll=unroll)
        else:
            state = initial_state(config.model_config, optimizer, seed=config.seed, unroll=unroll)
        start = int(state.step)

        held_out = HeldOut(config, objective, corpus.held_out) if len(corpus.held_out) else None

        # Files
        files = {"config.gin": text.encode(), "tokenizer.json": corpus.tokenizer.to_bytes()}
        if first_host:
            run_directory.write(directory, files)
        record = Record(
            directory, step=start, tokens_per_step=config.tokens_per_step, warn=report.warn, writes=first_host
        )
        stack.callback(record.close)
        files["model.json"] = config.model_config.to_json().encode()
        saver = Saver(checkpoints, record, files=files, meta=fingerprint(corpus), warn=report.warn)
        profiler = stack.enter_context(Profiler(directory / "profile", config.profile, start=start, warn=report.warn))
        describe(config, mesh, start, report)

        # Loop: launch step n, then read what step n - 1 measured, so that the devices never wait for the host.
        step, loss = start, math.nan
        unread: tuple[int, Metrics] | None = None
        with Stop() as stop, saver, report.follow(start, config.steps, tokens_per_step=config.tokens_per_step):
            while True:
                last, exit_code = step == config.steps, stop.exit_code()
                saving = step > start and (last or exit_code or step % config.checkpoint.every == 0)
                # After the save at the same step, so that a run stopped in between evaluates once it goes on.
                evaluating = held_out and step and not exit_code and (last or step % config.evaluation.every == 0)
                if saving or evaluating:
                    # Nothing is saved before it is known to be finite: here the last step is read at once.
                    watch(unread, config, record, report)
                    unread = None
                if saving:
                    saver.save(step, state)
                if evaluating:
                    loss = held_out.loss(state.params, whole=last)
                    record.held_out(step, loss=loss, bits_per_byte=held_out.bits_per_byte(loss))
                    report.line(f"step {step}: held-out loss {loss:.3f}")
                if saving or evaluating:
                    record.restart_clock(step)
                if last or exit_code:
                    break
                profiler.before(step)
                state, metrics = train_step(state, put_batch(rows, step, config))
                step += 1
                watch(unread, config, record, report)
                unread = (step, metrics)

        if exit_code:
            report.line(
                f"stopped after step {step} of {config.steps}, state saved; the same command goes on from there"
            )
        if first_host:
            try:
                plot.draw(directory, entropies=held_out.entropies if held_out else None)
            except OSError as error:  # the run is saved: a picture is no reason to fail
                report.warn(f"no {plot.IMAGE}: {error.strerror}")
        if first_host and not exit_code:
            if held_out:
                print(f"\n{held_out.summary(loss)}\n")
            print(f'try  python -m infer generate {config.run_dir} --prompt "def "')
    return exit_code


def join_hosts() -> None:
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


def fingerprint(corpus: Corpus) -> dict[str, str | int]:
    """What a checkpoint remembers of its data, so that it is not trained on with other data."""
    return {"tokenizer": corpus.tokenizer.fingerprint, "train_tokens": len(corpus.train)}


def check_corpus(corpus: Corpus, config: TrainConfig, checkpoint: Checkpoint | None) -> None:
    """Raises an error unless the model has a row for each token, and a checkpoint was made with this very data."""
    if corpus.tokenizer.num_tokens > config.model_config.vocab_size:
        raise ConfigError(
            f"the tokenizer has {corpus.tokenizer.num_tokens} tokens and model.vocab_size is "
            f"{config.model_config.vocab_size}; make it at least that"
        )
    if checkpoint and checkpoint.meta != fingerprint(corpus):
        raise DataError(
            f"the tokens are not those that {checkpoint.path} was trained on: {fingerprint(corpus)}, not "
            f"{checkpoint.meta}; restore them, or choose another run_dir"
        )


def describe(config: TrainConfig, mesh: Mesh, step: int, report: Report) -> None:
    """Reports what is about to run, in a few lines."""
    model = config.model_config
    active = f" ({model.num_active_parameters:,} active)" if model.moe else ""
    report.fact(
        "model",
        f"{model.num_parameters:,} parameters{active}: {model.num_layers} layers of width {model.width}, "
        f"{model.num_heads} heads ({model.num_kv_heads} for keys and values), vocabulary {model.vocab_size:,}, "
        f"{model.dtype}",
    )
    device = mesh.devices.flat[0]
    split = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1)
    report.fact("devices", f"{mesh.size} x {device.device_kind} ({device.platform})" + (f": {split}" if split else ""))
    report.fact(
        "steps", f"{config.steps:,} of {config.tokens_per_step:,} tokens" + (f", from {step:,}" if step else "")
    )
    report.fact("run_dir", config.run_dir)


def watch(unread: tuple[int, Metrics] | None, config: TrainConfig, record: Record, report: Report) -> None:
    """Reads what a step measured, when it is there to read: checks it, records it, shows it."""
    if unread is None:
        return
    step, metrics = unread[0], {name: float(value) for name, value in jax.device_get(unread[1]).items()}
    if not (math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])):
        raise NumericalError(
            f"step {step}: the loss is {metrics['loss']} and the norm of its gradient {metrics['grad_norm']}; nothing "
            f"was saved since. Try a lower optimizer.peak_lr or more schedule.warmup_steps in another run_dir"
        )
    if metrics["weight"] == 0:
        report.warn(f"step {step}: no token of this batch counts, so nothing was learned from it")
    if step % config.log_every == 0 or step == config.steps:
        record.train(step, metrics)
    report.step(step, metrics["loss"])
