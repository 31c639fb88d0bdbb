"""Small random models, as training and conversion leave them."""

from __future__ import annotations

import io
import json
import shutil
import sys

import jax
import numpy as np
import pytest

import infer.chat
from infer.__main__ import main
from qwen_jax import model, sharding
from qwen_jax.command import run_command
from qwen_jax.text import Tokenizer, train_bpe
from qwen_jax.weights.checkpoint import Checkpoints
from qwen_jax.weights.convert import convert
from qwen_jax.weights.source import open_model
from tests.conftest import tiny_config

# Unlike every published one.
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_run(folder, config, tokenizer):
    """A run folder with random weights."""
    random = np.random.default_rng(0)
    with jax.set_mesh(sharding.make_mesh(devices=jax.devices()[:1])):
        params = jax.tree.map(
            lambda x: jax.device_put(random.normal(0, 0.3, x.shape).astype(x.dtype), x.sharding.spec),
            model.abstract(config),
        )
        checkpoints = Checkpoints(folder / "checkpoints", warn=pytest.fail)
        files = {"model.json": config.to_json().encode(), "tokenizer.json": tokenizer.to_bytes(), "config.gin": b""}
        checkpoints.save(7, params=params, files=files, meta={})
        checkpoints.wait()
    return folder


def variant(published, folder, **files):
    """A copy of a published folder, with some of the files beside its weights written anew: NAME_json=...."""
    shutil.copytree(published, folder)
    for name, contents in files.items():
        path = folder / ".".join(name.rsplit("_", 1))
        path.write_text(contents if isinstance(contents, str) else json.dumps(contents))
    return folder


@pytest.fixture(scope="session")
def tokenizer():
    """With the tokens of thoughts, as Qwen3 has them."""
    spec = json.loads(train_bpe(["low lower lowest, newer newest wider. " * 3], vocab_size=276).to_bytes())
    for index, content in ((276, "<think>"), (277, "</think>")):
        spec["added_tokens"].append(spec["added_tokens"][0] | {"id": index, "content": content, "special": False})
    return Tokenizer(json.dumps(spec).encode())


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory, tokenizer):
    return save_run(tmp_path_factory.mktemp("run"), tiny_config(num_layers=1, vocab_size=288), tokenizer)


@pytest.fixture(scope="session")
def long_run(tmp_path_factory, tokenizer):
    """With room for a chat."""
    config = tiny_config(num_layers=1, vocab_size=288, max_position=512)
    return save_run(tmp_path_factory.mktemp("long"), config, tokenizer)


@pytest.fixture(scope="session")
def published(tmp_path_factory, long_run):
    """The long run as published, with nothing said of sampling."""
    folder = tmp_path_factory.mktemp("published") / "tiny"
    convert(open_model(long_run), folder, to="hf", dtype=None, say=lambda line: None)
    (folder / "generation_config.json").unlink()
    return folder


@pytest.fixture
def run_infer(capsys, monkeypatch):
    """Runs `python -m infer` with its arguments in this process; exit code, stdout, stderr."""

    def run(*arguments, stdin=b""):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        code = run_command("infer", lambda: main([str(argument) for argument in arguments]))
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def talk(run_infer, long_run):
    """Runs `infer chat` on lines; exit code, stdout, stderr."""

    def run(*lines, options=("--format", "qwen2"), model=long_run):
        stdin = "".join(f"{line}\n" for line in lines).encode("utf-8", "surrogateescape")
        return run_infer("chat", model, *options, stdin=stdin)

    return run


@pytest.fixture
def says(monkeypatch, tokenizer):
    """Has the model say texts, one a turn, each followed by <|im_end|>; gives the prompts it was asked with."""
    prompts = []

    def script(*answers, end="<|im_end|>"):
        texts = iter(answers)

        def generate(engine, jobs, *, show):
            ((request, completion),) = jobs
            prompts.append(tokenizer.decode(request.prompt, skip_special=False))
            text = next(texts)
            for token in tokenizer.encode_trusted(text + end)[: request.max_new_tokens]:
                show(0, completion.push(token))
            if text.endswith("^C"):
                raise KeyboardInterrupt
            show(0, completion.end("length"))

        monkeypatch.setattr(infer.chat, "generate", generate)
        return prompts

    return script
