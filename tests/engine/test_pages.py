"""Pages: taken, shared, kept and given back; none is lost and none is two things at once."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax.engine.pages import Pages


def come_and_gone(pages, tokens, kind=0):
    """The pages of a row of `tokens` that has come and gone."""
    held, node = pages.match(kind, tokens)
    first = len(held)
    held += pages.take(-(-len(tokens) // pages.size) - first)
    publish_all(pages, node, held[first : len(tokens) // pages.size], tokens[first * pages.size :])
    pages.release(held)
    return held


def publish_all(pages, node, held, tokens):
    for index, page in enumerate(held):
        node = pages.publish(node, page, tokens[index * pages.size : (index + 1) * pages.size])


def found(pages, tokens, kind=0):
    return pages.match(kind, tokens)[0]


def test_only_an_equal_beginning_of_whole_pages_of_the_same_kind_is_found():
    pages = Pages(10, 2)
    held = come_and_gone(pages, [1, 2, 3, 4, 5])
    assert found(pages, [1, 2, 3, 4, 5, 6]) == held[:2]
    assert found(pages, [1, 2, 3, 9]) == held[:1]
    assert found(pages, [3, 4]) == found(pages, [1]) == found(pages, [1, 2, 3, 4], kind=1) == []


def test_what_was_used_longest_ago_is_forgotten_first_and_its_end_before_its_beginning():
    pages = Pages(5, 1)
    first, second = come_and_gone(pages, [1, 2]), come_and_gone(pages, [3, 4])
    assert pages.free == 5
    pages.release(found(pages, [1, 2]))  # used again
    assert pages.take(3)[1:] == [second[1], second[0]]
    assert found(pages, [1, 2]) == first
    assert pages.free == 0


def test_a_page_of_known_content_is_not_published_twice():
    pages = Pages(6, 1)
    ours, theirs = pages.take(3), pages.take(3)
    publish_all(pages, 0, ours[:2], [1, 2, 3])
    publish_all(pages, 0, theirs, [1, 2, 3])
    assert found(pages, [1, 2, 3]) == [*ours[:2], theirs[2]]


def test_nothing_is_found_after_everything_was_forgotten():
    pages = Pages(4, 1)
    come_and_gone(pages, [1, 2])
    held = pages.take(1)
    publish_all(pages, 0, held, [5])
    pages.forget()
    assert found(pages, [1, 2]) == found(pages, [5]) == []
    pages.release(held)
    assert pages.free == 4 and len(set(pages.take(4))) == 4


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_no_page_is_lost_or_two_things_at_once(data):
    pages, rows, contents = Pages(8, 2), [], {}
    for _ in range(data.draw(st.integers(1, 40))):
        if rows and data.draw(st.booleans()):
            pages.release(rows.pop(data.draw(st.integers(0, len(rows) - 1))))
            continue
        tokens = data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=8))
        shared, node = pages.match(0, tokens)
        for index, page in enumerate(shared):
            assert contents[page] == tuple(tokens[: 2 * index + 2])  # nobody wrote over it
        wanted = -(-len(tokens) // 2) - len(shared)
        if wanted > pages.free:
            pages.release(shared)
            continue
        held = shared + pages.take(wanted)
        assert len(set(held)) == len(held) and not set(held[len(shared) :]) & {page for row in rows for page in row}
        for index, page in enumerate(held[len(shared) :], len(shared)):
            contents[page] = tuple(tokens[: 2 * index + 2])
        publish_all(pages, node, held[len(shared) : len(tokens) // 2], tokens[2 * len(shared) :])
        rows.append(held)
        assert pages.free == 8 - len({page for row in rows for page in row})
    for row in rows:
        pages.release(row)
    assert pages.free == 8 and sorted(pages.take(8)) == list(range(8))
