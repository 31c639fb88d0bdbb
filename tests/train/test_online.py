"""Runs on a model's own completions: what they learn from, measure and leave, and that they go on bit for bit."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from qwen_jax import bindings, sharding
from qwen_jax.config import Score
from qwen_jax.errors import SAVED_PLEASE_RESTART, ConfigError, DataError
from qwen_jax.weights.checkpoint import Checkpoints
from tests.conftest import tiny_config
from tests.published import publish
from tests.train.conftest import record
from tests.train.test_hosts import TIMEOUT, forget, run_on, started
from tests.train.test_run import final_arrays, run, steps, when_step
from train import critic
from train.config import LM, Evaluation, LoRA, Mesh, Pretrained, Stage
from train.data.config import Data, Mixture, Part, Prompts, Text, TokenizerFile
from train.episode import unpack
from train.reinforcement import GRPO, PPO, Critic, OnlineDPO, Rollout
from train.rewards.config import Function, RewardModel, RewardSource
from train.rollout import SAVED

pytestmark = pytest.mark.usefixtures("enough_devices")

# Nats by which float32 sums, taken in another order, move the log-probability of a token.
CLOSE = 1e-4

REWARD = """
def reward(prompts, completions, **columns):
    sums = [sum(map(ord, text)) for text in completions]
    return [None if each % 16 == 15 else each % 2 for each in sums]

def failing(prompts, completions, **columns):
    failing.calls += 1
    if failing.calls > 1:
        raise RuntimeError("no more")
    return reward(prompts, completions)

