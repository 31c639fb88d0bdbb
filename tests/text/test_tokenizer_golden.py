"""The published tokenizers, exactly: as plain text, and with the control tokens that the reference finds in text."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path

import pytest

from qwen_jax.text import Tokenizer, vocabulary

DATA = Path(__file__).parents[3] / "shared" / "data"
NUM_TOKENS = {"qwen1": 151851, "qwen2": 151646, "qwen2.5": 151665, "qwen3": 151669}
TIKTOKEN_SHA256 = "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186"

pytestmark = pytest.mark.skipif(
    not (DATA / "tokenizer-qwen2.5").is_dir(), reason="needs ../shared/data with the published tokenizers"
)


@pytest.fixture(scope="module")
def qwen_tiktoken(tmp_path_factory):
    """The folder of the first generation: its ranks are the ids of the second, so its file can be made again."""
    vocab = json.loads((DATA / "tokenizer-qwen2/vocab.json").read_bytes())
    as_bytes = lambda token: bytes(vocabulary.BYTE_OF[character] for character in token)
    lines = [b"%s %d\n" % (base64.b64encode(as_bytes(token)), vocab[token]) for token in sorted(vocab, key=vocab.get)]
    folder = tmp_path_factory.mktemp("qwen1")
    (folder / "qwen.tiktoken").write_bytes(b"".join(lines))
    return folder


@pytest.fixture(scope="module", params=NUM_TOKENS)
def published(request):
    folder = DATA / f"tokenizer-{request.param}"
    return request.param, Tokenizer.load(
        request.getfixturevalue("qwen_tiktoken") if request.param == "qwen1" else folder
    )


def test_ids_of_control_tokens(published):
    generation, tokenizer = published
    assert tokenizer.end_of_text == 151643
    assert tokenizer.num_tokens == NUM_TOKENS[generation]
    assert sorted(tokenizer.control.values()) == list(range(151643, NUM_TOKENS[generation]))
    expected = {
        "qwen1": {"<|extra_0|>": 151646, "<|extra_204|>": 151850},
        "qwen2": {},
        "qwen2.5": {"<|object_ref_start|>": 151646, "<tool_call>": 151657, "<|file_sep|>": 151664},
        "qwen3": {"<tool_call>": 151657, "<tool_response>": 151665, "</think>": 151668},
    }[generation] | {"<|im_start|>": 151644, "<|im_end|>": 151645}
    assert {content: tokenizer.control[content] for content in expected} == expected
    # Decoding keeps the words of tools, thoughts and files.
    assert tokenizer.special == set(range(151643, 151851 if generation == "qwen1" else 151657)) & set(
        tokenizer.control.values()
    )


def test_the_first_generations_file_gives_the_seconds_merges(qwen_tiktoken):
    file = qwen_tiktoken / "qwen.tiktoken"
    assert hashlib.sha256(file.read_bytes()).hexdigest() == TIKTOKEN_SHA256
    model = json.loads(vocabulary.read(file))["model"]
    merges = (DATA / "tokenizer-qwen2/merges.txt").read_text("utf-8").split("\n")[1:-1]
    assert len(merges) == 151387
    assert [" ".join(pair) for pair in model["merges"]] == merges
    assert model["vocab"] == json.loads((DATA / "tokenizer-qwen2/vocab.json").read_bytes())


def test_vocab_and_merges_files_are_the_tokenizer_json(tmp_path):
    source = DATA / "tokenizer-qwen2"
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (tmp_path / name).symlink_to(source / name)
    built, whole = (json.loads(vocabulary.read(folder)) for folder in (tmp_path, source))
    for part in ("vocab", "merges"):
        assert built["model"].pop(part) == whole["model"].pop(part)
    del built["model"], whole["model"]
    assert built == whole


def golden():
    return [json.loads(line) for line in (DATA / "tokenizer-golden/dev.jsonl").read_text("utf-8").splitlines()]


def test_golden_encodings(published):
    generation, tokenizer = published
    for case in golden():
        text, ids = case["text"], case.get(generation, case["qwen2"])
        assert tokenizer.encode_trusted(text) == ids, text
        assert tokenizer.decode(ids, skip_special=False) == case.get("decoded", text)


def test_golden_texts_as_plain_text(published):
    generation, tokenizer = published
    cases = golden()
    for case, ids in zip(cases, tokenizer.encode_batch([case["text"] for case in cases]), strict=True):
        assert tokenizer.decode(ids) == case.get("decoded", case["text"])
        assert not ids or max(ids) < 151643
        assert tokenizer.encode_with_offsets(case["text"])[0] == ids
        if not any(token in case["text"] for token in tokenizer.control):
            assert ids == case.get(generation, case["qwen2"]), case["text"]


def test_llamacpp_vectors(published):
    _, tokenizer = published
    folder = DATA / "llamacpp-vocab-tests"
    for name in ("qwen2", "deepseek-r1-qwen"):
        texts = (folder / f"ggml-vocab-{name}.gguf.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
        expected = (folder / f"ggml-vocab-{name}.gguf.out").read_text().splitlines()
        cases = [(text, [int(token) for token in line.split()]) for text, line in zip(texts, expected, strict=False)]
        assert len(cases) >= 46
        for text, ids in cases:
            assert tokenizer.encode(text) == ids, text


PLAIN = {
    "Hello world": [9707, 1879],
    " Hello world": [21927, 1879],
    "你好，世界": [108386, 3837, 99489],
    "12345": [16, 17, 18, 19, 20],
    " 2024 ": [220, 17, 15, 17, 19, 220],
    "3.14159": [18, 13, 16, 19, 16, 20, 24],
    "def f(x):\n    return x + 1\n": [750, 282, 2075, 982, 262, 470, 856, 488, 220, 16, 198],
    " 根": [51461, 117],
    'print("<|endoftext|>")': [1350, 9639, 91, 8691, 723, 427, 91, 82598],
    "\n": [198],
    "\r\n\r\n": [871],
    "\t\tx": [197, 10225],
    "I'LL don't": [40, 6, 4086, 1513, 944],
    "  two  spaces": [220, 1378, 220, 12621],
    "café": [924, 58858],
    "cafe\u0301": [924, 58858],
    "한국어": [23573, 124785, 31079],
    "🙂": [145080],
    "system": [8948],
    "user": [872],
    "assistant": [77091],
    "Observation:": [37763, 367, 25],
    "Observation:\n": [37763, 367, 510],
    "You are a helpful assistant.": [2610, 525, 264, 10950, 17847, 13],
    "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.": [
        2610, 525, 1207, 16948, 11, 3465, 553, 54364, 14817, 13, 1446, 525, 264, 10950, 17847, 13,
    ],
}  # fmt: skip
TRUSTED = {
    'print("<|endoftext|>")': [1350, 445, 151643, 899],
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n"
    "<|im_start|>assistant\n": [
        151644, 8948, 198, 2610, 525, 264, 10950, 17847, 13, 151645, 198,
        151644, 872, 198, 14990, 151645, 198, 151644, 77091, 198,
    ],
}  # fmt: skip


def test_encodings_of_the_original_vocabulary(published):
    _, tokenizer = published
    for text, ids in PLAIN.items():
        assert tokenizer.encode(text) == ids, text
    for text, ids in TRUSTED.items():
        assert tokenizer.encode_trusted(text) == ids, text


def test_streaming_the_published_vocabulary(published):
    _, tokenizer = published
    text = "👩‍👩‍👧 根 naïve 🙂\n"
    stream = tokenizer.stream()
    pieces = [stream.push(token) for token in tokenizer.encode(text)]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
