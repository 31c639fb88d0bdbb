"""What several sources come to, and the scores of reward models as one of them."""

from __future__ import annotations

import json
import math

import jax
import numpy as np
import pytest

from infer.__main__ import main as infer
from qwen_jax.config import Score
from qwen_jax.engine.scoring import closed, encode_row
from qwen_jax.errors import ConfigError, DataError, FileError, ModelError, NumericalError
from qwen_jax.sharding import make_mesh
from qwen_jax.text.chat import FORMATS, encode
from tests.conftest import tiny_config
from tests.published import publish, tiny_tokenizer
from train.data import preferences
from train.data.conversations import training_format
from train.reinforcement import GRPO
from train.rewards import judge as judge_module
from train.rewards.config import Function, RewardModel, RewardSource, Verifier
from train.rewards.judge import Judge, Sample
from train.rewards.verdicts import Verdicts

CONFIG = tiny_config(vocab_size=260, num_layers=1, score=Score(labels=1, hidden=False))


def judge(*rewards, weights=(1.0, 1.0, 1.0), mesh=None, form=FORMATS["qwen2"], warn=pytest.fail, **online):
    sources = tuple(RewardSource(source=each, weight=w) for each, w in zip(rewards, weights, strict=False))
    return Judge(GRPO(rewards=sources, **online), form=form, tokenizer=tiny_tokenizer(), mesh=mesh, warn=warn)


def samples(*completions, prompt="?", **columns):
    return [Sample(prompt=prompt, completion=text, columns={"answer": "4", **columns}) for text in completions]


def test_rewards_are_summed_by_weight_and_kept_apart(tmp_path):
    (tmp_path / "f.py").write_text(
        "def reward(completions, **_): return [len(c) if c != '5' else None for c in completions]"
    )
    function = Function(path=str(tmp_path / "f.py"))
    warnings = []
    sources = (Verifier(name="math"), function, Verifier(name="math", column="other"))
    with judge(*sources, weights=(2.0, 0.5, -1.0), warn=warnings.append) as judged:
        judged.check({"answer": "4", "other": 5})
        with pytest.raises(DataError, match='column "other" is missing'):
            judged.check({"answer": "4"})
        total, parts, failures = judged(samples("4", "so 5", "5", other=5))
    assert list(parts) == ["math_1", "reward", "math_2"]
    np.testing.assert_array_equal(total, [2.5, 1.0, np.nan])
    np.testing.assert_array_equal(parts["reward"], [1, 4, np.nan])
    assert parts["math_2"].tolist() == [0, 1, 1] and failures == {"reward: gave None": 1} and len(warnings) == 1


@pytest.mark.parametrize("count", [2, 3, 5])
def test_a_host_judges_all_completions_of_a_prompt(monkeypatch, tmp_path, count):
    (tmp_path / "f.py").write_text("def reward(completions, **_): return [len(completions)] * len(completions)")
    asked = [each for prompt in "abc" for each in samples("1", "2", "3", "4", prompt=prompt)]
    seen, hosts = [], judge_module.hosts
    for host in range(count):
        own = slice(len(asked) * host // count, len(asked) * (host + 1) // count)
        monkeypatch.setattr(hosts, "share", lambda _, own=own: own)
        with judge(Function(path=str(tmp_path / "f.py"))) as judged:
            (found,) = judged(asked).parts.values()
        seen += found.tolist()
        assert len(found) % 4 == 0 and set(found.tolist()) <= {len(found)}
    assert len(seen) == len(asked)


@pytest.mark.parametrize("order", [1, -1])
def test_what_is_right_outranks_all_that_is_wrong(monkeypatch, order):
    scores = np.array([0.0, 8.0, -1e6, 1e6, math.nan])
    monkeypatch.setattr(judge_module, "ModelReward", lambda *_, **__: Scores(scores))
    sources = (RewardModel(path="rm"), Verifier(name="math"))[::order]
    with judge(*sources, shaping="qwen2.5-math") as judged:
        total = judged(samples("4", "5", "4", "5", "4")).total
    sigmoid = 1 / (1 + np.exp(-4.0))
    np.testing.assert_allclose(total, [0.5, sigmoid - 1, 0, 0, np.nan], atol=1e-12)


class Scores:
    """What stands for a reward model."""

    def __init__(self, values):
        self.values = values

    def check(self, columns): ...

    def close(self): ...

    def __call__(self, given):
        return Verdicts(self.values[: len(given)], {})


def test_a_source_that_cannot_be_had_ends_those_before_it(tmp_path):
    (tmp_path / "f.py").write_text("def reward(**_): ...")
    ended = []
    real = judge_module.FunctionReward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(real, "close", lambda self: ended.append(self._process.end()))
        with pytest.raises(FileError):
            judge(Function(path=str(tmp_path / "f.py")), Function(path="nowhere.py"))
    assert len(ended) == 1


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: RewardSource(source=Verifier(name="math"), weight=math.nan),
        lambda: Function(path="f.py", seconds=math.inf),
        lambda: Verifier(name="code", seconds=math.nan),
        lambda: judge(RewardModel(path="rm"), Verifier(name="math"), weights=(1, 2), shaping="qwen2.5-math"),
    ],
)
def test_configs_that_mean_nothing_are_refused(wrong):
    with pytest.raises(ConfigError):
        wrong()


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "reward"
    publish(folder, CONFIG, "qwen2")
    return folder


