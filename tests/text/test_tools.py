"""Calls of tools, read from answers and written into chats."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_jax.errors import DataError
from qwen_jax.text import chat, tools
from qwen_jax.text.messages import Call

USER = {"role": "user", "content": "How hot is it?"}
TOOL = {"type": "function", "function": {"name": "f", "description": "does é", "parameters": {"type": "object"}}}
CALL_TEXT = '<tool_call>\n{"name": "f", "arguments": {"x": "é"}}\n</tool_call>'
CALL = Call(name="f", arguments='{"x": "é"}')


def test_answers_without_calls():
    answer = tools.parse("hello\n", thinks=True)
    assert (answer.content, answer.reasoning, answer.calls, answer.malformed) == ("hello\n", None, (), ())


@pytest.mark.parametrize(
    ("text", "content", "reasoning", "calls"),
    [
        (CALL_TEXT, "", None, 1),
        (f"yes\n{CALL_TEXT}\n{CALL_TEXT}", "yes", None, 2),
        (f"<think>\nhm\n</think>\n\nyes\n{CALL_TEXT}", "yes", "hm", 1),
        (f"hm\n</think>\n\n{CALL_TEXT}", "", "hm", 1),
        (f"<think>\n{CALL_TEXT}\n</think>\n\nno", "no", CALL_TEXT, 0),
        ("<think>\nnever ends", "", "never ends", 0),
        ("<think>\n\n</think>\n\nyes", "yes", "", 0),
        ("a <think> b", "a <think> b", None, 0),
        (CALL_TEXT.removesuffix("\n</tool_call>"), "", None, 1),
    ],
)
def test_answers(text, content, reasoning, calls):
    answer = tools.parse(text, thinks=True)
    assert (answer.content, answer.reasoning) == (content, reasoning)
    assert answer.calls == (CALL,) * calls
    assert not answer.malformed


def test_thoughts_are_text_where_the_format_has_none():
    text = "<think>a</think>b"
    assert tools.parse(text, thinks=False).content == text


@pytest.mark.parametrize(
    "body",
    [
        "",
        "{",
        "[]",
        '{"name": "f"}',
        '{"name": 1, "arguments": {}}',
        '{"name": "f", "arguments": [1]}',
        '{"name": "f", "arguments": {"x": NaN}}',
        "[" * 100_000,
    ],
)
def test_malformed_calls_stay_content(body):
    block = f"<tool_call>{body}</tool_call>"
    answer = tools.parse(f"a\n{block}\n{CALL_TEXT}", thinks=True)
    assert answer.content == f"a\n{block}"
    assert len(answer.malformed) == 1
    assert answer.calls == (CALL,)


@given(
    st.text(alphabet="<>/think_toolcar{}\n ")
    | st.lists(st.sampled_from(["<think>", "</think>", CALL_TEXT[:11], "</tool_call>", "x"])).map("".join)
)
def test_nothing_is_lost_without_calls_and_thoughts(text):
    answer = tools.parse(text, thinks=False)
    assert answer.content == text
    assert not answer.calls


@pytest.mark.parametrize("name", ["qwen2.5", "qwen3"])
def test_answers_render_to_what_was_parsed(name):
    form = chat.FORMATS[name]
    text = f"yes\n{CALL_TEXT}\n{CALL_TEXT}"
    if form.thinks:
        text = "<think>\nhm\n</think>\n\n" + text
    message = tools.parse(text, thinks=form.thinks).message()
    assert chat.text_of(form.render([USER, message])).endswith(f"<|im_start|>assistant\n{text}<|im_end|>\n")


def test_only_control_tokens_are_tags(tokenizer):
    ids = tokenizer.encode_trusted(f"<think>é</think>{CALL_TEXT}") + tokenizer.encode(CALL_TEXT)
    ids += [tokenizer.control["<|im_end|>"]]
    answer = tools.parse_ids(tokenizer, ids, thinks=True)
    assert (answer.content, answer.reasoning, answer.calls) == (CALL_TEXT, "é", (CALL,))
    assert tools.parse_ids(tokenizer, tokenizer.encode(CALL_TEXT), thinks=True).calls == ()


def test_react_prompt():
    record = {
        "name_for_human": "Search",
        "name_for_model": "search",
        "description_for_model": "finds {things}",
        "parameters": [{"name": "词"}],
    }
    code = {"name": "run", "parameters": [], "args_format": "code"}
    prompt = tools.react_prompt("Who?", [record, code, TOOL])
    head, rest = prompt.split("\n\nUse the following format:\n\n")
    assert head == (
        "Answer the following questions as best you can. You have access to the following tools:\n\n"
        "search: Call this tool to interact with the Search API. What is the Search API useful for? finds {things} "
        'Parameters: [{"name": "词"}] Format the arguments as a JSON object.\n\n'
        "run: Call this tool to interact with the run API. What is the run API useful for?  Parameters: [] "
        "Enclose the code within triple backticks (`) at the beginning and end of the code.\n\n"
        "f: Call this tool to interact with the f API. What is the f API useful for? does é "
        'Parameters: {"type": "object"} Format the arguments as a JSON object.'
    )
    assert rest == (
        "Question: the input question you must answer\nThought: you should always think about what to do\n"
        "Action: the action to take, should be one of [search,run,f]\nAction Input: the input to the action\n"
        "Observation: the result of the action\n"
        "... (this Thought/Action/Action Input/Observation can be repeated zero or more times)\n"
        "Thought: I now know the final answer\nFinal Answer: the final answer to the original input question\n\n"
        "Begin!\n\nQuestion: Who?"
    )


def test_react_messages():
    call = {"role": "assistant", "content": "I ask f.", "tool_calls": [{"name": "f", "arguments": {"x": 1}}]}
    result = {"role": "tool", "content": "\n30 "}
    used = 'Thought: I ask f.\nAction: f\nAction Input: {"x": 1}\nObservation: 30'
    prompt = {"role": "user", "content": tools.react_prompt(USER["content"], [TOOL])}
    plain = tools.react_messages([USER, call, result], [TOOL])
    assert plain == [prompt, {"role": "assistant", "content": f"{used}\nThought:"}]
    rendered = chat.text_of(chat.FORMATS["qwen1"].render(plain, continue_final_message=True))
    assert rendered.endswith("Observation: 30\nThought:")

    final = {"role": "assistant", "content": "Hot."}
    answered = f"{used}\nThought: I now know the final answer.\nFinal Answer: Hot."
    system = {"role": "system", "content": "s"}
    assert tools.react_messages([system, USER, call, result, final, USER], [TOOL]) == [
        system,
        USER,
        {"role": "assistant", "content": answered},
        prompt,
    ]


def test_react_refuses():
    call = {"name": "f", "arguments": {}}
    for messages, complaint in (
        ([USER, {"role": "tool", "content": "1"}], "result of a tool"),
        ([USER, {"role": "assistant", "content": "", "tool_calls": [call, call]}], "2 calls"),
        ([{"role": "assistant", "content": "a"}], "no user message"),
        ([USER, {"role": "assistant", "content": "a", "train": False}], "no place for"),
        ([USER, {"role": "assistant", "content": "a", "reasoning_content": "b"}], "no place for"),
    ):
        with pytest.raises(DataError, match=complaint):
            tools.react_messages(messages, [TOOL])
    for tool in (
        "f",
        {"function": "f"},
        {"name": "f"},
        {"parameters": []},
        {"name": "f", "parameters": [], "args_format": "xml"},
    ):
        with pytest.raises(DataError, match=r"tools\[0\]"):
            tools.react_prompt("q", [tool])


@pytest.mark.parametrize(
    ("written", "arguments"),
    [
        ('{"q": "黑"}', {"q": "黑"}),
        ("{'q': '黑', 'n': None,}", {"q": "黑", "n": None}),
        ('{"q": "黑"}\nObservation:', {"q": "黑"}),
        ('{"q": "黑"}\nObservation: 3\nThought: no', {"q": "黑"}),
        ("```py\nprint(1)\n```", {"code": "print(1)"}),
    ],
)
def test_react_calls(written, arguments):
    earlier = "Thought: I use\nAction: old\nAction Input: {}\nObservation: 1\n"
    answer = tools.parse_react(f"{earlier}Thought: I draw\nAction: f\nAction Input: {written}")
    [call] = answer.calls
    assert (call.name, json.loads(call.arguments)) == ("f", arguments)
    assert answer.content.endswith("I draw") and not answer.malformed


@pytest.mark.parametrize("written", ["black", "{'q': set()}", "__import__('os')", "{" * 10_000, '{"q": NaN}', "[1]"])
def test_react_calls_that_are_none(written):
    answer = tools.parse_react(f"Thought: x\nAction: f\nAction Input: {written}")
    assert answer.calls == () and len(answer.malformed) == 1
    assert written in answer.content


def test_react_final_answers():
    text = " I know.\nThought: I now know the final answer.\nFinal Answer: It is\nhot."
    assert tools.parse_react(text).content == "It is\nhot."
    assert tools.parse_react("Just hot.").content == "Just hot."
    assert tools.parse_react("Action Input: x\nAction: y").calls == ()
