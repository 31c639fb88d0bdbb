"""Real compilations by libtpu, each in a process of its own."""

from __future__ import annotations

import dataclasses
import importlib.util
import json

import jax
import pytest

from qwen_jax import bindings, model
from qwen_jax.config import QwenNTK, Rope, Score
from qwen_jax.errors import ConfigError, FileError
from qwen_jax.sharding import make_mesh
from tests.published import publish
from train.adapter import NOTHING
from train.config import Mesh
from train.data.config import Prompts, TokenizerFile
from train.plan import __main__ as command
from train.plan import compiled as compiled_module
from train.plan import page, phases
from train.plan.chips import CHIPS
from train.plan.compiled import compile_step
from train.plan.topology import parse
from train.reinforcement import PPO, Critic, Rollout
from train.rewards.config import RewardModel, RewardSource

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")


@pytest.fixture
def small(config, change):
    """One layer over four devices."""
    return change(change(config, "model.num_layers", 1), "mesh", Mesh(fsdp=4))


@needs_libtpu
def test_a_step_compiled_for_four_chips(small, tmp_path, capsys):
    (tmp_path / "mine.gin").write_text(bindings.render(small))
    arguments = [str(tmp_path / "mine.gin"), "--topology", "v5e:2x2", "--json", "--hlo", str(tmp_path / "hlo")]
    assert command.main(arguments) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["fits"] and plan["chips"] == 4 and plan["label"].startswith("compiled, not run")
    # Parameters in float32 split four ways, and two moments of each.
    parameters = 4 * small.model_config.num_parameters / 4
    assert plan["memory"]["parameters"] >= parameters
    assert plan["memory"]["optimizer"] == pytest.approx(2 * plan["memory"]["parameters"], abs=64)
    assert plan["memory"]["peak"] < plan["memory"]["limit"]
    assert plan["estimate"]["compute"] > 0 and "all-gather" in {each["kind"] for each in plan["collectives"]}
    assert (tmp_path / "hlo").read_text().startswith("HloModule jit_train_step")


@pytest.fixture
def ppo(small):
    """On completions, judged by a reward model that is not there yet, and that the critic begins with."""
    data = dataclasses.replace(
        small.data, source=Prompts(path="x", chat=False), tokenizer=TokenizerFile(path="x"), held_out=0.0
    )
    rewards = (RewardSource(source=RewardModel(path="runs/none")),)
    rollout = Rollout(completions=2, max_new_tokens=8, tensor=2, max_rows=3)
    objective = PPO(rewards=rewards, rollout=rollout, critic=Critic(model="runs/none"))
    return dataclasses.replace(small, data=data, objective=objective)


@needs_libtpu
def test_each_phase_of_an_episode_is_compiled(ppo, change):
    """A rollout holds an engine's weights and cache beside all that is there in any phase."""
    # As Qwen1 has it: rotations go by the lengths of the prompts.
    ppo = change(ppo, "model.rope", Rope(theta=1e4, scaling=QwenNTK(original_positions=64)))
    compiled = compile_step(ppo, parse("v5e:2x2"))
    assert compiled.absent == ["runs/none"]
    assert "runs/none is not there yet" in page.render(ppo, parse("v5e:2x2"), compiled, "")
    found = compiled.phases
    shape, rows, tokens = ppo.model_config, 3, 32  # of a page, which a row of 17 has one of
    cache = 4 * 2 * shape.num_kv_heads * shape.head_dim * shape.num_layers * rows * tokens / 2
    weights = 4 * shape.num_parameters / 2
    # Policy and critic with their moments, the reference and the reward model.
    always = 4 * (3 + 3 + 1 + 1) * shape.num_parameters / 4
    assert found.keys() == {"step", "rollout", "look", "critic"}
    assert min(found.values()) > always and found["rollout"] > always + weights + cache


def test_a_reward_model_counts_wherever_it_is(ppo, tmp_path):
    """With its own shape once it is there, and until then with that of the policy."""
    larger = dataclasses.replace(ppo.model_config, num_layers=2, mlp_width=64, score=Score(labels=1, hidden=False))
    publish(tmp_path / "judge", larger, "qwen2")

    def held(*paths):
        rewards = tuple(RewardSource(source=RewardModel(path=str(path))) for path in paths)
        objective = dataclasses.replace(ppo.objective, rewards=rewards)
        return phases.held(dataclasses.replace(ppo, objective=objective), None, NOTHING)

    with jax.set_mesh(make_mesh(fsdp=4, devices=jax.devices()[:4])):
        bytes_of = lambda shape: phases.size(model.abstract(shape))
        assert held(tmp_path / "none") == bytes_of(ppo.model_config)
        assert held("none", tmp_path / "judge") == bytes_of(ppo.model_config) + bytes_of(larger)


@needs_libtpu
def test_what_the_compiler_refuses_is_one_line(small):
    # Not a topology: the compiler is asked for more chips than the program's process can have.
    wrong = dataclasses.replace(parse("v5e:2x2"), shape=(3, 5))
    with pytest.raises(ConfigError, match=r"^v5e:3x5 cannot run this: [^\n]+$"):
        compile_step(dataclasses.replace(small, mesh=Mesh()), wrong)


def test_without_the_compiler(small, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (tmp_path / "mine.gin").write_text(bindings.render(small))
    with pytest.raises(FileError, match="libtpu, the TPU compiler, is not installed: pip install"):
        command.main([str(tmp_path / "mine.gin"), "--topology", "v5e:2x2"])


def test_last_words():
    log = "WARNING: something\nF0000 check.cc:12] Check failed: bounds <= 16\n*** stack\n#1 frame"
    assert compiled_module._last_words(log) == "F0000 check.cc:12] Check failed: bounds <= 16"
    assert compiled_module._last_words("plan: error: model.width=3 must be") == "model.width=3 must be"
    assert compiled_module._last_words("") == "no output"


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
def test_every_chip(small, chip):
    shape = next(shape for shape in CHIPS[chip].shapes if len(shape) == 2 or shape == (2, 2, 1))
    topology = dataclasses.replace(parse(f"{chip}:{'x'.join(map(str, shape))}"))
    found = compile_step(dataclasses.replace(small, mesh=Mesh(fsdp=topology.num_devices)), topology)
    assert found.program and len(found.places) == topology.num_devices


@needs_libtpu
@pytest.mark.slow
def test_the_compiler_says_how_much_too_much(planned, change):
    too_much = change(change(planned, "remat", "none"), "mesh", Mesh(fsdp=64, data=4))
    found = compile_step(change(too_much, "batch_size", 1024), parse("v5e:16x16"))
    assert found.program is None and found.peak > parse("v5e:16x16").hbm
    assert "DOES NOT FIT" in page.render(too_much, parse("v5e:16x16"), found)


@needs_libtpu
@pytest.mark.slow
def test_a_model_of_seven_billion_on_a_pod(planned):
    found = compile_step(planned, parse("v5e:16x16"))
    assert found.program and found.peak < 8 * 2**30
    assert found.parameters == pytest.approx(4 * planned.model_config.num_parameters / 256, rel=0.05)