failing.calls = 0
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A reward function, and prompts of two kinds: short ones, and long ones that begin alike."""
    folder = tmp_path_factory.mktemp("online")
    (folder / "reward.py").write_text(REWARD)
    prompts = [f"{n}{'+' * (n % 5)}" if n % 2 else f"What is the answer to this question {n}" for n in range(40)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    return folder


@pytest.fixture
def online(config, folder, corpus):
    """A function: an objective to five steps of it, of which three learn from an episode."""
    start = folder / "start"
    if not start.exists():
        shape = dataclasses.replace(config.model, num_layers=1, max_position=96, vocab_size=260)
        publish(start, shape, "qwen2")
    data = Data(
        source=Prompts(path=str(folder / "prompts.jsonl"), chat=False),
        tokenizer=TokenizerFile(path=str(start)),
        sequence_length=64,
        held_out=0.0,
    )
    asked, text = Part(name="asked", source=data.source, weight=2.0), Text(path=str(corpus))
    mixture = Mixture(parts=(asked, Part(name="text", source=text, weight=1.0)))
    beside = lambda objective: dict(source=mixture) if getattr(objective, "text", 0) else {}
    length = lambda objective: 96 if isinstance(objective, OnlineDPO) else 64  # so that the engine has the same prompts
    return lambda objective, **changes: dataclasses.replace(
        config,
        model=Pretrained(path=str(start), dtype="float32"),
        data=dataclasses.replace(data, **beside(objective), sequence_length=length(objective)),
        objective=objective,
        evaluation=Evaluation(every=2, samples=int(isinstance(objective, OnlineDPO))),
        checkpoint=dataclasses.replace(config.checkpoint, every=3),
        batch_size=8,
        accumulation=1,
        steps=5,
        **changes,
    )


@pytest.fixture
def judged(folder):
    """What objectives here have in common; the temperature is that of the policy."""
    rewards = (RewardSource(source=Function(path=str(folder / "reward.py"))),)
    rollout = Rollout(completions=4, max_new_tokens=8, temperature=1.25, updates=3, max_rows=4)
    return lambda **changes: dict(rewards=rewards, rollout=dataclasses.replace(rollout, **changes))


def saved_of(config) -> dict[str, np.ndarray]:
    """What the last checkpoint keeps of rollouts."""
    checkpoint = Checkpoints(Path(config.run_dir) / "checkpoints", warn=pytest.fail).latest_valid()
    return unpack(checkpoint.read(SAVED), SAVED)


def final_critic(config) -> list[bytes]:
    checkpoint = Checkpoints(Path(config.run_dir) / "checkpoints", warn=pytest.fail).latest_valid()
    with jax.set_mesh(sharding.make_mesh(devices=jax.devices()[:1])):
        return [np.asarray(x).tobytes() for x in jax.tree.leaves(critic.restored(config, checkpoint, unroll=False))]


KINDS = {
    "grpo": lambda judged: GRPO(**judged(order="variance"), resample=1),
    "ppo": lambda judged: PPO(**judged(ahead=1), critic=Critic(warmup_steps=1), text=0.5),
    "online dpo": lambda judged: OnlineDPO(**judged()),
}


def asked_to_stop(config, step):
    """Runs until it is asked to stop as it is about to take a step, counted from 0."""
    with when_step(step, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        assert run(config) == SAVED_PLEASE_RESTART


def killed(config, step):
    def end():
        raise RuntimeError("killed")

    with when_step(step, end), pytest.raises(RuntimeError, match="killed"):
        run(config)


@pytest.mark.parametrize(
    "kind, how",
    [
        ("grpo", (asked_to_stop, 3, 3)),  # before an episode, which is not sampled
        ("ppo", (asked_to_stop, 1, 2)),  # within an episode
        ("online dpo", (killed, 4, 3)),
    ],
)
def test_broken_off_and_resumed_equals_unbroken_bit_for_bit(online, judged, tmp_path, kind, how):
    config = online(KINDS[kind](judged))
    if kind == "online dpo":
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, held_out=0.2))
    broken = dataclasses.replace(config, run_dir=str(tmp_path / "broken"))
    assert run(config) == 0
    way, step, last = how
    way(broken, step)
    assert steps(broken)[-1] == last
    assert ("next/number" in saved_of(broken)) == (kind == "ppo")
    assert run(broken) == 0

    assert record(broken) == record(config)
    for name, count in {"rollouts.jsonl": 2 * 2 * 4, "samples.jsonl": 3 if kind == "online dpo" else 0}.items():
        told = [Path(each.run_dir, name).read_text() for each in (config, broken)]
        assert told[0] == told[1] and len(told[0].splitlines()) == count
    assert final_arrays(broken) == final_arrays(config)
    here, there = saved_of(config), saved_of(broken)
    assert here.keys() == there.keys()
    for name in here:
        if not name.startswith("now/measures/"):
            np.testing.assert_array_equal(there[name], here[name])
    assert 0 < sum(row.get("unjudged", 0) for row in record(config))
    if kind == "online dpo":
        assert [row["step"] for row in record(config) if "held_out_reward" in row] == [2, 4, 5]
    if kind == "grpo":
        assert Path(config.run_dir, "loss.png").exists()
        assert gap(here) < CLOSE and np.ptp(here["now/lengths"], axis=0).min() > 0
    if kind == "ppo":
        assert final_critic(broken) == final_critic(config) and here["moments"][0] > 0
        assert [0 < row.get("text_loss", 0) < 20 for row in record(config)] == [False, True, True, True, True]


def gap(found) -> float:
    """How far trainer and sampler are apart, of the token where they are furthest."""
    return np.abs(found["now/tokens/old"] - found["now/tokens/sampled"]).max()


def test_a_mesh_learns_what_a_device_does_and_samples_as_it_trains(online, judged, tmp_path):
    """Beside an adapter. Rows, columns, weights and heads are split; the engine has no columns to split."""
    lora = LoRA(rank=2, dropout=0.0, train_embeddings=True)
    config = online(GRPO(**judged()), adapter=lora)
    split = online(GRPO(**judged(max_rows=1)), adapter=lora, mesh=Mesh(fsdp=2, context=2, tensor=2))
    split = dataclasses.replace(split, run_dir=str(tmp_path / "split"), accumulation=2)
    for each in (config, split):
        assert run(each) == 0
        found = saved_of(each)
        assert found["now/number"] == 1 and gap(found) < CLOSE
    rows = record(config)
    assert 0 < rows[1]["kl"] < rows[4]["kl"]
    # The first episode: the second is sampled from weights that differ by rounding.
    for there, here in zip(record(split)[:3], rows, strict=False):
        assert there == pytest.approx(here, rel=1e-4, abs=1e-6)


def test_hosts_sample_shares_and_learn_what_one_does(online, judged, tmp_path):
    """With a critic, held-out prompts, verdicts that are missing, a reward model on all; then one host goes on."""
    shape = tiny_config(vocab_size=260, num_layers=1, score=Score(labels=1, hidden=False))
    publish(tmp_path / "judge", shape, "qwen2")
    how = judged(order="variance", tensor=1, max_rows=2)
    how["rewards"] += (RewardSource(source=RewardModel(path=str(tmp_path / "judge"), batch_size=3), weight=0.5),)
    config = online(PPO(**how, critic=Critic(warmup_steps=1)))
    data = dataclasses.replace(config.data, held_out=0.2)
    config = dataclasses.replace(config, data=data, mesh=Mesh(fsdp=2), evaluation=Evaluation(every=2, samples=3))
    shared = dataclasses.replace(config, run_dir=str(tmp_path / "shared"))
    run_on(shared, tmp_path, hosts=2, devices=1)
    assert run(config) == 0
    for there, here in zip(record(shared), record(config), strict=True):
        assert there == pytest.approx(here, rel=1e-4, abs=1e-6)
    for name, count in {"rollouts.jsonl": 2 * 2 * 4, "samples.jsonl": 3 * 3}.items():
        told = [Path(each.run_dir, name).read_text().splitlines() for each in (config, shared)]
        assert told[0] == told[1] and len(told[0]) == count
    forget(shared, 5)
    assert run(shared) == 0
    for there, here in zip(record(shared), record(config), strict=True):
        assert there == pytest.approx(here, rel=1e-4, abs=1e-6)


SLOW = """
import pathlib, time

