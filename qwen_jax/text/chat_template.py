"""The Jinja template that writes what a format writes, for programs that know chats by their templates alone."""

from __future__ import annotations

import json
from string import Template

from qwen_jax.text.chat import CALLS, NO_THOUGHT, TOOLS, Format

_SYSTEM = r"""
{%- set system = messages[0].content if messages[0].role == 'system' else $default %}
"""
_TOOLS = r"""
{%- if tools %}
    {{- '<|im_start|>system\n' + (system + '\n\n' if system is string else '') + $before }}
    {%- for tool in tools %}
        {{- '\n' + (tool | tojson) }}
    {%- endfor %}
    {{- $after + '<|im_end|>\n' }}
    {%- set system = none %}
{%- endif %}
"""
_NO_TOOLS = r"""
{%- if system is string %}
    {{- '<|im_start|>system\n' + system + '<|im_end|>\n' }}
{%- endif %}
"""
_QUESTION = r"""
{%- set ns = namespace(question=messages|length - 1, found=false) %}
{%- for message in messages[::-1] %}
    {%- if message.role == 'user' and not ns.found %}
        {%- set text = message.content %}
        {%- if not (text.startswith('<tool_response>') and text.endswith('</tool_response>')) %}
            {%- set ns.question = messages|length - loop.index %}
            {%- set ns.found = true %}
        {%- endif %}
    {%- endif %}
{%- endfor %}
"""
_MESSAGES = r"""
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- set content = message.content or '' %}
        {{- '<|im_start|>assistant\n' }}
        $thought
        {{- $said }}
        $calls
        {{- '<|im_end|>\n' }}
    $results
    {%- elif not (loop.first and message.role == 'system') %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
"""
_THOUGHT = r"""
        {%- set thought = message.reasoning_content if message.reasoning_content is string else '' %}
        {%- if message.reasoning_content is not string and '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {%- set said = content %}
        {%- if loop.index0 > ns.question and (loop.last or thought) %}
            {%- set said = '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') %}
        {%- endif %}
"""
_MESSAGE_CALLS = r"""
        {%- for item in message.tool_calls or [] %}
            {%- set call = item.function or item %}
            {{- ('\n' if content or not loop.first else '') + '<tool_call>\n{"name": "' + call.name }}
            {{- '", "arguments": ' + (call.arguments if call.arguments is string else call.arguments | tojson) }}
            {{- '}\n</tool_call>' }}
        {%- endfor %}
"""
_RESULTS = r"""
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user' if loop.first or loop.previtem.role != 'tool' else '' }}
        {{- '\n<tool_response>\n' + message.content + '\n</tool_response>' }}
        {{- '<|im_end|>\n' if loop.last or loop.nextitem.role != 'tool' else '' }}
"""
_PROMPT = r"""
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    $no_thought
{%- endif %}
"""
_QUIET = r"""
    {{- $empty }}
"""
_SWITCH = r"""
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- $empty }}
    {%- endif %}
"""


def template_of(form: Format) -> str:
    """A template that writes the same text as `form` does, with every message closed."""
    values = {
        "default": "none" if form.default_system is None else json.dumps(form.default_system),
        "before": json.dumps(TOOLS),
        "after": json.dumps(CALLS),
        "empty": json.dumps(NO_THOUGHT),
        "said": "said" if form.thinks else "content",
        "thought": _THOUGHT * form.thinks,
        "calls": _MESSAGE_CALLS * form.tools,
        "results": _RESULTS * form.tools,
    }
    values["no_thought"] = Template((_QUIET if form.quiet else _SWITCH) * form.thinks).substitute(values)
    parts = [_SYSTEM, _TOOLS * form.tools, _NO_TOOLS, _QUESTION * form.thinks, _MESSAGES, _PROMPT]
    lines = Template("".join(parts)).substitute(values).split("\n")
    return "\n".join(line for line in lines if line.strip())
