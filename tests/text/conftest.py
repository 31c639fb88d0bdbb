"""A tokenizer of the test's own, with the control tokens of every generation."""

from __future__ import annotations

import json

import pytest

from qwen_jax.text import Tokenizer, fim, train_bpe

TAGS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    spec = json.loads(train_bpe(["the user and the assistant\n\n\n" * 9], vocab_size=279).to_bytes())
    for content in (*fim.STOP_TOKENS[1:], *TAGS):
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
        spec["added_tokens"].append({"id": 276 + len(spec["added_tokens"]), "content": content, **flags})
    return Tokenizer(json.dumps(spec).encode())
