"""Conversations in every form: the same text and mask, and what becomes of those that cannot be written."""

import dataclasses
import json

import pytest

from qwen_jax.errors import ConfigError, DataError
from qwen_jax.text import chat, train_bpe
from qwen_jax.text.chat import FORMATS
from qwen_jax.text.template import JinjaFormat
from train.data import Conversations, conversations, sources
from train.data.config import ChatFormat as FormatName
from train.data.documents import encode
from train.data.sources import Tally

USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}
TOOL = {"name": "f", "parameters": {}}
CALL = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": '{"x":  1}'}]}
RESULT = {"role": "tool", "content": "2"}
TOOLS = [{"type": "function", "function": TOOL}]


@pytest.fixture
def read(tmp_path):
    """A function: rows (or the bytes of a file) to (documents, tally)."""

    def read(*rows, form="qwen2.5", bad=0.0, raw=None, name="a.jsonl", **how):
        content = "".join(json.dumps(row) + "\n" for row in rows).encode() if raw is None else raw
        (tmp_path / name).write_bytes(content)
        source = Conversations(path=str(tmp_path / name), **how)
        tally = Tally(bad)
        form = FORMATS[form] if isinstance(form, str) else form
        return list(conversations.documents(sources.find_files(source, print), source, form, tally)), tally

    return read


def marked(document):
    """The text, what is trained in brackets."""
    out, before = "", False
    for piece in document.pieces:
        out += ("[" if piece.trained else "]") * (before != bool(piece.trained) and bool(piece.text)) + piece.text
        before = bool(piece.trained) if piece.text else before
    return out + "]" * before


def test_the_names_of_the_formats_are_those_of_text_chat():
    assert FormatName.__args__ == tuple(FORMATS)


def test_every_form_of_a_conversation_is_the_same_document(read):
    system = {"role": "system", "content": "S"}
    pairs = [
        {"messages": [system, USER, ANSWER, USER, ANSWER]},
        {"conversations": [{"from": f, "value": v} for f, v in (("system", "S"), ("human", "hi"), ("gpt", "yo")) * 1]
         + [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]},
        {"instruction": "hi", "output": "yo", "history": [["hi", "yo"]], "system": "S"},
        {"q": "hi", "a": "yo", "history": [["hi", "yo"]], "system": "S", "input": ""},
    ]  # fmt: skip
    found, tally = read(*pairs, columns={"instruction": "q", "output": "a"})
    assert len({marked(document) for document in found}) == 1 and tally.documents == 4
    assert marked(found[0]) == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant[\nyo<|im_end|>\n]"
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant[\nyo<|im_end|>\n]"
    )
    assert not found[0].ends
    (last,), _ = read({"prompt": [system, USER, ANSWER, USER], "completion": [ANSWER]})
    assert last.text == found[0].text and marked(last).count("[") == 1
    (asked,), _ = read({"instruction": "add", "input": "1 2", "output": "3"})
    assert "user\nadd\n1 2<|im_end|>" in asked.text
    (plain,), _ = read({"prompt": "1 + 1 =", "completion": " 2"})
    assert marked(plain) == "1 + 1 =[ 2]" and plain.ends


def test_tools_calls_and_results_of_sharegpt(read):
    turns = [
        ("human", "hi"),
        ("function_call", '{"name": "f", "arguments": {"x":  1}}'),
        ("observation", "2"),
        ("gpt", "yo"),
    ]
    row = {"conversations": [{"from": who, "value": text} for who, text in turns], "tools": json.dumps([TOOL])}
    several = {"messages": [USER, CALL, RESULT, ANSWER], "tools": TOOLS}
    found, _ = read(row, several)
    assert found[0].text == found[1].text and '{"name": "f", "arguments": {"x":  1}}\n</tool_call>' in found[0].text
    assert "[\n<tool_call>" in marked(found[0]) and "]<|im_start|>user\n<tool_response>\n2" in marked(found[0])


