"""Runs on conversations: what they leave beside the weights, and that packing changes no loss."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax import bindings, model, sharding
from qwen_jax.errors import SAVED_PLEASE_RESTART, ConfigError
from qwen_jax.text.chat import FORMATS
from qwen_jax.weights import publish
from qwen_jax.weights.checkpoint import Checkpoints
from qwen_jax.weights.source import open_model, pieces
from qwen_jax.weights.usage import read_usage
from tests.train.conftest import record
from tests.train.test_run import when_step
from train import run as run_module
from train import stream
from train.config import LM, Checkpointing, Evaluation, Export, Pretrained, Stage
from train.data import Conversations, Mixture, Part, Rows, Text, TrainBPE
from train.data.rows import BestFit
from train.evaluation import HeldOut
from train.objectives import lm


def rows_of(number):
    return [{"role": "user", "content": f"{number}?"}, {"role": "assistant", "content": f"it is {number * number}"}]


@pytest.fixture
def chats(tmp_path) -> Conversations:
    lines = [json.dumps({"messages": rows_of(number)}) + "\n" for number in range(60)]
    (tmp_path / "chats.jsonl").write_text("".join(lines))
    return Conversations(path=str(tmp_path / "chats.jsonl"), format="qwen2")


@pytest.fixture
def tuned(config, chats):
    """The tiny run on conversations, two epochs of it, in rows that hold one."""
    data = dataclasses.replace(config.data, source=chats, tokenizer=TrainBPE(vocab_size=262), sequence_length=128)
    long = dataclasses.replace(config.model, max_position=128, num_layers=1)
    return dataclasses.replace(
        config, data=data, model=long, steps=0, epochs=2, checkpoint=dataclasses.replace(config.checkpoint, every=99)
    )


@pytest.mark.usefixtures("enough_devices")
def test_a_run_on_conversations_is_a_model_that_chats(tuned, chats, capsys):
    assert run_module.run(tuned, bindings.render(tuned)) == 0
    err = capsys.readouterr().err
    assert "trained)" in err and "epochs" in err
    done = record(tuned)
    assert done[-1].keys() == {"step", "held_out_loss"}, "not all of the text is trained, so it has no bits per byte"
    assert all(row["weight"] > 0 for row in done if "loss" in row)
    with open_model(tuned.run_dir) as found:
        tokenizer = found.tokenizer()
        usage = read_usage(found, tokenizer, warn=pytest.fail)
        assert found.chat and usage.chat_format(tokenizer, warn=pytest.fail) == FORMATS["qwen2"]
        assert tokenizer.control["<|im_end|>"] in usage.stop_ids
        files = publish.side_files(found, {})
    assert json.loads(files["generation_config.json"])["eos_token_id"][0] == tokenizer.control["<|im_end|>"]
    assert (Path(tuned.run_dir) / stream.TEMPLATE).read_bytes() == files[stream.TEMPLATE]
    # What begins with it goes on in its format, unless another is named.
    again = dataclasses.replace(tuned.data, source=dataclasses.replace(chats, format=None))
    child = dataclasses.replace(tuned, model=Pretrained(path=tuned.run_dir), data=again)
    assert stream.chat_format(child, warn=pytest.fail).form.name == "qwen2"
    assert stream.chat_format(child, warn=pytest.fail).template.encode() == files[stream.TEMPLATE]


@pytest.mark.usefixtures("enough_devices")
def test_what_a_stopped_run_says_keeps_and_exports(tuned, monkeypatch, capsys):
    """Answers at every evaluation, the best checkpoint beside the latest, and a folder of it; as of an unbroken run."""
    losses = iter([3.0, 1.0, 2.0, 2.0, 4.0])  # of steps 1 to 5: step 4 is the last before the stop
    monkeypatch.setattr(HeldOut, "losses", lambda self, params, *, whole: {"all": next(losses)})
    config = dataclasses.replace(
        tuned, steps=5, epochs=0.0, evaluation=Evaluation(every=1, samples=1, max_new_tokens=8), export=Export(),
        checkpoint=Checkpointing(every=3, keep=1, keep_best=True),
    )  # fmt: skip
    with when_step(3, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        assert run_module.run(config, bindings.render(config)) == SAVED_PLEASE_RESTART
    folder = Path(config.run_dir)
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())] == ["00000002", "00000004"]
    before = (folder / "samples.jsonl").read_text()
    (folder / "samples.jsonl").write_text(before + '{"step": 4, "prompt": "of a run that was kil')
    assert run_module.run(config, bindings.render(config)) == 0
    assert sorted(Checkpoints(folder / "checkpoints", warn=pytest.fail).steps()) == [2, 5]
    said = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in said] == [1, 2, 3, 4, 5]
    for row in said:
        number = re.search(r"user\n(\d+)\?<\|im_end\|>\n<\|im_start\|>assistant\n$", row["prompt"])[1]
        assert row["reference"] == f"it is {int(number) ** 2}" and row["finish_reason"] in ("stop", "length")
    with open_model(folder / "export") as out, open_model(folder / "checkpoints" / "00000002") as best:
        assert out.side_files()[stream.TEMPLATE] == best.side_files()[stream.TEMPLATE]
        for piece in (piece for tensor in out.table for piece in pieces(tensor, 4)):
            np.testing.assert_array_equal(out.read(piece), best.read(piece))
    ends = json.loads((folder / "export" / "generation_config.json").read_text())["eos_token_id"]
    assert ends[0] == out.tokenizer().control["<|im_end|>"]
    assert f"infer chat {config.run_dir}/export" in capsys.readouterr().out


def test_a_format_must_be_known_and_the_same_for_all(tuned, chats):
    nothing = dataclasses.replace(tuned.data, source=dataclasses.replace(chats, format=None))
    with pytest.raises(ConfigError, match="nothing says which format"):
        stream.chat_format(dataclasses.replace(tuned, data=nothing), warn=pytest.fail)
    parts = [Part(name=name, weight=1.0, source=dataclasses.replace(chats, format=name)) for name in ("qwen2", "qwen3")]
    both = dataclasses.replace(tuned.data, source=Mixture(parts=tuple(parts)))
    with pytest.raises(ConfigError, match="name the same for all"):
        stream.chat_format(dataclasses.replace(tuned, data=both), warn=pytest.fail)


def test_weights_of_stages(config, chats):
    parts = (Part(name="a", weight=1.0, source=Text(path="x")), Part(name="b", weight=0.0, source=chats))
    mixed = dataclasses.replace(config, data=dataclasses.replace(config.data, source=Mixture(parts=parts)))
    staged = dataclasses.replace(mixed, stages=(Stage(from_step=3, weights=(0.5, 0.5)),))
    assert [[part.weight for part in each.data.parts] for _, each in staged.stage_configs] == [[1, 0], [0.5, 0.5]]
    stream.check_parts(staged)
    with pytest.raises(ConfigError, match=r"parts\.2\.weight=0\.0: nothing reads b"):
        stream.check_parts(mixed)
    for bad, words in (((1.0,), "has 2 parts"), ((0.0, 0.0), "weights of 0 alone")):
        with pytest.raises(ConfigError, match=f"from stages.1.from_step=3 on, .*{words}"):
            dataclasses.replace(mixed, stages=(Stage(from_step=3, weights=bad),))
    with pytest.raises(ConfigError, match="steps=6 and epochs=1.0: say one of them"):
        dataclasses.replace(config, epochs=1.0)
    with pytest.raises(ConfigError, match="cannot be counted over stages"):
        dataclasses.replace(staged, steps=0, epochs=1.0)


def test_packed_documents_have_the_loss_and_the_gradient_of_those_alone(config, make_masked_shards):
    draw = np.random.default_rng(0)
    documents = [draw.integers(2, 96, length).tolist() for length in (5, 9, 2, 12, 4)]
    flags = [(draw.random(len(ids) + 1) < 0.6).tolist() for ids in documents]
    shards = make_masked_shards(documents, flags)
    packed, alone = (
        Rows(shards, sequence_length=32, batch_size=1, seed=0, layout=layout, shuffle=False).read(range(5))
        for layout in (BestFit(shards, 32, seed=0), _Alone(shards))
    )
    assert (
        packed["segments"].max(axis=1).tolist() == [5, 0, 0, 0, 0] and alone["segments"].max(axis=1).tolist() == [1] * 5
    )
    small = dataclasses.replace(config.model, vocab_size=96, num_layers=1)

    def of(params, batch):
        return lm.loss(small, LM(), params, batch, attention="reference", balanced=True)

    with jax.set_mesh(sharding.make_mesh(devices=jax.devices()[:1])):
        params = model.init(small, jax.random.key(0))
        step = jax.jit(jax.value_and_grad(of, has_aux=True))
        found = [step(params, jax.tree.map(jnp.asarray, batch)) for batch in (packed, alone)]
    (one, _), first = found[0]
    (other, _), second = found[1]
    # float32 sums in another order
    assert float(one) == pytest.approx(float(other), rel=1e-6)
    assert packed["weights"].sum() == alone["weights"].sum() > 0
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


class _Alone:
    """Each document in a row of its own."""

    def __init__(self, shards):
        ends = shards.ends().tolist()
        self._spans = [(start, end - start - 1) for start, end in zip([0, *ends], ends, strict=False)]
        self.num_rows, self.num_columns = len(self._spans), sum(count for _, count in self._spans)

    def spans(self, row):
        return [self._spans[row]]


@pytest.fixture
def make_masked_shards(tmp_path):
    from train.data.manifest import Manifest, Source
    from train.data.shards import ShardWriter, TokenShards

    def make(documents, flags):
        splits = {}
        for split in ("train", "held_out"):
            with ShardWriter(tmp_path, split, dtype="uint16", end_of_text=1, masked=True) as writer:
                for ids, trained in zip(documents, flags, strict=True) if split == "train" else ():
                    writer.add(ids, "x", trained)
                splits[split] = writer.finish()
        source = Source(description="by hand", options={}, files=0, bytes=0, listing="", content="")
        manifest = Manifest(
            dtype="uint16", vocab_size=96, end_of_text=1, tokenizer="none", source=source, held_out=0.0, splits=splits
        )
        return TokenShards(tmp_path, "train", manifest)

    return make
