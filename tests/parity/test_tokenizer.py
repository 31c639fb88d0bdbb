"""The tokenizer against the `transformers` library's: random text of many scripts, random ids, every generation."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from qwen_jax.text import Tokenizer

transformers = pytest.importorskip("transformers", reason="the oracle: pip install -e '.[parity]'")

DATA = Path(__file__).parents[3] / "shared" / "data"

pytestmark = [
    pytest.mark.filterwarnings("default"),
    pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data with the published tokenizers"),
]

NUM_TEXTS = 2000
BLOCKS = [
    (0x00, 0x7F), (0xA0, 0x24F), (0x300, 0x36F), (0x370, 0x52F), (0x590, 0x6FF), (0x900, 0xDFF), (0xE00, 0xEFF),
    (0xF00, 0xFFF), (0x1100, 0x11FF), (0x1E00, 0x1FFF), (0x2000, 0x206F), (0x2070, 0x2BFF), (0x3000, 0x30FF),
    (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0xF900, 0xFAFF), (0xFE00, 0xFE0F), (0xFF00, 0xFFEF), (0x1D100, 0x1D7FF),
    (0x1F1E6, 0x1F1FF), (0x1F300, 0x1FAFF), (0x20000, 0x2A6DF), (0xE0000, 0xE007F), (0x0, 0xD7FF),
]  # fmt: skip
WORDS = [
    " ", "  ", "\n", "\n\n", "\r\n", "\t", "'s", "'LL", " the", "return", "def f(x):\n    ", "12345", "٣", "½",
    "e\u0301", "👩\u200d👩\u200d👧", "🇩🇪", "<|", "|>", "<|im_end", "im_start|>", "\u0338", "，", "。", "\ufeff", "\x1c",
    "\x85",
]  # fmt: skip


def random_text(rng: random.Random, control: list[str]) -> str:
    parts = []
    for _ in range(rng.randint(1, 12)):
        kind = rng.random()
        if kind < 0.2:
            parts.append(rng.choice(control))
        elif kind < 0.5:
            parts.append(rng.choice(WORDS))
        else:
            first, last = rng.choice(BLOCKS)
            parts += [chr(rng.randint(first, last)) for _ in range(rng.randint(1, 6))]
    return "".join(parts)


@pytest.fixture(scope="module", params=["qwen2", "qwen2.5", "qwen3"])
def pair(request):
    folder = DATA / f"tokenizer-{request.param}"
    return Tokenizer.load(folder), transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def texts(pair):
    rng = random.Random(0)
    return [random_text(rng, list(pair[0].control)) for _ in range(NUM_TEXTS)]


def test_random_text_with_control_tokens(pair, texts):
    ours, theirs = pair
    for text, ids in zip(texts, theirs(texts, add_special_tokens=False)["input_ids"], strict=True):
        assert ours.encode_trusted(text) == ids, text
        for skip_special in (True, False):
            expected = theirs.decode(ids, skip_special_tokens=skip_special, clean_up_tokenization_spaces=False)
            assert ours.decode(ids, skip_special=skip_special) == expected, text


def test_plain_text_is_that_of_a_tokenizer_without_control_tokens(pair, texts):
    ours, theirs = pair
    mark = "\u2063"  # keeps a control token from being found, is a piece of its own kind and comes out unchanged
    for text in texts:
        for content in ours.control:
            text = text.replace(content, content[0] + mark + content[1:])
        assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"], text


def test_random_ids(pair):
    ours, theirs = pair
    rng = random.Random(1)
    for _ in range(NUM_TEXTS):
        ids = rng.choices(range(ours.num_tokens), k=rng.randint(1, 12))
        stream = ours.stream()
        expected = theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert ours.decode(ids) == "".join(map(stream.push, ids)) + stream.finish() == expected


def test_other_tools_read_what_to_bytes_gives(pair, texts, tmp_path):
    ours, theirs = pair
    (tmp_path / "tokenizer.json").write_bytes(ours.to_bytes())
    again = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    assert again(texts[:200])["input_ids"] == theirs(texts[:200])["input_ids"]