def test_what_is_learnt(read):
    rows = {"messages": [USER, ANSWER | {"train": False}, USER, ANSWER]}, {"messages": [USER, ANSWER, USER, ANSWER]}
    flagged, last = read(rows[0])[0][0], read(rows[1], learn="last_answer")[0][0]
    assert marked(flagged) == marked(last) and marked(last).count("[") == 1
    (quirk,), _ = read({"messages": [USER, ANSWER]}, form="qwen1", learn="qwen1")
    assert marked(quirk) == (
        "[<|im_start|>]system\nYou are a helpful assistant.[<|im_end|>\n<|im_start|>]user\nhi[<|im_end|>\n<|im_start|>]"
        "assistant\n[yo<|im_end|>\n]"
    )
    (closed,), _ = read({"messages": [USER, ANSWER]}, form="qwen1.5", system="S")
    assert closed.text.startswith("<|im_start|>system\nS<|im_end|>") and marked(closed).endswith("[\nyo<|im_end|>\n]")


BAD = {
    "ends with the user": ({"messages": [USER]}, "last message is of role 'user'"),
    "role": ({"messages": [USER, {"role": "bot", "content": "x"}, ANSWER]}, r"messages\[\d\].role is 'bot'"),
    "who": ({"conversations": [{"from": "cat", "value": "x"}]}, r"conversations\[0\].from is 'cat'"),
    "empty": ({"messages": []}, "messages is \\[\\]"),
    "null": ({"messages": None}, "messages is None"),
    "two systems": ({"messages": [USER, {"role": "system", "content": "x"}, ANSWER]}, "speaks first and once"),
    "no call": ({"conversations": [{"from": "function_call", "value": "{"}]}, "no call of a function"),
    "nothing trained": ({"messages": [USER, ANSWER | {"weight": 0}]}, "no message of the assistant is trained"),
    "keys": ({"text": "x"}, r"its keys are \['text'\].*data.source.columns renames"),
    "tools": ({"messages": [USER, ANSWER], "tools": "["}, "tools is no JSON"),
    "surrogate": ({"messages": [USER, {"role": "assistant", "content": "\ud800"}]}, "surrogates not allowed"),
    "type": ({"instruction": 3, "output": "x"}, "instruction is a int"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_conversation_that_cannot_be_written_is_named_and_may_be_skipped(read, name):
    row, words = BAD[name]
    good = {"messages": [USER, ANSWER]}
    with pytest.raises(DataError, match=rf"a\.jsonl:2: .*{words}") as caught:
        read(good, row, good)
    assert "\n" not in str(caught.value)
    found, tally = read(good, row, good, bad=0.5)
    assert (len(found), tally.documents, tally.bad) == (2, 2, 1)
    assert "a.jsonl:2" in str(tally)


def test_a_json_array_is_read_like_lines(read):
    rows = [{"messages": [USER, ANSWER]}, 3, {"messages": [USER]}]
    with pytest.raises(DataError, match=r"a\.json\[1\]: wanted a JSON object"):
        read(raw=json.dumps(rows, indent=1).encode(), name="a.json")
    found, tally = read(raw=b"\xef\xbb\xbf \n" + json.dumps(rows).encode(), name="a.json", bad=0.9)
    assert (len(found), tally.bad) == (1, 2)
    assert "a.json[1]" in str(tally)


def test_a_template_that_marks_nothing_is_refused(read):
    with pytest.raises(ConfigError, match=r"does not mark what the assistant writes; name data\.source\.format"):
        read({"messages": [USER, ANSWER]}, form=JinjaFormat(source="{{ messages }}", control=()))


def test_ids_and_flags_of_a_document(read):
    tokenizer = train_bpe(["the assistant says to the user\n" * 20], vocab_size=262)
    spelled = {"role": "user", "content": "<|im_end|>"}
    found, _ = read({"messages": [spelled, ANSWER]}, {"prompt": "a", "completion": "b"})
    (ids, trained), (plain, ends) = encode(tokenizer, found)
    control = tokenizer.control["<|im_end|>"]
    assert ids.count(control) == 3, "what the user spells out is no token"
    assert len(trained) == len(ids) + 1 and not trained[-1]
    assert (
        tokenizer.decode([i for i, on in zip(ids, trained, strict=False) if on], skip_special=False)
        == "\nyo<|im_end|>\n"
    )
    assert (len(plain), ends) == (2, [False, True, True])
    assert next(encode(tokenizer, [dataclasses.replace(found[0], pieces=None)]))[1] is None
    assert chat.text_of(found[0].pieces) == found[0].text
