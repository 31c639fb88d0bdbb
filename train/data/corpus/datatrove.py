"""The same tasks under datatrove's executors: on this machine, on Ray, on Slurm (extra `corpus`).

    from datatrove.executor import SlurmPipelineExecutor
    from train.data.corpus.datatrove import steps

    previous = None
    for step in steps("configs/corpus.gin"):
        previous = SlurmPipelineExecutor(
            pipeline=[step], tasks=step.tasks, logging_dir=f"logs/{step.name}", depends=previous, ...
        )
    previous.run()

The output folder must be one that all machines see. It gets the same bytes as from `python -m train.data.corpus`, which
goes on with what is not done, and writes the report.
"""

from __future__ import annotations

import sys
from pathlib import Path

from datatrove.data import DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from qwen_jax import bindings
from train.data.corpus.config import Corpus
from train.data.corpus.phases import corpus_phases, output_of
from train.data.corpus.tasks import Phase, Task


class CorpusStep(PipelineStep):
    """A phase as a pipeline of its own, with as many tasks as it has.

    Attributes:
      tasks: what the executor is to be given.
    """

    type = "corpus"

    def __init__(self, corpus: Path, phase: Phase) -> None:
        self.name, self.tasks = phase.name, phase.tasks
        super().__init__()
        self._corpus, self._phase = corpus, phase

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> None:
        """Does the tasks of a rank. Documents are read and written by the tasks: there are none in the pipeline."""
        for index in range(rank, self.tasks, world_size):
            with self.track_time():
                summary = Task(self._corpus, self._phase, index).perform()
            self.stat_update("read", value=summary.read)
            self.stat_update("kept", value=summary.kept)


def steps(config: Corpus | str) -> list[CorpusStep]:
    """The phases of a corpus, or of the .gin file of one, in order; each begins when the one before is done.

    The files of the source are listed now, and the list is written down for all tasks.
    """
    if isinstance(config, str):
        config, _ = bindings.resolve(Corpus, bindings.read(Path(config)))
    corpus = output_of(config).resolve()
    listing, *phases = corpus_phases(config, lambda line: print(line, file=sys.stderr))
    for index in range(listing.tasks):
        Task(corpus, listing, index).perform()
    return [CorpusStep(corpus, phase) for phase in phases]
