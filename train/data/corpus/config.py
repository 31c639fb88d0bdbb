"""What `python -m train.data.corpus` does: the schema of its .gin files. Imports nothing heavy.

A stage that is not named is not done. The stages run in the order of the fields of `Corpus`, which is that of the Qwen
report (arXiv 2309.16609, section 2.1). A threshold of None turns its rule off.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass

from qwen_jax.errors import ConfigError
from train.data.config import PythonStdlib, Text, TokenizerFile, TrainBPE


def _at_least(least: float, section: object, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        if value is not None and not value >= least:  # NaN is not
            raise ConfigError(f"{name}={value} must be at least {least}")


def _fractions(section: object, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        if value is not None and not 0 <= value <= 1:
            raise ConfigError(f"{name}={value} must be a fraction: between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class Language:
    """Keeps documents of some languages, as py3langid tells them (extra `corpus`).

    Attributes:
      keep: codes of ISO 639-1, e.g. ("en", "zh"); () keeps all, and only notes the language.
      min_confidence: probability that the language must have; FineWeb's (arXiv 2406.17557).
    """

    keep: tuple[str, ...] = ()
    min_confidence: float = 0.65

    def __post_init__(self) -> None:
        _fractions(self, "min_confidence")


@dataclass(frozen=True, kw_only=True)
class Exact:
    """Keeps the first of the documents with the same words, whatever their case, punctuation and spacing."""


@dataclass(frozen=True, kw_only=True)
class MinHash:
    """Keeps the first of the documents that share most of their n-grams (Broder 1997), found by banding.

    Two documents of Jaccard similarity s meet in a band with probability 1 - (1 - s^rows)^bands. The defaults are
    FineWeb's: 92 % at 0.8, half at 0.7.

    Attributes:
      ngram: words per n-gram.
      bands, rows: each band compares `rows` minima out of bands * rows.
      verify: exact Jaccard similarity that two documents which met must have as well; None takes the band's word.
      seed: draws the hash functions.
    """

    ngram: int = 5
    bands: int = 14
    rows: int = 8
    verify: float | None = None
    seed: int = 1

    def __post_init__(self) -> None:
        _at_least(1, self, "ngram", "bands", "rows")
        _at_least(0, self, "seed")
        _fractions(self, "verify")


@dataclass(frozen=True, kw_only=True)
class GopherQuality:
    """Quality rules of Gopher (arXiv 2112.11446, A.1.1); words are what stands between spaces.

    Attributes:
      min_words, max_words: words of a document.
      min_word_length, max_word_length: mean characters of a word.
      max_hashes, max_ellipses: of these symbols per word.
      max_bullet_lines, max_ellipsis_lines: fraction of the lines that begin or end so.
      min_alphabetic: fraction of the words with a letter.
      min_stop_words: how many of "the, be, to, of, and, that, have, with" a document has.
    """

    min_words: int | None = 50
    max_words: int | None = 100_000
    min_word_length: float | None = 3.0
    max_word_length: float | None = 10.0
    max_hashes: float | None = 0.1
    max_ellipses: float | None = 0.1
    max_bullet_lines: float | None = 0.9
    max_ellipsis_lines: float | None = 0.3
    min_alphabetic: float | None = 0.8
    min_stop_words: int | None = 2

    def __post_init__(self) -> None:
        _at_least(0, self, *(field.name for field in dataclasses.fields(self)))


@dataclass(frozen=True, kw_only=True)
class GopherRepetition:
    """Repetition rules of Gopher (arXiv 2112.11446, table A1), all fractions of a document.

    Attributes:
      lines, paragraphs: of its lines and paragraphs that were there before.
      line_characters, paragraph_characters: of its characters, in these.
      top: (n, fraction) of the characters of its words that are in the n-gram which takes up most.
      repeated: (n, fraction) of the characters of its words that are in n-grams which were there before.
    """

    lines: float | None = 0.3
    paragraphs: float | None = 0.3
    line_characters: float | None = 0.2
    paragraph_characters: float | None = 0.2
    top: tuple[tuple[int, float], ...] = ((2, 0.2), (3, 0.18), (4, 0.16))
    repeated: tuple[tuple[int, float], ...] = ((5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.1))

    def __post_init__(self) -> None:
        _fractions(self, "lines", "paragraphs", "line_characters", "paragraph_characters")
        for n, fraction in (*self.top, *self.repeated):
            if n < 1 or not 0 <= fraction <= 1:
                raise ConfigError(f"({n}, {fraction}) must be words of an n-gram and a fraction, like (5, 0.15)")


@dataclass(frozen=True, kw_only=True)
class C4:
    """Rules of C4 (arXiv 1910.10683, section 2.2). The first group takes lines out, the second whole documents.

    The numbers are those of the paper in print and of the program it was made with; its first version had lines of 3
    words and documents of 5 sentences, as datatrove does.

    Attributes:
      terminal_punctuation: lines that do not end in one of . ! ? " '
      min_line_words: lines of fewer words.
      max_word_characters: lines with a longer word.
      javascript: lines with that word.
      policy: lines about cookies, privacy and terms of use.
      citations: takes marks such as [12] and [edit] out of lines.
      lorem_ipsum, curly_bracket: documents that have it.
      min_sentences: documents of fewer sentences, once the lines are gone.
      bad_words: a file with one word or phrase per line; documents with any of them. None ships with this program.
    """

    terminal_punctuation: bool = True
    min_line_words: int | None = 5
    max_word_characters: int | None = 1000
    javascript: bool = True
    policy: bool = True
    citations: bool = True
    lorem_ipsum: bool = True
    curly_bracket: bool = True
    min_sentences: int | None = 3
    bad_words: str = ""

    def __post_init__(self) -> None:
        _at_least(0, self, "min_line_words", "max_word_characters", "min_sentences")


@dataclass(frozen=True, kw_only=True)
class FineWeb:
    """Rules of FineWeb (arXiv 2406.17557, section 3.5).

    Attributes:
      min_punctuated_lines: fraction of the lines that end a sentence.
      max_short_lines, short_line: fraction of the lines with at most that many characters.
      max_repeated_characters: fraction of the characters in lines that were there before. The paper gives 0.1, the
        program it was made with 0.01.
      max_lines_per_word: line breaks per word.
    """

    min_punctuated_lines: float | None = 0.12
    max_short_lines: float | None = 0.67
    short_line: int = 30
    max_repeated_characters: float | None = 0.1
    max_lines_per_word: float | None = 0.3

    def __post_init__(self) -> None:
        _at_least(0, self, "short_line", "max_lines_per_word")
        _fractions(self, "min_punctuated_lines", "max_short_lines", "max_repeated_characters")


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Published heuristics; the first that a document breaks is the one it is counted under.

    Attributes:
      languages: documents of other languages pass, if the stage `language` was there to tell; () for all. The rules
        know words by the spaces between them, and English by its stop words.
    """

    languages: tuple[str, ...] = ()
    c4: C4 | None = None
    gopher_quality: GopherQuality | None = None
    gopher_repetition: GopherRepetition | None = None
    fineweb: FineWeb | None = None

    def __post_init__(self) -> None:
        if not (self.c4 or self.gopher_quality or self.gopher_repetition or self.fineweb):
            raise ConfigError("rules has none; write rules.gopher_quality = @GopherQuality, or leave rules out")


