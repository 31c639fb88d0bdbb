"""Runs on a model's own completions: they are judged, learned from, recorded, and go on bit for bit."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from tests.published import publish
from tests.train.conftest import record
from tests.train.test_run import run
from train.config import Evaluation, Pretrained
from train.data.config import Prompts, TokenizerFile
from train.reinforcement import GRPO, PPO, Critic, OnlineDPO, Rollout
from train.rewards.config import Function, RewardSource

pytestmark = pytest.mark.usefixtures("enough_devices")

REWARD = """
def reward(prompts, completions, letter, **columns):
    texts = [completion[0]["content"] for completion in completions]
    return [text.count(each) / (len(text) + 1) for text, each in zip(texts, letter)]
"""


@pytest.fixture
def online(config, tmp_path, compiled):
    """The tiny run on completions of its own, which are the better the more e are in them."""
    publish(tmp_path / "start", dataclasses.replace(config.model, num_layers=1, max_position=64), "qwen2")
    (tmp_path / "reward.py").write_text(REWARD)
    prompts = "".join(json.dumps({"prompt": f"{i}", "letter": "e"}) + "\n" for i in range(40))
    (tmp_path / "prompts.jsonl").write_text(prompts)
    judged = (RewardSource(source=Function(path=str(tmp_path / "reward.py"))),)
    return dataclasses.replace(
        config,
        model=Pretrained(path=str(tmp_path / "start"), dtype="float32"),
        data=dataclasses.replace(
            config.data,
            source=Prompts(path=str(tmp_path / "prompts.jsonl"), format="qwen3-instruct-2507"),
            tokenizer=TokenizerFile(path=str(tmp_path / "start")),
            sequence_length=31,
        ),
        objective=GRPO(rollout=Rollout(completions=4, max_new_tokens=8), rewards=judged),
        evaluation=Evaluation(every=2, samples=2),
        batch_size=16,
        accumulation=2,
        steps=4,
    )


OBJECTIVES = {
    "grpo": lambda rewards: GRPO(rollout=Rollout(completions=4, max_new_tokens=8), rewards=rewards),
    "ppo": lambda rewards: PPO(
        rollout=Rollout(completions=4, max_new_tokens=8, updates=2), rewards=rewards, critic=Critic(warmup_steps=1)
    ),
    "online dpo": lambda rewards: OnlineDPO(rollout=Rollout(completions=4, max_new_tokens=8), rewards=rewards),
}


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_a_run_on_its_own_completions_is_recorded(online, kind):
    length = 62 if kind == "online dpo" else 31
    data = dataclasses.replace(online.data, sequence_length=length)
    config = dataclasses.replace(online, objective=OBJECTIVES[kind](online.objective.rewards), data=data)
    assert run(config) == 0
    rows = record(config)
    assert {"loss", "reward", "reward_std", "completion_tokens", "rollout_tokens_per_second"} <= rows[0].keys()
    assert "held_out_reward" in rows[-1]
    told = [json.loads(line) for line in Path(config.run_dir, "rollouts.jsonl").read_text().splitlines()]
    assert {"step", "prompt", "completion", "reward", "tokens", "finish_reason"} == told[0].keys()
