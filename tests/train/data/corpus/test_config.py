"""The schema checks itself, is bound by the config that ships, and loads nothing heavy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from qwen_jax import bindings
from qwen_jax.errors import ConfigError
from train.data.config import PythonStdlib
from train.data.corpus.config import (
    C4,
    Corpus,
    Decontaminate,
    Domains,
    EvaluationSet,
    FineWeb,
    GopherQuality,
    GopherRepetition,
    Judged,
    Language,
    MinHash,
    Patterns,
    Quality,
    Tokens,
    TrainBPE,
)

ROOT = Path(__file__).parents[4]
SETS = (EvaluationSet(path="x"),)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Corpus(source=PythonStdlib(), output=""), "output="),
        (lambda: Corpus(source=PythonStdlib(), output="x", workers=-1), "workers=-1"),
        (lambda: Corpus(source=PythonStdlib(), output="x", shard_megabytes=0), "shard_megabytes=0"),
        (lambda: Corpus(source=PythonStdlib(), output="x", max_bad_fraction=1.0), "max_bad_fraction=1.0"),
        (lambda: Corpus(source=PythonStdlib(), output="x", fields=("url", "domain")), "domain"),
        (lambda: Language(min_confidence=65), "min_confidence=65"),
        (lambda: MinHash(bands=0), "bands=0"),
        (lambda: MinHash(verify=float("nan")), "verify=nan"),
        (lambda: GopherQuality(min_words=-1), "min_words=-1"),
        (lambda: GopherRepetition(lines=30.0), "lines=30.0"),
        (lambda: GopherRepetition(top=((2, 20.0),)), "(2, 20.0)"),
        (lambda: C4(min_sentences=-3), "min_sentences=-3"),
        (lambda: FineWeb(max_short_lines=67.0), "max_short_lines=67.0"),
        (lambda: Quality(model=""), "model="),
        (lambda: Quality(model="m", min_score=6.0), "min_score=6.0"),
        (lambda: Quality(model="m", question="How good?"), "{text}"),
        (lambda: Judged(model="m", labels=("one",)), "labels="),
        (lambda: Decontaminate(sets=SETS, ngram=0), "ngram=0"),
        (lambda: Decontaminate(sets=SETS, lcs_fraction=60.0), "lcs_fraction=60.0"),
        (lambda: Decontaminate(sets=SETS, lcs_ratio=0.5), "lcs_ratio=0.5"),
        (lambda: Patterns(field="url", patterns=(("(", "x"),)), "no regular expression"),
        (lambda: Domains(by=Patterns(field="url"), weights={"a": -1.0}), 'weights["a"]'),
        (lambda: Domains(by=Patterns(field="url"), weights={"a": float("nan")}), 'weights["a"]'),
        (lambda: Tokens(tokenizer=TrainBPE(vocab_size=300), held_out=1.0), "held_out=1.0"),
    ],
)
def test_values_that_cannot_be_honoured_are_refused_in_one_sentence(make, words):
    with pytest.raises(ConfigError) as caught:
        make()
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_the_config_that_ships_is_one():
    config, _ = bindings.resolve(Corpus, bindings.read(ROOT / "configs/corpus.gin"))
    assert config.minhash == MinHash(verify=0.7) and config.rules and config.rules.c4 and not config.quality
    again, _ = bindings.resolve(Corpus, bindings.parse_set(bindings.render(config).replace("\n\n", "\n").splitlines()))
    assert again == config


def test_help_and_print_load_nothing_heavy():
    code = (
        "import sys; from train.data.corpus.__main__ import main\n"
        "main(['configs/corpus.gin', '--print'])\n"
        "sys.exit(bool({'jax', 'numpy', 'rich', 'tokenizers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and "minhash.verify = 0.7" in done.stdout