def test_scores_on_a_mesh_are_those_of_infer_score(reward_model, tmp_path, capsys):
    """Of texts and of conversations; those that do not fit into the model have none."""
    chat = [{"role": "user", "content": "add"}]
    given = [*samples("a" * 99), *samples("4", "the the", prompt="2+2="), *samples("7", "", prompt=chat)]
    rows = [
        {"prompt": each.prompt + each.completion} if isinstance(each.prompt, str)
        else {"messages": [*chat, {"role": "assistant", "content": each.completion}]}
        for each in given[1:]
    ]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--format", "qwen2", "--batch-size", "4", "--dtype", "float32"]
    assert infer(["score", str(reward_model), "--input", str(tmp_path / "rows.jsonl"), *options]) == 0
    wanted = [json.loads(line)["score"] for line in capsys.readouterr().out.splitlines()]
    mesh = make_mesh(data=2, context=2, devices=jax.devices()[:4])
    with judge(RewardModel(path=str(reward_model), batch_size=3), mesh=mesh) as judged:
        total, parts, failures = judged(given)
    np.testing.assert_allclose(parts["model"][1:], wanted, rtol=1e-4, atol=1e-5)
    assert len(set(wanted)) == 4 and np.isnan(total[0]) and failures == {"model: too long for the model": 1}


@pytest.mark.parametrize("name", ["qwen1.5", "qwen3"])
def test_a_chat_is_scored_as_reward_models_are_trained(name):
    """Up to the end of the last message, also where the format leaves it open."""
    prompt, answers = [{"role": "user", "content": "add"}], ["<|im_end|> 4", "5\n"]
    chosen, rejected = ([{"role": "assistant", "content": text}] for text in answers)
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    form = training_format(FORMATS[name], learn="answers")
    document = preferences._sides("here", row, preferences.Preferences(path="here", format=name), form)
    for side, answer in zip(document.sides, (chosen, rejected), strict=True):
        scored = encode_row({"messages": prompt + answer}, tiny_tokenizer(), closed(FORMATS[name]))
        assert scored.ids == encode(tiny_tokenizer(), side.pieces).ids
        assert scored.places == [len(scored.ids) - 1]


def test_models_that_are_no_reward_model_of_the_policy_are_refused(tmp_path):
    publish(tmp_path / "language", tiny_config(vocab_size=260, num_layers=1), "qwen2")
    with pytest.raises(ModelError, match="gives 0 scores of a text"):
        judge(RewardModel(path=str(tmp_path / "language")))
    publish(tmp_path / "other", CONFIG, "qwen2")
    tokenizer = json.loads(tiny_tokenizer().to_bytes())
    tokenizer["added_tokens"][-1]["content"] = "<|other|>"
    (tmp_path / "other/tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ModelError, match="has another tokenizer than the policy"):
        judge(RewardModel(path=str(tmp_path / "other")))


def test_scores_that_are_not_finite_end_the_run(reward_model):
    mesh = make_mesh(devices=jax.devices()[:1])
    with judge(RewardModel(path=str(reward_model)), mesh=mesh) as judged:
        (source,) = judged._sources
        nan = np.full((1, 1), np.nan, np.float32)
        source._scorer = Fixed(source._scorer.config, [(1, nan), (0, nan + 1)])
        with pytest.raises(NumericalError, match="none of the 2 scores"):
            judged(samples("a", "b"))
        source._scorer = Fixed(source._scorer.config, [(1, nan), (0, np.zeros((1, 1), np.float32))])
        total, _, failures = judged(samples("a", "b"))
    np.testing.assert_array_equal(total, [0, np.nan])
    assert failures == {"model: gave no finite score": 1}


class Fixed:
    """A scorer that says what it is told to."""

    def __init__(self, config, scores):
        self.config, self._scores = config, scores

    def __call__(self, texts, *, batch_size):
        return iter(self._scores)
