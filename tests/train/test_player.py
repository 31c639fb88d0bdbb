"""Who asks a run to stop does not wait for what is sampled or judged."""

from __future__ import annotations

import contextlib
import dataclasses
import threading

import jax
import pytest

from qwen_jax.errors import ConfigError
from qwen_jax.sharding import make_mesh
from tests.published import tiny_tokenizer
from train import player
from train.data.prompts import Prompt
from train.reinforcement import GRPO


@pytest.fixture
def made(judged_by_rule, monkeypatch):
    """A player with an engine that is none, what it shows, and a switch that asks it to stop."""
    entered, asked, shown = [], threading.Event(), []

    class Follower:
        def __init__(self, *_, **__):
            pass

        @contextlib.contextmanager
        def at(self, params, frozen):
            entered.append(params)
            try:
                yield params
            finally:
                entered.remove(params)

    monkeypatch.setattr(player, "Follower", Follower)
    prompts = [[Prompt(origin="", text="?", asked="?", ids=[1], columns={})], []]
    config = judged_by_rule(GRPO)
    mesh = make_mesh(devices=jax.devices()[:1])
    found = player.Player(config, prompts, tiny_tokenizer(), None, mesh, stopping=asked.is_set, show=shown.append)
    return found, entered, asked, shown


class State:
    params = "weights"


def test_what_is_played_comes_back_and_the_engine_is_left(made):
    found, entered, _, shown = made
    assert found.result(found.start(lambda engine: (engine, list(entered)), State, None)) == ("weights", ["weights"])
    with pytest.raises(KeyError, match="no"):
        found.result(found.start(lambda engine: {}["no"], State, None))
    assert not entered
    go = threading.Event()
    playing = found.start(lambda engine: go.wait(5), State, None)
    threading.Timer(0.3, go.set).start()
    assert found.start(lambda engine: None, State, None) is not playing and playing.result()
    assert shown
    found.close()


def test_a_judge_that_hangs_is_left_behind(made, monkeypatch):
    found, _, asked, _ = made
    monkeypatch.setattr(player, "_FAREWELL", 0.1)
    hangs = threading.Event()
    playing = found.start(lambda engine: hangs.wait(60), State, None)
    asked.set()
    with pytest.raises(player.Interrupted):
        found.result(playing)
    found.close()
    assert not playing.done()
    hangs.set()
    assert playing.result(5)


def test_a_cache_without_room_for_a_completion_is_refused(judged_by_rule):
    prompts = [[Prompt(origin="", text="?", asked="?", ids=[1] * 30, columns={})], []]
    config = judged_by_rule(GRPO)
    rollout = dataclasses.replace(config.objective.rollout, cache_tokens=32)
    config = dataclasses.replace(config, objective=dataclasses.replace(config.objective, rollout=rollout))
    mesh = make_mesh(devices=jax.devices()[:1])
    with pytest.raises(ConfigError, match="cache_tokens=32 has no room .* set it to 64 or more"):
        player.Player(config, prompts, tiny_tokenizer(), None, mesh, stopping=bool, show=print)