@dataclass(frozen=True, kw_only=True)
class Quality:
    """A Qwen gives each document points from 0 to 5, as in the Qwen2.5 report (arXiv 2412.15115, section 3.1).

    The score is the mean of the points under the probabilities that the model gives them as its answer.

    Attributes:
      model: a published folder, a run, a checkpoint, or with the extra `hub` the name of a published model.
      min_score: documents below are dropped; 0 keeps all, and only notes the score.
      question: what is asked; {text} stands for the document.
      max_tokens: of a document are shown, its beginning.
      batch_size: documents at a time.
    """

    model: str
    min_score: float = 2.5
    question: str = (
        "{text}\n\nHow good is the text above as a text to learn from? Judge its content, its language and how much "
        "there is in it. Answer with one digit from 0 (spam, fragments, nonsense) to 5 (excellent)."
    )
    max_tokens: int = 1024
    batch_size: int = 16

    def __post_init__(self) -> None:
        _judged(self)
        if not 0 <= self.min_score <= 5:
            raise ConfigError(f"min_score={self.min_score} must be between 0 and 5")


def _judged(section: Quality | Judged) -> None:
    if not section.model:
        raise ConfigError('model="" names no model; give a published folder, a run or a checkpoint')
    if section.question.count("{text}") != 1:
        raise ConfigError(f'question="{section.question:.40}" must have {{text}} once, where the document goes')
    _at_least(1, section, "max_tokens", "batch_size")


@dataclass(frozen=True, kw_only=True)
class EvaluationSet:
    """Samples that must not be trained on.

    Attributes:
      path: a file, a directory or a glob; JSON lines (.gz or not), or text with a sample in each line.
      fields: keys of a JSON line whose texts are looked for, each on its own; () for all that are texts.
    """

    path: str
    fields: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Decontaminate:
    """Drops what an evaluation set has too, by words without case and punctuation.

    Attributes:
      sets: what is looked for.
      ngram: words in a row that a document shares with a sample (Qwen report, arXiv 2309.16609); None for any number.
      lcs, lcs_fraction: words of the longest common subsequence, and which fraction of the shorter of the two it is
        at least (Qwen2 report, arXiv 2407.10671, section 3.3); None for any.
      lcs_ratio: a document of more times the words of a sample is compared with it in overlapping stretches of that
        length; None compares it whole, as the rule was written for samples of instruction data.
    """

    sets: tuple[EvaluationSet, ...] = ()
    ngram: int | None = 13
    lcs: int | None = 13
    lcs_fraction: float = 0.6
    lcs_ratio: float | None = 2.0

    def __post_init__(self) -> None:
        if not self.sets:
            raise ConfigError('sets=() has nothing to look for; write decontaminate.sets.1.path = "test.jsonl"')
        _at_least(1, self, "ngram", "lcs", "lcs_ratio")
        _fractions(self, "lcs_fraction")


