"""What a run reads: the schema of the `data` part of a config. Imports nothing heavy."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import PurePath
from typing import Literal

from qwen_jax.errors import ConfigError

# Those of text.chat, which is not imported for a name.
ChatFormat = Literal[
    "qwen1", "qwen1.5", "qwen2", "qwen2.5", "qwen2.5-math", "qwen3", "qwen3-nonthinking", "qwen3-instruct-2507"
]


CODE = (
    ".c .cc .cpp .cs .css .cu .dart .ex .go .h .hpp .hs .html .java .jl .js .jsx .kt .lua .m .ml .php .pl .py .r .rb "
    ".rs .scala .sh .sql .swift .ts .tsx .vue .zig"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FillInTheMiddle:
    """Documents in three parts, of which the middle comes last, as Qwen2.5-Coder writes them; all of it is trained.

    Where a document is cut, if it is, depends on the seed and its text alone: at two characters, each as likely.

    Attributes:
      rate: fraction of the documents.
      spm: of these, the fraction in which the suffix comes first (SPM), not the prefix (PSM; see arXiv 2207.14255).
      extensions: of the files that it is for; () for every document. JSON lines are of no file of their own.
    """

    rate: float = 0.5
    spm: float = 0.5
    extensions: tuple[str, ...] = tuple(CODE.split())

    def __post_init__(self) -> None:
        for name in ("rate", "spm"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be a fraction: between 0 and 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text:
    """Text files and JSON lines.

    Attributes:
      path: a file, a directory (read recursively) or a glob such as "corpus/**/*.jsonl.gz". Files that end in
        .jsonl or .json, .gz or not, hold one JSON object per line; any other file is one document.
      pattern: limits a directory, e.g. "**/*.py"; empty for every file.
      field: the key of the text in a JSON object.
      fim: documents with their middle at the end; None for none.
      repositories: the files of a folder in `path` are one document, as Qwen2.5-Coder reads repositories.
    """

    path: str
    pattern: str = ""
    field: str = "text"
    fim: FillInTheMiddle | None = None
    repositories: bool = False

    def __post_init__(self) -> None:
        _check_path(self.path, self.pattern)
        if not self.field:
            raise ConfigError('field="" names no key of a JSON line; the usual one is "text"')


@dataclasses.dataclass(frozen=True, kw_only=True)
class PythonStdlib:
    """The .py files of the Python that runs: a real corpus of some 30 MB that needs no download."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conversations:
    """Conversations, of which the assistant's words are trained.

    Attributes:
      path: as in Text; the files hold JSON lines, or one JSON array. Rows are `messages` (and `tools`), ShareGPT's
        `conversations`, Alpaca's `instruction` and `output`, or `prompt` and `completion`: see docs/data.md.
      pattern: as in Text.
      columns: names that the files have for those keys, as in {"instruction": "question", "output": "answer"}.
      format: the chat format; None for that of the model the run begins with.
      system: the system text of conversations that have none; None for what the format writes then.
      learn: which words are trained: all answers, the last one, or with "qwen1" what finetune.py of QwenLM/Qwen trains,
        which is all answers, and beside them the tokens that open and close every message.
      too_long: what becomes of a conversation that is longer than a row: its beginning is kept, or nothing.
    """

    path: str
    pattern: str = ""
    columns: dict[str, str] = dataclasses.field(default_factory=dict)
    format: ChatFormat | None = None
    system: str | None = None
    learn: Literal["answers", "last_answer", "qwen1"] = "answers"
    too_long: Literal["truncate", "drop"] = "truncate"

    def __post_init__(self) -> None:
        _check_path(self.path, self.pattern)
        if "" in (*self.columns, *self.columns.values()):
            raise ConfigError(f"columns={self.columns} has an empty name; leave it out")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preferences:
    """Completions that are preferred to others, or solutions whose steps are judged, for reward models and DPO.

    The texts of a row stay together in a row of a batch; one that does not hold them all is left out.

    Attributes:
      path, pattern, columns, format, system: as in Conversations. Rows are `chosen` and `rejected` (with `prompt`, or
        as two whole texts or conversations), or `prompt`, `completions` and `labels`: see docs/data.md.
      kind: what `completions` are: of several, or the steps of one solution.
      step_end: what is written after each step; its last token is where the step is judged.
    """

    path: str
    pattern: str = ""
    columns: dict[str, str] = dataclasses.field(default_factory=dict)
    format: ChatFormat | None = None
    system: str | None = None
    kind: Literal["completions", "steps"] = "completions"
    step_end: str = "\n\n"

    def __post_init__(self) -> None:
        _check_path(self.path, self.pattern)
        if "" in (*self.columns, *self.columns.values()):
            raise ConfigError(f"columns={self.columns} has an empty name; leave it out")
        if not self.step_end:
            raise ConfigError('step_end="" leaves no token to judge a step at; name one, such as "\\n\\n"')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompts:
    """What a model is asked in reinforcement learning, with what its answers are judged by.

    Attributes:
      path, pattern, columns, format, system: as in Conversations. Rows have `prompt`, a text or messages, and whatever
        columns the rewards look at. Of `messages` a last one of the assistant is left out.
      chat: whether a text is what a user says; False for one that goes on as it is.
    """

    path: str
    pattern: str = ""
    columns: dict[str, str] = dataclasses.field(default_factory=dict)
    format: ChatFormat | None = None
    system: str | None = None
    chat: bool = True

    def __post_init__(self) -> None:
        _check_path(self.path, self.pattern)
        if "" in (*self.columns, *self.columns.values()):
            raise ConfigError(f"columns={self.columns} has an empty name; leave it out")


