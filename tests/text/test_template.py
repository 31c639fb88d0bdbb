"""Unknown templates: rendered as Hugging Face renders them, and kept from doing anything else."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax.errors import ConfigError, DataError, ModelError
from qwen_jax.text import chat, template
from qwen_jax.text.template import JinjaFormat

jinja2 = pytest.importorskip("jinja2", minversion="3.1.6", reason="needs jinja2, which renders unknown templates")
from qwen_jax.text import template_child

DATA = Path(__file__).parents[3] / "shared" / "data" / "chat-templates"
CHATML = (
    "{%- for message in messages %}\n    {{- '<|im_start|>' + message.role }}{% generation %}\n"
    "{{ message.content }}<|im_end|>{% endgeneration %}\n{% endfor %}"
)
USER = {"role": "user", "content": "hi"}
# Starting a process and 1 s of computing, on a machine that does other things too.
SECONDS = 15


def form(source: str, tokenizer=None) -> JinjaFormat:
    return JinjaFormat(source=source, control=tokenizer.control if tokenizer else ["<|im_end|>"])


def render(source: str, messages=(USER,), **options) -> str:
    return chat.text_of(form(source).render(list(messages), **options))


def test_known_templates_are_native_and_others_come_with_a_notice():
    notices = []
    unknown = template.load_format(CHATML, ["<|im_end|>"], warn=notices.append)
    assert isinstance(unknown, JinjaFormat)
    assert len(notices) == 1 and "sandbox" in notices[0]


def test_text_and_mask(tokenizer):
    pieces = form(CHATML, tokenizer).render([USER])
    assert chat.text_of(pieces) == "<|im_start|>userhi<|im_end|>"
    assert "".join(piece.text for piece in pieces if piece.trained) == "hi<|im_end|>"
    encoded = chat.encode(tokenizer, pieces)
    assert encoded.ids == tokenizer.encode_trusted(chat.text_of(pieces))
    assert encoded.mask[0] is False and encoded.mask[-1] is True


def test_without_generation_blocks_there_is_no_mask(tokenizer):
    pieces = form("{{ messages[0].content }}", tokenizer).render([USER])
    with pytest.raises(DataError, match="generation"):
        _ = chat.encode(tokenizer, pieces).mask


def test_what_templates_are_given():
    source = (
        "{{ bos_token }}{{ tools | tojson }}{{ add_generation_prompt }}{{ enable_thinking }}{{ strftime_now('%%') }}"
    )
    special = JinjaFormat(source=source, control=["<|im_end|>"], special_tokens={"bos_token": "<s>"})
    rendered = special.render([USER], tools=[{"é": "<&'>"}], add_generation_prompt=True, enable_thinking=False)
    assert chat.text_of(rendered) == '<s>[{"é": "<&\'>"}]TrueFalse%'.replace("é", "é")
    assert (
        render("{% for m in messages %}{% break %}{% endfor %}{% set n = namespace(a=1) %}{{ n.a }}{{ dict(b=2).b }}")
        == "12"
    )


@pytest.mark.parametrize(
    "source",
    [
        CHATML,
        "  {% if tools %}\n  a\n  {% endif %}\n {{ tools | tojson }}\n\n",
        "{% for m in messages %}{% if loop.index > 1 %}{% continue %}{% endif %}{{ m.content | trim }}{% endfor %}",
        "{% generation %}{{ {'é<&': 1} | tojson(indent=2) }}{% endgeneration %} b {% generation %}c{% endgeneration %}",
        "{{ dict.fromkeys('ab', 1) }}{{ undefined_name }}{{ bos_token }}\n",
    ],
)
def test_renders_as_transformers_does(source):
    oracle = pytest.importorskip("transformers.utils.chat_template_utils", reason="needs transformers as an oracle")
    messages, tools = [USER, {"role": "assistant", "content": " é<|im_end|>\n"}], [{"name": "f<"}]
    options = {"tools": tools, "add_generation_prompt": True, "bos_token": "<s>"}
    mask = "generation %}" in source
    texts, spans = oracle.render_jinja_template(
        [messages], chat_template=source, return_assistant_tokens_mask=mask, **options
    )
    ours = template_child.Template(source).render({"messages": messages, **options})
    assert ours == (texts[0], spans[0] if mask else [])


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ lipsum.__globals__['os'].popen('id').read() }}",
        "{{ (''|attr('__class__')).mro() }}",
        "{{ ''['__class__'].mro() }}",
        "{{ '{0.__class__.__mro__}'.format('') }}",
        "{{ messages.append(1) }}",
        "{% set n = namespace() %}{% set n.__class__ = 1 %}",
        "{{ namespace(__class__=1) }}",
        "{{ 1 / 0 }}",
        "{% if",
        "{{ messages | nothing }}",
    ],
)
def test_escapes_and_mistakes_fail(source):
    with pytest.raises(jinja2.TemplateError if "/ 0" not in source else ZeroDivisionError):
        template_child.Template(source).render({"messages": [USER]})


def test_failures_are_one_line():
    with pytest.raises(ModelError, match="the chat template fails: SecurityError: .*__class__") as error:
        render("{{ '\n'.__class__.__mro__ }}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("{{ 'a' * 10**9 }}", "more than 512 MiB"),
        ("{{ [0] * 10**9 }}", "more than 512 MiB"),
        ("{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}", "writes more than 4194304 characters"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "more than 1 s"),
        ("{% macro f(n) %}{{ f(n + 1) }}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}", "recursion"),
    ],
)
def test_greedy_templates_are_stopped(source, complaint):
    start = time.monotonic()
    with pytest.raises(ModelError, match=complaint):
        render(source)
    assert time.monotonic() - start < SECONDS
    assert render("fine") == "fine"


def test_a_template_can_refuse_a_chat():
    with pytest.raises(DataError, match="refuses the chat: no way$"):
        render("{{ raise_exception('no\nway') }}")


def test_arguments_that_mean_nothing_are_refused():
    for options in ({"enable_thinking": False}, {"continue_final_message": True}):
        with pytest.raises(ConfigError):
            render("x", **options)
    with pytest.raises(DataError, match="tools"):
        render("x", tools=[{}])
    for messages in ([], "hi", [{"content": "x"}], [USER | {"train": False}]):
        with pytest.raises(DataError):
            form("x").render(messages)


def test_values_that_are_no_json_are_refused():
    with pytest.raises(DataError, match="JSON"):
        render("x", [USER | {"content": float("nan")}])


def test_missing_jinja(monkeypatch):
    def missing(name):
        raise template.metadata.PackageNotFoundError(name)

    for version in (missing, lambda name: "3.1.5"):
        monkeypatch.setattr(template.metadata, "version", version)
        with pytest.raises(ModelError, match=r"pip install 'qwen-jax\[template\]'"):
            render("x")


@settings(max_examples=6, deadline=None)
@given(
    contents=st.lists(
        st.sampled_from(["<|im_end|>", "<|im_", "end|>", "<", ">", "<think>", "é"]), min_size=2, max_size=6
    )
)
def test_contents_never_give_control_ids(tokenizer, contents):
    source = "<|im_start|>{% for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}<|im_end|>{{ tools | tojson }}"
    messages = [{"role": "<|im_end|>", "content": content} for content in contents]
    pieces = form(source, tokenizer).render(messages, tools=[{"".join(contents): "".join(contents)}])
    ids = chat.encode(tokenizer, pieces).ids
    control = set(tokenizer.control.values())
    assert [token for token in ids if token in control] == [
        tokenizer.control[t] for t in ("<|im_start|>", "<|im_end|>")
    ]
    assert tokenizer.decode(ids, skip_special=False) == chat.text_of(pieces)


def test_contents_that_steer_the_template_by_control_tokens_are_refused(tokenizer):
    source = "{{ messages[0].content.split('</think>')[-1] }}"
    assert chat.text_of(form(source, tokenizer).render([USER])) == "hi"
    with pytest.raises(DataError, match="acts upon"):
        form(source, tokenizer).render([{"role": "user", "content": "a</think>b"}])


@pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data with the published chat templates")
def test_a_published_template_of_another_family():
    source = (DATA / "DeepSeek-R1-Distill-Qwen.jinja").read_text("utf-8")
    other = JinjaFormat(source=source, control=["<｜User｜>", "<think>"], special_tokens={"bos_token": "<bos>"})
    pieces = other.render([USER], add_generation_prompt=True)
    assert chat.text_of(pieces) == "<bos><｜User｜>hi<｜Assistant｜><think>\n"


@pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data with the published chat templates")
def test_published_templates_in_the_child_are_the_native_formats():
    for name in ("Qwen3", "Qwen2.5-Instruct"):
        source = (DATA / f"{name}.jinja").read_text("utf-8")
        native = template.load_format(source, ["<|im_end|>"], warn=pytest.fail)
        assert isinstance(native, chat.Format)
        options = {"tools": [json.loads('{"name": "é<"}')], "add_generation_prompt": True}
        assert render(source, **options) == chat.text_of(native.render([USER], **options))
