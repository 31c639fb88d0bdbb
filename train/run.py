"""A training run, from its config to its last checkpoint, read downwards."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import Mesh

from qwen_jax.errors import ConfigError, DataError, FileError, NumericalError, SandboxError
from qwen_jax.sharding import make_mesh
from qwen_jax.weights.checkpoint import Checkpoint, Checkpoints
from qwen_jax.weights.source import ADAPTER, open_model
from train import adapter, critic, hosts, plot, reference
from train import directory as run_directory
from train import frozen as kept
from train.adapter import NOTHING, Frozen
from train.config import Pretrained, TrainConfig
from train.data import Corpus, prepare
from train.data.conversations import ChatFormat
from train.evaluation import HeldOut
from train.exam import Exam
from train.export import EXPORT, export
from train.feed import Reading, abstract_batch
from train.player import Interrupted, Player
from train.profiler import Profiler
from train.progress import Report
from train.provenance import base_digest, check_corpus, check_tokenizer, fingerprint
from train.record import Record
from train.reinforcement import PPO, Online
from train.rewards.judge import Judge
from train.rollout import SAVED, TABLE, Rollouts
from train.samples import SAMPLES, Samples, Table
from train.saving import Best, Saver
from train.step import (
    Metrics,
    State,
    abstract_state,
    adapted_state,
    configured,
    initial_state,
    pretrained_state,
    restored_state,
    unrolled,
)
from train.stop import Stop
from train.stream import TEMPLATE, Sides, Stream, chat_format, check_parts, count_steps, facts, read_prompts, stream


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
    kept.check_weights(config)
    hosts.join()
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

        # Stages that are left; a run without any is one. What its step cannot do a stage says while it is traced: now,
        # and not after hours of preparing data.
        done = checkpoint.step if checkpoint else 0
        for steps, stage in config.stage_configs:
            if config.epochs or done <= steps.stop:
                trace(stage)

        # Data
        check_parts(config)
        chat = chat_format(config, warn=report.warn)
        corpus = prepare(config.data, directory, seed=config.seed, report=report.line, chat=chat, is_writer=first_host)
        check_corpus(corpus, config, checkpoint)
        prompts = read_prompts(config, corpus.tokenizer, chat, report=report.line)
        config = count_steps(config, corpus, len(prompts[0]))
        stages = {n: each for n, each in enumerate(config.stage_configs) if done <= each[0].stop}
        reading = [(steps, stage.text_config or stage) for steps, stage in stages.values()]
        streams = [stream(corpus, *each) if corpus.parts else None for each in reading]

        # Files
        files = {"config.gin": text.encode(), "tokenizer.json": corpus.tokenizer.to_bytes()}
        if chat:
            files[TEMPLATE] = chat.template.encode()
        if first_host:
            run_directory.write(directory, files)
        # Completions fill as many rows as they happen to: there is no telling tokens from steps.
        tokens_after = None if config.data.prompts else config.tokens_after
        record = Record(directory, step=done, tokens_after=tokens_after, warn=report.warn, writes=first_host)
        stack.callback(record.close)

        # Each goes on from the checkpoint that the one before has left, as if the run had been stopped there.
        stop = stack.enter_context(Stop())
        shared = Shared(directory, corpus, prompts, chat, files, checkpoints, record, report, stop)
        for (number, (steps, stage)), each, read in zip(stages.items(), reading, streams, strict=True):
            if done < steps.start:
                checkpoint = checkpoints.latest_valid()
                if checkpoint is None or checkpoint.step != steps.start:
                    raise FileError(
                        f"the checkpoint of step {steps.start} in {directory} cannot be read back; the same command "
                        f"goes on from the newest that can"
                    )
            if config.stages:
                report.fact("stage", f"{number} of 0 to {len(config.stages)}, up to step {steps.stop:,}")
            for fact in facts(read, *each) if read else ():
                report.fact("reads", fact)
            if exit_code := train_stage(steps, stage, read, checkpoint, shared):
                return exit_code
    return 0


class Shared(NamedTuple):
    """What all stages of a run have in common; `files` go into every checkpoint."""

    directory: Path
    corpus: Corpus
    prompts: Sides
    chat: ChatFormat | None
    files: Mapping[str, bytes]
    checkpoints: Checkpoints
    record: Record
    report: Report
    stop: Stop


def train_stage(
    steps: range, config: TrainConfig, read: Stream | None, checkpoint: Checkpoint | None, shared: Shared
) -> int:
    """Trains through a stage, which for most runs is all there is, and returns the exit code.

    Args:
      steps: the stage's.
      config: the run as it is in these steps.
      read: its training text, where it has any.
      checkpoint: what to go on from; None for the start.
      shared: with the other stages.
    """
    directory, corpus, _, _, files, checkpoints, record, report, stop = shared
    first_host = jax.process_index() == 0
    with contextlib.ExitStack() as stack:
        # Mesh
        mesh = make_mesh(**dataclasses.asdict(config.mesh))
        stack.enter_context(jax.set_mesh(mesh))
        _, optimizer, train_step = configured(config)

        # State
        unroll = unrolled(config, mesh)
        state, frozen, base = begin(config, optimizer, checkpoint, shared, unroll=unroll)
        start = int(state.step)

        if isinstance(config.objective, PPO):
            state = state._replace(
                critic=critic.restored(config, checkpoint, unroll=unroll)
                if checkpoint
                else critic.fresh(config, unroll=unroll)
            )
            train_step = critic.ActorCritic(config, train_step, step=start)
        if isinstance(config.objective, Online):
            feed, held_out = stack.enter_context(
                asking(config, mesh, frozen, start, checkpoint, read and read.rows, shared)
            )
        else:
            assert read is not None, "a run on text has rows of it"
            feed = Reading(read.rows, config)
            held_out = HeldOut(config, corpus, frozen) if any(len(part.held_out) for part in corpus.parts) else None
            if reference.is_wanted(config):
                names = [part.part.name for part in corpus.parts]
                parts = {f"{name}-train": rows for name, rows in zip(names, read.parts, strict=True)}
                parts |= {f"{name}-held_out": rows for name, rows in (held_out.parts if held_out else {}).items()}
                load = functools.partial(kept.load_reference, config, warn=report.warn, unroll=unroll)
                reference.attach(config, parts, directory, load, report=report.line)
        saver = Saver(
            checkpoints,
            record,
            files={
                **files,
                "model.json": config.model_config.to_json().encode(),
                **({ADAPTER: adapter.describe(config, config.adapter)} if config.adapter else {}),
            },
            meta=fingerprint(corpus, config) | base,
            warn=report.warn,
        )
        best = Best(checkpoints, directory, start=steps.start, done=start) if config.checkpoint.keep_best else None
        samples = None
        if isinstance(held_out, HeldOut) and config.evaluation.samples:
            samples = Samples(config, corpus, mesh=mesh, directory=directory, step=start, report=report.line)
        profiler = stack.enter_context(Profiler(directory / "profile", config.profile, start=start, warn=report.warn))
        describe(config, mesh, start, report)
        speed_of = None if config.data.prompts else config.tokens_per_step
        record.restart_clock(start)

        # Loop: launch step n, then read what step n - 1 measured, so that the devices never wait for the host.
        step, saved, unread, failure = start, start, None, None
        with saver, report.follow(start, config.steps, tokens_per_step=speed_of):
            while True:
                last, exit_code = step == steps.stop, stop.exit_code()
                saving = step > saved and (last or exit_code or failure or step % config.checkpoint.every == 0)
                # After the save at the same step, so that a run stopped in between evaluates once it goes on. The step
                # that a stage begins with is the last of the stage before.
                due = last or (step > steps.start and step % config.evaluation.every == 0)
                evaluating = bool(held_out) and due and not (exit_code or failure)
                if saving or evaluating:
                    # Nothing is saved before it is known to be finite: here the last step is read at once.
                    watch(unread, config, record, report)
                    unread = None
                if saving:
                    saver.save(step, state, feed.files(step))
                    saved = step
                if failure:
                    raise failure
                try:
                    if held_out and evaluating:
                        measures, line = held_out.evaluate(state, whole=last)
                        record.held_out(step, **measures)
                        report.line(f"step {step}: {line}")
                        worth = measures["loss"] if "loss" in measures else -measures["reward"]
                        if best and best.improves(worth):
                            if step > saved:
                                saver.save(step, state, feed.files(step))
                                saved = step
                            best.keep(step, worth)
                        if samples:
                            samples.answer(step, state.params, frozen)
                    if saving or evaluating:
                        record.restart_clock(step)
                    if last or exit_code:
                        break
                    profiler.before(step)
                    batch, known = feed.batch(step, state, frozen)
                except (Interrupted, DataError, SandboxError) as error:
                    # What is asked or read next cannot be had, but the state is whole: it is saved first.
                    failure = None if isinstance(error, Interrupted) else error
                    stop.exit_code()  # whose next answer is what each host has been asked by now
                    continue
                state, metrics = train_step(state, batch, frozen)
                step += 1
                watch(unread, config, record, report)
                unread = (step, {**metrics, **known})

        if exit_code:
            what = f"after step {step} of {config.steps}, state saved" if step else "before the first step was done"
            report.line(f"stopped {what}; the same command goes on from there")
        if first_host:
            try:
                plot.draw(directory, entropies=held_out.entropies if held_out else None)
            except OSError as error:  # the run is saved: a picture is no reason to fail
                report.warn(f"no {plot.IMAGE}: {error.strerror}")
        finished = step == config.steps and not exit_code
        if first_host and finished and held_out:
            print(f"\n{held_out.summary()}\n")
        if finished and config.export:
            chosen = checkpoints.best if checkpoints.best in checkpoints.steps() else step
            export(config.export, checkpoints.folder(chosen), directory / EXPORT, report)
        if first_host and finished:
            how = "chat {}" if "chat" in fingerprint(corpus, config) else 'generate {} --prompt "def "'
            how = "score {} --input FILE.jsonl" if config.model_config.score else how
            print(
                f"try  python -m infer {how.format(f'{config.run_dir}/{EXPORT}' if config.export else config.run_dir)}"
            )
    return exit_code


def begin(
    config: TrainConfig,
    optimizer: optax.GradientTransformation,
    checkpoint: Checkpoint | None,
    shared: Shared,
    *,
    unroll: bool,
) -> tuple[State, Frozen, dict[str, str]]:
    """The state to go on from, what stays as it is beside it, and what tells the model that this is of apart."""
    restored = functools.partial(restored_state, config=config.model_config, optimizer=optimizer, unroll=unroll)
    if not isinstance(config.model, Pretrained) or (checkpoint and not kept.is_needed(config)):
        if checkpoint:
            return restored(checkpoint), NOTHING, {}
        return initial_state(config.model_config, optimizer, seed=config.seed, unroll=unroll), NOTHING, {}
    with open_model(config.model.path, warn=shared.report.warn) as source:
        check_tokenizer(shared.corpus, source)
        base = {"base": base_digest(config, source, checkpoint)} if kept.is_needed(config) else {}
        frozen = kept.load(config, source, warn=shared.report.warn, unroll=unroll)
        if checkpoint:
            state = restored(checkpoint, adapter=config.adapter)
        elif config.adapter:
            assert frozen.base is not None
            state = adapted_state(config, config.adapter, frozen.base, optimizer, unroll=unroll)
        else:
            state = pretrained_state(config, source, optimizer, unroll=unroll)
    return state, kept.without_trained(config, frozen), base


@contextlib.contextmanager
def asking(
    config: TrainConfig,
    mesh: Mesh,
    frozen: Frozen,
    start: int,
    checkpoint: Checkpoint | None,
    rows: Rows | MixedRows | None,
    shared: Shared,
) -> Iterator[tuple[Rollouts, Exam | None]]:
    """The batches of a run on its own completions, and its held-out prompts; `rows` are those of text beside them."""
    assert isinstance(config.objective, Online)
    report, table = shared.report, functools.partial(Table, step=start, report=shared.report.line)
    form, tokenizer = shared.chat and shared.chat.form, shared.corpus.tokenizer
    with Judge(config.objective, form=form, tokenizer=tokenizer, mesh=mesh, warn=report.warn) as judge:
        for prompt in itertools.chain(*shared.prompts):
            try:
                judge.check(prompt.columns)
            except DataError as error:
                raise DataError(f"{prompt.origin}: {error}") from None
        stopping = lambda: bool(shared.stop.asked)
        player = Player(config, shared.prompts, tokenizer, judge, mesh, stopping=stopping, show=report.busy)
        report.fact("engines", player.engines)
        saved = checkpoint.read(SAVED) if checkpoint else None
        try:
            told = table(shared.directory / TABLE)
            how = dict[str, Any](saved=saved, table=told, text=rows, warn=report.warn)
            rollouts = Rollouts(config, shared.prompts[0], player, **how)
            samples = table(shared.directory / SAMPLES)
            yield rollouts, Exam(config, shared.prompts[1], player, frozen, samples) if shared.prompts[1] else None
        finally:
            player.close()


def trace(config: TrainConfig) -> None:
    """Traces the step of a config, for what it raises."""
    with jax.set_mesh(make_mesh(**dataclasses.asdict(config.mesh))):
        _, optimizer, train_step = configured(config)
        state = abstract_state(config.model_config, optimizer, config.adapter)
        jax.eval_shape(train_step, state, abstract_batch(config), kept.abstract(config))


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
    if config.adapter and isinstance(config.model, Pretrained):
        kinds = ", ".join(dict.fromkeys(path.removeprefix("layers/") for path in config.adapter.paths(model)))
        report.fact("adapter", f"of rank {config.adapter.rank} beside {config.model.path}, which stays: {kinds}")
    elif isinstance(config.model, Pretrained):
        report.fact("weights", f"at first those of {config.model.path}")
    device = mesh.devices.flat[0]
    split = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1)
    report.fact("devices", f"{mesh.size} x {device.device_kind} ({device.platform})" + (f": {split}" if split else ""))
    rows = f"{config.batch_size:,} rows of {config.data.sequence_length:,} tokens"
    if isinstance(config.objective, Online):
        rows = f"{config.batch_size:,} completions; {config.completions_per_episode:,} are sampled together"
    report.fact("steps", f"{config.steps:,} of {rows}" + (f", from {step:,}" if step else ""))
    report.fact("run_dir", config.run_dir)


def watch(unread: tuple[int, Metrics] | None, config: TrainConfig, record: Record, report: Report) -> None:
    """Reads what a step measured, when it is there to read: checks it, records it, shows it."""
    if unread is None:
        return
    step, metrics = unread[0], {name: float(value) for name, value in jax.device_get(unread[1]).items()}
    for of in ("", "value_"):  # which a critic has of its own
        loss, norm = (metrics.get(of + name, 0.0) for name in ("loss", "grad_norm"))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise NumericalError(
                f"step {step}: the {of}loss is {loss} and the norm of its gradient {norm}; nothing was saved since. "
                f"Try a lower {'objective.critic' if of else 'optimizer'}.peak_lr or more schedule.warmup_steps in "
                "another run_dir"
            )
    if metrics["weight"] == 0:
        report.warn(f"step {step}: no token of this batch counts, so nothing was learned from it")
    if step % config.log_every == 0 or step == config.steps:
        record.train(step, metrics)
    shown = [name for name in ("reward", "completion_tokens", "kl", "log_ratio") if name in metrics] or ["loss"]
    report.step(step, "  ".join(f"{name.removeprefix('completion_')} {_short(metrics[name])}" for name in shown))


def _short(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 100 else f"{value:,.0f}"
