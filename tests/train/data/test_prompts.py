"""Prompts: what is read of a file, which side they are on, and in which order they are asked."""

from __future__ import annotations

import json

import numpy as np
import pytest

from qwen_jax.errors import DataError
from qwen_jax.text.chat import FORMATS
from tests.published import tiny_tokenizer
from train.data import prompts
from train.data.config import Prompts
from train.data.prompts import Order


@pytest.fixture
def read(tmp_path):
    """Rows to what is read of them, and the lines about it."""

    def of(rows, *, chat=True, system=None, columns=None, **changes):
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        source = Prompts(path=str(tmp_path / "a.jsonl"), chat=chat, system=system, columns=columns or {})
        said: list[str] = []
        how = dict(longest=200, held_out=0.0, max_bad_fraction=0.0, report=said.append) | changes
        form = FORMATS["qwen2.5"] if chat else None
        return *prompts.read(source, form=form, tokenizer=tiny_tokenizer(), **how), said

    return of


def test_a_prompt_is_what_a_user_says_or_messages_without_their_answer(read):
    asked = [{"role": "user", "content": "2 + 2?"}]
    rows = [
        {"prompt": "2 + 2?", "answer": "4"},
        {"prompt": asked, "answer": "4"},
        {"messages": [*asked, {"role": "assistant", "content": "5"}], "answer": "4"},
    ]
    found, _, _ = read(rows)
    assert len({tuple(prompt.ids) for prompt in found}) == 1
    assert tiny_tokenizer().decode(found[0].ids, skip_special=False).endswith("<|im_start|>assistant\n")
    assert [prompt.columns["answer"] for prompt in found] == ["4"] * 3 and found[2].asked == asked
    ((told, *_), _, _) = read(rows, system="Be brief.")
    assert "Be brief." in told.text and told.asked[0]["role"] == "system"


def test_a_text_that_goes_on_is_no_chat(read):
    found, _, _ = read([{"question": "def f("}, {"question": ""}], chat=False, columns={"prompt": "question"})
    assert [prompt.asked for prompt in found] == ["def f(", ""]
    assert found[0].ids == tiny_tokenizer().encode("def f(") and found[1].ids == [tiny_tokenizer().end_of_text]


def test_the_content_decides_the_side_and_what_is_too_long_is_counted(read):
    rows = [{"prompt": f"{n % 50}{'?' * (100 * (n == 7))}"} for n in range(100)]
    train, held_out, said = read(rows, held_out=0.3, longest=99)
    assert len(train) + len(held_out) == 99 and not {p.text for p in train} & {p.text for p in held_out}
    assert said[-1].endswith(f"{len(held_out)} held out, of 100 documents; 1 longer than 99 tokens left out")
    with pytest.raises(DataError, match="splits 0 prompts into 0 and 0; 100 longer than 3 tokens left out; give more"):
        read(rows, longest=3)


@pytest.mark.parametrize("row", [{"question": "?"}, {"prompt": []}, {"prompt": 7}, {"messages": [7]}])
def test_a_row_that_asks_nothing_is_unreadable(read, row):
    with pytest.raises(DataError, match="a.jsonl:1"):
        read([row])


def test_all_are_asked_once_before_any_is_asked_again():
    order = Order(7, seed=1, by_variance=False)
    taken = np.concatenate([order.take(count) for count in (3, 0, 6, 5)])
    rounds = taken[:7], taken[7:]
    assert [sorted(each.tolist()) for each in rounds] == [list(range(7))] * 2
    assert rounds[0].tolist() != rounds[1].tolist()


def test_those_whose_rewards_differed_most_come_first_and_it_goes_on_where_it_was():
    order = Order(5, seed=1, by_variance=True)
    order.learn(order.take(4), np.array([0.1, 0.4, 0.0, 0.3]))
    again = Order(5, seed=1, by_variance=True)
    again.restore({name: np.array(values) for name, values in order.arrays().items()})
    (unasked,) = order.take(1)
    first = Order(5, seed=1, by_variance=True).take(4)
    assert order.take(5).tolist() == [unasked, first[1], first[3], first[0], first[2]]
    again.take(1)
    assert again.take(5).tolist() == [unasked, first[1], first[3], first[0], first[2]]