@dataclass(frozen=True, kw_only=True)
class Patterns:
    """The domain of a document by what stands in one of its fields.

    Attributes:
      field: "id" (file and line) or a key of `Corpus.fields`, such as "url".
      patterns: (regular expression, domain): the first that is found anywhere in the field decides; () makes the
        domain what stands there.
      other: the domain of the rest.
    """

    field: str
    patterns: tuple[tuple[str, str], ...] = ()
    other: str = "other"

    def __post_init__(self) -> None:
        for pattern, _ in self.patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError(f"patterns: {pattern!r} is no regular expression: {error}") from None


@dataclass(frozen=True, kw_only=True)
class Judged:
    """The domain that a Qwen names, as in the Qwen2.5 report (arXiv 2412.15115, section 3.1).

    Attributes:
      labels: the domains it chooses from, at most 26.
      model, question, max_tokens, batch_size: as in `Quality`; {choices} stands for the labels.
    """

    model: str
    labels: tuple[str, ...]
    question: str = "{text}\n\nWhat is the text above about?\n{choices}\nAnswer with one letter."
    max_tokens: int = 512
    batch_size: int = 16

    def __post_init__(self) -> None:
        _judged(self)
        if not 2 <= len(self.labels) <= 26:
            raise ConfigError(f"labels={self.labels} must be 2 to 26 domains")


@dataclass(frozen=True, kw_only=True)
class Domains:
    """What documents are about, and how often each is to be read.

    Attributes:
      by: what tells the domain.
      weights: copies of each document of a domain: 2.25 is two copies of all and a third one of a quarter, 0.5 one of
        half. Domains that are not named have one.
    """

    by: Patterns | Judged
    weights: dict[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, weight in self.weights.items():
            if not 0 <= weight <= 1000:
                raise ConfigError(f'weights["{name}"] is {weight}, and must be copies of a document: 0 to 1000')


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Token shards of what is left, which `data.tokens` of a training run takes.

    Attributes:
      tokenizer: what makes them.
      held_out: fraction of the documents kept for evaluation.
    """

    tokenizer: TrainBPE | TokenizerFile
    held_out: float = 0.01

    def __post_init__(self) -> None:
        if not 0 <= self.held_out < 1:
            raise ConfigError(f"held_out={self.held_out} must be a fraction of the documents: 0 or more and below 1")


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """A corpus: what it is made of, what is done to it, where it goes.

    Attributes:
      source: raw text, HTML (files that end in .html or .htm, or texts that begin like HTML; extra `corpus`), JSON
        lines.
      output: folder of documents/, tokens/, report.txt, report.json and work/, where every stage leaves its own.
      fields: keys of JSON lines that documents keep beside their text.
      workers: processes; 0 for one per core.
      shard_megabytes: files are read together up to this size; a larger one is a shard of its own, and not split.
      max_bad_fraction: fraction of the documents that may be unreadable; they are skipped and counted.
      seed: draws which documents get one copy more.
    """

    source: Text | PythonStdlib
    output: str
    fields: tuple[str, ...] = ("url",)
    workers: int = 0
    shard_megabytes: int = 64
    max_bad_fraction: float = 0.0
    seed: int = 0
    language: Language | None = None
    exact: Exact | None = None
    minhash: MinHash | None = None
    rules: Rules | None = None
    quality: Quality | None = None
    decontaminate: Decontaminate | None = None
    domains: Domains | None = None
    tokens: Tokens | None = None

    def __post_init__(self) -> None:
        if not self.output:
            raise ConfigError('output="" names no folder; give one for the corpus, such as "corpus/mine"')
        _at_least(0, self, "workers", "seed")
        _at_least(1, self, "shard_megabytes")
        if not 0 <= self.max_bad_fraction < 1:
            raise ConfigError(f"max_bad_fraction={self.max_bad_fraction} must be a fraction: 0 or more and below 1")
        if taken := {"id", "text", *NOTES} & set(self.fields):
            raise ConfigError(f"fields={self.fields}: {sorted(taken)} are written by the stages; name others")


# What stages write beside a document's text.
NOTES = ("language", "quality", "domain")
