"""Templates of our own beside the formats that they write, on random chats."""

from __future__ import annotations

import dataclasses
import hashlib
import random

import pytest

from qwen_jax.text import chat
from qwen_jax.text.chat_template import template_of
from tests.text.test_chat_golden import renders

pytest.importorskip("jinja2", minversion="3.1.6")
CHATS = 200


@pytest.mark.parametrize("name", chat.FORMATS)
def test_a_template_writes_what_its_format_writes(name):
    from qwen_jax.text import template_child

    form = dataclasses.replace(chat.FORMATS[name], open_end=False)
    template = template_child.Template(template_of(form))
    assert len(list(renders(random.Random(name), form, template, count=CHATS))) == CHATS


@pytest.mark.parametrize("name", chat.FORMATS)
def test_a_template_of_our_own_is_known_again(name):
    template = template_of(chat.FORMATS[name])
    found = chat.format_of_template(template)
    assert found and template_of(found) == template, (
        f"in text/chat.py: {hashlib.sha256(template.encode()).hexdigest()!r}: {name!r},"
    )
    assert max(map(len, template.split("\n"))) < 600
