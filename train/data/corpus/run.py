"""The phases of a corpus on one machine, in as many processes as it has cores."""

from __future__ import annotations

import contextlib
import fcntl
import multiprocessing
import os
import threading
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from qwen_jax.errors import ConfigError, DataError, FileError
from train.data.corpus.config import Corpus
from train.data.corpus.phases import corpus_phases, output_of
from train.data.corpus.progress import Progress
from train.data.corpus.report import write_report
from train.data.corpus.tasks import Phase, Summary, Task


def run(config: Corpus, text: str) -> str:
    """Makes the corpus, or what an earlier run left to make; the report. `text` is the config as it is written down."""
    corpus, workers = output_of(config), config.workers or os.cpu_count() or 1
    with Progress() as progress, _locked(corpus), _pool(workers) as pool:
        phases = corpus_phases(config, progress.line)
        (corpus / "config.gin").write_text(text)
        summaries = {phase.name: _perform(phase, corpus, pool, progress) for phase in phases}
    report = write_report(corpus, phases, summaries)
    if not summaries["9-documents"].kept:
        raise DataError(f"no document is left; {corpus / 'report.txt'} has the stage that dropped the last")
    return report


def perform(corpus: Path, phase: Phase, index: int) -> Summary:
    """Does one task; this is what runs in another process."""
    return Task(corpus, phase, index).perform()


def _perform(phase: Phase, corpus: Path, pool: Executor | None, progress: Progress) -> Summary:
    """What all tasks of a phase did, in their order."""
    done: dict[int, Summary] = {}
    progress.begin(phase.name, phase.tasks)
    if pool is None or phase.alone:
        for index in range(phase.tasks):
            done[index] = perform(corpus, phase, index)
            progress.step()
    else:
        waiting = {pool.submit(perform, corpus, phase, index): index for index in range(phase.tasks)}
        try:
            for future in as_completed(waiting):
                done[waiting[future]] = future.result()
                progress.step()
        except BrokenProcessPool:
            raise FileError(f"{phase.name}: a process died, perhaps for memory; go on with fewer workers") from None
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    _sweep(phase, corpus)
    total = sum((done[index] for index in range(phase.tasks)), Summary())
    progress.end(total)
    return total


def _sweep(phase: Phase, corpus: Path) -> None:
    """Removes what tasks left that are no longer part of the phase."""
    for folder in {corpus / "work" / phase.name, corpus / (phase.folder or "work")}:
        for path in folder.glob("[0-9][0-9][0-9][0-9][0-9].*"):
            if int(path.name[:5]) >= phase.tasks:
                path.unlink()


@contextlib.contextmanager
def _pool(workers: int) -> Iterator[Executor | None]:
    """Processes that begin with nothing of this one's, or None for this one alone."""
    if workers == 1:
        yield None
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_live_with_parent) as pool:
        yield pool


def _live_with_parent() -> None:
    """Ends this process when the one that began it is gone: it would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


@contextlib.contextmanager
def _locked(corpus: Path) -> Iterator[None]:
    """Holds the folder for this process; the system frees the lock of one that dies."""
    try:
        if corpus.exists() and any(corpus.iterdir()) and not (corpus / "work").is_dir():
            raise ConfigError(f'output="{corpus}" holds something else; choose a folder that is new, or a corpus')
        (corpus / "work").mkdir(parents=True, exist_ok=True)
        file = open(corpus / "work" / "lock", "wb")
    except OSError as error:
        raise FileError(f"cannot write {corpus}: {error.strerror}; choose another output") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FileError(f"another process makes {corpus}; wait for it, or choose another output") from None
        yield
