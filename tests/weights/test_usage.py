"""What the files beside weights say of use: read as transformers reads them, or refused by name."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from qwen_jax.errors import ModelError
from qwen_jax.text import train_bpe
from qwen_jax.text.chat import FORMATS
from qwen_jax.weights.usage import read_usage, turn_ends

TOKENIZER = train_bpe(["low lower lowest, newer newest wider. " * 3], vocab_size=276)
END, START_TURN, END_TURN = (TOKENIZER.control[text] for text in ("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
SHARED = Path(__file__).parents[3] / "shared" / "data" / "hf-configs"


def usage(*, model_type="qwen2", chat=False, warn=pytest.fail, tokenizer=TOKENIZER, **files):
    """Of a model with these files: NAME_json={...}."""
    contents = {
        ".".join(name.rsplit("_", 1)): value if isinstance(value, bytes) else json.dumps(value).encode()
        for name, value in files.items()
    }
    model = argparse.Namespace(path=Path("/models/m"), model_type=model_type, chat=chat, side_files=lambda: contents)
    return read_usage(model, tokenizer, warn=warn)


def test_a_model_without_files_has_no_defaults_and_ends_at_end_of_text():
    found = usage()
    assert (found.defaults, found.max_new_tokens, found.stop_ids) == ({}, None, {END})
    assert found.chat_format(TOKENIZER, warn=pytest.fail) is None
    assert usage(chat=True).stop_ids == {END, START_TURN, END_TURN} == turn_ends(TOKENIZER)


@pytest.mark.parametrize(
    "fields, defaults",
    [
        ({}, {"temperature": 0, "top_k": 50}),
        ({"do_sample": True}, {"temperature": 1, "top_k": 50}),
        ({"do_sample": True, "top_k": None, "top_p": None}, {"temperature": 1, "top_k": 50}),
        ({"do_sample": True, "top_k": 0, "top_p": 0.8}, {"temperature": 1, "top_k": 0, "top_p": 0.8}),
        ({"do_sample": False, "temperature": 0.7, "min_p": 0}, {"temperature": 0, "top_k": 50, "min_p": 0}),
        (
            {"do_sample": True, "temperature": 0.7, "top_k": 20, "repetition_penalty": 1.05},
            {"temperature": 0.7, "top_k": 20, "repetition_penalty": 1.05},
        ),
        (
            {"presence_penalty": 1.5, "frequency_penalty": None},
            {"temperature": 0, "top_k": 50, "presence_penalty": 1.5},
        ),
    ],
)
def test_defaults_are_those_of_generate(fields, defaults):
    assert usage(generation_config_json=fields).defaults == defaults


@pytest.mark.parametrize(
    "fields", [{}, {"do_sample": True}, {"do_sample": True, "top_k": 0, "top_p": 0.8, "min_p": None}]
)
def test_defaults_agree_with_transformers(fields):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GenerationConfig(**fields)
    theirs.update(**theirs._get_default_generation_params(), defaults_only=True)
    ours = {"top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0} | usage(generation_config_json=fields).defaults
    assert ours["temperature"] == (theirs.temperature if theirs.do_sample else 0)
    assert (ours["top_k"], ours["top_p"], ours["min_p"]) == (theirs.top_k, theirs.top_p, theirs.min_p or 0)
    assert ours["repetition_penalty"] == theirs.repetition_penalty


def test_ends_come_from_the_first_file_that_names_one():
    files = {
        "generation_config_json": {"eos_token_id": [END_TURN, END]},
        "config_json": {"eos_token_id": START_TURN},
        "tokenizer_config_json": {"eos_token": {"content": "<|im_end|>"}},
    }
    assert usage(**files).stop_ids == {END_TURN, END}
    del files["generation_config_json"]
    assert usage(**files).stop_ids == {START_TURN}
    files["config_json"] = {"eos_token_id": None}
    assert usage(**files).stop_ids == {END_TURN}
    assert usage(**files).special_tokens == {"eos_token": "<|im_end|>"}


def test_what_is_not_honoured_is_named_once():
    lines = []
    idle = {"num_beams": 1, "typical_p": 1.0, "no_repeat_ngram_size": 0, "bad_words_ids": None, "length_penalty": 2}
    usage(generation_config_json=idle)
    usage(generation_config_json=idle | {"num_beams": 4, "suppress_tokens": [1]}, warn=lines.append)
    (line,) = lines
    assert line.startswith("/models/m/generation_config.json: ") and line.endswith(": num_beams, suppress_tokens")


@pytest.mark.parametrize(
    "files, message",
    [
        ({"generation_config_json": {"do_sample": True, "top_p": 1.5}}, "top_p=1.5 must be"),
        ({"generation_config_json": {"do_sample": 1}}, "do_sample is 1; wanted is true or false"),
        ({"generation_config_json": {"temperature": "hot"}}, "temperature is 'hot'; wanted is a number"),
        ({"generation_config_json": {"do_sample": True, "temperature": -1}}, "temperature=-1 must be"),
        ({"generation_config_json": {"top_p": True}}, "top_p is True; wanted is a number"),
        ({"generation_config_json": {"top_k": 2.5}}, "top_k is 2.5; wanted is a whole number from 0 up"),
        ({"generation_config_json": {"max_new_tokens": 0}}, "max_new_tokens is 0; wanted is a whole number from 1"),
        ({"generation_config_json": {"eos_token_id": 276}}, "eos_token_id is 276; wanted is ids of the"),
        ({"generation_config_json": {"eos_token_id": [0, -1]}}, "eos_token_id is .* wanted is ids"),
        ({"config_json": {"eos_token_id": "0"}}, "eos_token_id is '0'; wanted is ids"),
        ({"generation_config_json": b"[]"}, "JSON is not an object"),
        ({"generation_config_json": b'{"top_p": NaN}'}, "NaN is not JSON"),
        ({"tokenizer_config_json": {"eos_token": "<eos>"}}, "eos_token is '<eos>', which the tokenizer does not have"),
        ({"tokenizer_config_json": {"chat_template": 5}}, "chat_template is 5; wanted is a string"),
        ({"tokenizer_config_json": {"chat_template": [{"name": "rag"}]}}, "chat_template is .* wanted is a string"),
        ({"chat_template_jinja": b"\xff"}, "is not UTF-8 at byte 0"),
    ],
)  # fmt: skip
def test_a_bad_field_is_named_with_its_file(files, message):
    with pytest.raises(ModelError, match=message) as caught:
        usage(**files)
    (name,) = files
    assert str(caught.value).startswith("/models/m/" + ".".join(name.rsplit("_", 1)))
    assert "\n" not in str(caught.value)


def test_templates_are_found_where_they_are_published():
    lines = []
    texts = {
        usage(chat_template_jinja=b"{{ 1 }}", tokenizer_config_json={"chat_template": "{{ 2 }}"}).template,
        usage(tokenizer_config_json={"chat_template": "{{ 1 }}"}).template,
        usage(
            tokenizer_config_json={
                "chat_template": [{"name": "rag", "template": "x"}, {"name": "default", "template": "{{ 1 }}"}]
            }
        ).template,
    }
    assert texts == {"{{ 1 }}"}
    form = usage(chat_template_jinja=b"{{ 1 }}").chat_format(TOKENIZER, warn=lines.append)
    assert form is not None and form.name == "template" and len(lines) == 1


def test_qwen1_chats_without_a_template_and_its_base_models_do_not():
    chat = {"chat_format": "chatml", "eos_token_id": END, "do_sample": True, "top_k": 0, "top_p": 0.8}
    found = usage(model_type="qwen", generation_config_json=chat)
    assert found.chat_format(TOKENIZER, warn=pytest.fail) is FORMATS["qwen1"] and found.window == 6144
    assert found.defaults == {"temperature": 1, "top_k": 0, "top_p": 0.8}
    assert usage(model_type="qwen", generation_config_json=chat | {"max_window_size": 24000}).window == 24000
    base = usage(model_type="qwen", generation_config_json=chat | {"chat_format": "raw"})
    assert base.chat_format(TOKENIZER, warn=pytest.fail) is None


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the published files in ../shared/data")
def test_published_files_are_read_without_complaint():
    wide = argparse.Namespace(control=TOKENIZER.control, end_of_text=END, num_tokens=152000)
    for folder in ("Qwen-7B-Chat", "Qwen-72B", "Qwen2-1.5B-Instruct-finetune"):
        files = {
            path.name.replace(".", "_"): path.read_bytes()
            for path in (SHARED / folder).glob("*.json")
            if path.name in ("config.json", "generation_config.json", "tokenizer_config.json")
        }
        model_type = json.loads(files["config_json"])["model_type"]
        found = usage(model_type=model_type, tokenizer=wide, **files)
        assert 151643 in found.stop_ids and found.defaults["temperature"] > 0
    template = json.loads((SHARED / "misc" / "Qwen3-tokenizer_config.json").read_bytes())["chat_template"]
    known = usage(tokenizer_config_json={"chat_template": template}).chat_format(TOKENIZER, warn=pytest.fail)
    assert known is FORMATS["qwen3"]