def reward(prompts, completions, **columns):
    reward.calls += 1
    if reward.calls == 2:
        pathlib.Path("TOLD").touch()
        time.sleep(3)
    return [float(len(set(text))) for text in completions]

reward.calls = 0
"""


def test_one_host_that_is_asked_to_stop_stops_all(online, judged, tmp_path):
    """In the middle of an episode, which is not learned from; then they go on as if nothing had been."""
    file, told = tmp_path / "slow.py", tmp_path / "told"
    file.write_text(SLOW.replace("TOLD", str(told)))
    rewards = (RewardSource(source=Function(path=str(file))),)
    config = online(GRPO(**judged(tensor=1) | dict(rewards=rewards)), mesh=Mesh(data=2))
    (tmp_path / "run.gin").write_text(bindings.render(config))
    with started(tmp_path / "run.gin", hosts=2, devices=1) as processes:
        wait_for(told.exists, processes)
        processes[1].send_signal(signal.SIGTERM)
        for process in processes:
            _, errors = process.communicate(timeout=TIMEOUT)
            assert process.returncode == SAVED_PLEASE_RESTART, errors
    assert steps(config) == [3]
    run_on(config, tmp_path, hosts=2, devices=1)
    unbroken = dataclasses.replace(config, run_dir=str(tmp_path / "unbroken"))
    assert run(unbroken) == 0
    for there, here in zip(record(config), record(unbroken), strict=True):
        assert there == pytest.approx(here, rel=1e-4, abs=1e-6)


def test_a_reward_that_fails_on_a_host_ends_all_in_one_sentence(online, judged, folder, tmp_path):
    failing = (RewardSource(source=Function(path=str(folder / "reward.py"), name="failing")),)
    config = online(GRPO(**judged(tensor=1) | dict(rewards=failing)), mesh=Mesh(data=2))
    (tmp_path / "run.gin").write_text(bindings.render(config))
    with started(tmp_path / "run.gin", hosts=2, devices=1) as processes:
        for process in processes:
            _, errors = process.communicate(timeout=TIMEOUT)
            assert process.returncode == 3 and "failing judged 0 of 12 completions: RuntimeError: no more" in errors
    assert steps(config) == [3]


def wait_for(ready, processes):
    """Until it is so; processes that end before have failed."""
    deadline = time.monotonic() + TIMEOUT
    while not ready():
        assert time.monotonic() < deadline and all(process.poll() is None for process in processes)
        time.sleep(0.05)


def test_a_judge_that_fails_ends_the_run_with_its_state_saved(online, judged, folder, tmp_path):
    """With which no run of other prompts goes on."""
    failing = (RewardSource(source=Function(path=str(folder / "reward.py"), name="failing")),)
    config = online(GRPO(**judged() | dict(rewards=failing)))
    asked, rows = tmp_path / "asked.jsonl", (folder / "prompts.jsonl").read_text()
    source = dataclasses.replace(config.data.source, path=str(asked))
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, source=source),
        checkpoint=dataclasses.replace(config.checkpoint, every=99),
    )
    asked.write_text(rows)
    with pytest.raises(DataError, match="judged 0 of 24 completions: RuntimeError: no more; mend it"):
        run(config)
    assert steps(config) == [3]
    assert [row["step"] for row in record(config)] == [1, 2, 3]
    asked.write_text(rows.replace("3", "4"))
    with pytest.raises(DataError, match="the prompts are not those that the checkpoint was trained on"):
        run(config)


REFUSED = {
    "text parts of data.source go with PPO and its field text above 0": lambda o, j: dataclasses.replace(
        o(PPO(**j(), text=0.5)), objective=PPO(**j())
    ),
    "objective GRPO wants @Prompts as data.source": lambda o, j: dataclasses.replace(
        o(GRPO(**j())), data=dataclasses.replace(o(GRPO(**j())).data, source=Text(path="x"))
    ),
    "objective LM wants no @Prompts": lambda o, j: o(LM()),
    "rewards=\\(\\) judge nothing": lambda o, j: GRPO(),
    "rollout.completions=1 leaves nothing to compare": lambda o, j: GRPO(**j(completions=1)),
    "updates=3 must be a multiple of passes=2": lambda o, j: j(passes=2),
    "temperature=0.0 must be above 0": lambda o, j: j(temperature=0.0),
    "importance_cap=0.5 must be at least 1": lambda o, j: j(importance_cap=0.5),
    "must be whole prompts of objective.rollout.completions=5": lambda o, j: o(GRPO(**j(completions=5))),
    "max_new_tokens=64 must be below data.sequence_length=64, which": lambda o, j: o(GRPO(**j(max_new_tokens=64))),
    "max_new_tokens=48 must be below data.sequence_length=96 / 2, as a pair": lambda o, j: o(
        OnlineDPO(**j(max_new_tokens=48))
    ),
    "objective GRPO has no stages": lambda o, j: o(GRPO(**j()), stages=(Stage(from_step=2),)),
    "set adapter.dropout = 0.0 and leave noise out": lambda o, j: o(GRPO(**j()), adapter=LoRA()),
    "of a RewardModel and a Verifier, and rewards are \\['Function'\\]": lambda o, j: GRPO(
        **j(), shaping="qwen2.5-math"
    ),
    "kl=-0.1 must not be negative": lambda o, j: GRPO(**j(), kl=-0.1),
    "trace=1.5 must be between 0 and 1": lambda o, j: PPO(**j(), trace=1.5),
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_refused(online, judged, sentence):
    with pytest.raises(ConfigError, match=sentence):
        REFUSED[sentence](online, judged)
