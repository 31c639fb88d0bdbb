"""The published tokenizers, exactly. What `encode` claims is text as plain text; control tokens are left out."""

import json
from pathlib import Path

import pytest

from qwen_jax.text import Tokenizer

DATA = Path(__file__).parents[3] / "shared" / "data"
GENERATIONS = ("qwen2", "qwen2.5", "qwen3")

pytestmark = pytest.mark.skipif(
    not (DATA / "tokenizer-qwen2.5").is_dir(), reason="needs ../shared/data with the published tokenizers"
)


@pytest.fixture(scope="module", params=GENERATIONS)
def published(request):
    tokenizer = Tokenizer.load(DATA / f"tokenizer-{request.param}")
    added = {token["content"]: token["id"] for token in json.loads(tokenizer.to_bytes())["added_tokens"]}
    return request.param, tokenizer, added


def test_ids_of_special_tokens(published):
    generation, tokenizer, _ = published
    assert tokenizer.end_of_text == 151643
    assert tokenizer.num_tokens == {"qwen2": 151646, "qwen2.5": 151665, "qwen3": 151669}[generation]


def test_golden_encodings(published):
    generation, tokenizer, added = published
    cases = [json.loads(line) for line in (DATA / "tokenizer-golden/dev.jsonl").read_text("utf-8").splitlines()]
    for case, ids in zip(cases, tokenizer.encode_batch([case["text"] for case in cases]), strict=True):
        assert tokenizer.decode(ids) == case.get("decoded", case["text"])
        if any(token in case["text"] for token in added):
            assert not set(added.values()) & set(ids)
        else:
            assert ids == case.get(generation, case["qwen2"]), case["text"]


def test_llamacpp_vectors(published):
    _, tokenizer, _ = published
    folder = DATA / "llamacpp-vocab-tests"
    texts = (folder / "ggml-vocab-qwen2.gguf.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    expected = (folder / "ggml-vocab-qwen2.gguf.out").read_text().splitlines()
    cases = [(text, [int(token) for token in line.split()]) for text, line in zip(texts, expected, strict=False)]
    assert len(cases) >= 46
    for text, ids in cases:
        assert tokenizer.encode(text) == ids, text


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ('print("<|endoftext|>")', [1350, 9639, 91, 8691, 723, 427, 91, 82598]),
        ("def f(x):\n    return x + 1\n", [750, 282, 2075, 982, 262, 470, 856, 488, 220, 16, 198]),
        ("你好，世界", [108386, 3837, 99489]),
        (" 根", [51461, 117]),
        ("I'LL don't", [40, 6, 4086, 1513, 944]),
        ("3.14159", [18, 13, 16, 19, 16, 20, 24]),
    ],
)
def test_encodings_of_the_original_vocabulary(published, text, ids):
    assert published[1].encode(text) == ids


def test_streaming_the_published_vocabulary(published):
    _, tokenizer, _ = published
    text = "👩‍👩‍👧 根 naïve 🙂\n"
    stream = tokenizer.stream()
    pieces = [stream.push(token) for token in tokenizer.encode(text)]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
