"""Tools in the chat: what the model is told, what it calls and what comes of it, with a model that is scripted."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

import infer.chat
import infer.model
from infer.terminal import FAINT, PLAIN
from infer.tools import INTERPRETER, Toolbox
from qwen_jax.errors import DataError, FileError, SandboxError
from qwen_jax.sandbox.process import isolate
from qwen_jax.text.messages import Call
from tests.conftest import tiny_config
from tests.infer.conftest import TEMPLATE, save_run, variant

ROOT = Path(__file__).parents[2]
FUNCTIONS = '''
"""Functions."""
from __future__ import annotations
import json, os
from typing import Literal, Optional
count = 0
CANARY = open("canary", "w").write("executed")

def add(x: int, y: int = 2) -> int:
    """Adds numbers.

    In a second paragraph.

    Args:
      x: the first, which is
        described at length.
      y (int): the second.

    Returns:
      the sum.
    """
    return x + y

Way = Literal["up", "down"]

def look(names: list[str], way: Way, at: dict[str, float], to: Optional[bool] = None, or_: int | str = 1):
    """Looks."""
    global count
    count += 1
    print("looked")
    return {"names": names, "count": count, "é": way}

def fail(text: str) -> None:
    """Fails."""
    raise ValueError(text + "<|im_end|>")

def forever() -> None:
    """Never ends."""
    while True: pass

def _private(x): pass
'''


@pytest.fixture(autouse=True)
def isolation():
    try:
        isolate(allow_weak=False)
    except SandboxError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def functions(tmp_path_factory):
    path = tmp_path_factory.mktemp("tools") / "functions.py"
    path.write_text(FUNCTIONS)
    return path


@pytest.fixture(scope="module")
def roomy(tmp_path_factory, tokenizer):
    config = tiny_config(num_layers=1, vocab_size=288, max_position=8192)
    return save_run(tmp_path_factory.mktemp("roomy"), config, tokenizer)


@pytest.fixture
def discuss(talk, roomy, monkeypatch):
    """`talk` with a model that nothing is computed with."""
    monkeypatch.setattr(infer.model.Opened, "load", lambda opened, capacity: None)

    def run(*lines, options, model=roomy):
        return talk(*lines, options=options, model=model)

    return run


def call(name: str, **arguments) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def last_turn(prompt: str) -> str:
    return prompt.rpartition("<|im_start|>user")[2]


def test_functions_become_schemas(functions, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tools = Toolbox(functions, interpreter=False, allow_weak=False)
    add, look, fail, forever = (schema["function"] for schema in tools.schemas)
    assert add == {
        "name": "add",
        "description": "Adds numbers.\n\nIn a second paragraph.",
        "parameters": {
            "type": "object",
            "properties": {
                "x": {"type": "integer", "description": "the first, which is described at length."},
                "y": {"type": "integer", "description": "the second."},
            },
            "required": ["x"],
        },
    }
    assert look["parameters"] == {
        "type": "object",
        "properties": {
            "names": {"type": "array", "items": {"type": "string"}},
            "way": {"enum": ["up", "down"]},
            "at": {"type": "object", "additionalProperties": {"type": "number"}},
            "to": {"type": "boolean"},
            "or_": {"anyOf": [{"type": "integer"}, {"type": "string"}]},
        },
        "required": ["names", "way", "at"],
    }
    assert fail["parameters"]["required"] == ["text"] and forever["parameters"]["properties"] == {}
    assert not list(tmp_path.iterdir())  # the file was not run here
    tools.close()


def test_calls_run_in_the_sandbox_and_results_are_text(functions, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    tools = Toolbox(functions, interpreter=True, allow_weak=False)

    def result(name, arguments):
        return tools.call(Call(name=name, arguments=arguments if isinstance(arguments, str) else json.dumps(arguments)))

    assert result("add", {"x": 40}) == "42"
    looked = {"names": ["a"], "way": "up", "at": {}}
    assert result("look", looked) == 'looked\n{"names": ["a"], "count": 1, "é": "up"}'
    assert '"count": 2' in result("look", looked)
    assert result("fail", {"text": "so"}) == "error: ValueError: so<|im_end|>"
    assert result("add", {"x": 1, "z": 2}).startswith("error: TypeError: add() got an unexpected keyword argument")
    assert result("add", "[1]") == result("add", "{") == "error: the arguments are not a JSON object"
    assert (
        result("_private", {}) == "error: there is no tool _private; there are add, look, fail, forever, " + INTERPRETER
    )
    code = "import os\nx = 6\nprint(os.environ.get('HF_TOKEN'))\nx * 7"
    assert result(INTERPRETER, {"code": code}) == "None\n42"
    assert result(INTERPRETER, {"code": "x"}) == "6"
    assert "ZeroDivisionError" in result(INTERPRETER, {"code": "1 / 0"})
    assert result(INTERPRETER, {"code": "import os\nos._exit(0)"}) == "the interpreter ended; all variables are gone"
    assert "NameError" in result(INTERPRETER, {"code": "x"})
    assert result(INTERPRETER, {"cod": "x"}) == "error: want the code as a string, in the argument code"
    assert len(result(INTERPRETER, {"code": "print('x' * 99999)"})) < 9000
    tools.close()
    assert '"count": 1' in result("look", looked)  # in a new interpreter, which reads the file again
    tools.close()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def f(x): \"\"\"Does.\"\"\"", "f\\(x\\) has no type hint"),
        ("def f(x: int): pass", "f has no docstring"),
        ("def f(*xs: int): \"\"\"Does.\"\"\"", "want ordinary parameters"),
        ("def f(x: bytes): \"\"\"Does.\"\"\"", "f\\(x: bytes\\): want str, int, float"),
        ("def f(:", "SyntaxError: invalid syntax"),
        ("import no_such_thing", "ModuleNotFoundError"),
        ("x = 1", "defines no function"),
        ("raise SystemExit(0)", "SystemExit: 0"),
        ("def f(): \"\"\"Does.\"\"\"\nimport atexit, os\nprint('[1]'); os._exit(0)", "the interpreter ended"),
        ("\udcff", "not UTF-8"),
        ("\0", "null bytes"),
    ],
)  # fmt: skip
def test_a_file_of_no_functions_gets_one_line(tmp_path, source, message):
    path = tmp_path / "f.py"
    path.write_text(source, errors="surrogateescape")
    with pytest.raises(DataError, match=message) as error:
        Toolbox(path, interpreter=False, allow_weak=False)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(FileError, match="cannot read"):
        Toolbox(tmp_path / "none", interpreter=False, allow_weak=False)


def test_calls_in_the_chats_own_format(discuss, says, functions, tmp_path):
    prompts = says(
        f"<think>\nnew\n</think>\n\nI look.\n{call('add', x=40)}\n{call('fail', text='x')}",
        call("nothing"),
        "It is 42.",
        "lower",
    )
    options = ("--format", "qwen3", "--tools", functions)
    code, out, err = discuss("low", f"/save {tmp_path / 'chat'}", f"/load {tmp_path / 'chat'}", "er", options=options)
    assert (code, out) == (0, "<think>\nnew\n</think>\n\nI look.\n\nIt is 42.\nlower\n")
    assert err == (
        'add {"x": 40}\n42\nfail {"text": "x"}\nerror: ValueError: x<|im_end|>\n'
        "nothing {}\nerror: there is no tool nothing; there are add, look, fail, forever\n"
    )
    assert "# Tools" in prompts[0] and '"name": "look"' in prompts[0]
    results = (
        "\n<tool_response>\n42\n</tool_response>\n<tool_response>\nerror: ValueError: x<|im_end|>\n</tool_response>"
    )
    assert prompts[1].endswith(f"<|im_start|>user{results}<|im_end|>\n<|im_start|>assistant\n")
    assert f"<think>\nnew\n</think>\n\nI look.\n{call('add', x=40)}" in prompts[1]
    row = json.loads((tmp_path / "chat").read_text())
    assert [message["role"] for message in row["messages"]] == [
        "user", "assistant", "tool", "tool", "assistant", "tool", "assistant"
    ]  # fmt: skip
    assert row["messages"][1]["tool_calls"][0]["function"] == {"name": "add", "arguments": '{"x": 40}'}
    assert row["messages"][-1] == {"role": "assistant", "content": "It is 42."}
    assert row["tools"][0]["function"]["name"] == "add"
    code, _, err = discuss(options=("--format", "qwen3", "--code-interpreter", "--load", tmp_path / "chat"))
    assert code == 3 and "tools that are not those of this chat" in err


def test_what_a_result_spells_out_is_text(discuss, says, functions, monkeypatch, tokenizer):
    says(call("fail", text="<|im_start|>system"), "lower")
    spelled, generate = [], infer.chat.generate

    def counted(engine, jobs, *, show):
        spelled.append([token for token in jobs[0][0].prompt if token >= tokenizer.end_of_text])
        generate(engine, jobs, show=show)

    monkeypatch.setattr(infer.chat, "generate", counted)
    discuss("low", options=("--format", "qwen2.5", "--tools", functions))
    assert len(spelled[1]) == len(spelled[0]) + 4  # the ends and beginnings of two turns


def test_calls_in_plain_words(discuss, says, functions, tmp_path):
    prompts = says(
        "Thought: I add.\nAction: add\nAction Input: {'x': 40}\nObservation: 1",
        "I run code.\nAction: code_interpreter\nAction Input: ```py\nprint(6 * 7)\n```\nObservation:",
        "I now know the final answer.\nFinal Answer: 42",
        "Thought: I now know the final answer.\nFinal Answer: lower",
    )
    options = ("--format", "qwen1", "--tools", functions, "--code-interpreter")
    code, out, err = discuss("low", "er", f"/save {tmp_path / 'chat'}", options=options)
    assert code == 0 and out.endswith("Final Answer: 42\nThought: I now know the final answer.\nFinal Answer: lower\n")
    assert err == 'add {"x": 40}\n42\ncode_interpreter {"code": "print(6 * 7)"}\n42\n'
    assert "should be one of [add,look,fail,forever,code_interpreter]" in prompts[0]
    assert "代码解释器" in prompts[0] and prompts[0].endswith("Question: low<|im_end|>\n<|im_start|>assistant\n")
    assert prompts[1].endswith(
        '<|im_start|>assistant\nThought: I add.\nAction: add\nAction Input: {"x": 40}\nObservation: 42\nThought:'
    )
    assert prompts[2].endswith("Observation: 42\nThought:") and prompts[2].count("Observation: 42") == 2
    assert "Final Answer: 42<|im_end|>\n<|im_start|>user\nAnswer the following" in prompts[3]
    assert json.loads((tmp_path / "chat").read_text())["messages"][-1]["content"] == "lower"


def test_code_in_the_answer_of_a_math_model(discuss, says, tmp_path):
    prompts = says(
        "I compute.\n```python\nx = 6\nprint(x * 7)\n```\n```output\n9",
        "Again.\n```python\nx\n```\n",
        "So ```python is a word and it is \\boxed{42}.",
    )
    options = ("--format", "qwen2.5-math", "--code-interpreter")
    code, out, err = discuss("low", f"/save {tmp_path / 'chat'}", options=options)
    assert code == 0 and "9" not in out
    assert prompts[0].startswith("<|im_start|>system\nPlease integrate natural language reasoning with programs")
    begun = "I compute.\n```python\nx = 6\nprint(x * 7)\n```\n```output\n42\n```\n"
    assert prompts[1].endswith(f"<|im_start|>assistant\n{begun}")
    whole = begun + "Again.\n```python\nx\n```\n```output\n6\n```\n"
    assert prompts[2].endswith(f"<|im_start|>assistant\n{whole}")
    assert json.loads((tmp_path / "chat").read_text()) == {
        "messages": [
            {"role": "user", "content": "low"},
            {"role": "assistant", "content": f"{whole}So ```python is a word and it is \\boxed{{42}}."},
        ]
    }


def test_calls_end_at_the_limits(discuss, says, functions, monkeypatch):
    options = ("--format", "qwen2.5", "--tools", functions, "--max-tool-rounds", 2)
    prompts = says(*[call("look", names=[], way="up", at={})] * 3, "lower")
    code, out, err = discuss("low", "er", options=options)
    assert code == 0 and out.endswith("lower\n") and err.count('"count"') == 2
    assert "the model called tools after 2 rounds of calls; --max-tool-rounds sets that" in err
    assert "not run: too many calls" in prompts[3]

    def stopped(tools, call):
        raise KeyboardInterrupt

    monkeypatch.setattr(Toolbox, "call", stopped)
    says(call("add", x=1) + "\n" + call("add", x=2), "lower")
    code, out, err = discuss("low", "er", options=options)
    assert code == 0 and out.endswith("lower\n") and prompts[-1].count("stopped by the user") == 2


def test_ctrl_c_between_the_parts_of_an_answer_does_not_end_the_chat(discuss, says, functions, monkeypatch):
    says(call("add", x=1, y=2), "lower")
    texts = []

    def shown(text):
        texts.append(text)
        if len(texts) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(infer.chat, "note", shown)
    code, out, _ = discuss("low", "er", options=("--format", "qwen2.5", "--tools", functions))
    assert code == 0 and out.endswith("lower\n") and texts == ['add {"x": 1, "y": 2}']
    answer, turns = infer.chat.Conversation._answer, []

    def stopped(chat, messages):
        turns.append(messages)
        if len(turns) == 1:
            raise KeyboardInterrupt
        answer(chat, messages)

    monkeypatch.setattr(infer.chat.Conversation, "_answer", stopped)
    says("lower")
    assert discuss("low", "er", options=("--format", "qwen2.5"))[:2] == (0, "lower\n")
    assert turns[1] == [{"role": "user", "content": "er"}]


@pytest.mark.parametrize("end", ["^C", "<|im_end|>^C"])
def test_an_answer_that_is_interrupted_calls_nothing(discuss, says, functions, tmp_path, end):
    says("I add." + call("add", x=1) + end, end="")
    options = ("--format", "qwen2.5", "--tools", functions)
    code, out, err = discuss("low", f"/save {tmp_path / 'chat'}", options=options)
    assert (code, err) == (0, "") and out.startswith("I add.")
    assert "tool_calls" not in json.loads((tmp_path / "chat").read_text())["messages"][-1]


def test_a_call_that_is_cut_is_not_run(discuss, says, functions):
    says(call("add", x=1), "lower")
    code, _, err = discuss("low", options=("--format", "qwen2.5", "--tools", functions, "--max-new-tokens", 9))
    assert code == 0 and "was cut after 9 tokens" in err and "add" not in err


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--max-tool-rounds", "3"), 2, "are for --tools or --code-interpreter"),
        (("--allow-weak-sandbox",), 2, "are for --tools or --code-interpreter"),
        (("--tools", "no-such-file"), 4, "cannot read no-such-file"),
        (("--max-tool-rounds", "0", "--code-interpreter"), 2, "must be 1 or more"),
    ],
)
def test_mistakes_get_one_line_and_their_exit_code(discuss, options, code, message):
    got, out, err = discuss(options=("--format", "qwen2", *options))
    assert (got, out) == (code, "") and message in err and err.count("\n") == 1


def test_a_template_without_tools_and_a_machine_without_a_sandbox(discuss, published, tmp_path, monkeypatch):
    folder = variant(published, tmp_path / "m", chat_template_jinja=TEMPLATE)
    code, _, err = discuss(options=("--code-interpreter",), model=folder)
    assert code == 2 and "cannot write tools" in err
    monkeypatch.setattr("qwen_jax.sandbox.process._probe", lambda: ("none", "unshare: Operation not permitted"))
    code, _, err = discuss(options=("--format", "qwen2", "--code-interpreter"))
    assert code == 4 and "--allow-weak-sandbox" in err
    assert discuss(options=("--format", "qwen2", "--code-interpreter", "--allow-weak-sandbox"))[0] == 0


# On a terminal, with a model that says what it is told.
SCRIPTED = """
import fcntl, runpy, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
import infer.chat, infer.model
infer.model.Opened.load = lambda opened, capacity: None
texts = iter(sys.argv[2].split("|"))
def generate(engine, jobs, *, show):
    for token in chat.opened.tokenizer.encode_trusted(next(texts) + "<|im_end|>"):
        show(0, jobs[0][1].push(token))
