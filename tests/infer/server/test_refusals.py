"""What is not let in, and that every refusal has OpenAI's shape and leaves the server as it was."""

from __future__ import annotations

import json
import logging

import pytest

from tests.infer.server.conftest import KEY, ScriptedEngine, run_server

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
ASK = {"messages": [{"role": "user", "content": "low"}]}
HOST = "Host: localhost"
IMAGE = {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}


def refused(response, status, word="", param=None):
    """Checks a refusal."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"} and word in error["message"], error
    assert param is None or error["param"] == param, error
    return error


def raw(method, path, *headers, body=b""):
    return "\r\n".join([f"{method} {path} HTTP/1.1", *headers, "Connection: close", "", ""]).encode("latin-1") + body


def parsed(data):
    """Status and error of a response as bytes."""
    head, _, body = data.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]


@pytest.mark.parametrize(
    "body, param",
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": "0.5"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 2}, "top_p"),
        ({"top_k": 2**40}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"n": 0}, "n"),
        ({"n": 10**6}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": 10**9}, "max_tokens"),
        ({"seed": 2**80}, "seed"),
        ({"stop": ""}, "stop"),
        ({"stop": ["x"] * 10**4}, "stop"),
        ({"logprobs": True, "top_logprobs": 10**4}, "top_logprobs"),
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"logit_bias": {"99999999": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"chat_template": "{{ 1 }}"}, "chat_template"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
        ({"guided_regex": "a"}, "guided_regex"),
        ({"functions": [{}]}, "functions"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, None),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools"),
        ({"tools": [{"type": "code_interpreter"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format"),
        ({"stream_options": {"include_usage": 1}}, "stream_options"),
    ],
)  # fmt: skip
def test_chats_that_cannot_be_answered(scripted, body, param):
    response = scripted.post(CHAT, {})
    refused(response, 400, "messages", "messages")
    with scripted.http as http:
        refused(
            http.post(CHAT, content=json.dumps(ASK | body), headers={"content-type": "application/json"}),
            400,
            param=param,
        )
    assert scripted.engine.asked == []


@pytest.mark.parametrize(
    "body, param",
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": "low", "logprobs": 10**4}, "logprobs"),
        ({"prompt": "low", "best_of": 5}, "best_of"),
        ({"prompt": "low", "echo": True, "logprobs": 1}, "echo"),
        ({"prompt": [1], "suffix": "x"}, "suffix"),
        ({"prompt": ["low"] * 9}, "n"),
    ],
)
def test_completions_that_cannot_be_made(scripted, body, param):
    refused(scripted.post(TEXT, body), 400, param=param)
    assert scripted.engine.asked == []


def test_what_is_too_long_is_told_the_numbers(scripted):
    error = refused(scripted.post(TEXT, {"prompt": "low " * 1000}), 400, "1000 tokens there is room for")
    assert error["code"] == "context_length_exceeded"
    error = refused(scripted.post(TEXT, {"prompt": "low", "max_tokens": 999}), 400, "ask for at most 998", "max_tokens")
    refused(scripted.post(TEXT, {"prompt": [5] * 1000}), 400, "shorten the prompt")
    # The engine has the last word.
    scripted.engine.max_length = 10
    try:
        refused(scripted.post(TEXT, {"prompt": "low", "max_tokens": 20}), 400, "too long")
    finally:
        del scripted.engine.max_length


@pytest.mark.parametrize(
    "text, word",
    [
        ("{", "malformed"),
        ("[]", "not an object"),
        ('{"messages": NaN}', "NaN"),
        ('{"temperature": Infinity}', "Infinity"),
        ('{"seed": ' + "1" * 5000 + "}", "digits"),
        ('{"x": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested"),
        ('{"seed": 1, "seed": 2}', "twice"),
        (b'{"prompt": "\xff"}', "UTF-8"),
        ("", "Content-Type"),
    ],
)
def test_bodies_that_are_no_json(scripted, text, word):
    with scripted.http as http:
        response = http.post(TEXT, content=text, headers={"content-type": "application/json"})
        refused(response, 400, "" if text == "" else word)
        refused(http.post(TEXT, json={"prompt": "low"}, headers={"content-type": "text/plain"}), 400, "Content-Type")


def test_unknown_fields_are_ignored(scripted):
    assert scripted.post(CHAT, ASK | {"user": "x", "metadata": {"a": [1]}, "modalities": ["text"]}).status_code == 200


def test_paths_that_lead_nowhere(scripted):
    for path in ("/v1/nothing", "//v1/../admin", "/v1/%2e%2e/admin", "/admin", "/docs", "/v1/models/", "/page.py"):
        assert parsed(scripted.send(raw("GET", path, HOST)))[0] == 404
    with scripted.http as http:
        refused(http.get(CHAT), 405)
        refused(http.options(CHAT, headers={"Origin": "http://evil.example"}), 405)
        for method in ("PUT", "DELETE"):
            refused(http.request(method, "/v1/models"), 405)


def test_no_page_of_another_origin_is_served(scripted):
    with scripted.http as http:
        response = http.get("/v1/models", headers={"Origin": "http://evil.example"})
        assert not [name for name in response.headers if name.startswith("access-control")]
        for host in ("evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.nip.io", ""):
            refused(http.get("/v1/models", headers={"Host": host}), 403, "Host")
        for host in ("localhost", "LOCALHOST:1", "127.0.0.1", "[::1]:8000"):
            assert http.get("/v1/models", headers={"Host": host}).status_code == 200
        page = http.get("/")
        assert "default-src 'none'" in page.headers["content-security-policy"]
        assert (page.headers["x-frame-options"], page.headers["x-content-type-options"]) == ("DENY", "nosniff")
        assert http.get("/page.css").headers["content-type"].startswith("text/css")


@pytest.fixture(scope="module")
def guarded(tagged):
    """A server with a key and little patience."""
    limits = dict(key=KEY, max_body=2000, body_seconds=0.3)
    with run_server(ScriptedEngine(tagged), tagged, room=2, **limits) as running:
        yield running


def test_only_health_and_the_page_need_no_key(guarded):
    good = f"Bearer {KEY}".encode()
    wrong = [
        b"",
        b"Bearer",
        b"Bearer x",
        b"Basic " + KEY.encode(),
        KEY.encode(),
        good + b"x",
        "Bearer sch\xfcssel".encode("latin-1"),
    ]
    with guarded.http as http:
        for path in ("/health", "/", "/page.js"):
            assert http.get(path).status_code == 200
        for path in ("/metrics", "/v1/models", CHAT, TEXT, "/openapi.json", "/nothing"):
            for given in wrong:
                refused(http.get(path, headers={"Authorization": given}), 401, "Bearer")
            refused(http.get(path), 401)
        for given in (good, b"bearer  " + KEY.encode()):
            assert http.get("/v1/models", headers={"Authorization": given}).status_code == 200
            assert http.get("/v1/models", headers={"Authorization": given, "Host": "a.proxy"}).status_code == 200
        both = [("Authorization", good), ("Authorization", b"Bearer x")]
        refused(http.get("/v1/models", headers=both), 401)


def test_requests_have_an_end_in_size_and_in_time(guarded):
    key = f"Authorization: Bearer {KEY}".encode().decode("latin-1")
    begin = (HOST, key, "Content-Type: application/json")
    status, error = parsed(guarded.send(raw("POST", TEXT, *begin, "Content-Length: 10000000")))
    assert status == 413 and "2000 bytes" in error["message"]
    endless = raw("POST", TEXT, *begin, "Transfer-Encoding: chunked", body=b"400\r\n" + b"x" * 0x400 + b"\r\n")
    assert parsed(guarded.send(endless + b"800\r\n" + b"x" * 0x800 + b"\r\n"))[0] == 413
    assert parsed(guarded.send(endless))[0] == 408
    long = raw("POST", TEXT, *begin, "Content-Length: 1000000", body=b"x" * 1_000_000)
    chunk = b"f4240\r\n" + b"x" * 1_000_000 + b"\r\n0\r\n\r\n"
    for all_at_once in (long, raw("POST", TEXT, *begin, "Transfer-Encoding: chunked", body=chunk)):
        assert parsed(guarded.send(all_at_once))[0] == 413  # which is read, though all of it is sent first
    assert parsed(guarded.send(raw("GET", "/health", HOST, "X: " + "x" * 20_000)))[0] == 431
    with guarded.http as http:  # and the others are well
        assert http.get("/health").status_code == 200


def test_a_head_that_does_not_come_is_not_waited_for(scripted, monkeypatch):
    from infer.server.connection import Connection

    monkeypatch.setattr(Connection, "head_seconds", 0.1)
    assert parsed(scripted.send(b"GET /health HT"))[0] == 408
    assert parsed(scripted.send(b""))[0] == 408
    monkeypatch.setattr(Connection, "max_connections", 0)
    assert parsed(scripted.send(b""))[0] == 503


@pytest.mark.parametrize(
    "request_, status",
    [
        (raw("POST", TEXT, HOST, "Content-Length: 5", "Transfer-Encoding: chunked", body=b"0\r\n\r\n"), 400),
        (raw("POST", TEXT, HOST, "Content-Length: 5", "Content-Length: 6", body=b"12345"), 400),
        (raw("POST", TEXT, HOST, "Content-Length: -1"), 400),
        (raw("POST", TEXT, HOST, "Transfer-Encoding: chunked", body=b"zz\r\n"), 400),
        (raw("GET", "/health", "Host: a", "Host: b"), 400),
        (raw("GET", "/health", HOST, "X: a\rb"), 400),
        (b"\x16\x03\x01\x02\x00", 400),
    ],
)  # fmt: skip
def test_what_is_no_http_is_refused(scripted, request_, status):
    assert parsed(scripted.send(request_))[0] == status


def test_what_clients_send_is_not_logged(scripted, caplog):
    caplog.set_level(logging.DEBUG)
    name = "x\n2026 INFO \x1b[31mforged"
    scripted.post(CHAT, ASK | {"model": name})
    scripted.post(CHAT, {"messages": [{"role": "user", "content": "low secret"}]})
    scripted.post(TEXT, {"prompt": "low secret", "temperature": "secret"})
    with scripted.http as http:
        http.get("/%0a%1b[31mforged", headers={"Host": "localhost\x1b[31m"})
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("uvicorn")]
    assert len(lines) >= 4 and not any("secret" in line for line in lines)
    assert all(line.isprintable() for line in lines)
