"""Requests with anything in their fields: they are answered, or refused in OpenAI's shape, and the server lives on."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from infer.server.protocol import ChatBody, CompletionBody

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
    | st.sampled_from(["low", "user", "system", "tool", "assistant", "text", "function", "auto", "json_object"]),
    lambda parts: st.lists(parts, max_size=3) | st.dictionaries(
        st.sampled_from(["type", "role", "content", "text", "function", "name", "parameters", "tool_calls", "schema"])
        | st.text(max_size=3), parts, max_size=4,
    ),
    max_leaves=10,
)  # fmt: skip
GOOD = {
    "messages": [{"role": "user", "content": "low"}],
    "prompt": "low",
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
}


@pytest.mark.parametrize("path, body", [("/v1/chat/completions", ChatBody), ("/v1/completions", CompletionBody)])
def test_no_field_breaks_the_server(scripted, path, body):
    described = {**body.model_fields, **dict.fromkeys(("chat_template", "functions", "other"))}
    scripted.engine.max_length = 100
    with scripted.http as http:
        paths = http.get("/openapi.json").json()["paths"]
        assert paths.keys() >= {"/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/metrics"}

        @settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
        @given(st.dictionaries(st.sampled_from(sorted(described)), VALUES, max_size=3), st.booleans())
        def check(fields, complete):
            required = {name: GOOD[name] for name in GOOD if name in body.model_fields} if complete else {}
            response = http.post(path, json=required | fields)
            assert response.status_code < 500, response.text
            if response.status_code >= 400:
                assert response.json()["error"].keys() == {"message", "type", "param", "code"}

        check()
    del scripted.engine.max_length
    assert scripted.service.error is None


def test_what_the_description_allows_is_answered_as_it_says(scripted):
    """Schemathesis: requests from the description of the API itself, and responses checked against it."""
    schemathesis = pytest.importorskip("schemathesis")
    import schemathesis.checks as known

    checks = [known.not_a_server_error, known.status_code_conformance, known.content_type_conformance]
    checks.append(known.response_schema_conformance)
    with scripted.http as http:
        api = schemathesis.openapi.from_dict(http.get("/openapi.json").json())
        for operation in (found.ok() for found in api.get_all_operations()):

            @settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
            @given(operation.as_strategy())
            def check(case):
                case.call_and_validate(base_url=scripted.url, checks=checks)

            check()
    assert scripted.service.error is None
