"""What a person is shown of a run's rows."""

import json
import re

import pytest

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
