"""Scores of reward models from the command line."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from infer.__main__ import main
from qwen_jax import model, sharding
from qwen_jax.config import Score
from qwen_jax.weights.load import load_params
from qwen_jax.weights.source import open_model
from tests.conftest import tiny_config
from tests.published import publish

STEP = "<|endoftext|>"
ANSWERS = [f"a{STEP}", f"be{STEP}cab{STEP}d{STEP}"]


@pytest.mark.parametrize("labels, hidden", [(2, True), (1, False)])
def test_each_step_of_an_answer_has_a_score(tmp_path, capsys, labels, hidden):
    """Of two labels how likely the second is. A step ends at a token, which the same text in a question is not."""
    config = tiny_config(vocab_size=260, num_layers=1, max_position=256, score=Score(labels=labels, hidden=hidden))
    publish(tmp_path / "prm", config, "qwen2")
    chats = [
        [{"role": "user", "content": f"say{STEP}"}, {"role": "assistant", "content": answer}] for answer in ANSWERS
    ]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    options = ["--input", str(tmp_path / "answers.jsonl"), "--step-end", STEP, "--format", "qwen2"]
    assert main(["score", str(tmp_path / "prm"), *options, "--dtype", "float32"]) == 0
    found = [json.loads(line)["scores"] for line in capsys.readouterr().out.splitlines()]

    with open_model(tmp_path / "prm") as source, jax.set_mesh(sharding.make_mesh(devices=jax.devices()[:1])):
        tokenizer, params = source.tokenizer(), load_params(source, dtype="float32", stacked=False)
        for answer, scores in zip(ANSWERS, found, strict=True):
            system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
            ids = tokenizer.encode_trusted(f"{system}<|im_start|>user\nsay")
            ids += tokenizer.encode(STEP)
            ids += tokenizer.encode_trusted(f"<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n")
            row, at = jnp.array([ids]), jnp.arange(len(ids))[None]
            hidden_states = model.forward(source.config, params, row, at)
            every = np.asarray(model.scores(source.config, params, hidden_states))[0]
            wanted = every[[i for i, token in enumerate(ids) if token == tokenizer.end_of_text]]
            wanted = np.exp(wanted[:, 1]) / np.exp(wanted).sum(1) if labels == 2 else wanted[:, 0]
            np.testing.assert_allclose(scores, wanted, rtol=1e-4)  # float32 sums in another order
