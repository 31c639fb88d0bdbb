"""Stop strings: the same text comes out however it was cut into pieces, and nothing is shown too early."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qwen_jax.engine.stop import StopStrings
from qwen_jax.errors import ConfigError

# Few letters, so that stop strings occur, overlap and almost occur.
LETTERS = st.text("ab\n", max_size=12)
STOPS = st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3)


@settings(deadline=None)
@given(pieces=st.lists(LETTERS, max_size=8), stops=STOPS)
@example(pieces=["ab", "c"], stops=["abc", "b"])
@example(pieces=["a", "a", "b"], stops=["aab"])
@example(pieces=["ab"], stops=["abc", "b"])
def test_output_is_the_text_before_the_first_stop(pieces, stops):
    text = "".join(pieces)
    first = min((text.find(stop) for stop in stops if stop in text), default=len(text))

    reader, shown = StopStrings(stops), ""
    for piece in pieces:
        shown += reader.push(piece)
        assert text[:first].startswith(shown)
    shown += reader.finish()
    assert shown == text[:first]
    assert reader.found == (first < len(text))


@settings(deadline=None)
@given(pieces=st.lists(LETTERS, max_size=8), stops=STOPS)
def test_text_is_held_back_only_while_it_may_become_a_stop(pieces, stops):
    reader, pushed, shown = StopStrings(stops), "", ""
    for piece in pieces:
        pushed, shown = pushed + piece, shown + reader.push(piece)
        if reader.found:
            break
        held = pushed[len(shown) :]
        assert held == "" or any(stop.startswith(held) for stop in stops)


def test_nothing_comes_after_a_stop():
    reader = StopStrings(["stop"])
    assert reader.push("go st") + reader.push("op, more") == "go "
    assert reader.found
    assert reader.push("and more") + reader.finish() == ""


def test_empty_stop_string_is_refused():
    with pytest.raises(ConfigError, match="must not be empty"):
        StopStrings(["x", ""])
