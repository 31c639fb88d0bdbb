"""Grammars: whatever a model would say, what comes out fits; and what none can be made of is refused in one line."""

from __future__ import annotations

import enum
import json
import sys

import numpy as np
import pytest

pytest.importorskip("llguidance")
pydantic = pytest.importorskip("pydantic")

from qwen_jax.engine import ChatCompletion, structured, structured_child, structured_limits
from qwen_jax.engine.structured import Grammars
from qwen_jax.errors import ConfigError, DataError
from qwen_jax.text import Tokenizer, tools, train_bpe

TAGS = (*tools.THOUGHT_TAGS, *tools.CALL_TAGS)


def make_tokenizer() -> Tokenizer:
    text = '{"name": "f", "arguments": {"x": 1}}' * 5 + "x\n\n" * 50
    spec = json.loads(train_bpe([text], vocab_size=275).to_bytes())
    for index, tag in enumerate(TAGS, 275):
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
        spec["added_tokens"].append({"id": index, "content": tag, **flags})
    return Tokenizer(json.dumps(spec).encode())


TOKENIZER = make_tokenizer()
IM_END = TOKENIZER.control["<|im_end|>"]
THINK, UNTHINK = (TOKENIZER.control[tag] for tag in tools.THOUGHT_TAGS)
# A model that says anything, and would rather be done with it.
WISHES = np.zeros(TOKENIZER.num_tokens)
WISHES[[token for token, piece in enumerate(TOKENIZER.pieces) if piece[:1] in b'"}]n']] = 2
WISHES[[token for token, piece in enumerate(TOKENIZER.pieces) if piece.isspace()]] = -2