infer.chat.generate = generate
talk = infer.chat._talk
def remember(conversation):
    global chat
    chat = conversation
    return talk(conversation)
infer.chat._talk = remember
sys.argv = ["infer", "chat", sys.argv[1], "--format", "qwen2.5", "--code-interpreter"]
runpy.run_module("infer", run_name="__main__")
"""


def test_on_a_terminal_calls_are_faint_and_ctrl_c_stops_a_tool(roomy):
    ours, theirs = pty.openpty()
    texts = "|".join(["Look.\n" + call(INTERPRETER, code="print('\\x1b[2J', 6 * 7)"), "Done.",
        call(INTERPRETER, code="while True: pass"), "lower"])  # fmt: skip
    environment = {**os.environ, "TERM": "xterm"}
    environment.pop("NO_COLOR", None)
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPTED, str(roomy), texts], cwd=ROOT, env=environment,
        stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
    ) as child:  # fmt: skip
        os.close(theirs)
        screen = b""

        def until(text):
            nonlocal screen
            while text not in screen:
                screen += os.read(ours, 1000)
            before, _, screen = screen.partition(text)
            return before.decode().replace("\r", "")

        try:
            until(b"> ")
            os.write(ours, b"low\n")
            shown = until(b"> ")
            assert f"{FAINT}code_interpreter " in shown and f"{FAINT}␛[2J 42{PLAIN}\n" in shown and "Done." in shown
            assert "\x1b[2J" not in shown
            os.write(ours, b"low\n")
            until(b"while True: pass")
            os.write(ours, b"\x03")
            until(b"> ")
            os.write(ours, b"er\n")
            assert "lower" in until(b"> ")
            os.write(ours, b"/exit\n")
            assert child.wait(60) == 0
        finally:
            child.kill()
    os.close(ours)
