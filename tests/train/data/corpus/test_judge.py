"""What a tiny random model says of documents: meaningless, and the same each time."""

from __future__ import annotations

from collections import Counter

import pytest

from qwen_jax.errors import ConfigError, ModelError
from qwen_jax.text import train_bpe
from tests.conftest import tiny_config
from tests.infer.conftest import save_run
from tests.train.data.corpus.conftest import prose
from train.data.corpus import domains, judge, quality
from train.data.corpus.config import Judged, Quality
from train.data.corpus.documents import Document

HOW = dict(max_tokens=24, batch_size=2)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    tokenizer = train_bpe(["low lower lowest, newer newest wider. " * 3], vocab_size=276)
    config = tiny_config(num_layers=1, vocab_size=280, max_position=128)
    return str(save_run(tmp_path_factory.mktemp("judge"), config, tokenizer))


def documents(*lengths):
    return [Document(prose(i, length), f"{i}") for i, length in enumerate(lengths)]


def test_scores_are_noted_and_the_low_ones_dropped(model):
    ask = lambda least, *lengths: list(
        quality.keep(
            documents(*lengths),
            Counter(),
            settings=Quality(model=model, question="{text} 0-5:", min_score=least, **HOW),
        )
    )
    found = ask(0.0, 3, 90, 5, 1, 40)
    scores = [document.notes["quality"] for document, _ in found]
    assert [document.id for document, _ in found] == ["0", "1", "2", "3", "4"]
    assert all(0 <= score <= 5 for score in scores) and len(set(scores)) > 1
    assert not any(reason for _, reason in found)
    assert [document.notes["quality"] for document, _ in ask(0.0, 3, 90)] == scores[:2]  # whatever is beside them
    middle = sorted(scores)[2]
    assert [bool(reason) for _, reason in ask(middle, 3, 90, 5, 1, 40)] == [score < middle for score in scores]


def test_probabilities_are_those_of_the_answers(model):
    settings = Quality(model=model, question="{text}?", **HOW)
    ((_, shares),) = judge.ask(documents(5), settings, settings.question, quality.POINTS)
    assert set(shares) == set(quality.POINTS) and sum(shares.values()) == pytest.approx(1, abs=1e-3)
    ((_, more),) = judge.ask(documents(5), settings, settings.question, quality.POINTS[:3])
    assert set(more) == {"0", "1", "2"}
    if shares["0"] and shares["1"]:
        assert more["0"] / more["1"] == pytest.approx(shares["0"] / shares["1"], rel=0.02)


def test_a_domain_is_one_of_the_labels(model):
    settings = Judged(model=model, labels=("science", "trade"), question="{text}\n{choices}\n", **HOW)
    found = [document.notes["domain"] for document, _ in domains.keep(documents(5, 9), Counter(), settings=settings)]
    assert set(found) <= {"science", "trade"} and len(found) == 2


def test_only_the_beginning_is_shown(model):
    asked = judge.Judge.load(model)
    text = "low lower 你好 " * 30
    assert text.startswith(asked.beginning(text, 20)) and len(asked.tokenizer.encode(asked.beginning(text, 20))) <= 20
    assert asked.beginning("low", 20) == "low"


def test_what_cannot_be_asked_is_refused(model):
    settings = Quality(model=model, question="{text}" + "?" * 200, **HOW)
    with pytest.raises(ConfigError, match="128 positions.*choose a lower max_tokens"):
        list(judge.ask(documents(1), settings, settings.question, quality.POINTS))
    with pytest.raises(ModelError, match="no token for the answer"):
        list(judge.ask(documents(1), settings, "{text}", ["good", "bad"]))
