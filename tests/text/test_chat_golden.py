"""Text, ids and masks of published chats, and native formats beside the published templates on random chats."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from qwen_jax.text import Tokenizer, chat

DATA = Path(__file__).parents[3] / "shared" / "data"
TEMPLATES = DATA / "chat-templates"
PUBLISHED = {
    "Qwen1.5-72B-Chat_early": "qwen1.5",
    "Qwen2-Instruct.RECONSTRUCTED": "qwen2",
    "Qwen2.5-Instruct": "qwen2.5",
    "trl/qwen2_5_training": "qwen2.5",
    "Qwen2.5-Math-Instruct.DERIVED": "qwen2.5-math",
    "Qwen3": "qwen3",
    "qwen3_nonthinking": "qwen3-nonthinking",
    "trl/qwen3_instruct_2507": "qwen3-instruct-2507",
    "trl/qwen3_instruct_2507_training": "qwen3-instruct-2507",
}
TOKENIZERS = {"qwen2": "qwen2", "qwen2.5": "qwen2.5", "qwen2.5-math": "qwen2.5", "qwen3": "qwen3"}
CHATS = 1000

pytestmark = pytest.mark.skipif(not TEMPLATES.is_dir(), reason="needs ../shared/data with the published chat templates")


@pytest.fixture(scope="module")
def tokenizers():
    return {name: Tokenizer.load(DATA / f"tokenizer-{name}") for name in set(TOKENIZERS.values())}


def cases():
    lines = (TEMPLATES / "expected/chat_golden_dev.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_golden_text_ids_and_masks(tokenizers):
    masks = 0
    for case in cases():
        options = {key: case[key] for key in ("tools", "add_generation_prompt", "enable_thinking") if key in case}
        pieces = chat.FORMATS[case["template"]].render(case["messages"], **options)
        tokenizer = tokenizers[TOKENIZERS[case["template"]]]
        encoded = chat.encode(tokenizer, pieces, trust_contents=True)
        assert encoded.ids == case["ids"], case
        if "text" in case:
            assert chat.text_of(pieces) == case["text"]
        if "assistant_mask" in case:
            masks += 1
            assert encoded.mask == [bool(flag) for flag in case["assistant_mask"]], case
        if case["case"] == "injection":
            written = chat.encode(tokenizer, pieces).ids
            assert len(written) > len(encoded.ids)
            assert tokenizer.decode(written, skip_special=False) == chat.text_of(pieces)
        else:
            assert chat.encode(tokenizer, pieces) == encoded
    assert masks >= 5


def test_upstream_cases():
    upstream = json.loads((TEMPLATES / "expected/huggingfacejs_qwen_e2e.json").read_text("utf-8"))
    known = []
    for name, case in upstream.items():
        if form := chat.format_of_template(case["chat_template"]):
            known.append(name)
            data = {key: value for key, value in case["data"].items() if not key.endswith("_token")}
            assert chat.text_of(form.render(**data)) == case["target"]
    assert known == ["Qwen/Qwen1.5-72B-Chat", "Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen3-0.6B"]


def test_published_templates_are_known():
    for name, form in PUBLISHED.items():
        text = (TEMPLATES / f"{name}.jinja").read_text("utf-8")
        assert chat.format_of_template(text) is chat.FORMATS[form]
        assert chat.format_of_template(text.replace("\n", "\r\n")) is chat.FORMATS[form]
        assert chat.format_of_template(text + " ") is None


# Of the two, one writes another family's tokens, the other an empty line between messages that Qwen1 never saw.
@pytest.mark.parametrize("name", ["DeepSeek-R1-Distill-Qwen", "qwen1_vllm_chatml"])
def test_other_templates_are_not(name):
    assert chat.format_of_template((TEMPLATES / f"{name}.jinja").read_text("utf-8")) is None


WORDS = [
    "",
    "",
    "hi",
    "\n",
    "\n\nok \n",
    "  ",
    "<think>",
    "</think>",
    "<think>\na\n</think>\n\nb",
    "<|im_end|>",
    "你好",
]
WORDS += [
    "<tool_call>",
    "{}",
    "é&<b>'\"",
    "🙂\u200d",
    "x</think>\n\n\ny</think>z",
    "<tool_response>\n1\n</tool_response>",
]
VALUES = [1, 2.5, None, True, "a<b>&'\"\\", "根", [], [1, {"k": "v"}], {"nested": {"x": [None, "é"]}}]


def random_chat(draw: random.Random, form: chat.Format) -> tuple[list, list | None]:
    """Messages and tools of one of the shapes that the format can write."""
    roles = ["system", "user", "user", "assistant", "assistant"] + ["tool"] * 3 * form.tools
    messages = []
    for _ in range(draw.randint(1, 9)):
        role = draw.choice(roles)
        message = {"role": role, "content": "".join(draw.choices(WORDS, k=draw.randint(0, 3)))}
        if role == "assistant" and form.tools and draw.random() < 0.4:
            calls = [
                {"name": draw.choice(WORDS) or "f", "arguments": arguments(draw)} for _ in range(draw.randint(1, 3))
            ]
            nested = [{"type": "function", "id": "1", "function": call} for call in calls]
            message["tool_calls"] = draw.choice([calls, nested])
        if role == "assistant" and form.thinks and draw.random() < 0.4:
            message["reasoning_content"] = "".join(draw.choices(WORDS, k=2))
        messages.append(message)
    has_tools = form.tools and draw.random() < 0.4
    return messages, [{"type": "function", "function": arguments(draw)} for _ in range(2)] if has_tools else None


def arguments(draw: random.Random) -> dict:
    return {draw.choice(WORDS): draw.choice(VALUES) for _ in range(draw.randint(0, 3))}


def renders(draw: random.Random, form: chat.Format, template, *, count: int):
    """Random chats of a format, which its template writes in the same words: pieces, text and trained spans."""
    for _ in range(count):
        messages, tools = random_chat(draw, form)
        options = {"add_generation_prompt": draw.random() < 0.5}
        if form.thinks and not form.quiet:
            options["enable_thinking"] = draw.choice([True, False])
        pieces = form.render(messages, tools=tools, **options)
        text, spans = template.render({"messages": messages, "tools": tools, **options})
        assert chat.text_of(pieces) == text, messages
        yield pieces, text, spans


@pytest.mark.parametrize("name", PUBLISHED)
def test_native_text_equals_the_published_template(name):
    pytest.importorskip("jinja2", minversion="3.1.6")
    from qwen_jax.text import template_child

    form = chat.FORMATS[PUBLISHED[name]]
    template = template_child.Template((TEMPLATES / f"{name}.jinja").read_text("utf-8"))
    for pieces, text, spans in renders(random.Random(name), form, template, count=CHATS):
        if "training" in name:
            trained = "".join(("x" if piece.trained else " ") * len(piece.text) for piece in pieces)
            assert trained == marked(len(text), spans)


def marked(length: int, spans: list) -> str:
    flags = [" "] * length
    for start, end in spans:
        flags[start:end] = "x" * (end - start)
    return "".join(flags)