@pytest.fixture(scope="module")
def grammars():
    """Without the child that tries a grammar first, which takes most of the time and has its own test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(structured, "check_compiles", lambda grammar: None)
        yield Grammars(TOKENIZER, {IM_END, TOKENIZER.end_of_text})


def allowed(constraint) -> np.ndarray:
    bits = np.unpackbits(constraint.mask().view(np.uint8), bitorder="little")
    assert len(bits) == -(-TOKENIZER.num_tokens // 32) * 32 and not bits[TOKENIZER.num_tokens :].any()
    return bits[: TOKENIZER.num_tokens].astype(bool)


def walk(constraint, seed: int, most: int = 2000) -> list[int]:
    """The tokens of an answer from random logits, without the one that ends it."""
    random, ids = np.random.default_rng(seed), []
    while len(ids) < most:
        logits = random.normal(0, 1, TOKENIZER.num_tokens) + WISHES
        token = int(np.argmax(np.where(allowed(constraint), logits, -np.inf)))
        constraint.accept(token)
        if token in (IM_END, TOKENIZER.end_of_text):
            assert constraint.error is None
            return ids
        ids.append(token)
    raise AssertionError(f"no end: {TOKENIZER.decode(ids)}")


def may_say(constraint, text: str, encode=TOKENIZER.encode_trusted) -> bool:
    """Whether `text`, tokenised as models are trained on it, may come and be the end."""
    for token in [*encode(text), IM_END]:
        if not allowed(constraint)[token]:
            return False
        constraint.accept(token)
    return True


class Colour(enum.Enum):
    RED, GREEN = "red", "grün"


class Leaf(pydantic.BaseModel):
    model_config = {"extra": "forbid"}
    colour: Colour
    size: int = pydantic.Field(ge=-3, le=120)
    note: str | None = None


class Tree(pydantic.BaseModel):
    model_config = {"extra": "forbid"}
    code: str = pydantic.Field(pattern="^[A-Z]{2}-[0-9]{1,3}$")
    leaves: list[Leaf] = pydantic.Field(min_length=1, max_length=2)
    below: Tree | None


@pytest.mark.parametrize("model", [Leaf, Tree])
def test_what_random_logits_say_fits_the_schema(grammars, model):
    grammar = grammars.json_schema(model.model_json_schema())
    for seed in range(8):
        model.model_validate_json(TOKENIZER.decode(walk(grammar.constraint(), seed)), strict=False)


def test_json_objects(grammars):
    grammar = grammars.json_object()
    for seed in range(8):
        assert isinstance(json.loads(TOKENIZER.decode(walk(grammar.constraint(), seed))), dict)
    value = {"a": [1, -2.5e3, None, {"é<think>": '\\"\n'}], "b": {}}
    for indent in (None, 2):
        text = json.dumps(value, indent=indent, ensure_ascii=False)
        assert may_say(grammar.constraint(), text, TOKENIZER.encode)
        assert not may_say(grammar.constraint(), text)  # with the token <think> in it
    assert not may_say(grammar.constraint(), "[]")


def test_patterns(grammars):
    grammar = grammars.regex(r"(ja|nein)/\d{2}\n?")
    assert may_say(grammar.constraint(), "nein/07")
    assert not may_say(grammar.constraint(), "nein")
    assert not may_say(grammar.constraint(), "ja/123")


SEARCH = {
    "name": "search-2",
    "parameters": {
        "type": "object",
        "properties": {"leaf": {"$ref": "#/$defs/leaf"}, "n": {"type": "integer"}},
        "required": ["leaf"],
        "additionalProperties": False,
        "$defs": {"leaf": {"type": "array", "items": {"$ref": "#/$defs/leaf"}, "maxItems": 2}},
    },
}
TOOLS = [{"type": "function", "function": SEARCH}, {"type": "function", "function": {"name": "now"}}]
NOW = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
FOUND = '<tool_call>\n{"name": "search-2", "arguments": {"leaf": [[], []], "n": 7}}\n</tool_call>'


def test_calls_that_random_logits_make_stream_as_calls(grammars):
    grammar = grammars.calls(TOOLS)
    made = set()
    for seed in range(8):
        ids = walk(grammar.constraint(), seed)
        answer = ChatCompletion(TOKENIZER, {IM_END}, (), thinks=False, in_thought=False, tools=True)
        deltas = [delta for token in ids for delta in answer.push(token)] + answer.end("length")
        assert not any(delta.content or delta.reasoning for delta in deltas)
        read = tools.parse_ids(TOKENIZER, ids, thinks=False)
        assert len(read.calls) == answer.calls >= 1 and not read.malformed and not read.content
        for call in read.calls:
            arguments = json.loads(call.arguments)
            assert arguments == {} if call.name == "now" else isinstance(arguments["leaf"], list)
            made.add(call.name)
        arguments = "".join(delta.call.arguments for delta in deltas if delta.call)
        assert arguments == "".join(call.arguments for call in read.calls)
    assert made == {"now", "search-2"}


def test_calls_are_those_that_were_asked_for(grammars):
    for text in (NOW, FOUND, f"{FOUND}\n{NOW}\n{NOW}"):
        assert may_say(grammars.calls(TOOLS).constraint(), text)
        assert may_say(grammars.calls(TOOLS, parallel=False).constraint(), text) == (text in (NOW, FOUND))
        assert may_say(grammars.calls(TOOLS, name="now").constraint(), text) == (text == NOW)
    assert not may_say(grammars.calls(TOOLS).constraint(), FOUND.replace("7", '"7"'))


def test_tags_are_their_characters_where_there_is_no_token_for_them():
    plain = train_bpe(["tool_call" * 9], vocab_size=265)
    constraint = Grammars(plain, {plain.end_of_text}).calls(TOOLS).constraint()
    for token in plain.encode(NOW):
        assert constraint.mask()[token // 32] >> (token % 32) & 1
        constraint.accept(token)


def test_a_thought_is_free_and_an_answer_follows_it(grammars):
    grammar = grammars.json_object()
    thought = "hm {<tool_call> not JSON\n</think>\n\n{}"
    assert may_say(grammar.constraint(thinks=True, in_thought=True), thought)
    assert may_say(grammar.constraint(thinks=True), f"<think>{thought}")
    assert may_say(grammar.constraint(thinks=True), "{}")
    assert not may_say(grammar.constraint(thinks=True), "hm {}")
    assert not may_say(grammar.constraint(), "<think></think>{}")
    constraint = grammar.constraint(thinks=True, in_thought=True)
    assert allowed(constraint).sum() == TOKENIZER.num_tokens - 2  # all but those that would end it
    constraint.accept(UNTHINK)
    assert not allowed(constraint)[[THINK, UNTHINK, IM_END]].any()


def test_constraints_of_one_grammar_go_their_own_ways(grammars):
    grammar = grammars.json_object()
    first, second = grammar.constraint(), grammar.constraint()
    assert may_say(first, "{}")
    assert not allowed(second)[IM_END] and may_say(second, "{}")


def nested(levels):
    schema = {}
    for _ in range(levels):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize(
    ("schema", "complaint"),
    [
        ([], "is a list; want a JSON schema"),
        ({"type": "elephant"}, "elephant"),
        ({"type": "string", "format": "elephant"}, "elephant"),
        ({"if": {}, "type": "object"}, "if"),
        ({"const": float("nan")}, "cannot be written as JSON"),
        ({"type": "string", "pattern": "(a"}, "unclosed"),
        ({"type": "string", "pattern": r"(a)\1"}, "backreferences"),
        ({"type": "string", "pattern": "^((a{99}){99})$"}, "repeats"),
        ({"type": "object", "patternProperties": {"a{9999}": {}}}, "repeats"),
        ({"type": "string", "pattern": "a" * 1001}, "1,001 characters"),
        ({"type": "string", "pattern": "\ud800"}, "surrogate"),
        ({"enum": ["\ud800"]}, "cannot be used"),
        ({"enum": list(range(10**5))}, "at most 100,000"),
        ({"$ref": "#"}, "cannot be used"),
        ({"$ref": "file:///etc/passwd"}, "does not fetch"),
        ({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}, "cannot be used"),
        ({"allOf": [{"type": "object"}, {"type": "string"}]}, "nsatisfiable"),
        (nested(200), "recursion limit"),
        (nested(10**5), "cannot be written as JSON"),
        ({"type": "object", "properties": {f"p{n}": {} for n in range(1200)}}, "cannot be used"),
    ],
)
def test_schemas_that_are_refused(grammars, schema, complaint):
    with pytest.raises(DataError, match=complaint) as error:
        grammars.json_schema(schema)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


CHAIN = {"$ref": "#/$defs/0", "$defs": {str(n): {"$ref": f"#/$defs/{n + 1}"} for n in range(2500)}}
SLOW = {"patternProperties": {f"^x{n}y.*$": {"type": "string"} for n in range(300)}}


def test_a_grammar_that_the_library_crashes_on_costs_a_child(monkeypatch):
    monkeypatch.setattr(structured, "check_compiles", structured_limits.check_compiles)
    grammars = Grammars(TOKENIZER, {IM_END})
    for schema in (CHAIN, {"type": "integer", "minimum": -1e300, "maximum": -1e300, "multipleOf": 1e-5}):
        with pytest.raises(DataError, match="too much"):
            grammars.json_schema(schema)
    with pytest.raises(DataError, match="elephant"):
        grammars.json_schema({"type": "elephant"})
    assert may_say(grammars.calls(TOOLS).constraint(), NOW)
    monkeypatch.setattr(structured_limits, "WALL_SECONDS", 0.1)
    with pytest.raises(DataError, match="given up"):
        grammars.json_schema(SLOW)


def test_tools_that_are_refused(grammars):
    now = TOOLS[1]
    for given, name, complaint in (
        ([], None, "no tool"),
        (TOOLS, "later", "no 'later'"),
        (["now"], None, r"tools\[0\]"),
        ([now, now], None, "no name twice"),
        ([{"function": {"name": 'a", "b'}}], None, "want letters"),
        ([{"function": {"name": "f", "parameters": {"type": "array"}}}], None, 'want "type": "object"'),
        ([{"function": {"name": "f", "parameters": "x"}}], None, "is a str"),
        ([{"function": {"name": "f", "parameters": {"type": "object", "minProperties": -1}}}], None, "cannot be used"),
    ):
        with pytest.raises(DataError, match=complaint):
            grammars.calls(given, name=name)


def test_thinking_needs_its_tokens():
    plain = train_bpe(["x" * 9], vocab_size=259)
    with pytest.raises(DataError, match="thinking off"):
        Grammars(plain, {plain.end_of_text}).json_object().constraint(thinks=True)


def test_few_compiled_grammars_are_kept(grammars):
    fresh = Grammars(TOKENIZER, {IM_END})
    kept = [fresh.json_schema({"const": n}) for n in range(structured.MAX_CACHED + 40)]
    assert fresh.json_schema({"const": structured.MAX_CACHED + 39}) is kept[-1]
    assert fresh.json_schema({"const": 0}) is not kept[0]


def test_a_grammar_that_fails_on_its_way_ends_the_answer(grammars, monkeypatch):
    monkeypatch.setitem(structured_child.LIMITS, "max_lexer_states", 300)
    constraint = grammars.regex("(.*a.{30}b)*").constraint()
    for token in TOKENIZER.encode("a b aa bb aaa bbb aaab" * 20):
        if constraint.error:
            break
        allowed(constraint)
        constraint.accept(token)
    assert "too many states" in constraint.error
    assert np.flatnonzero(allowed(constraint)).tolist() == sorted({IM_END, TOKENIZER.end_of_text})


def test_without_llguidance_there_is_one_clear_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ConfigError, match=r"pip install 'qwen-jax\[structured\]'"):
        Grammars(TOKENIZER, {IM_END})
