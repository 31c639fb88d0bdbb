"""What a run of PPO holds on each device, beside the table of docs/alignment.md."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import jax
import pytest

from tests.published import publish
from tests.train.test_run import run
from train import critic
from train.config import Mesh, Pretrained
from train.data.config import Prompts, TokenizerFile
from train.reinforcement import PPO, Critic, Rollout
from train.rewards.config import RewardSource, Verifier

TABLE = Path(__file__).parents[2] / "docs" / "alignment.md"
CLOSE = 0.1  # of the table: what else there is, a batch and a few counters, is small beside a model


def bytes_per_parameter() -> dict[str, int]:
    """Of the table: what stays from step to step, weights and moments."""
    found = re.findall(r"^\| (policy|critic|reference)[^|]*\| (\d+) \| (\d*)", TABLE.read_text(), re.MULTILINE)
    return {name: int(weights) + int(moments or 0) for name, weights, moments in found}


def held(device: jax.Device) -> int:
    """Bytes of all arrays on a device."""
    shards = [shard for x in jax.live_arrays() for shard in x.addressable_shards if shard.device == device]
    return sum({id(shard.data): shard.data.nbytes for shard in shards}.values())


@pytest.mark.usefixtures("enough_devices")
def test_ppo_holds_what_the_table_says(config, tmp_path, monkeypatch):
    shape = dataclasses.replace(config.model, num_layers=1, width=128, mlp_width=512, num_heads=4, num_kv_heads=4)
    publish(tmp_path / "start", shape, "qwen2")
    rows = [{"prompt": f"{n}?", "answer": f"{n}"} for n in range(40)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    online = dataclasses.replace(
        config,
        model=Pretrained(path=str(tmp_path / "start"), dtype="bfloat16"),
        data=dataclasses.replace(
            config.data,
            source=Prompts(path=str(tmp_path / "prompts.jsonl"), format="qwen3-instruct-2507"),
            tokenizer=TokenizerFile(path=str(tmp_path / "start")),
            sequence_length=32,
        ),
        objective=PPO(
            rollout=Rollout(completions=2, max_new_tokens=4),
            rewards=(RewardSource(source=Verifier(name="math")),),
            critic=Critic(warmup_steps=0),
        ),
        mesh=Mesh(fsdp=8),
        batch_size=16,
        steps=3,
    )
    measured: list[int] = []
    before, step = held(jax.devices()[0]), critic.ActorCritic.__call__

    def measuring(self, *arguments):
        measured.append(held(jax.devices()[0]) - before)
        return step(self, *arguments)

    monkeypatch.setattr(critic.ActorCritic, "__call__", measuring)
    assert run(online) == 0
    table = bytes_per_parameter()
    assert table.keys() == {"policy", "critic", "reference"}
    predicted = sum(table.values()) * online.model_config.num_parameters / 8
    assert len(measured) == 3 and max(measured) == pytest.approx(predicted, rel=CLOSE)
