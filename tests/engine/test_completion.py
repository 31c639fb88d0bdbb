"""Completions from scripted tokens: text, counts and reasons, whatever stops them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax.engine import Completion, Request, Token, generate
from qwen_jax.errors import NumericalError
from qwen_jax.text import train_bpe

TOKENIZER = train_bpe(["low lower lowest, newer newest wider. " * 3], vocab_size=276)
END = TOKENIZER.end_of_text


class Scripted:
    """An engine whose requests are answered with what it was told, one token each per step."""

    stats = SimpleNamespace(num_waiting=0)

    def __init__(self, *rows):
        self.rows = rows
        self.steps = 0
        self.requests = {}

    def add(self, request):
        self.requests[len(self.requests)] = request
        return len(self.requests) - 1

    def cancel(self, number):
        self.requests.pop(number, None)

    def step(self):
        self.steps += 1
        made = []
        for number, request in list(self.requests.items()):
            token = self.rows[number][self.steps - 1]
            reason = "stop" if token in request.stop_ids else None
            if reason is None and self.steps == min(request.max_new_tokens, len(self.rows[number])):
                reason = "length"
            made.append(Token(number, token, reason))
            if reason:
                del self.requests[number]
        return made


def completed(engine, *, stop_ids=(END,), stops=(), max_new_tokens=100, show=lambda *a: None, done=lambda index: None):
    completions = [Completion(TOKENIZER, stop_ids, stops) for _ in engine.rows]
    request = Request(prompt=[1], max_new_tokens=max_new_tokens, stop_ids=frozenset(stop_ids))
    generate(engine, [(request, completion) for completion in completions], show=show, done=done)
    return completions


def padded(text, length):
    ids = TOKENIZER.encode(text)
    return ids + [END] * (length - len(ids))


@settings(deadline=None)
@given(
    ids=st.lists(st.integers(0, TOKENIZER.num_tokens - 1), min_size=1, max_size=30),
    stops=st.lists(st.sampled_from(["low", "er ", "we", "�", "est, n"]), max_size=2),
)
def test_text_is_the_decoded_tokens_up_to_the_first_end(ids, stops):
    pieces = []
    (made,) = completed(Scripted(ids), stops=stops, show=lambda index, piece: pieces.append(piece))
    before_end = ids[: ids.index(END)] if END in ids else ids
    text = TOKENIZER.decode(before_end)
    cut = min((text.find(stop) for stop in stops if stop in text), default=len(text))

    assert made.text == text[:cut] == "".join(pieces)
    assert made.finish_reason == ("stop" if cut < len(text) or END in ids else "length")
    assert made.num_tokens <= len(before_end) + (END in ids)
    if not stops:
        assert made.num_tokens == len(before_end) + (END in ids)


def test_finished_rows_say_no_more_and_the_last_one_ends_it():
    engine = Scripted(padded("low", 20), padded("newer lower", 20))
    pieces = {0: "", 1: ""}

    def show(index, piece):
        pieces[index] += piece

    ended = []
    short, long = completed(engine, show=show, done=ended.append)
    assert ended == [0, 1]
    assert (short.text, long.text) == ("low", "newer lower") == (pieces[0], pieces[1])
    assert (short.num_tokens, long.num_tokens) == tuple(len(TOKENIZER.encode(t)) + 1 for t in ("low", "newer lower"))
    assert engine.steps == long.num_tokens


def test_any_of_the_stop_tokens_ends_the_text_and_no_other_does():
    ids = [*TOKENIZER.encode("low"), END, *TOKENIZER.encode("er"), TOKENIZER.control["<|im_end|>"], 0]
    (made,) = completed(Scripted(ids), stop_ids={TOKENIZER.control["<|im_end|>"], TOKENIZER.control["<|im_start|>"]})
    assert (made.text, made.finish_reason, made.num_tokens) == ("lower", "stop", len(ids) - 1)


def test_limit_gives_back_the_text_that_was_held():
    ids = TOKENIZER.encode("newest lo")
    (made,) = completed(Scripted(ids + TOKENIZER.encode("w")), stops=["low"], max_new_tokens=len(ids))
    assert (made.text, made.finish_reason, made.num_tokens) == ("newest lo", "length", len(ids))


def test_half_a_character_at_the_limit_is_one_replacement():
    ids = TOKENIZER.encode("é")
    assert len(ids) == 2
    (made,) = completed(Scripted(ids), max_new_tokens=1)
    assert made.text == "�"


def test_interruption_keeps_what_was_made():
    completion = Completion(TOKENIZER, {END}, ["lower"])
    shown = "".join(completion.push(token) for token in TOKENIZER.encode("wider low"))
    assert shown == "wider "
    assert completion.end("interrupted") == "low"
    assert (completion.text, completion.finish_reason) == ("wider low", "interrupted")
    assert completion.end("length") == "" and completion.finish_reason == "interrupted"


def test_the_engine_is_left_at_once_when_interrupted():
    def interrupt(index, piece):
        raise KeyboardInterrupt

    engine = Scripted(padded("newer", 9))
    with pytest.raises(KeyboardInterrupt):
        completed(engine, show=interrupt)
    assert engine.steps == 1 and not engine.requests


def test_a_row_that_ends_at_a_string_is_cancelled():
    engine = Scripted(padded("newer lower", 20), padded("wider", 5))
    (first, second) = completed(engine, stops=["lo"])
    assert (first.text, second.text) == ("newer ", "wider") and engine.steps <= len(TOKENIZER.encode("newer lower"))


def test_logits_that_are_not_finite_are_an_error():
    engine = Scripted([-1])
    engine.step = lambda: [Token(0, -1, "error")]
    with pytest.raises(NumericalError, match="not finite"):
        completed(engine)
    assert not engine.requests
