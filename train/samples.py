"""What the weights say at an evaluation: answers to prompts of the held-out text, beside what stands there."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from qwen_jax.engine import Capacity, Completion, FinishReason, Replicas, Request, Sampling, generate
from qwen_jax.errors import FileError
from qwen_jax.model import Params
from qwen_jax.weights.usage import turn_ends
from train import hosts
from train.adapter import Frozen
from train.config import TrainConfig
from train.data import Corpus, TokenShards
from train.data.config import Chats
from train.sampling import Follower

SAMPLES = "samples.jsonl"
_SHOWN, _CHARACTERS = 2, 160  # samples in the log, and characters of each text there
_MAX_ROWS = 16  # answers made together
_PAGE = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
    """Where a held-out document is cut in two, and which tokens end the answer."""

    ids: list[int]
    reference: list[int]
    stop_ids: frozenset[int]


class Table:
    """A file of JSON lines for people, each with the `step` it is of; of a run that goes on, those before it.

    The first host writes it.
    """

    def __init__(self, path: Path, *, step: int, report: Callable[[str], None]) -> None:
        self._path, self._report = path, report
        if jax.process_index():
            return
        text = path.read_text() if path.exists() else ""
        lines = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
        self._write("".join(line for line in lines if json.loads(line)["step"] < step), "w")

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Adds rows; where the disk takes none, training goes on without, since nothing is trained on them."""
        if jax.process_index():
            return
        try:
            self._write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "a")
        except FileError as error:
            self._report(f"warning: {error}; training goes on")

    def _write(self, text: str, mode: str) -> None:
        try:
            with self._path.open(mode) as file:
                file.write(text)
        except OSError as error:
            raise FileError(f"{self._path} cannot be written: {error.strerror}") from error


class Samples:
    """Prompts of the held-out text, which are the same at every evaluation, and the file that answers go to.

    A conversation is cut before its last answer, text in its middle. Prompts that leave an answer no room in a row of
    training are passed over. A row of the file is `{"step", "prompt", "answer", "reference", "finish_reason"}`.
    """

    def __init__(
        self,
        config: TrainConfig,
        corpus: Corpus,
        *,
        mesh: Mesh,
        directory: Path,
        step: int,
        report: Callable[[str], None],
    ) -> None:
        """
        Args:
          config: of the stage.
          corpus: whose held-out documents are asked.
          mesh: of the training.
          directory: the run's, whose file keeps what was said before `step`.
          step: steps done.
          report: takes lines for people.
        """
        self._tokenizer, self._report = corpus.tokenizer, report
        self._limit = min(config.evaluation.max_new_tokens, config.model_config.max_position - 1)
        self._prompts = list(_prompts(config, corpus, self._limit))
        if not self._prompts:
            report(f"no samples: no held-out document is a prompt of up to {config.data.sequence_length} tokens")
        self._follower = Follower(
            config.model_config,
            num_tokens=corpus.tokenizer.num_tokens,
            mesh=mesh,
            capacity=_capacity([len(prompt.ids) + self._limit for prompt in self._prompts]),
            adapter=config.adapter,
        )
        self._table = Table(directory / SAMPLES, step=step, report=report)

    def answer(self, step: int, params: Params, frozen: Frozen) -> None:
        """Has every prompt answered with these weights, the likeliest token each time, and writes it down."""
        if not self._prompts:
            return
        with self._follower.at(params, frozen) as replicas:
            done = list(itertools.chain(*hosts.together(lambda: self._answers(replicas))))
        rows = [self._row(step, *each) for each in zip(self._prompts, done, strict=True)]
        self._table.add(rows)
        for row in rows[:_SHOWN]:
            asked_of, said = (" ".join(row[name].split()) for name in ("prompt", "answer"))
            self._report(f"  … {asked_of[-_CHARACTERS:]}\n  → {said[:_CHARACTERS]} [{row['finish_reason']}]")

    def _answers(self, replicas: Replicas) -> list[tuple[str, FinishReason | None]]:
        """The answers to this host's share of the prompts, and how each ended."""
        own = self._prompts[hosts.share(len(self._prompts))]
        done = [Completion(self._tokenizer, prompt.stop_ids, ()) for prompt in own]
        greedy, limit = Sampling(temperature=0), self._limit
        asked = [
            Request(prompt=prompt.ids, max_new_tokens=limit, sampling=greedy, stop_ids=prompt.stop_ids)
            for prompt in own
        ]
        generate(replicas, zip(asked, done, strict=True))
        return [(each.text, each.finish_reason) for each in done]

    def _row(self, step: int, prompt: Prompt, made: tuple[str, FinishReason | None]) -> dict[str, Any]:
        text = self._tokenizer.decode
        return {
            "step": step,
            "prompt": text(prompt.ids, skip_special=False),
            "answer": made[0],
            "reference": text(prompt.reference).strip(),
            "finish_reason": made[1],
        }


def _prompts(config: TrainConfig, corpus: Corpus, limit: int) -> Iterator[Prompt]:
    """As many as the config asks for, of the parts in turn, spread evenly over their documents."""
    parts = [part for part in corpus.parts if len(part.held_out)]
    room = min(config.data.sequence_length, config.model_config.max_position - limit)
    for number, part in enumerate(parts):
        chat = isinstance(part.part.source, Chats)
        ends = frozenset({corpus.tokenizer.end_of_text}) | (turn_ends(corpus.tokenizer) if chat else frozenset())
        count = len(range(number, config.evaluation.samples, len(parts)))
        (newline,) = corpus.tokenizer.encode("\n")
        cut = functools.partial(_cut, part.held_out, limit=limit, newline=newline)
        bounds = [index * part.held_out.num_documents // max(1, count) for index in range(count + 1)]
        for first, last in pairwise(bounds):
            cuts = map(cut, range(first, last))
            fitting = next(((ids, reference) for ids, reference in cuts if 0 < len(ids) <= room), None)
            if fitting:
                yield Prompt(ids=fitting[0], reference=fitting[1], stop_ids=ends)


def _cut(shards: TokenShards, document: int, *, limit: int, newline: int) -> tuple[list[int], list[int]]:
    """The prompt that a document makes, and what follows there; an empty one where nothing is trained."""
    start, stop = shards.document(document)
    ids, flags = shards.tokens(start, stop).tolist(), shards.trained(start, stop).tolist()
    if shards.num_trained is None:
        middle = len(ids) // 2
        return ids[:middle], ids[middle : middle + limit]
    runs = [list(run) for trained, run in groupby(range(len(ids)), flags.__getitem__) if trained]
    if not runs:
        return [], []
    run = runs[-1] if shards.num_labels is None else runs[0]  # of texts that are compared the first, which is good
    # Some formats train the newline after the name of who speaks, which a prompt has.
    first, last = run[0] + (ids[run[0]] == newline and len(run) > 1), run[-1]
    return ids[:first], ids[first : last + 1]


def _capacity(lengths: list[int]) -> Capacity:
    """Room for these requests, and for no more of them at a time than are made together."""
    lengths = sorted(lengths or [_PAGE], reverse=True)
    pages = [-(-length // _PAGE) * _PAGE for length in lengths[:_MAX_ROWS]]
    return Capacity(max_rows=len(pages), max_length=lengths[0], cache_tokens=sum(pages), page_size=_PAGE)
