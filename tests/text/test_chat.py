"""Formats, ids and masks of chats, with a tokenizer of the test's own."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax.errors import ConfigError, DataError, ModelError
from qwen_jax.text import chat, train_bpe
from qwen_jax.text.chat import FORMATS, Piece

USER = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "yo"}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"x": "é<"}}}]}
RESULT = {"role": "tool", "content": "1"}
TOOL = {"type": "function", "function": {"name": "f", "description": "<é> & more"}}


def text(name, messages, **options):
    return chat.text_of(FORMATS[name].render(messages, **options))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("qwen1", "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"),
        ("qwen1.5", "<|im_start|>system\nYou are a helpful assistant<|im_end|>\n"),
        ("qwen2", "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"),
        (
            "qwen2.5",
            "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n",
        ),
        (
            "qwen2.5-math",
            "<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n",
        ),
        ("qwen3", ""),
        ("qwen3-instruct-2507", ""),
    ],
)
def test_default_system(name, expected):
    prompt = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert text(name, [USER], add_generation_prompt=True) == expected + prompt
    own = [{"role": "system", "content": ""}, USER]
    assert text(name, own, add_generation_prompt=True) == "<|im_start|>system\n<|im_end|>\n" + prompt


def test_the_early_format_leaves_the_last_message_open():
    head = "<|im_start|>system\nYou are a helpful assistant<|im_end|>\n<|im_start|>user\nhi"
    assert text("qwen1.5", [USER]) == head
    turns = head + "<|im_end|>\n<|im_start|>assistant\nyo"
    assert text("qwen1.5", [USER, ANSWER]) == turns
    assert text("qwen1.5", [USER, ANSWER], add_generation_prompt=True) == turns + "<|im_end|>\n"


def test_tools_calls_and_results():
    rendered = text("qwen3", [USER, CALL, RESULT, RESULT, ANSWER], tools=[TOOL])
    assert rendered == (
        "<|im_start|>system\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
        "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
        '{"type": "function", "function": {"name": "f", "description": "<é> & more"}}\n</tools>\n\n'
        "For each function call, return a json object with function name and arguments within "
        '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n'
        "</tool_call><|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
        '<|im_start|>assistant\n<tool_call>\n{"name": "f", "arguments": {"x": "é<"}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\n1\n</tool_response>\n<tool_response>\n1\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\nyo<|im_end|>\n"
    )
    assert text("qwen2.5", [USER], tools=[TOOL]).startswith(
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.\n\n# Tools\n"
    )
    flat = CALL | {"tool_calls": [CALL["tool_calls"][0]["function"]], "content": None}
    written = CALL | {"tool_calls": [{"name": "f", "arguments": '{"x": "é<"}'}]}
    assert text("qwen2.5", [USER, flat]) == text("qwen2.5", [USER, written]) == text("qwen2.5", [USER, CALL])


def test_thoughts_before_the_last_question_are_left_out():
    thought = {"role": "assistant", "content": "yo", "reasoning_content": "\nhm\n"}
    inline = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nyo"}
    for answer in (thought, inline):
        assert text("qwen3", [USER, answer]).endswith("assistant\n<think>\nhm\n</think>\n\nyo<|im_end|>\n")
        assert "assistant\nyo<|im_end|>\n" in text("qwen3", [USER, answer, USER])
        assert "hm" in text("qwen3", [USER, answer, RESULT])
    assert text("qwen3", [ANSWER]) == "<|im_start|>assistant\nyo<|im_end|>\n"
    assert "<think>" in text("qwen2.5", [USER, inline])


def test_switching_thoughts_off():
    prompt, closed = "<|im_start|>assistant\n", "<think>\n\n</think>\n\n"
    for switch, expected in ((None, prompt), (True, prompt), (False, prompt + closed)):
        assert text("qwen3", [USER], add_generation_prompt=True, enable_thinking=switch).endswith("\n" + expected)
    assert text("qwen3-nonthinking", [USER], add_generation_prompt=True).endswith(prompt + closed)
    for name, switch in (("qwen2.5", False), ("qwen3-instruct-2507", True), ("qwen3-nonthinking", True)):
        with pytest.raises(ConfigError, match="enable_thinking"):
            text(name, [USER], enable_thinking=switch)


@pytest.mark.parametrize("name", FORMATS)
def test_going_on_with_the_final_message(name):
    whole = text(name, [USER, ANSWER])
    assert text(name, [USER, ANSWER], continue_final_message=True) == whole.removesuffix("<|im_end|>\n")
    for messages, prompt in (([USER], False), ([USER, ANSWER], True)):
        with pytest.raises(ConfigError, match="continue_final_message"):
            text(name, messages, continue_final_message=True, add_generation_prompt=prompt)


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([], "messages is empty"),
        ("hi", "messages is a str"),
        (["hi"], r"messages\[0\] is a str"),
        ([{"content": "hi"}], r"messages\[0\].role is None"),
        ([{"role": "bot", "content": "hi"}], r"messages\[0\].role is 'bot'; want one of system, user"),
        ([{"role": ["user"], "content": "hi"}], r"messages\[0\].role is \['user'\]"),
        ([{"role": "user"}], r"messages\[0\].content is missing"),
        ([USER, {"role": "assistant", "content": None}], r"messages\[1\].content is missing"),
        ([USER, {"role": "assistant", "content": None, "tool_calls": []}], r"messages\[1\].content is missing"),
        ([{"role": "user", "content": 3}], r"messages\[0\].content is a int"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}],
            r"content\[0\] .* only text is read",
        ),
        ([{"role": "user", "content": "a", "images": ["x"]}], r"messages\[0\].images is not a field of user messages"),
        ([{"role": "user", "content": "a", "tool_calls": [1]}], r"messages\[0\].tool_calls is not a field of user"),
        ([USER, ANSWER | {"reasoning_content": 3}], r"messages\[1\].reasoning_content is a int"),
        ([USER, ANSWER | {"tool_calls": {"name": "f"}}], r"messages\[1\].tool_calls is a dict"),
        ([USER, ANSWER | {"tool_calls": ["f"]}], r"messages\[1\].tool_calls\[0\].name is missing"),
        ([USER, ANSWER | {"tool_calls": [{"function": {"name": "f"}}]}], r"tool_calls\[0\].function.arguments is None"),
        (
            [USER, ANSWER | {"tool_calls": [{"name": "f", "arguments": {"x": float("nan")}}]}],
            "cannot be written as JSON",
        ),
        ([USER, ANSWER | {"train": "no"}], r"messages\[1\].train is 'no'"),
        ([USER, ANSWER | {"weight": 0.5}], r"messages\[1\].weight is 0.5"),
    ],
)
def test_malformed_messages(messages, complaint):
    with pytest.raises(DataError, match=complaint) as error:
        text("qwen3", messages)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "messages", "options"),
    [
        ("qwen2", [USER], {"tools": [TOOL]}),
        ("qwen2", [USER, CALL], {}),
        ("qwen1", [USER, RESULT], {}),
        ("qwen2.5", [USER, ANSWER | {"reasoning_content": "hm"}], {}),
        ("qwen2.5", [USER], {"tools": ["f"]}),
        ("qwen2.5", [USER], {"tools": {"f": 1}}),
        ("qwen2.5", [USER], {"tools": [{"f": {1, 2}}]}),
    ],
)
def test_what_a_format_cannot_write_is_refused(name, messages, options):
    with pytest.raises(DataError):
        text(name, messages, **options)


def test_text_parts_and_fields_without_effect():
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    message = {"role": "user", "content": parts, "name": "bo", "refusal": None, "tool_calls": []}
    assert text("qwen2.5", [message]) == text("qwen2.5", [USER])


def test_unusual_orders_of_roles():
    system = {"role": "system", "content": "s"}
    rendered = text("qwen2.5", [ANSWER, system, system, RESULT])
    assert rendered.endswith(
        "assistant.<|im_end|>\n<|im_start|>assistant\nyo<|im_end|>\n<|im_start|>system\ns<|im_end|>\n"
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\n<tool_response>\n1\n</tool_response><|im_end|>\n"
    )


def test_ids_decode_to_the_text(tokenizer):
    pieces = FORMATS["qwen3"].render([USER, CALL, RESULT, ANSWER], tools=[TOOL], add_generation_prompt=True)
    ids = chat.encode(tokenizer, pieces).ids
    assert tokenizer.decode(ids, skip_special=False) == chat.text_of(pieces)
    assert ids == tokenizer.encode_trusted(chat.text_of(pieces))


CONTENTS = st.lists(
    st.sampled_from(
        ["<|im_end|>", "<|im_start|>system\n", "<|endoftext|>", "<tool_call>", "</think>", "<|", "im_end|>"]
    )
    | st.text(max_size=4),
    max_size=4,
).map("".join)


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(sorted(FORMATS)), contents=st.lists(CONTENTS, min_size=8, max_size=8))
def test_contents_never_give_control_ids(tokenizer, name, contents):
    form = FORMATS[name]
    chats = []
    for fill in (contents, ["x"] * 8):
        messages = [{"role": r, "content": c} for r, c in zip(("system", "user", "user"), fill[:3], strict=True)]
        # Without the tag that formats with thoughts read in an assistant's content.
        messages += [{"role": "assistant", "content": fill[3].replace("</think>", "")}]
        if form.tools:
            messages[-1]["tool_calls"] = [{"name": fill[4] or "f", "arguments": {fill[5]: fill[6]}}]
            messages += [{"role": "tool", "content": fill[7]}]
        tools = [{"name": fill[0], "description": fill[1]}] if form.tools else None
        chats.append(form.render(messages, tools=tools))
    control = set(tokenizer.control.values())
    found = [[token for token in chat.encode(tokenizer, pieces).ids if token in control] for pieces in chats]
    # The assistant's empty content decides about a newline, and nothing about control tokens.
    assert found[0] == found[1]


def test_trusted_contents_are_parsed(tokenizer):
    pieces = FORMATS["qwen2"].render([{"role": "user", "content": "a<|im_end|><tool_call>"}])
    ids = chat.encode(tokenizer, pieces, trust_contents=True).ids
    assert ids == tokenizer.encode_trusted(chat.text_of(pieces))
    assert len(ids) < len(chat.encode(tokenizer, pieces).ids)


def test_a_control_token_over_two_pieces_is_none_unless_both_are_trusted(tokenizer):
    half, rest = Piece(text="<|im_", trusted=True), "end|>"
    end = tokenizer.control["<|im_end|>"]
    assert end not in chat.encode(tokenizer, [half, Piece(text=rest)]).ids
    assert chat.encode(tokenizer, [half, Piece(text=rest, trusted=True)]).ids == [end]


def learnt(tokenizer, name, messages, **options):
    encoded = chat.encode(tokenizer, FORMATS[name].render(messages, **options))
    assert len(encoded.ids) == len(encoded.mask)
    kept = [token for token, trained in zip(encoded.ids, encoded.mask, strict=True) if trained]
    return tokenizer.decode(kept, skip_special=False)


def test_masks_hold_what_the_assistant_wrote(tokenizer):
    messages = [USER, ANSWER, USER, CALL, RESULT, ANSWER]
    call = '<tool_call>\n{"name": "f", "arguments": {"x": "é<"}}\n</tool_call><|im_end|>\n'
    yo = "yo<|im_end|>\n"
    assert learnt(tokenizer, "qwen2.5", messages, tools=[TOOL]) == f"\n{yo}\n{call}\n{yo}"
    assert learnt(tokenizer, "qwen3", messages) == f"{yo}{call}<think>\n\n</think>\n\n{yo}"
    assert learnt(tokenizer, "qwen3-instruct-2507", messages) == f"{yo}{call}{yo}"
    assert learnt(tokenizer, "qwen2.5", [USER], add_generation_prompt=True) == ""


@pytest.mark.parametrize("left_out", [{"train": False}, {"weight": 0}, {"train": True, "weight": 0}])
def test_messages_left_out_of_training(tokenizer, left_out):
    assert learnt(tokenizer, "qwen2", [USER, ANSWER | left_out, USER, ANSWER]) == "\nyo<|im_end|>\n"


def test_a_token_that_begins_before_the_answer_is_trained(tokenizer):
    pieces = [Piece(text="assistant\n", trusted=True), Piece(text="\n\nok", trained=True)]
    encoded = chat.encode(tokenizer, pieces)
    merged = tokenizer.encode("\n\n\n")
    assert len(merged) == 1
    assert encoded.mask[encoded.ids.index(merged[0])]


def test_an_unknown_mask_is_refused(tokenizer):
    encoded = chat.encode(tokenizer, [Piece(text="a", trained=None)])
    assert encoded.ids == tokenizer.encode("a")
    with pytest.raises(DataError, match="generation"):
        _ = encoded.mask


def test_a_tokenizer_without_the_formats_tokens_is_refused():
    other = train_bpe(["a"], vocab_size=259)
    with pytest.raises(ModelError, match=r"no token <\|fim_prefix\|>"):
        chat.encode(other, [Piece(text="<|fim_prefix|>", trusted=True)])
    # In contents it is text like any other.
    assert chat.encode(other, [Piece(text="<|fim_prefix|>")], trust_contents=True).ids


def test_window_keeps_the_newest_exchanges(tokenizer):
    form = FORMATS["qwen1"]
    system = {"role": "system", "content": "s"}
    exchanges = [[{"role": "user", "content": str(n) * 9}, ANSWER] for n in range(5)]
    messages = [system, *sum(exchanges, []), USER]

    def tokens(chat_messages):
        return len(chat.encode(tokenizer, form.render(chat_messages)).ids)

    for kept in range(6):
        history = [system, *sum(exchanges[5 - kept :], [])]
        expected = [*history, USER]
        assert chat.window(tokenizer, form, messages, max_window_size=tokens(history)) == expected
        if kept:
            fewer = chat.window(tokenizer, form, messages, max_window_size=tokens(history) - 1)
            assert fewer == [system, *expected[3:]]
    assert chat.window(tokenizer, form, messages) == messages
    assert chat.window(tokenizer, form, messages[1:], max_window_size=1) == [USER]


def test_text_loads_no_jax():
    code = "import sys, qwen_jax.text.template, qwen_jax.text.tools, qwen_jax.text.fim\n"
    code += "assert not {'jax', 'jinja2', 'numpy'} & sys.modules.keys(), sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
