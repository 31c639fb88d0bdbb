"""What a person is shown of a run's rows."""

import json
import re

import pytest

from tests.conftest import tiny_config
from tests.published import publish
from train.data import show

CONFIG = """
run_dir = "{folder}/run"
model = @Zoo
model.name = "Qwen2.5-0.5B"
data.source = @Mixture
data.source.parts.1.name = "text"
data.source.parts.1.source = @Text
data.source.parts.1.source.path = "{folder}/texts"
data.source.parts.1.weight = 0.5
data.source.parts.2.name = "chats"
data.source.parts.2.source = @Conversations
data.source.parts.2.source.path = "{folder}/chats.jsonl"
data.source.parts.2.source.format = "qwen2"
data.source.parts.2.weight = 0.5
data.tokenizer = @TrainBPE
data.tokenizer.vocab_size = 262
data.sequence_length = 128
data.held_out = 0.0
batch_size = 2
epochs = 2
optimizer.peak_lr = 1e-3
schedule.warmup_steps = 0
checkpoint.every = 9
evaluation.every = 9
"""


@pytest.fixture
def config(tmp_path):
    (tmp_path / "texts").mkdir()
    for i in range(9):
        (tmp_path / f"texts/{i}.txt").write_text(f"text {i}\n" * 20 + "\x1b[31m")
    rows = [[{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"it is {i}"}] for i in range(9)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    (tmp_path / "a.gin").write_text(CONFIG.format(folder=tmp_path))
    return str(tmp_path / "a.gin")


def test_rows_their_borders_and_what_is_trained(config, capsys, monkeypatch):
    assert show.main([config, "--rows", "2"]) == 0
    plain = capsys.readouterr().out
    assert re.search(r"row \d of step 0: chats, 1 document, \d+ of 128 columns \(\d+\.\d%\), \d+\.\d% trained", plain)
    assert re.search(r"── 1: positions 0 to \d+, \d+ targets trained", plain)
    assert re.search(r"<\|im_start\|>assistant⟦\n   it is \d<\|im_end\|>\n   ⟧<\|endoftext\|>", plain)
    assert re.search(r"chats: \d+ of 9 rows \(\d\.\d\d epochs\), \d+\.\d% full; \d+\.\d% of its tokens trained", plain)
    assert "\x1b" not in plain and r"\x1b[31m" in plain
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    show.main([config, "--rows", "2"])
    assert "\x1b[32m   it is" not in (coloured := capsys.readouterr().out) and "\x1b[32mit is" in coloured
    monkeypatch.setenv("NO_COLOR", "1")
    show.main([config, "--rows", "2"])
    assert capsys.readouterr().out == plain


def test_prompts_as_the_model_sees_them_and_what_they_are_judged_by(config, tmp_path, capsys):
    """Beside the text that is trained on with them."""
    rows = [{"prompt": f"{i} + 1?", "answer": f"{i + 1}", "meta": {"n": i}} for i in range(9)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = (
        "objective = @PPO",
        "objective.text = 0.5",
        "objective.kl = 0.0",
        "objective.rewards.1.source = @Verifier",
        'objective.rewards.1.source.name = "math"',
        "objective.rollout.max_new_tokens = 8",
        "data.source.parts.2.source = @Prompts",
        f'data.source.parts.2.source.path = "{tmp_path}/prompts.jsonl"',
        'data.source.parts.2.source.format = "qwen2"',
        "model = @Pretrained",
        f'model.path = "{tmp_path}/start"',
    )
    publish(tmp_path / "start", tiny_config(vocab_size=260, max_position=128), "qwen2")
    path = tmp_path / "asked.gin"
    text = (tmp_path / "a.gin").read_text()
    kept = [line for line in text.splitlines() if not line.startswith(("model", "data.source.parts.2.source"))]
    path.write_text("\n".join([*kept, *changes]))
    assert show.main([str(path), "--rows", "1"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"prompt (\d): \d+ tokens, .*prompts.jsonl:\d", shown)
    number = re.search(r"prompt (\d)", shown)[1]
    assert f"<|im_start|>user\n   {number} + 1?<|im_end|>\n   <|im_start|>assistant" in shown
    assert f"── answer: {int(number) + 1}\n" in shown and f'── meta: {{"n": {number}}}' in shown
    assert "9 prompts; an episode asks 1 of them 2 times, for 1 steps of 2 completions" in shown
    assert re.search(r"row 0 of step 0: \d+ documents?, 128 of 128 columns", shown)