Chats = Conversations | Preferences
MOST_COMPLETIONS = 32  # of a prompt, as each is compared with those after it
Source = Text | PythonStdlib | Chats | Prompts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """A source of a mixture.

    Attributes:
      name: of its folder of tokens and in reports.
      source: where its documents come from.
      weight: its share of the rows, and so of the tokens, beside the weights of the others. 0 for a part that only a
        later stage reads.
      tokens: its folder of token shards, as in Data.
    """

    name: str
    source: Source
    weight: float
    tokens: str = ""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\w[\w.-]{0,63}", self.name, re.ASCII):
            raise ConfigError(f'name="{self.name}" must be letters, digits, "_", "-" and ".": it names a folder')
        if not 0 <= self.weight < math.inf:
            raise ConfigError(f"weight={self.weight} must be a number, 0 or more")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixture:
    """Several sources, each read in an order of its own, as often as its weight says."""

    parts: tuple[Part, ...] = ()

    def __post_init__(self) -> None:
        names = [part.name for part in self.parts]
        if len(set(names)) < len(names) or not names:
            raise ConfigError(f"parts are {names or 'none'}; a mixture has parts, each with a name of its own")
        if not any(part.weight for part in self.parts):
            raise ConfigError("parts have weights of 0 alone; give one a weight")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainBPE:
    """A byte-level BPE trained on the training split.

    Attributes:
      vocab_size: its tokens: 256 bytes, the merges, 3 special tokens (<|endoftext|> and, for chats, <|im_start|> and
        <|im_end|>), `extra_tokens`.
      extra_tokens: more control tokens, such as "<tool_call>", "<think>" or "<|fim_prefix|>".
    """

    vocab_size: int
    extra_tokens: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len({"", *self.extra_tokens}) <= len(self.extra_tokens):
            raise ConfigError(f"extra_tokens={self.extra_tokens} must be different, and none of them empty")
        extra = f" and {len(self.extra_tokens)} extra tokens" if self.extra_tokens else ""
        if self.vocab_size < (least := 256 + 3 + len(self.extra_tokens)):
            raise ConfigError(
                f"vocab_size={self.vocab_size} must be at least {least}: 256 bytes, 3 special tokens{extra}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerFile:
    """An existing tokenizer.

    Attributes:
      path: a folder as published (tokenizer.json, or vocab.json and merges.txt, or qwen.tiktoken), or one such file.
    """

    path: str

    def __post_init__(self) -> None:
        if not self.path:
            raise ConfigError('path="" names no tokenizer; give a published folder or a tokenizer.json')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """Text, how it becomes tokens, and how long the rows are.

    Attributes:
      source: where the documents come from.
      tokenizer: what makes them tokens.
      sequence_length: predicted tokens per row.
      full_length: fraction of the rows that are `sequence_length` tokens of the text as they follow each other. Each
        other row is cut, as if documents ended there, into pieces of one of `shorter_lengths`, drawn for it.
      shorter_lengths: those lengths.
      packing: "windows" are rows of the text as its documents follow each other; "best_fit" puts whole documents into
        rows, nearly without padding, and cuts those that are longer than a row. "auto" takes windows for text and
        best_fit for conversations and preferences, which cannot have windows.
      held_out: fraction of the documents kept for evaluation. The content of a document decides its side, so
        copies never fall on both. 0 for none.
      tokens: folder of token shards, used as it is where one exists, made there otherwise; empty for one
        inside the run directory, which is checked against the source at each start. A mixture has one for each part.
      max_bad_fraction: fraction of the documents that may be unreadable; they are skipped and counted.
    """

    source: Source | Mixture
    tokenizer: TrainBPE | TokenizerFile
    sequence_length: int
    full_length: float = 1.0
    shorter_lengths: tuple[int, ...] = ()
    packing: Literal["auto", "windows", "best_fit"] = "auto"
    held_out: float = 0.02
    tokens: str = ""
    max_bad_fraction: float = 0.0

    def __post_init__(self) -> None:
        if self.sequence_length < 1:
            raise ConfigError(f"sequence_length={self.sequence_length} must be at least 1")
        if not 0 <= self.full_length <= 1:
            raise ConfigError(f"full_length={self.full_length} must be a fraction of the rows: between 0 and 1")
        if self.full_length < 1 and not self.shorter_lengths:
            raise ConfigError(f"full_length={self.full_length} leaves rows for shorter_lengths, and there are none")
        for length in self.shorter_lengths:
            if not 1 <= length < self.sequence_length:
                raise ConfigError(
                    f"shorter_lengths={self.shorter_lengths} must be at least 1 and below "
                    f"sequence_length={self.sequence_length}"
                )
        if not 0 <= self.held_out < 1:
            raise ConfigError(f"held_out={self.held_out} must be a fraction of the documents: 0 or more and below 1")
        if not 0 <= self.max_bad_fraction < 1:
            raise ConfigError(f"max_bad_fraction={self.max_bad_fraction} must be a fraction: 0 or more and below 1")
        self._check_prompts()
        self._check_packing()

    def _check_prompts(self) -> None:
        if sum(isinstance(part.source, Prompts) for part in self._all) > 1:
            raise ConfigError("source has several parts with @Prompts; put their files into one, with a glob")
        if not self.parts and isinstance(self.tokenizer, TrainBPE):
            raise ConfigError(
                "source is @Prompts alone, of which no tokenizer is trained: set tokenizer = @TokenizerFile and "
                "tokenizer.path to the model"
            )

    def _check_packing(self) -> None:
        chats = [part for part in self.parts if isinstance(part.source, Chats)]
        if chats and self.packing == "windows":
            raise ConfigError('packing="windows" would cut conversations anywhere; leave it out, or say "best_fit"')
        if self.full_length < 1 and any(self.packing_of(part) == "best_fit" for part in self.parts):
            raise ConfigError(
                f"full_length={self.full_length} cuts windows of text, and best_fit has none; leave it out"
            )
        if self.tokens and isinstance(self.source, Mixture):
            raise ConfigError(
                f'tokens="{self.tokens}" is one folder; in a mixture name those of the parts: source.parts.1.tokens'
            )

    @property
    def parts(self) -> tuple[Part, ...]:
        """The sources of tokens: one alone has no weight to speak of, and its folder of tokens no name."""
        return tuple(part for part in self._all if not isinstance(part.source, Prompts))

    @property
    def prompts(self) -> Prompts | None:
        """The prompts of reinforcement learning."""
        return next((part.source for part in self._all if isinstance(part.source, Prompts)), None)

    @property
    def _all(self) -> tuple[Part, ...]:
        if isinstance(self.source, Mixture):
            return self.source.parts
        return (Part(name="all", source=self.source, weight=1.0, tokens=self.tokens),)

    def packing_of(self, part: Part) -> Literal["windows", "best_fit"]:
        """How the rows of a part are made."""
        if self.packing == "auto":
            return "best_fit" if isinstance(part.source, Chats) else "windows"
        return self.packing


def _check_path(path: str, pattern: str) -> None:
    if not path:
        raise ConfigError('path="" names no text; give a file, a directory or a glob')
    if PurePath(pattern).is_absolute() or ".." in PurePath(pattern).parts:
        raise ConfigError(f'pattern="{pattern}" must stay inside path, like "**/*.py"')
