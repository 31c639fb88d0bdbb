"""Losses of alignment against TRL's, written out in PyTorch, on the same tensors: values and gradients."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from infer.__main__ import main as infer
from qwen_jax.config import Score
from tests.conftest import tiny_config
from tests.published import publish, tiny_tokenizer
from tests.train.test_judged import BAD, GOOD, ROWS, judged_batch, texts_of
from train.alignment import DPO, Reward
from train.objectives import dpo, reward

torch = pytest.importorskip("torch", reason="the oracle: pip install -e '.[parity]'")
F = torch.nn.functional

# float32 sums in another order.
ROUNDING = dict(rtol=1e-5, atol=1e-6)


def theirs_dpo(objective, policy, reference, mask):
    """`DPOTrainer._compute_loss`: of [2 n, T] log-probabilities, the chosen first."""
    ratio = (policy - reference) * mask
    scores = ratio.sum(-1)
    if objective.loss == "ipo":
        scores = scores / mask.sum(-1).clamp(min=1.0)
    chosen, rejected = scores.chunk(2)
    delta = chosen - rejected
    if objective.loss == "ipo":
        return (delta - 1 / (2 * objective.beta)) ** 2
    wrong = objective.label_smoothing
    return -F.logsigmoid(objective.beta * delta) * (1 - wrong) - F.logsigmoid(-objective.beta * delta) * wrong


def theirs_reward(objective, chosen, rejected):
    """`RewardTrainer.compute_loss`, of one pair; the published listwise form of Qwen2.5-Math is the mean over pairs."""
    return -F.logsigmoid(chosen - rejected - objective.margin) + objective.centre * (chosen + rejected) ** 2


def pairs(batch):
    """Of each group its pairs, as (row, columns) of the good and of the bad text."""
    for group in texts_of(batch, lambda row, columns: (row, columns)):
        good, bad = ([place for label, place in group if label == wanted] for wanted in (GOOD, BAD))
        yield [(a, b) for a in good for b in bad]


@pytest.mark.parametrize(
    "objective",
    [DPO(), DPO(beta=0.7, label_smoothing=0.1), DPO(beta=0.4, loss="ipo")],
    ids=["sigmoid", "smoothed", "ipo"],
)
def test_dpo_is_trls(mesh, objective):
    batch, rng = judged_batch(), np.random.default_rng(1)
    policy, reference = np.float32(rng.normal(-2, 1, (2, *batch["weights"].shape)))
    names = ("weights", "labels", "segments", "groups")

    def ours(policy):
        of_row = jax.vmap(lambda *row: dpo._of_row(objective, *row)["loss"])
        return of_row(policy, reference, *(batch[name] for name in names)).sum()

    value, gradient = jax.value_and_grad(ours)(jnp.asarray(policy))
    tensor = torch.tensor(policy, requires_grad=True)
    mask = torch.tensor(batch["weights"])

    def side(place, x):
        row, columns = place
        padded = torch.zeros(policy.shape[1])
        padded[: len(columns)] = x[row, columns]
        return padded

    total = 0
    for group in filter(None, pairs(batch)):
        both = [
            torch.stack([side(p[i], x) for i in (0, 1) for p in group]) for x in (tensor, torch.tensor(reference), mask)
        ]
        total = total + theirs_dpo(objective, *both).mean()
    total.backward()
    np.testing.assert_allclose(value, total.item(), **ROUNDING)
    np.testing.assert_allclose(gradient, tensor.grad.numpy(), **ROUNDING)


@pytest.mark.parametrize("objective", [Reward(), Reward(margin=0.3, centre=0.01)], ids=["plain", "margin and centre"])
def test_rewards_are_trls(mesh, objective):
    batch = judged_batch()
    scores = np.float32(np.random.default_rng(2).normal(0, 1, batch["weights"].shape))
    names = ("labels", "segments", "groups")

    def ours(scores):
        of_row = jax.vmap(lambda *row: reward._of_row(objective, *row)["loss"])
        return of_row(scores, *(batch[name] for name in names)).sum()

    value, gradient = jax.value_and_grad(ours)(jnp.asarray(scores))
    tensor = torch.tensor(scores, requires_grad=True)
    last = lambda place: tensor[place[0], place[1][-1]]
    total = sum(
        sum(theirs_reward(objective, last(a), last(b)) for a, b in group) / len(group)
        for group in filter(None, pairs(batch))
    )
    total.backward()
    np.testing.assert_allclose(value, total.item(), **ROUNDING)
    np.testing.assert_allclose(gradient, tensor.grad.numpy(), **ROUNDING)
    assert len(ROWS) == 4


@pytest.mark.filterwarnings("default")
def test_a_reward_model_scores_as_transformers_does(tmp_path, capsys):
    """Texts of several lengths at once, each at its last token."""
    transformers = pytest.importorskip("transformers", reason="the oracle: pip install -e '.[parity]'")
    config = tiny_config(vocab_size=260, score=Score(labels=1, hidden=False))
    publish(tmp_path / "model", config, "qwen2")
    texts = ["the cat", "a", "the the the dog"]
    options = [part for text in texts for part in ("--prompt", text)]
    assert infer(["score", str(tmp_path / "model"), *options, "--dtype", "float32"]) == 0
    found = [json.loads(line)["score"] for line in capsys.readouterr().out.splitlines()]
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", dtype=torch.float32)
    tokenizer = tiny_tokenizer()
    ids = [tokenizer.encode(text) for text in texts]
    pad = theirs.config.pad_token_id = tokenizer.end_of_text
    tokens = torch.tensor([each + [pad] * (max(map(len, ids)) - len(each)) for each in ids])
    with torch.no_grad():
        wanted = theirs(tokens, attention_mask=(tokens != pad).long()).logits[:, 0].numpy()
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
