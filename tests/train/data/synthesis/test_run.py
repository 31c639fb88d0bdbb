"""From file to file: killed anywhere, gone on with, and nothing else taken for one's own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from qwen_jax import bindings
from qwen_jax.errors import DataError
from qwen_jax.resumable import ResumableFile
from tests.conftest import tiny_config
from tests.published import publish
from tests.train.data.synthesis.conftest import MODEL
from train.data.synthesis.config import Respond, Synthesis
from train.data.synthesis.input import Input
from train.data.synthesis.respond import RespondStage

ROOT = Path(__file__).parents[4]
ROWS = [{"prompt": f"question {n}", "answer": str(n), "id": n} for n in range(7)]
RESPOND = dict(reference="answer", samples=3)


def answers(question, request):
    """Wrong, right, right in other words, or the same again, as the request's own number says."""
    number = question.split()[-1]
    return [f"I say {number}1", f"It is {number}.", f"#### {number}"][request.seed % 3]


def test_a_run_keeps_what_is_right_and_says_so(says, stage):
    engines = says(answers)
    done = stage(ROWS, "Respond", *MODEL, **RESPOND)
    assert done.code == 0, done.err
    assert [row["id"] for row in done.rows] == sorted(row["id"] for row in done.rows) and done.rows
    for row in done.rows:
        assert row["messages"][0] == {"role": "user", "content": row["prompt"]} and row["samples"] == 3
        assert row["messages"][1]["content"] in (f"It is {row['id']}.", f"#### {row['id']}")
    dropped = done.report["dropped"]
    assert done.report["rows in"] == 7 and done.report["rows out"] == len(done.rows)
    assert len(done.rows) + sum(dropped.values()) == 21 and set(dropped) == {"wrong", "duplicate"}
    assert "tokens/s" in done.err and f"rows out: {len(done.rows)}" in done.err
    assert engines[0].most <= 6 * 3  # twice max_rows of rows, whatever there is to do
    again = stage(ROWS, "Respond", *MODEL, **RESPOND)
    assert again.code == 0 and "is there already" in again.err and len(engines) == 1


@pytest.mark.parametrize("after", [0, 3, 6])
def test_a_run_that_was_killed_ends_with_the_bytes_of_an_unbroken_one(says, stage, tmp_path, monkeypatch, after):
    says(answers)
    names = ("out.jsonl", "out.jsonl.report.json")
    assert stage(ROWS, "Respond", *MODEL, **RESPOND).code == 0
    whole = [(tmp_path / name).read_bytes() for name in names]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.gin", "in.jsonl", *names]
    append, count = ResumableFile.append, 0

    def killed(file, number, row):
        nonlocal count
        if count == after:
            raise KeyboardInterrupt
        append(file, number, row)
        count += 1

    monkeypatch.setattr(ResumableFile, "append", killed)
    code = stage(ROWS, "Respond", *MODEL, **RESPOND, overwrite=True).code
    assert code == 130 and not (tmp_path / "out.jsonl").exists()
    with (tmp_path / "out.jsonl.progress").open("ab") as file:
        file.write(b'{"index": 6, "sam')  # a row that was being written
    monkeypatch.setattr(ResumableFile, "append", append)
    says(answers)
    # Another number of rows at a time, too.
    done = stage(ROWS, "Respond", *MODEL[:2], "model.max_rows = 1", **RESPOND)
    assert done.code == 0 and [(tmp_path / name).read_bytes() for name in names] == whole
    assert not (tmp_path / "out.jsonl.progress").exists()


def test_what_another_run_has_made_is_not_taken_for_ones_own(says, stage, tmp_path):
    says(answers)
    assert stage(ROWS, "Respond", *MODEL, **RESPOND).code == 0
    whole = (tmp_path / "out.jsonl").read_bytes()
    for changes in (dict(rows=ROWS[:6]), dict(samples=2), dict(options=(*MODEL, "seed = 1"))):
        fields = {**RESPOND, **{name: value for name, value in changes.items() if name == "samples"}}
        done = stage(changes.get("rows", ROWS), "Respond", *changes.get("options", MODEL), **fields)
        assert done.code == 3 and "made by another run" in done.err and "--overwrite" in done.err
        assert (tmp_path / "out.jsonl").read_bytes() == whole
    assert stage(ROWS[:6], "Respond", *MODEL, **RESPOND, overwrite=True).report["rows in"] == 6
    (tmp_path / "out.jsonl.report.json").unlink()
    assert stage(ROWS[:6], "Respond", *MODEL, **RESPOND).code == 3


