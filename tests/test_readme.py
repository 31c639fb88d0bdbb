"""What the README shows, done: its config is read, its commands are parsed, its code runs, its links lead somewhere."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest

from infer.config import parse
from qwen_jax import bindings, zoo
from tests.conftest import tiny_config
from tests.published import publish
from train.__main__ import main as train
from train.config import TrainConfig
from train.data.config import Prompts
from train.reinforcement import GRPO

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
CONFIG = next(text for _, text in BLOCKS if text.startswith("run_dir"))
STAGE = next(text for _, text in BLOCKS if text.startswith("stages."))
ALIGN = next(text for _, text in BLOCKS if "@GRPO" in text)
LINES = [line for _, text in BLOCKS for line in text.splitlines()]


def commands(start: str) -> list[list[str]]:
    found = [shlex.split(line, comments=True) for line in LINES if line.startswith(start + " ")]
    assert found, f"the README shows no {start!r}"
    return [words[len(start.split()) :] for words in found]


def test_the_config_is_one(tmp_path):
    file = tmp_path / "mine.gin"
    file.write_text(CONFIG)
    config, _ = bindings.resolve(TrainConfig, bindings.read(file))
    assert config.model_config.width == zoo.published("Qwen2.5-0.5B").width
    assert config.mesh.fsdp == 8
    file.write_text(CONFIG + STAGE)
    (_, first), (_, last) = bindings.resolve(TrainConfig, bindings.read(file))[0].stage_configs
    assert (first, last.data.sequence_length) == (config, 32768)


def test_the_config_of_reinforcement_learning_is_one(tmp_path, monkeypatch):
    publish(tmp_path / "runs" / "sft", tiny_config(max_position=8192), "qwen2")
    monkeypatch.chdir(tmp_path)
    rest = [line for line in CONFIG.splitlines() if not line.startswith(("model", "data.source"))]
    (tmp_path / "mine.gin").write_text("\n".join(rest) + "\n" + ALIGN)
    config, _ = bindings.resolve(TrainConfig, bindings.read(tmp_path / "mine.gin"))
    assert isinstance(config.objective, GRPO) and isinstance(config.data.source, Prompts)


def test_the_config_of_a_longer_run_is_one(tmp_path, monkeypatch):
    text = (ROOT / "docs" / "long-context.md").read_text()
    (tmp_path / "mine.gin").write_text(CONFIG)
    (tmp_path / "long.gin").write_text(next(block for block in text.split("```\n") if block.startswith("include")))
    publish(tmp_path / "runs" / "mine", tiny_config(), "qwen2")
    monkeypatch.chdir(tmp_path)
    model = bindings.resolve(TrainConfig, bindings.read(Path("long.gin")))[0].model_config
    assert (model.max_position, model.rope.scaling.reach) == (32768, 32768)


@pytest.mark.parametrize("words", commands("python -m train"))
def test_train_takes_its_commands(words, tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.gin").write_text(CONFIG)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    publish(tmp_path / "runs" / "sft_qwen2.5", tiny_config(max_position=8192), "qwen2")
    monkeypatch.chdir(tmp_path)
    assert train([*words, *(() if "--print" in words else ("--print",))]) == 0
    assert "run_dir" in capsys.readouterr().out


@pytest.mark.parametrize("words", commands("python -m train.plan"))
def test_plan_takes_its_commands(words):
    importlib.import_module("train.plan.__main__").parse(words)


@pytest.mark.parametrize("words", commands("python -m infer"))
def test_infer_takes_its_commands(words):
    parse(words)


@pytest.mark.parametrize("name", ["convert", "merge", "verify"])
def test_weights_commands_parse(name):
    module = importlib.import_module(f"qwen_jax.weights.{name}")
    for words in commands(f"python -m qwen_jax.weights.{name}"):
        module.parse(words)


def test_the_code_runs(monkeypatch):
    monkeypatch.setattr(zoo, "published", lambda name: tiny_config(max_position=128))
    names: dict = {}
    exec(next(text for language, text in BLOCKS if language == "python"), names)
    assert names["hidden"].shape == (8, 128, 32)


def test_make_has_its_targets():
    makefile = (ROOT / "Makefile").read_text()
    for name in {line.split()[1] for line in LINES if line.startswith("make ")}:
        assert f"\n{name}:" in makefile


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))])
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target
