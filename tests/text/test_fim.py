"""Prompts for code, literally."""

from __future__ import annotations

from qwen_jax.text import chat, fim


def test_fill_in_the_middle(tokenizer):
    pieces = fim.fill_in_the_middle("def f():\n", "\n<|fim_middle|>")
    assert chat.text_of(pieces) == "<|fim_prefix|>def f():\n<|fim_suffix|>\n<|fim_middle|><|fim_middle|>"
    ids = chat.encode(tokenizer, pieces).ids
    assert ids[0] == tokenizer.control["<|fim_prefix|>"]
    assert ids.count(tokenizer.control["<|fim_middle|>"]) == 1
    assert ids[-1] == tokenizer.control["<|fim_middle|>"]


def test_repository():
    files = [("a.py", "A = 1\n"), ("b.py", "")]
    head = "<|repo_name|>r\n<|file_sep|>a.py\nA = 1\n\n<|file_sep|>b.py\n"
    assert chat.text_of(fim.repository("r", files)) == head
    last = ("c.py", fim.fill_in_the_middle("x", "y"))
    expected = head + "\n<|file_sep|>c.py\n<|fim_prefix|>x<|fim_suffix|>y<|fim_middle|>"
    assert chat.text_of(fim.repository("r", files, last=last)) == expected


def test_stop_tokens_are_control_tokens(tokenizer):
    assert set(fim.STOP_TOKENS) <= tokenizer.control.keys()
