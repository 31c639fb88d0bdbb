"""Preferences as documents: every form they are kept in, their marks, and how they come into rows."""

from __future__ import annotations

import json

import numpy as np
import pytest

from qwen_jax.errors import DataError
from qwen_jax.text import train_bpe
from qwen_jax.text.chat import FORMATS
from train.data import Preferences, preferences, sources
from train.data.documents import IS_BAD, IS_GOOD, TRAINED
from train.data.rows import BestFit, Rows
from train.data.shards import ShardWriter, TokenShards

QUESTION = [{"role": "user", "content": "two?"}]
YES, NO = ([{"role": "assistant", "content": text}] for text in ("2", "three"))
CHAT = "<|im_start|>user\ntwo?<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(["the the"], vocab_size=260)


def read(tmp_path, *rows, bad=0.0, **how):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = Preferences(path=str(path), format="qwen3-instruct-2507", **how)
    tally = sources.new_tally(source, bad)
    form = FORMATS["qwen3-instruct-2507"]
    found = list(preferences.documents(sources.find_files(source, lambda _: None), source, form, tally))
    return found, tally


def texts(document):
    """Each side: its text, what of it is trained, whether its end is, and its labels."""
    return [
        (
            "".join(piece.text for piece in side.pieces),
            "".join(piece.text for piece in side.pieces if piece.trained),
            side.ends,
            side.labels,
        )
        for side in document.sides
    ]


BOTH = [
    (CHAT + "2<|im_end|>\n", "2<|im_end|>\n", False, (True,)),
    (CHAT + "three<|im_end|>\n", "three<|im_end|>\n", False, (False,)),
]
PLAIN = [("two? 2", " 2", True, (True,)), ("two? three", " three", True, (False,))]
TURN = {"from": "human", "value": "two?"}
FORMS = {
    "messages": ({"prompt": QUESTION, "chosen": YES, "rejected": NO}, BOTH),
    "whole conversations": ({"chosen": QUESTION + YES, "rejected": QUESTION + NO}, BOTH),
    "ShareGPT": (
        {
            "conversations": [TURN],
            "chosen": {"from": "gpt", "value": "2"},
            "rejected": {"from": "gpt", "value": "three"},
        },
        BOTH,
    ),
    "labelled messages": ({"prompt": QUESTION, "completions": [NO, YES], "labels": [False, True]}, BOTH),
    "texts": ({"prompt": "two?", "chosen": " 2", "rejected": " three"}, PLAIN),
    "whole texts": ({"chosen": "two? 2", "rejected": "two? three"}, PLAIN),
    "labelled texts": ({"prompt": "two?", "completions": [" three", " 2"], "labels": [0, 1]}, PLAIN),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_is_the_same_preference(tmp_path, name):
    row, wanted = FORMS[name]
    (document,), _ = read(tmp_path, row)
    assert texts(document) == wanted
    assert document.decides in ("two?", CHAT.removesuffix("<|im_start|>assistant\n"))


def test_names_of_columns_and_a_system_message(tmp_path):
    row = {"question": QUESTION, "better": "2", "worse": "three", "system": "Be short."}
    columns = {"prompt": "question", "chosen": "better", "rejected": "worse"}
    (document,), _ = read(tmp_path, row, columns=columns)
    assert texts(document)[0][0] == "<|im_start|>system\nBe short.<|im_end|>\n" + BOTH[0][0]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "is the same as one that is not"),
        ({"prompt": "a", "completions": ["b", "c"], "labels": [True, True]}, "all completions have the same label"),
        ({"prompt": "a", "completions": ["b", "c"], "labels": [True]}, "not two lists of one length"),
        ({"prompt": "a", "completions": ["b", "c"], "labels": [True, 0.5]}, "want true or false"),
        ({"prompt": QUESTION, "chosen": YES, "rejected": QUESTION}, "does not end with a message of the assistant"),
        ({"text": "a"}, r"its keys are \['text'\]; want chosen and rejected"),
        ({"prompt": "a", "completions": list("bcdefghij" * 4), "labels": [True] + [False] * 35}, "more than 32"),
    ],
)
def test_what_prefers_nothing_is_unreadable(tmp_path, row, message):
    with pytest.raises(DataError, match=message):
        read(tmp_path, row)
    found, tally = read(tmp_path, row, FORMS["texts"][0], bad=0.5)
    assert len(found) == 1 and tally.bad == 1


@pytest.mark.parametrize("prompt", [QUESTION, "two?"])
def test_steps_are_judged_at_their_last_token(tmp_path, tokenizer, prompt):
    row = {"prompt": prompt, "completions": ["one and one", "so 2"], "labels": [True, False]}
    (document,), _ = read(tmp_path, row, kind="steps")
    ids, marks = document.encode(tokenizer)
    places = [at for at, mark in enumerate(marks) if mark & (IS_GOOD | IS_BAD)]
    assert [marks[at] & ~TRAINED for at in places] == [IS_GOOD, IS_BAD]
    assert [tokenizer.decode(ids[: at + 1])[-5:] for at in places] == ["one\n\n", "o 2\n\n"]


def test_a_pair_is_two_segments_of_a_row_beside_others(tmp_path, tokenizer):
    found, _ = read(tmp_path, FORMS["texts"][0], FORMS["labelled texts"][0] | {"prompt": "again: two?"})
    with ShardWriter(
        tmp_path, "train", dtype="uint16", end_of_text=tokenizer.end_of_text, masked=True, judged=True
    ) as writer:
        for document in found:
            ids, marks = document.encode(tokenizer)
            writer.add(ids, document.text, marks)
        split = writer.finish()
    assert split.judged == 4
    record = type(
        "Manifest", (), dict(splits={"train": split}, vocab_size=260, end_of_text=tokenizer.end_of_text, dtype="uint16")
    )
    shards = TokenShards(tmp_path, "train", record)
    layout = BestFit(shards, 96, seed=0, too_long="drop")
    assert layout.num_rows == 1
    batch = {
        k: v[0] for k, v in Rows(shards, sequence_length=96, batch_size=1, seed=0, layout=layout).read([0]).items()
    }
    assert batch["segments"].max() == 4 and batch["groups"].max() == 2
    for segment in range(1, 5):
        columns = np.flatnonzero(batch["segments"] == segment)
        real = [at for at in columns if batch["tokens"][at] != tokenizer.end_of_text]
        text = tokenizer.decode(batch["tokens"][real].tolist())
        (place,) = np.flatnonzero(batch["labels"] * (batch["segments"] == segment))
        assert place == real[-1], "at the last token of the text"
        assert batch["labels"][place] == 1 + text.endswith("2")
        assert batch["groups"][place] == (segment + 1) // 2
        trained = [at for at in columns if batch["weights"][at]]
        assert tokenizer.decode(batch["targets"][trained].tolist()) in (
            " 2<|endoftext|>",
            " three<|endoftext|>",
            " 2",
            " three",
        )
        assert batch["targets"][trained[-1]] == tokenizer.end_of_text
    assert not batch["groups"][batch["segments"] == 0].any() and not batch["labels"][batch["segments"] == 0].any()
    too_small = BestFit(shards, 10, seed=0, too_long="drop")
    assert too_small.num_rows == 0 and too_small.num_left_out == 2
