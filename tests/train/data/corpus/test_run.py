"""A corpus from end to end: what is left, who does it, and what a kill leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from qwen_jax import bindings
from qwen_jax.errors import ConfigError, DataError, FileError
from tests.train.data.corpus.conftest import prose, published, tree, write_lines
from train.data import prepare
from train.data.config import Data, Text, TrainBPE
from train.data.corpus import tasks
from train.data.corpus.config import MinHash
from train.data.corpus.run import run


@pytest.fixture
def whole(config, tmp_path):
    """Every file of a corpus that was made at once."""
    other = replace(config, output=str(tmp_path / "whole"), tokens=None)
    run(other, "")
    return tree(other)


def test_what_is_left_is_what_the_stages_leave(config):
    report = run(config, "the config\n")
    left = Counter(document.id for document in published(config))
    wiki = {f"a.jsonl.gz:{i}" for i in (1, 3, 5)}
    expected = (
        {f"{i}.txt" for i in range(6)} | {f"a.jsonl.gz:{i}" for i in (2, 4, 6)} | {f"b.jsonl:{i}" for i in (1, 2, 3)}
    )
    assert set(left) <= expected | wiki and wiki <= set(left)
    assert all(left[id] in (2, 3) for id in wiki) and all(left[id] == 1 for id in expected & set(left))
    values = json.loads((Path(config.output) / "report.json").read_text())
    dropped = {stage: summary["dropped"] for stage, summary in values.items() if summary["dropped"]}
    assert dropped == {
        "1-read": {"empty": 1},
        "3-exact": {"duplicate": 2},
        "4-minhash": {"duplicate": 1},
        "5-rules": {"gopher min_words": 1},
        "7-decontaminate": {"13-gram": 1},
    }
    assert "a.jsonl.gz:11 (of test.jsonl:1)" in report and "a.jsonl.gz:7 (of 3.txt)" in report
    assert (Path(config.output) / "config.gin").read_text() == "the config\n"


def test_a_training_run_takes_the_tokens(config, tmp_path):
    run(config, "")
    source = Text(path=str(Path(config.output) / "documents"))
    tokens = str(Path(config.output) / "tokens")
    data = Data(source=source, tokenizer=TrainBPE(vocab_size=270), sequence_length=8, held_out=0.0, tokens=tokens)
    made = prepare(data, tmp_path, seed=0, report=print).parts[0]
    assert made.train.num_documents == len(published(config))
    assert made.train.num_characters == sum(len(document.text) for document in published(config))


def test_more_workers_leave_the_same_bytes(config, whole, tmp_path):
    for workers in (2, 4):
        other = replace(config, output=str(tmp_path / f"{workers}"), workers=workers, tokens=None)
        run(other, "")
        assert tree(other) == whole


def test_killed_at_every_rename_and_run_again_it_leaves_the_same_bytes(config, whole, monkeypatch):
    config, real, kills = replace(config, tokens=None), os.replace, 0

    def killed(*paths):
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        real(*paths)

    monkeypatch.setattr(tasks.os, "replace", killed)
    while True:
        left = 6  # more than a task has: each run comes further, and most stop between an output and its record
        try:
            run(config, "")
            break
        except KeyboardInterrupt:
            kills += 1
    assert kills > 20
    assert tree(config) == whole


# The command with the shards of these tests, which kills itself as it is to give a file of a stage its name.
KILLED = """
import os, runpy, signal, sys
from train.data.corpus import phases, read, tasks

stage, *sys.argv[1:] = sys.argv[1:]
phases.shard_files = lambda files, megabytes: read.shard_files(files, megabytes / 32_000)
replace = os.replace

def killed(partial, path):
    if stage in str(path) and "00001" in path.name:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(partial, path)

tasks.os.replace = killed
runpy.run_module("train.data.corpus", run_name="__main__")
"""


def test_killed_by_the_system_inside_two_stages_it_leaves_the_same_bytes(config, whole, tmp_path):
    config = replace(config, tokens=None)
    file = tmp_path / "corpus.gin"
    file.write_text(bindings.render(config))
    for stage in ("4-minhash", "7-decontaminate"):
        done = subprocess.run([sys.executable, "-c", KILLED, stage, str(file)], capture_output=True, text=True)
        assert done.returncode == -signal.SIGKILL, done.stderr
        work = Path(config.output) / "work"
        assert list(work.glob(f"{stage}*/00001.*.partial")), "what was being written is there, without its name"
    run(config, "")
    assert tree(config) == whole


def test_what_did_not_change_is_not_done_again(config, monkeypatch):
    run(config, "")
    before = tree(config)
    done = []
    real = tasks.Task._commit
    monkeypatch.setattr(tasks.Task, "_commit", lambda task, *rest: (done.append(task.phase.name), real(task, *rest)))
    run(config, "")
    assert done == [] and tree(config) == before
    run(replace(config, decontaminate=replace(config.decontaminate, ngram=20)), "")
    assert set(done) == {"7-decontaminate"}  # which drops the same, so what follows stands
    damaged = next((Path(config.output) / "documents").iterdir())
    damaged.write_bytes(b"")
    done.clear()
    run(config, "")
    assert set(done) == {"7-decontaminate", "9-documents"} and tree(config) == before


def test_fewer_shards_leave_nothing_of_the_others(config, raw, tmp_path):
    run(replace(config, source=Text(path=str(raw)), tokens=None), "")
    few = replace(config, source=Text(path=str(raw / "a.jsonl.gz")), tokens=None)
    run(few, "")
    fresh = replace(few, output=str(tmp_path / "fresh"))
    run(fresh, "")
    assert {name for name in tree(few) if name.startswith("documents")} == {
        name for name in tree(fresh) if name.startswith("documents")
    }
    assert [document.id for document in published(few)] == [document.id for document in published(fresh)]


def test_a_folder_that_holds_something_else_is_left_alone(config):
    Path(config.output).mkdir()
    (Path(config.output) / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds something else"):
        run(config, "")
    assert os.listdir(config.output) == ["thesis.txt"]


def test_a_second_process_is_sent_away(config):
    from train.data.corpus.run import _locked

    with _locked(Path(config.output)), pytest.raises(FileError, match="another process makes"):
        run(config, "")


def test_nothing_left_is_an_error_that_names_the_report(config):
    rules = replace(config.rules, gopher_quality=replace(config.rules.gopher_quality, min_words=10_000))
    with pytest.raises(DataError, match=r"no document is left; .*report\.txt"):
        run(replace(config, rules=rules, tokens=None), "")


def test_bad_lines_are_named_or_counted(config, tmp_path):
    bad = tmp_path / "bad"
    bad.mkdir()
    write_lines(bad / "a.jsonl", *({"text": prose(i)} for i in range(9)))
    with open(bad / "a.jsonl", "ab") as file:
        file.write(b'{"text": \xff}\n')
    of = replace(config, source=Text(path=str(bad)), tokens=None, decontaminate=None, minhash=MinHash())
    with pytest.raises(DataError, match=r"a\.jsonl:10: .*max_bad_fraction"):
        run(of, "")
    with pytest.raises(DataError, match=r"1 of 10 documents are unreadable, .* allows 0; the first: a\.jsonl:10: "):
        run(replace(of, max_bad_fraction=0.05), "")
    assert "dropped: unreadable" in run(replace(of, max_bad_fraction=0.1), "")


def test_nothing_to_read_is_an_error(config, tmp_path):
    with pytest.raises(FileError, match="no file"):
        run(replace(config, source=Text(path=str(tmp_path / "*.txt"))), "")