@pytest.mark.parametrize(
    "line, message",
    [
        (b"{", "2: "),
        (b"[1]", "wanted a JSON object, got a list"),
        (b'{"prompt": 3}', 'field "prompt" holds a int; want a text'),
        (b'{"text": "a"}', 'field "prompt" holds nothing (there are text)'),
        (b'{"prompt": "a", "answer": "\\ud800"}', "a lone surrogate"),
        (b'{"prompt": "\xff"}', "2: 'utf-8' codec"),
        (b"[" * 100_000, "JSON nested too deeply"),
        (b'{"prompt": [{"role": "user"}]}', "messages[0].content is missing"),
        (b'{"prompt": [{"role": "assistant", "content": "a"}]}', "no message of the user"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(tmp_path, line, message):
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"prompt": "a", "answer": "1"}\n' + line + b"\n")
    check = RespondStage(Respond(reference="answer")).check
    with pytest.raises(DataError, match=re.escape(f"{path}:2: ")) as raised:
        Input(path, check)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("Respond", (), "stage=@Respond asks a model; bind model.path"),
        ("Select", ("stage.count = 3", *MODEL), "model: stage @Select asks none; leave it out"),
        ("Select", ("stage.count = 0",), "count=0 must be at least 1"),
        ("Tag", (*MODEL, 'stage.prompt = "tags"'), "there is no prompt 'tags'; there are broaden"),
        ("Tag", (*MODEL, "model.max_length = 900"), "max_length=900 must be above max_new_tokens=900"),
        ("Repurpose", (*MODEL, "stage.min_score = 6"), "min_score=6 must be 5 at most"),
    ],
)
def test_a_config_that_cannot_be_honoured_is_refused(stage, name, options, message):
    done = stage(ROWS, name, *options)
    assert done.code == 2 and message in done.err


def test_questions_that_leave_no_room_and_answers_that_are_cut_are_counted(says, stage):
    says(lambda question, request: "so " * 400 if "1" in question else "#### 0")
    rows = [ROWS[0], ROWS[1], {"prompt": "why? " * 2000, "answer": "3"}]
    done = stage(rows, "Respond", *MODEL, **{**RESPOND, "samples": 1})
    assert done.report["dropped"] == {"cut at max_new_tokens": 1, "question too long": 1}
    assert [row["id"] for row in done.rows] == [0] and done.report["rows in without any out"] == 2


def test_only_what_is_marked_is_an_answer_where_that_is_asked(says, stage):
    says(lambda question, request: "it is 0" if "1" in question else "#### 0")
    rows = [{"prompt": f"{number}?", "answer": "0"} for number in (1, 2)]
    done = stage(rows, "Respond", *MODEL, "stage.marked = True", **{**RESPOND, "samples": 1})
    assert done.report["dropped"] == {"no final answer": 1} and done.report["rows out"] == 1
    assert stage(rows, "Respond", *MODEL, "stage.marked = True").code == 2


def test_samples_of_one_row_are_drawn_apart(says, stage):
    drawn = []
    says(lambda question, request: drawn.append((request.seed, request.row)) or "3")
    assert stage(ROWS, "Respond", *MODEL, samples=4).code == 0
    assert len(set(drawn)) == 28


def test_the_example_and_the_manual_are_configs(tmp_path):
    manual = (ROOT / "docs/synthesis.md").read_text()
    (tmp_path / "manual.gin").write_text(next(block for block in manual.split("```\n") if block.startswith("input")))
    for file in (ROOT / "configs/synthesis.gin", tmp_path / "manual.gin"):
        config, _ = bindings.resolve(Synthesis, bindings.read(file))
        assert isinstance(config.stage, Respond) and config.stage.keep == 4


def test_a_real_model_goes_on_to_the_same_answers(stage, tmp_path, monkeypatch):
    publish(tmp_path / "tiny", tiny_config(num_layers=1, vocab_size=260), "qwen2")
    model = [f"model.path = {str(tmp_path / 'tiny')!r}", 'model.format = "qwen3"', "model.temperature = 1.0"]
    model += ["model.max_new_tokens = 6", "model.max_length = 60", "model.max_rows = 1", "model.thinking = False"]
    rows = [{"prompt": text} for text in ("a", "b", "the " * 30)]
    one = stage(rows, "Respond", *model, samples=2)
    assert one.code == 0 and one.report["dropped"]["question too long"] == 2, one.err
    whole = (tmp_path / "out.jsonl").read_bytes()
    append = ResumableFile.append
    monkeypatch.setattr(
        ResumableFile, "append", lambda file, number, row: append(file, number, row) or 1 / (number - 1)
    )
    assert stage(rows, "Respond", *model, samples=2, overwrite=True).code == 1
    monkeypatch.setattr(ResumableFile, "append", append)
    assert stage(rows, "Respond", *model, samples=2).code == 0
    assert (tmp_path / "out.jsonl").read_bytes() == whole
