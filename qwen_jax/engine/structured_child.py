"""The child process of `structured`: compiles an untrusted grammar first, with limits on time, memory and stack.

Run as a script: a grammar as llguidance takes it in, what is wrong with it out, "" for nothing.
"""

from __future__ import annotations

import resource
import sys
from typing import Any

MEMORY_BYTES = 1 << 30
STACK_BYTES = 2 << 20  # a quarter of what threads have
CPU_SECONDS = 2
TAGS = ("<tool_call>", "</tool_call>")  # which grammars name
# Beyond these a grammar is given up while it is used: what one request can cost.
LIMITS = {"max_lexer_states": 50_000, "max_grammar_size": 200_000, "verbose_errors": False}


class Bytes:
    """A vocabulary of bytes: a grammar is compiled without regard to its tokens."""

    tokens = [*(bytes([byte]) for byte in range(256)), b"<end>", *(tag.encode() for tag in TAGS)]
    special_token_ids = list(range(256, len(tokens)))
    eos_token_id, bos_token_id = 256, None

    def __call__(self, text: str) -> list[int]:
        return list(text.encode())


def compiled(llguidance: Any, tokenizer: Any, grammar: str) -> tuple[Any, str]:
    """The matcher of a grammar, and what is wrong with it.

    A grammar that nothing fits, or that has too many ways to go on, shows it with its first tokens only.
    """
    limits = llguidance.LLParserLimits(**LIMITS)
    matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
    if matcher.is_error():
        return matcher, matcher.get_error()
    trial = matcher.deep_copy()
    trial.compute_bitmask()
    trial.try_consume_tokens(trial.compute_ff_tokens() or tokenizer.tokenize_str("{"))
    trial.compute_bitmask()
    return matcher, trial.get_error().replace("NoExtensionBias", "no text fits it")


def main() -> None:
    for limit, value in (
        (resource.RLIMIT_AS, MEMORY_BYTES),
        (resource.RLIMIT_STACK, STACK_BYTES),
        (resource.RLIMIT_CPU, CPU_SECONDS),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (value, value))
    import llguidance  # within the limits

    tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(Bytes()))
    print(compiled(llguidance, tokenizer, sys.stdin.read())[1], end="")


if __name__ == "__main__":
    main()
