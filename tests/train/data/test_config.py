"""The schema checks itself, and is there without anything heavy."""

import subprocess
import sys
from pathlib import Path

import pytest

from qwen_jax import bindings
from qwen_jax.errors import ConfigError
from train.data import Data, PythonStdlib, Text, TokenizerFile, TrainBPE

ROOT = Path(__file__).parents[3]


def data(**changes):
    return Data(**{"source": PythonStdlib(), "tokenizer": TrainBPE(vocab_size=300), "sequence_length": 8} | changes)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Text(path=""), "path="),
        (lambda: Text(path="x", field=""), "field="),
        (lambda: Text(path="x", pattern="/etc/*"), "pattern="),
        (lambda: Text(path="x", pattern="../*.py"), "pattern="),
        (lambda: TrainBPE(vocab_size=258), "at least 259"),
        (lambda: TokenizerFile(path=""), "path="),
        (lambda: data(sequence_length=0), "sequence_length=0"),
        (lambda: data(held_out=1.0), "held_out=1.0"),
        (lambda: data(held_out=-0.1), "held_out=-0.1"),
        (lambda: data(held_out=float("nan")), "held_out=nan"),
        (lambda: data(max_bad_fraction=1.5), "max_bad_fraction=1.5"),
    ],
)
def test_values_that_cannot_be_honoured_are_refused_in_one_sentence(make, words):
    with pytest.raises(ConfigError) as caught:
        make()
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_schema_can_be_bound():
    text = ["source=@Text", "source.path='a/*.txt'", "tokenizer=@TrainBPE", "tokenizer.vocab_size=512"]
    config, _ = bindings.resolve(Data, bindings.parse_set([*text, "sequence_length=64", "held_out=0.1"]))
    assert config == Data(
        source=Text(path="a/*.txt"), tokenizer=TrainBPE(vocab_size=512), sequence_length=64, held_out=0.1
    )


def test_the_schema_imports_nothing_heavy():
    code = (
        "import sys, train.data, train.data.config; from train.data import Data, Text;"
        "print(sorted({'jax', 'grain', 'tokenizers', 'numpy'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_every_public_name_is_there():
    import train.data as package

    assert all(getattr(package, name) for name in package.__all__)
    with pytest.raises(AttributeError, match="nothing"):
        _ = package.nothing
