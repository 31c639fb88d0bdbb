"""What each stage keeps and drops."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_jax.errors import ConfigError, SandboxError
from qwen_jax.sandbox.grade import grade
from qwen_jax.sandbox.problem import problem
from qwen_jax.sandbox.process import isolate
from tests.train.data.synthesis.conftest import MODEL
from train.data.synthesis.evolve import refuses
from train.data.synthesis.prompts import FOLDER, Prompt
from train.data.synthesis.repurpose import parts
from train.data.synthesis.select import select
from train.data.synthesis.tag import clean, merge
from train.data.synthesis.write_verifiers import agreeing

SHARED = Path(__file__).parents[5] / "shared/data"


@pytest.fixture(scope="module")
def sandbox():
    try:
        isolate(allow_weak=False)
    except SandboxError as error:
        pytest.skip(str(error))


# ------------------------------------------------------------------------------------------------ tag and select


def test_tags_are_held_to_their_form_and_made_one(says, stage):
    pytest.importorskip("llguidance")

    def answer(question, request):
        topic = question.partition("<request>\n")[2].split()[0]
        tags = {"sums": ["Math Problem", "addition"], "maps": ["math problems", "Graph-Theory"], "poems": ["Poetry"]}
        return json.dumps([{"tag": tag, "explanation": f"about {topic}"} for tag in tags[topic]])

    says(answer)
    rows = [{"prompt": f"{topic} please", "id": topic} for topic in ("sums", "maps", "poems")]
    done = stage(rows, "Tag", *MODEL, min_frequency=1)
    assert done.code == 0, done.err
    assert [row["tags"] for row in done.rows] == [
        ["addition", "math problem"],
        ["graph theory", "math problem"],
        ["poetry"],
    ]
    assert done.rows[0]["tag_explanations"] == {"math problem": "about sums", "addition": "about sums"}
    assert done.report["most frequent"]["math problem"] == 2 and done.report["tags used"] == 4
    assert [row["tags"] for row in stage(rows, "Tag", *MODEL, min_frequency=2, overwrite=True).rows] == [
        ["math problem"], ["math problem"], []
    ]  # fmt: skip


def test_rare_tags_go_into_the_most_special_of_the_others():
    said = Counter({"python": 9, "programming": 9, "python programming": 5, "programming in pythons": 1, "chess": 1})
    said |= {"Python Programming".lower(): 5, "python programmings": 2, "advanced python programming": 1}
    names = merge(said, 3)
    assert names["advanced python programming"] == names["python programmings"] == "python programming"
    assert names["programming in pythons"] == "python programming" and "chess" not in names
    assert merge(said, 1)["chess"] == "chess"
    assert clean("  Text_Rewriting/Editing! ") == "text rewriting editing"


TAGS = st.lists(st.frozensets(st.sampled_from("abcdefgh"), max_size=4), max_size=12)


@given(tags=TAGS, count=st.integers(1, 12))
def test_selection_takes_the_complex_and_diverse_first(tags, count):
    chosen = select(tags, count)
    assert len(chosen) == len(set(chosen)) == min(count, sum(map(bool, tags)))
    assert chosen == select(tags, 12)[:count]  # a smaller one is the beginning of a larger
    if chosen:
        assert len(tags[chosen[0]]) == max(map(len, tags))
        # The first round covers all tags there are, and each of its rows adds one.
        seen: set[str] = set()
        for index in chosen:
            if tags[index] <= seen:
                assert seen == set().union(*tags)
                break
            seen |= tags[index]


def test_a_selection_has_more_tags_than_as_many_rows_from_the_front(stage):
    rows = [{"id": n, "tags": [f"t{n % 3}"] + [f"u{n}"] * (n > 6)} for n in range(9)]
    done = stage(rows, "Select", count=3)
    assert [row["id"] for row in done.rows] == [7, 8, 0]
    assert done.report["tags of the selection"] == 5 and done.report["rows out"] == 3
    assert "holds no list of tags" in stage([{"tags": "a"}], "Select", count=1).err


# ------------------------------------------------------------------------------------------------ evolve


@pytest.mark.parametrize(
    "answer, dropped",
    [
        ("Name three rivers of Asia", {}),
        ("name  a RIVER!", {"unchanged": 1}),
        ("", {"empty": 1}),
        ("a" * 300, {"too long": 1}),
        ("Name one. Write nothing but the new request", {"copies the prompt": 1}),
        ("Name a lake that cannot be named", {"no answer": 1}),
    ],
)
def test_instructions_that_are_no_better_are_eliminated(says, stage, answer, dropped):
    def model(question, request):
        if "<request>" in question:
            return answer
        return "I'm sorry, I cannot." if "cannot" in question else "Ganges, Indus, Lena"

    says(model)
    done = stage([{"prompt": "Name a river.", "id": 1}], "Evolve", *MODEL, max_characters=200)
    assert done.code == 0 and done.report["dropped"] == dropped, done.err
    assert [row["prompt"] for row in done.rows] == ([] if dropped else [answer])
    if not dropped:
        assert done.rows[0]["evolution"]["from"] == "Name a river." and done.rows[0]["id"] == 1


def test_rounds_go_on_from_each_other_by_ways_drawn_for_the_row(says, stage, tmp_path):
    (tmp_path / "mine.txt").write_text("Louder!\n<request>\n{{instruction}}\n</request>")
    says(lambda question, request: question.partition("<request>\n")[2].partition("\n</request>")[0] + " more")
    rows = [{"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": f"say {n}"}]} for n in range(8)]
    ways = ("deepen", str(tmp_path / "mine.txt"))
    done = stage(rows, "Evolve", *MODEL, rounds=2, answered=False, ways=ways)
    assert len(done.rows) == 16 and done.rows[1]["prompt"][1]["content"] == "say 0 more more"
    assert done.rows[1]["prompt"][0]["role"] == "system" and done.rows[1]["evolution"]["round"] == 2
    assert {row["evolution"]["way"] for row in done.rows} == {"deepen", "mine"}


def test_refusals():
    assert refuses("Sorry, no.") and refuses("...") and refuses("很抱歉，我不知道。") and refuses("")
    assert not refuses("Paris") and not refuses("sorry " + "word " * 80)


def test_prompts_say_which_places_they_have(tmp_path):
    for path in FOLDER.glob("*.txt"):
        assert "{{" in path.read_text() and max(map(len, path.read_text().splitlines())) < 400
    (tmp_path / "p.txt").write_text("Do {{it}}")
    with pytest.raises(ConfigError, match=r"p.txt has the places \{\{it\}\}; want \{\{instruction\}\}"):
        Prompt(str(tmp_path / "p.txt"), ["instruction"])
    (tmp_path / "p.txt").write_text("Do {{instruction}}")
    assert Prompt(str(tmp_path / "p.txt"), ["instruction"]).fill(instruction="{{x}} \\1") == "Do {{x}} \\1"


# ------------------------------------------------------------------------------------------------ respond


def test_thoughts_are_apart_and_no_reference_keeps_all(says, stage):
    says(lambda question, request: "<think>\nhm 8\n</think>\n\n7", form="qwen3")
    # This tokenizer spells its tags out.
    done = stage([{"prompt": "3+4?", "answer": 7}], "Respond", *MODEL, reference="answer", samples=2, keep=1)
    message = done.rows[0]["messages"][-1]
    assert message == {"role": "assistant", "reasoning_content": "hm 8", "content": "7"}
    assert done.report["dropped"] == {"duplicate": 1}
    says(lambda question, request: f"{request.seed}")
    done = stage([{"prompt": "any"}], "Respond", *MODEL, samples=5, keep=2, system="Be brief.", overwrite=True)
    assert len(done.rows) == 2 and done.report["dropped"] == {"more than keep": 3} and "right" not in done.rows[0]
    assert [message["role"] for message in done.rows[0]["messages"]] == ["system", "user", "assistant"]


# ------------------------------------------------------------------------------------------------ verify

HELPED = "def double(x):\n    return 2 * x\n\n\ndef quadruple(x):\n    '''Four times.'''\n"
TEST = "def check(candidate):\n    assert candidate(3) == 12\n"


def test_programs_are_run_on_their_tests(sandbox, stage):
    row = {"prompt": HELPED, "test": TEST, "entry_point": "quadruple", "task_id": "t"}
    answers = [
        "    return double(double(x))",
        "Here:\n```python\ndef quadruple(x):\n    return double(double(x))\n```\nIt doubles twice.",
        "```python\ndef quadruple(x):\n    return 3 * x\n```",
        "```python\ndef quadruple(x):\n    while True: pass\n```",
        "I do not know.",
    ]
    rows = [{**row, "messages": [{"role": "assistant", "content": answer}]} for answer in answers]
    done = stage(rows, "VerifyCode", "stage.sandbox.seconds = 2.0")
    assert done.code == 0, done.err
    assert [row["messages"][0]["content"] for row in done.rows] == answers[:2]
    assert done.report["dropped"] == {"tests failed": 2, "timeout": 1}


def test_a_prompt_in_words_is_no_part_of_the_program():
    program, checker = problem("def f(x): return x", prompt="Write f.", test="import program", entry_point="")
    assert program == "def f(x): return x" and checker == "import program"
    assert "Write" not in problem("def f(x): return x", prompt="Write f.", test=TEST, entry_point="f")[1]


@pytest.mark.skipif(not (SHARED / "humaneval").exists(), reason="needs ../shared/data")
def test_solutions_of_humaneval_pass_as_a_body_and_as_a_block(sandbox):
    with gzip.open(SHARED / "humaneval/HumanEval.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in file]
    for row in (rows[0], rows[32], rows[38]):  # the latter two with helpers in their prompts
        whole = f"```python\n{row['prompt'].rpartition('def ' + row['entry_point'])[2]}{row['canonical_solution']}```"
        whole = whole.replace("```python\n", f"```python\ndef {row['entry_point']}", 1)
        imports = "from typing import *\n" if row is rows[0] else ""
        for answer in (row["canonical_solution"], whole.replace("```python\n", f"```python\n{imports}")):
            fields = {name: row[name] for name in ("prompt", "test", "entry_point")}
            assert grade(*problem(answer, **fields)).passed, answer


NO_COMMA = "def evaluate(response):\n    print('busy')\n    return ',' not in response"
ALWAYS = "def evaluate(response):\n    return True"
CASES = [{"response": "no such sign", "follows": True}, {"response": "one, two", "follows": False}]


def test_verifiers_check_each_other_and_then_answers(sandbox, says, stage):
    pytest.importorskip("llguidance")
    written = iter([NO_COMMA, ALWAYS, "def evaluate(response): return len(", "import os\nvalue = 1"])
    says(lambda question, request: json.dumps({"program": next(written), "cases": CASES}))
    done = stage([{"prompt": "Use no commas."}], "WriteVerifiers", *MODEL, samples=4)
    assert done.code == 0, done.err
    assert done.rows[0]["verifiers"] == [NO_COMMA]
    assert done.report["dropped"] == {
        "verifier: does not agree": 1, "verifier: does not run": 1, "verifier: no function evaluate": 1
    }  # fmt: skip
    chats = [[{"role": "user", "content": "?"}, {"role": "assistant", "content": text}] for text in ("a b", "a, b")]
    rows = [
        {"messages": chat, "verifiers": verifiers}
        for chat in chats
        for verifiers in (done.rows[0]["verifiers"], ALWAYS)
    ]
    rows.append({"messages": chats[0], "verifiers": ["def evaluate(response): return 1"]})
    checked = stage(rows, "VerifyInstructions", overwrite=True)
    assert [row["messages"][1]["content"] for row in checked.rows] == ["a b", "a b", "a, b"]
    assert checked.report["dropped"] == {"not followed": 1, "verifiers do not run": 1}


def test_a_verifier_must_tell_both_kinds_of_cases_apart():
    follows = [True, True, False, False]
    said = {
        "right": [True, True, False, False],
        "yes": [True] * 4,
        "one": [True, True, False, True],
        "none": [None] * 4,
    }
    assert agreeing(said, follows, 0.8) == ["right"] and agreeing(said, follows, 0.75) == ["right", "one"]
    assert agreeing({"yes": [True] * 4}, follows, 0.5) == []
    assert agreeing({}, [], 0.5) == []


# ------------------------------------------------------------------------------------------------ repurpose


@given(text=st.text("ab .\n。", max_size=200), most=st.integers(1, 60))
def test_parts_are_the_text(text, most):
    found = parts(text, most)
    assert "".join(found) == text and max(map(len, found)) <= most


def test_texts_become_answers(says, stage):
    pytest.importorskip("llguidance")
    lake = "The lake was still that morning, and nobody on the shore had yet said a word to anyone about the boats. "
    text = "\n\n".join([lake * 3, lake.replace("lake", "hill") * 3, "short", lake.replace("lake", "sea") * 3])

    def answer(question, request):
        if "<request>" in question:
            return json.dumps({"score": 5 if "lake" in question else 2})
        return lake if "sea" in question else "Write a quiet opening of a novel."

    says(answer)
    done = stage(
        [{"text": text, "source": "s"}], "Repurpose", *MODEL, min_characters=50, max_characters=330, min_score=4
    )
    assert done.code == 0, done.err
    assert done.rows == [
        {"source": "s", "messages": [{"role": "user", "content": "Write a quiet opening of a novel."},
                                     {"role": "assistant", "content": (lake * 3).strip()}], "part": 0}
    ]  # fmt: skip
    assert done.report["dropped"]["score too low"] == 1 and done.report["dropped"]["copies the text"] == 1
