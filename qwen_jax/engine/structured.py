"""Constrained decoding: grammars of JSON, of calls of tools and of patterns, as the tokens that may come next.

llguidance (an extra) computes the masks. Grammars come from whoever sends requests, and some small ones keep it busy
for long or overflow its stack: each is compiled first in a process of its own.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import UInt32

from qwen_jax.engine.structured_child import compiled
from qwen_jax.engine.structured_limits import check_compiles, check_pattern, check_schema, one_line, schema_json
from qwen_jax.errors import ConfigError, DataError
from qwen_jax.text import Tokenizer
from qwen_jax.text.tools import CALL_TAGS, THOUGHT_TAGS

if TYPE_CHECKING:
    from llguidance import LLMatcher

MAX_CACHED = 64  # compiled grammars

# Models fall into endless white space when they have nothing to say.
_JSON = {"whitespace_pattern": r"[ \t\n\r]{1,32}"}
# Calls are spaced as the chat formats write them.
_CALL = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}
_NAME = re.compile(r"[\w.-]{1,64}", re.ASCII)


class Grammars:
    """Compiles grammars for one tokenizer and keeps the newest; usable from any thread.

    A new one takes a fraction of a second, the largest a few. What the library or the limits refuse is a DataError.
    """

    def __init__(self, tokenizer: Tokenizer, stop_ids: Collection[int]) -> None:
        """`stop_ids` are the tokens that end an answer; a ConfigError where llguidance is not installed."""
        try:
            import llguidance
        except ImportError as error:
            raise ConfigError("structured output needs llguidance: pip install 'qwen-jax[structured]'") from error
        self._library = llguidance
        self._vocabulary = _Vocabulary(tokenizer, stop_ids)
        wrapper = llguidance.TokenizerWrapper(self._vocabulary)
        self._tokenizer = llguidance.LLTokenizer(wrapper, tokenizer.num_tokens, sorted(self._vocabulary.stop_ids))
        self._cached = functools.lru_cache(MAX_CACHED)(self._compile)

    def json_object(self) -> Grammar:
        """Any JSON object."""
        return self.json_schema({"type": "object"})

    def json_schema(self, schema: Mapping[str, Any]) -> Grammar:
        """JSON that fits a JSON schema; properties come in its order."""
        check_schema(schema, "the schema")
        return self._grammar(json_schema={**schema, "x-guidance": _JSON})

    def calls(self, tools: Sequence[Mapping[str, Any]], *, name: str | None = None, parallel: bool = True) -> Grammar:
        """Calls of tools and nothing else.

        Args:
          tools: functions as OpenAI writes them.
          name: the only one that may be called; None for any.
          parallel: whether there may be more than one call.
        """
        names, calls, rules = set(), [], []
        for index, tool in enumerate(tools):
            function = tool.get("function") if isinstance(tool, Mapping) else None
            if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
                raise DataError(f'tools[{index}] is not {{"type": "function", "function": {{"name": ...}}}}')
            if not _NAME.fullmatch(function["name"]) or function["name"] in names:
                raise DataError(
                    f"tools[{index}].function.name is {function['name'][:80]!r}; want letters, digits, _, . or -, "
                    "64 at most, and no name twice"
                )
            names.add(function["name"])
            if name in (None, function["name"]):
                calls.append(f"call_{index}")
                rules += self._call_rules(index, function)
        if not calls:
            raise DataError(
                "no tool to call was given" if name is None else f"tools hold no {name[:80]!r}, to be called"
            )
        opened, closed = map(self._vocabulary.written, CALL_TAGS)
        start = 'start: block ("\\n" block)*' if parallel else "start: block"
        rules += [start, f'block: {opened} "\\n" ({" | ".join(calls)}) "\\n" {closed}']
        return self._grammar(lark_grammar="\n".join(rules))

    def regex(self, pattern: str) -> Grammar:
        """Text that a regular expression matches, all of it."""
        check_pattern(pattern, "the pattern")
        return self._grammar(lark_grammar=f"start: /{self._library.regex_to_lark(pattern)}/")

    def _call_rules(self, index: int, function: Mapping[str, Any]) -> list[str]:
        """The rules of one tool; its parameters are a schema of their own, whose references begin at its root."""
        where = f"tools[{index}].function.parameters"
        parameters = function.get("parameters") or _NO_PARAMETERS
        check_schema(parameters, where)
        if parameters.get("type") != "object":
            raise DataError(f'{where} is no schema of an object; want "type": "object"')
        head = json.dumps(f'{{"name": "{function["name"]}", "arguments": ')
        schema = schema_json({**parameters, "x-guidance": _CALL})
        return [f'call_{index}: {head} arguments_{index} "}}"', f"arguments_{index}: %json {schema}"]

    def _grammar(self, **grammar: Any) -> Grammar:
        """Compiles what the library calls a grammar, unless that has been done of late."""
        return self._cached(schema_json({"grammars": [grammar]}))

    def _compile(self, grammar: str) -> Grammar:
        check_compiles(grammar)
        matcher, error = compiled(self._library, self._tokenizer, grammar)
        if error:
            raise DataError(f"the grammar cannot be used: {one_line(error)}")
        return Grammar(matcher, self._vocabulary)


class Grammar:
    """A compiled grammar, of which each request gets a constraint of its own."""

    def __init__(self, matcher: LLMatcher, vocabulary: _Vocabulary) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary

    def constraint(self, *, thinks: bool = False, in_thought: bool = False) -> GrammarConstraint:
        """A constraint at its beginning.

        Args:
          thinks: whether the answer may begin with a thought, which is free.
          in_thought: whether the prompt ended inside one.
        """
        if thinks and self._vocabulary.thought is None:
            raise DataError("the tokenizer has no tokens <think> and </think>: structured output needs thinking off")
        phase = "thought" if thinks and in_thought else "start" if thinks else "grammar"
        return GrammarConstraint(self._matcher.deep_copy(), self._vocabulary, phase)


class GrammarConstraint:
    """The tokens that may come next in one answer (`request.Constraint`).

    Attributes:
      error: what made the grammar give up, which it does by ending the answer; else None.
    """

    def __init__(
        self, matcher: LLMatcher, vocabulary: _Vocabulary, phase: Literal["start", "thought", "gap", "grammar"]
    ) -> None:
        """`phase`: "start" where a thought may begin, "gap" where newlines may stand between it and the rest."""
        self.error: str | None = None
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._phase = phase

    def mask(self) -> UInt32[np.ndarray, "words"]:
        """A bit for each token, the lowest bits of the first word first."""
        if self._phase == "thought":
            return self._vocabulary.no_stop
        allowed = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)
        if self._matcher.is_error():  # which allows the tokens that end the answer
            self.error = one_line(self._matcher.get_error())
        if self._phase == "start":
            return allowed | self._vocabulary.open_thought
        return allowed | self._vocabulary.newlines if self._phase == "gap" else allowed

    def accept(self, token: int) -> None:
        """Takes the token that was chosen."""
        vocabulary = self._vocabulary
        if token in vocabulary.stop_ids:
            return
        if self._phase == "start" and vocabulary.thought and token == vocabulary.thought[0]:
            self._phase = "thought"
        elif self._phase == "thought":
            if vocabulary.thought and token == vocabulary.thought[1]:
                self._phase = "gap"
        elif self._phase == "gap" and token in vocabulary.newline_ids:
            self._phase = "grammar"
        else:
            self._phase = "grammar"
            self._matcher.consume_token(token)


class _Vocabulary:
    """A tokenizer as llguidance wants it, and the sets of tokens that constraints need beside a grammar's."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, stop_ids: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self.tokens = tokenizer.pieces
        self.special_token_ids = sorted(tokenizer.control.values())
        self.stop_ids = frozenset(stop_ids)
        self.eos_token_id = min(stop_ids)
        tags = [tokenizer.control[tag] for tag in THOUGHT_TAGS if tag in tokenizer.control]
        self.thought = (tags[0], tags[1]) if len(tags) == 2 else None
        self.newline_ids = {token for token, piece in enumerate(tokenizer.pieces) if piece in (b"\n", b"\n\n")}
        self.newlines = self._words(self.newline_ids)
        self.open_thought = self._words(tags[:1])
        self.no_stop = self._words(set(range(tokenizer.num_tokens)) - self.stop_ids)

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)

    def written(self, tag: str) -> str:
        """A tag in a grammar: its token, or its characters where there is none."""
        return tag if tag in self._tokenizer.control else json.dumps(tag)

    def _words(self, tokens: Collection[int]) -> UInt32[np.ndarray, "words"]:
        bits = np.zeros(-(-len(self.tokens) // 32) * 32, np.uint8)
        bits[list(tokens)] = 1
        return np.packbits(bits, bitorder="little").view("<u4")
