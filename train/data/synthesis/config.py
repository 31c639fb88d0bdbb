"""What a run is asked to do: the schema of its config. Imports nothing heavy."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from qwen_jax.config import DType
from qwen_jax.errors import ConfigError
from qwen_jax.sandbox.process import Limits

WAYS = ("constrain", "deepen", "concretise", "broaden")


def _not_empty(section: object, *names: str) -> None:
    for name in names:
        value: Sequence[object] = getattr(section, name)
        if not value or (not isinstance(value, str) and "" in value):
            raise ConfigError(f"{name}={value!r} names nothing")


def _at_least(section: object, least: int, *names: str) -> None:
    for name in names:
        if getattr(section, name) < least:
            raise ConfigError(f"{name}={getattr(section, name)} must be at least {least}")


def _fraction(section: object, name: str) -> None:
    if not 0 < getattr(section, name) <= 1:
        raise ConfigError(f"{name}={getattr(section, name)} must be a fraction: above 0, and 1 at most")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """The model that is asked, and how it answers.

    Attributes:
      path: a published folder, a run or checkpoint folder of ours, or the name of a published model.
      dtype: type of parameters and computation; None for the checkpoint's.
      format: name of a chat format; empty for the model's own.
      thinking: False closes an empty thought before every answer.
      max_new_tokens: of an answer.
      max_length: tokens of a question and its answer; questions that leave no room are dropped.
      max_rows: answers made together.
      temperature, top_k, top_p, min_p, repetition_penalty: as in `qwen_jax.engine.Sampling`; None for the model's own.
    """

    path: str
    dtype: DType | None = None
    format: str = ""
    thinking: bool = True
    max_new_tokens: int = 1024
    max_length: int = 4096
    max_rows: int = 16
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    def __post_init__(self) -> None:
        _not_empty(self, "path")
        _at_least(self, 1, "max_new_tokens", "max_rows")
        if self.max_length <= self.max_new_tokens:
            raise ConfigError(f"max_length={self.max_length} must be above max_new_tokens={self.max_new_tokens}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sandbox:
    """Where code that a model has written runs.

    Attributes:
      seconds: of a program, on the clock and of processors.
      memory_mib: of a program.
      workers: programs at a time.
      allow_weak: also on a machine that cannot hide its files from them.
    """

    seconds: float = 10.0
    memory_mib: int = 1024
    workers: int = 2
    allow_weak: bool = False

    def __post_init__(self) -> None:
        _at_least(self, 1, "memory_mib", "workers")
        if not self.seconds > 0:
            raise ConfigError(f"seconds={self.seconds} must be above 0")

    @property
    def limits(self) -> Limits:
        """Of a program."""
        return Limits(wall_seconds=self.seconds, cpu_seconds=self.seconds, memory_bytes=self.memory_mib << 20)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tag:
    """Says what an instruction asks for, in tags of the model's own choice.

    Attributes:
      field: where the instruction stands: a text, or messages.
      prompt: name of a prompt of ours, or a file.
      max_tags: of one instruction.
      min_frequency: rows a tag must have; a rarer one becomes the most special of the others whose words it holds, or
        goes. InsTag has 20.
    """

    field: str = "prompt"
    prompt: str = "tag"
    max_tags: int = 8
    min_frequency: int = 1

    def __post_init__(self) -> None:
        _not_empty(self, "field")
        _at_least(self, 1, "max_tags", "min_frequency")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Select:
    """Takes rows that are complex and differ, by their tags.

    Attributes:
      count: rows to take.
      field: where a list of tags stands.
    """

    count: int
    field: str = "tags"

    def __post_init__(self) -> None:
        _not_empty(self, "field")
        _at_least(self, 1, "count")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evolve:
    """Makes instructions harder, narrower or others like them.

    Attributes:
      field: where the instruction stands: a text, or messages.
      ways: names of prompts of ours ("constrain", "deepen", "concretise", "broaden"), or files; each round draws one.
      rounds: how often an instruction is evolved at most, each time from what came out before.
      max_characters: a longer one is dropped.
      answered: whether the model must be able to answer it.
    """

    field: str = "prompt"
    ways: tuple[str, ...] = WAYS
    rounds: int = 1
    max_characters: int = 4000
    answered: bool = True

    def __post_init__(self) -> None:
        _not_empty(self, "field", "ways")
        _at_least(self, 1, "rounds", "max_characters")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Respond:
    """Answers instructions several times, and keeps the answers that are right.

    Attributes:
      field: where the instruction stands: a text, or messages up to the last of the user.
      reference: where the right answer stands; empty where there is none, which keeps all.
      marked: whether only what stands in a box or after #### is an answer, as in the rows a model was tuned on.
      samples: answers to each.
      keep: answers of each that are kept at most; 0 for all.
      system: a system message, for an instruction that is a text; empty for none.
    """

    field: str = "prompt"
    reference: str = ""
    marked: bool = False
    samples: int = 8
    keep: int = 0
    system: str = ""

    def __post_init__(self) -> None:
        _not_empty(self, "field")
        _at_least(self, 1, "samples")
        _at_least(self, 0, "keep")
        if self.marked and not self.reference:
            raise ConfigError("marked=True is for answers that are compared with a reference, and there is none")


@dataclasses.dataclass(frozen=True, kw_only=True)
class VerifyCode:
    """Keeps programs that pass their tests. Rows are like HumanEval's: `prompt`, `test`, `entry_point`.

    Attributes:
      field: where the program stands: a text, or messages, whose last has it.
      prompt: where the code stands that the program goes on from; it may be missing.
      test: where the code stands that checks it.
    """

    field: str = "messages"
    prompt: str = "prompt"
    test: str = "test"
    sandbox: Sandbox = Sandbox()

    def __post_init__(self) -> None:
        _not_empty(self, "field", "prompt", "test")


@dataclasses.dataclass(frozen=True, kw_only=True)
class WriteVerifiers:
    """Has the model write programs that check whether an instruction was followed, and keeps those that agree.

    Attributes:
      field: where the instruction stands: a text, or messages.
      prompt: name of a prompt of ours, or a file.
      samples: programs, each with test cases, that are asked for.
      min_accuracy: of all cases that some program gets right, the fraction that a program must.
      min_programs: programs that must be left.
    """

    field: str = "prompt"
    prompt: str = "write_verifier"
    samples: int = 4
    min_accuracy: float = 0.8
    min_programs: int = 1
    sandbox: Sandbox = Sandbox()

    def __post_init__(self) -> None:
        _not_empty(self, "field")
        _at_least(self, 1, "samples", "min_programs")
        _fraction(self, "min_accuracy")


@dataclasses.dataclass(frozen=True, kw_only=True)
class VerifyInstructions:
    """Keeps answers that the row's own verifiers pass.

    Attributes:
      field: where the answer stands: a text, or messages, whose last it is.
      verifiers: where the verifiers stand: a list of programs (or one), each with a function `evaluate(response)`.
      min_passed: fraction of them that must pass an answer.
    """

    field: str = "messages"
    verifiers: str = "verifiers"
    min_passed: float = 1.0
    sandbox: Sandbox = Sandbox()

    def __post_init__(self) -> None:
        _not_empty(self, "field", "verifiers")
        _fraction(self, "min_passed")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Repurpose:
    """Makes answers of texts: the model writes the instruction that each would have answered.

    Attributes:
      field: where the text stands.
      prompt: name of a prompt of ours, or a file.
      min_characters, max_characters: of an answer; a longer text is cut between paragraphs, a shorter part goes.
      min_score: from 1 to 5, how well the model must find that text and instruction belong together; 0 to not ask.
      judge: name of a prompt of ours that asks for the score, or a file.
    """

    field: str = "text"
    prompt: str = "repurpose"
    min_characters: int = 400
    max_characters: int = 8000
    min_score: int = 0
    judge: str = "judge"

    def __post_init__(self) -> None:
        _not_empty(self, "field")
        _at_least(self, 1, "min_characters")
        _at_least(self, 0, "min_score")
        if self.max_characters < self.min_characters:
            raise ConfigError(f"max_characters={self.max_characters} is below min_characters={self.min_characters}")
        if self.min_score > 5:
            raise ConfigError(f"min_score={self.min_score} must be 5 at most")


_ASKING = (Tag, Evolve, Respond, WriteVerifiers, Repurpose)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Synthesis:
    """One stage, from a file to a file.

    Attributes:
      input, output: files of JSON lines, an object in each.
      stage: what is done.
      model: the model that the stage asks; None for a stage that asks none.
      seed: of all that is drawn.
    """

    input: str
    output: str
    stage: Tag | Select | Evolve | Respond | VerifyCode | WriteVerifiers | VerifyInstructions | Repurpose
    model: Model | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        _not_empty(self, "input", "output")
        _at_least(self, 0, "seed")
        name = type(self.stage).__name__
        if isinstance(self.stage, _ASKING) and self.model is None:
            raise ConfigError(f"stage=@{name} asks a model; bind model.path")
        if not isinstance(self.stage, _ASKING) and self.model is not None:
            raise ConfigError(f"model: stage @{name} asks none; leave it out")
