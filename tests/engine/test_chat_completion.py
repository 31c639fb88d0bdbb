"""Answers from tokens: tags are tokens, and stop strings cut the same text as ever, wherever a token ends."""

from __future__ import annotations

import json

from hypothesis import example, given, settings
from hypothesis import strategies as st

from qwen_jax.engine import ChatCompletion, Completion
from qwen_jax.text import Tokenizer, tools, train_bpe
from qwen_jax.text.messages import Call

TAGS = (*tools.THOUGHT_TAGS, *tools.CALL_TAGS)
PLAIN = train_bpe(
    ['<tool_call>\n{"name": "f", "arguments": {"x": "é"}}\n</tool_call><think>low</think>' * 3], vocab_size=290
)
CALL = '<tool_call>\n{"name": "f", "arguments": {"x": "é"}}\n</tool_call>'
# Bytes and merges of all there is, half characters and control tokens in any order, and calls that are whole.
TEXTS = st.lists(st.sampled_from([*TAGS, CALL, "\n\n", "low", "é", " "]), max_size=6).map("".join)


def with_tags() -> Tokenizer:
    spec = json.loads(PLAIN.to_bytes())
    for index, tag in enumerate(TAGS, PLAIN.num_tokens):
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        spec["added_tokens"].append({"id": index, "content": tag, **flags, "special": tag == "<think>"})
    return Tokenizer(json.dumps(spec).encode())


TOKENIZER = with_tags()
IM_END = TOKENIZER.control["<|im_end|>"]


def said(completion, ids, reason="length"):
    """Content, reasoning and calls of all deltas."""
    content, reasoning, calls = "", "", []
    for delta in [delta for token in ids for delta in completion.push(token)] + completion.end(reason):
        content += delta.content
        reasoning += delta.reasoning
        if delta.call and delta.call.name:
            calls.append([delta.call.name, ""])
        elif delta.call:
            calls[delta.call.index][1] += delta.call.arguments
    assert len(calls) == completion.calls
    return content, reasoning, tuple(Call(name=name, arguments=arguments) for name, arguments in calls)


@settings(deadline=None)
@given(texts=st.lists(TEXTS, max_size=3), noise=st.lists(st.integers(0, TOKENIZER.num_tokens - 1), max_size=4))
@example(texts=["é"], noise=[TOKENIZER.encode("é")[0], TOKENIZER.control["<think>"]])
def test_tokens_say_what_parse_ids_reads(texts, noise):
    ids = [token for text in texts for token in (*TOKENIZER.encode(text), *TOKENIZER.encode_trusted(text))] + noise
    for tokenizer in (TOKENIZER, PLAIN):
        ids = [token for token in ids if token < tokenizer.num_tokens]
        completion = ChatCompletion(tokenizer, {IM_END}, (), thinks=True, in_thought=False, tools=True)
        got = said(completion, ids)
        ids = ids[: ids.index(IM_END)] if IM_END in ids else ids
        answer = tools.parse_ids(tokenizer, ids, thinks=True, in_thought=False)
        if not answer.malformed:  # what breaks late stays a call; that is tested with text
            assert got == (answer.content, answer.reasoning or "", answer.calls)


@settings(deadline=None)
@given(
    text=TEXTS,
    spelled=st.booleans(),
    stops=st.lists(st.sampled_from(["low", "é\n", "</think>", "call>", "k><", "\n", ">l"]), max_size=2),
)
@example(text="<think>low</think>low", spelled=False, stops=["k><", "k>lo"])
@example(text="é<tool_call>é", spelled=False, stops=["call>é\n"])
def test_stop_strings_are_found_in_all_of_the_text(text, spelled, stops):
    ids = (TOKENIZER.encode if spelled else TOKENIZER.encode_trusted)(text)
    chat = ChatCompletion(TOKENIZER, {IM_END}, stops, thinks=True, in_thought=False, tools=True)
    plain = Completion(TOKENIZER, {IM_END}, stops, tags=tools.tag_tokens(TOKENIZER)[0])
    got = said(chat, ids)
    for token in ids:
        plain.push(token)
    plain.end("length")
    assert (chat.text, chat.finish_reason, chat.num_tokens) == (plain.text, plain.finish_reason, plain.num_tokens)
    assert chat.text == text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]

    left = (TOKENIZER.encode if spelled else TOKENIZER.encode_trusted)(chat.text)
    answer = tools.parse_ids(TOKENIZER, left, thinks=True, in_thought=False)
    if not answer.malformed:  # a call that was cut is none to who reads the whole
        assert got == (answer.content, answer.reasoning or "", answer.calls)


def test_nothing_comes_after_the_end():
    completion = ChatCompletion(TOKENIZER, {IM_END}, ["low"], thinks=True, in_thought=False, tools=True)
    assert said(completion, TOKENIZER.encode("é low low"))[0] == "é "
    assert (completion.finish_reason, completion.text) == ("stop", "é ")
    assert completion.push(0) == completion.end("length") == []
