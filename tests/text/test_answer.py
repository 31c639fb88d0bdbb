"""Answers as they stream: what comes out is what is read from the whole, and comes as early as it is certain."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qwen_jax.text import tools
from qwen_jax.text.answer import AnswerStream
from qwen_jax.text.messages import Call

TAGS = (*tools.THOUGHT_TAGS, *tools.CALL_TAGS)
BODIES = [
    '{"name": "f", "arguments": {"x": "é}{\\"", "y": [{}]}}',
    '\n{ "name":"g\\u00e9","arguments" :{ } , "id": 1}\n',
    '{"arguments": {"name": "h"}, "name": "f"}',
    '{"name": "f", "arguments": [1]}',
    '{"name": "", "arguments": {}}',
    '{"name": "\\ud800", "arguments": {}}',
    '{"name": "f", "parameters": {"arguments": {"name": 1}}}',
    "{",
]
BLOCKS = st.sampled_from(BODIES).map("<tool_call>{}</tool_call>".format)
TEXTS = st.lists(st.sampled_from([*TAGS, "\n", "\n\n", " ", "x", "é<", "<tool", "call>"]) | BLOCKS, max_size=8).map(
    "".join
)


def joined(stream: AnswerStream, events: list[tuple[str, bool]]) -> tuple[str, str, tuple[Call, ...]]:
    """Content, reasoning and calls of all that `stream` gives; the parts of a call come in order."""
    content, reasoning, calls = "", "", []
    for delta in [delta for text, control in events for delta in stream.push(text, control)] + stream.finish():
        assert sum(map(bool, (delta.content, delta.reasoning, delta.call))) == 1
        content += delta.content
        reasoning += delta.reasoning
        if delta.call and delta.call.name:
            assert delta.call.id and delta.call.index == len(calls) and not delta.call.arguments
            calls.append((delta.call.name, ""))
        elif delta.call:
            assert delta.call.id is None and delta.call.index == len(calls) - 1 and delta.call.arguments
            calls[-1] = (calls[-1][0], calls[-1][1] + delta.call.arguments)
    assert stream.calls == len(calls)
    return content, reasoning, tuple(Call(name=name, arguments=arguments) for name, arguments in calls)


def cut(text: str, sizes: list[int]) -> list[str]:
    """`text` in pieces of `sizes`, taken around."""
    pieces = []
    while text:
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(text[:size])
        text = text[size:]
    return pieces


@settings(deadline=None)
@given(
    text=TEXTS,
    unclosed=st.sampled_from(["", *(f"<tool_call>{body}" for body in BODIES)]),
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    thought=st.sampled_from([(True, True), (True, False), (False, False)]),
    as_tokens=st.booleans(),
)
@example("\n\n<think>\n\nx\n</think>\n\nx\n\n", "", [1], (True, False), False)
@example("x\n</think>\n\n", f"<tool_call>{BODIES[0]}", [2], (True, True), True)
def test_a_stream_says_what_the_whole_does(text, unclosed, sizes, thought, as_tokens):
    text += unclosed
    thinks, in_thought = thought
    if as_tokens:
        parts = tools.split_tags(text, TAGS)
        events = [
            (piece, n % 2 == 1) for n, part in enumerate(parts) for piece in ([part] if n % 2 else cut(part, sizes))
        ]
    else:
        events = [(piece, False) for piece in cut(text, sizes)]
    spelled = () if as_tokens else TAGS
    stream = AnswerStream(thinks=thinks, in_thought=in_thought, tools=True, spelled=spelled)
    answer = tools.parse(text, thinks=thinks, in_thought=in_thought)
    assert joined(stream, events) == (answer.content, answer.reasoning or "", answer.calls)


@given(text=TEXTS, sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_tags_that_are_not_wanted_and_tags_that_are_only_spelled_are_text(text, sizes):
    plain = AnswerStream(thinks=False, in_thought=False, tools=False, spelled=TAGS)
    assert joined(plain, [(part, part in TAGS) for part in tools.split_tags(text, TAGS)]) == (text, "", ())
    tokens = AnswerStream(thinks=True, in_thought=False, tools=True)
    assert joined(tokens, [(piece, False) for piece in cut(text, sizes)]) == (text, "", ())


def test_everything_comes_as_soon_as_it_is_certain():
    stream = AnswerStream(thinks=True, in_thought=True, tools=True)

    def said(text, control=False):
        return [
            (delta.reasoning or delta.content or delta.call.name or delta.call.arguments)
            for delta in stream.push(text, control)
        ]

    assert said("\nI think") == ["I think"]
    assert said("\n") == []
    assert said("</think>", True) == []
    assert said("\n\nI say\n") == ["I say"]
    assert said("<tool_call>", True) == []
    assert said('\n{"name": "f", ') == []
    assert said('"arguments": {') == ["f", "{"]
    assert said('"x"') == ['"x"']
    assert said(": 1}}\n") == [": 1}"]
    assert said("</tool_call>", True) == []
    assert said("\nx") == ["\nx"]
    assert stream.finish() == []


@pytest.mark.parametrize(
    ("block", "arguments"),
    [
        ('{"name": "f", "arguments": {"x": 1', '{"x": 1'),
        ('{"name": "f", "arguments": {"x": NaN}}</tool_call>', '{"x": NaN}'),
        ('{"name": "f", "arguments": {"x": "}</tool_call>', '{"x": "}'),
        ('{"name": "f", "arguments": {}\n</tool_call>', "{}"),
        ('{"name": "f", "arguments": {"x": ' + "[" * 10**3 + "</tool_call>", '{"x": ' + "[" * 10**3),
    ],
)
def test_a_call_that_breaks_after_its_arguments_have_begun_stays_one(block, arguments):
    events = [(part, part in TAGS) for part in tools.split_tags(f"a\n<tool_call>{block}\nb", TAGS)]
    content, _, [call] = joined(AnswerStream(thinks=False, in_thought=False, tools=True), events)
    assert call.name == "f" and call.arguments.startswith(arguments)
    assert content == ("a\nb" if "</tool_call>" in block else "a")


def test_a_long_block_that_is_no_call_takes_no_longer_than_its_text():
    stream = AnswerStream(thinks=False, in_thought=False, tools=True)
    stream.push("<tool_call>", True)
    assert not any(stream.push('{"name": "') for _ in range(50_000))
    assert "".join(delta.content for delta in stream.finish()) == "<tool_call>" + '{"name": "' * 50_000
