"""What a run of an adapter leaves for PEFT, and that it goes on beside its own base alone."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from qwen_jax import bindings
from qwen_jax.errors import ConfigError, DataError
from qwen_jax.weights import convert
from qwen_jax.weights.source import open_model
from qwen_jax.weights.usage import read_usage
from tests.published import publish
from train import run as run_module
from train import stream
from train.config import Checkpointing, Evaluation, Export, LoRA, Pretrained
from train.data import Conversations, TokenizerFile

pytestmark = pytest.mark.usefixtures("enough_devices")


def run(config) -> int:
    return run_module.run(config, bindings.render(config))


@pytest.fixture
def adapted(config, tmp_path):
    """Two steps of an adapter on conversations, beside a published base that cannot chat."""
    model = dataclasses.replace(config.model, num_layers=1, max_position=128)
    publish(tmp_path / "base", model, "qwen2")
    say = lambda n: [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "yes" * n}]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": say(n % 5 + 1)}) + "\n" for n in range(40)))
    data = dataclasses.replace(
        config.data, source=Conversations(path=str(tmp_path / "chats.jsonl"), format="qwen2"), sequence_length=96,
        tokenizer=TokenizerFile(path=str(tmp_path / "base" / "tokenizer.json")),
    )  # fmt: skip
    return dataclasses.replace(
        config, model=Pretrained(path=str(tmp_path / "base"), dtype="float32"), adapter=LoRA(rank=2), data=data,
        steps=2, schedule=dataclasses.replace(config.schedule, warmup_steps=0), checkpoint=Checkpointing(every=2),
        evaluation=Evaluation(every=2, samples=1, max_new_tokens=4), export=Export(),
    )  # fmt: skip


def test_an_adapter_is_exported_as_peft_has_it_and_refuses_another_base(adapted, tmp_path):
    assert run(adapted) == 0
    folder = Path(adapted.run_dir)
    files = {path.name for path in (folder / "export").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", stream.TEMPLATE} <= files
    assert not {"config.json", "model.safetensors"} & files
    assert len((folder / "samples.jsonl").read_text().splitlines()) == 1
    with open_model(folder) as trained, open_model(folder / "export") as out:
        tokenizer = out.tokenizer()
        for name, array in trained.adapter.arrays.items():
            np.testing.assert_allclose(out.adapter.arrays[name], array, rtol=1e-6)
        for model in (trained, out):
            usage = read_usage(model, tokenizer, warn=pytest.fail)
            assert usage.chat_format(tokenizer, warn=pytest.fail).name == "qwen2"
            assert tokenizer.control["<|im_end|>"] in usage.stop_ids
    shutil.rmtree(tmp_path / "base")
    publish(tmp_path / "base", dataclasses.replace(adapted.model_config, param_dtype="float32"), "qwen2", seed=1)
    with pytest.raises(DataError, match=r"base has other weights than the base that .* was trained beside"):
        run(adapted)


def test_a_quantised_base_merged_wants_a_type(adapted, tmp_path):
    quantised = tmp_path / "int4"
    assert convert.main([adapted.model.path, str(quantised), "--quantize", "int4-g8"]) == 0
    model = dataclasses.replace(adapted.model, path=str(quantised))
    with pytest.raises(ConfigError, match=r'set export\.dtype = "bfloat16"'):
        run(dataclasses.replace(adapted, model=model, export=Export(merged=True)))
