"""Stages with an engine that says what a script has it say, so that nothing is compiled."""

from __future__ import annotations

import json
import types

import pytest

from qwen_jax.command import run_command
from qwen_jax.engine import Token
from qwen_jax.ops.sampling import Sampling
from qwen_jax.text import train_bpe
from qwen_jax.text.chat import FORMATS
from train.data.synthesis import asking
from train.data.synthesis import run as run_module
from train.data.synthesis.__main__ import main

POSITIONS = 4096


class ScriptedEngine:
    """The protocol of `qwen_jax.engine.Engine`: each request gets the tokens of a text, one a step.

    Attributes:
      most: requests there were at a time.
    """

    def __init__(self, tokenizer, script, capacity):
        self._tokenizer, self._script, self._rows = tokenizer, script, capacity.max_rows
        self._texts = {}
        self.most = self._number = 0

    def add(self, request):
        prompt = self._tokenizer.decode(request.prompt, skip_special=False)
        question = prompt.rpartition("<|im_start|>user\n")[2].partition("<|im_end|>")[0]
        ids = self._tokenizer.encode_trusted(self._script(question, request) + "<|im_end|>")
        for token in ids if request.constraint else ():
            assert request.constraint.mask()[token // 32] >> (token % 32) & 1, "not a token of the grammar"
            request.constraint.accept(token)
        self._number += 1
        self._texts[self._number] = [list(reversed(ids)), request.max_new_tokens]
        self.most = max(self.most, len(self._texts))
        return self._number

    def step(self):
        made = []
        for number in list(self._texts)[: self._rows]:
            left = self._texts[number]
            left[1] -= 1
            token = left[0].pop()
            reason = "stop" if not left[0] else "length" if not left[1] else None
            if reason:
                del self._texts[number]
            made.append(Token(number, token, reason))
        return made

    def cancel(self, number):
        self._texts.pop(number, None)


@pytest.fixture(scope="session")
def tokenizer():
    return train_bpe(["low lower lowest, newer newest wider. " * 3], vocab_size=276)


@pytest.fixture
def says(monkeypatch, tokenizer):
    """Has the model answer as a function of the question (and the request) says; gives the engines that were loaded."""
    engines = []

    def script(answer, *, form="qwen2"):
        def load(model, tokenizer, *, mesh, dtype, capacity):
            engines.append(ScriptedEngine(tokenizer, answer, capacity))
            return engines[-1]

        def open_for(config, *, warn):
            model = types.SimpleNamespace(path=config.path)
            stop_ids = frozenset({tokenizer.control["<|im_end|>"]})
            how = dict(form=FORMATS[form], stop_ids=stop_ids, sampling=Sampling(), max_length=config.max_length)
            return asking.Opened(config=config, model=model, tokenizer=tokenizer, **how)

        monkeypatch.setattr(asking, "load", load)
        monkeypatch.setattr(run_module, "open_for", open_for)
        return engines

    return script


@pytest.fixture
def stage(tmp_path, capsys):
    """Runs a stage on rows: the exit code, the rows of the output, its report, and what was said on stderr."""

    def run(rows, name, *options, overwrite=False, **fields):
        (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        lines = [f"input = {str(tmp_path / 'in.jsonl')!r}", f"output = {str(tmp_path / 'out.jsonl')!r}"]
        lines += [f"stage = @{name}", *(f"stage.{field} = {value!r}" for field, value in fields.items()), *options]
        (tmp_path / "c.gin").write_text("\n".join(lines))
        arguments = [str(tmp_path / "c.gin"), *["--overwrite"] * overwrite]
        code = run_command("synthesis", lambda: main(arguments))
        out, report = tmp_path / "out.jsonl", tmp_path / "out.jsonl.report.json"
        made = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else None
        said = json.loads(report.read_text()) if report.exists() else None
        return types.SimpleNamespace(code=code, rows=made, report=said, err=capsys.readouterr().err)

    return run


MODEL = ('model.path = "m"', "model.max_new_tokens = 900", "model.max_rows = 3")
