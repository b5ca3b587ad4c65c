"""What is refused, and in which words: the errors that OpenAI's client tells apart."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from running import MODEL, Running

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
TEXT = {"model": MODEL, "prompt": "hi", "max_tokens": 2}
DEEP: dict[str, Any] = {"type": "integer"}
for _ in range(400):
    DEEP = {"type": "array", "items": DEEP}


def schema(value: Any) -> dict[str, Any]:
    return {
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": value}}
    }


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}

REFUSED = [
    ("chat", {"messages": []}, "messages", "invalid_value"),
    ("chat", {"messages": None}, "messages", "invalid_type"),
    ("chat", {"temperature": "1"}, "temperature", "invalid_type"),
    ("chat", {"temperature": 3}, "temperature", "invalid_value"),
    ("chat", {"temperature": float("nan")}, "temperature", "invalid_value"),
    ("chat", {"top_p": 0}, "top_p", "invalid_value"),
    ("chat", {"n": 0}, "n", "invalid_value"),
    ("chat", {"n": 10**9}, "n", "invalid_value"),
    ("chat", {"max_tokens": 0}, "max_tokens", "invalid_value"),
    ("chat", {"top_logprobs": 21, "logprobs": True}, "top_logprobs", "invalid_value"),
    ("chat", {"top_logprobs": 2}, "top_logprobs", "invalid_value"),
    ("chat", {"logit_bias": {"x": 1}}, "logit_bias", "invalid_value"),
    ("chat", {"logit_bias": {"999999": 1}}, "logit_bias", "invalid_value"),
    ("chat", {"logit_bias": {"1": 101}}, "logit_bias.1", "invalid_value"),
    ("chat", {"stop": [""]}, None, "invalid_value"),
    ("chat", {"stop": "\ud800"}, None, "invalid_value"),
    ("chat", {"stop": ["a"] * 17}, None, "invalid_value"),
    ("chat", {"seed": 2**64}, "seed", "invalid_value"),
    ("chat", {"audio": {}}, "audio", "unsupported_parameter"),
    ("chat", {"reasoning_effort": "low"}, "reasoning_effort", "unsupported_parameter"),
    ("chat", {"store": True}, "store", "invalid_value"),
    ("chat", {"chat_template": "{{ 1 }}"}, "chat_template", "unsupported_parameter"),
    ("chat", {"cache_salt": "x"}, "cache_salt", "unsupported_parameter"),
    ("chat", {"stream_options": {"x": 1}}, "stream_options.x", "unsupported_parameter"),
    ("chat", {"response_format": {"type": "grammar"}}, "response_format", "invalid_value"),
    ("chat", schema({"type": "nothing"}), None, "invalid_schema"),
    ("chat", schema({"type": "string", "pattern": "("}), None, "invalid_schema"),
    ("chat", schema(DEEP), None, "invalid_schema"),
    ("chat", schema({"enum": ["x" * 70_000]}), "response_format", "invalid_schema"),
    ("chat", {**schema({}), "ignore_eos": True}, "ignore_eos", "unsupported_parameter"),
    ("chat", {"tools": [TOOL, TOOL]}, "tools", "invalid_value"),
    ("chat", {"tool_choice": "required"}, "tool_choice", "invalid_value"),
    ("chat", {"tools": [TOOL], **schema({})}, "response_format", "unsupported_parameter"),
    (
        "chat",
        {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}},
        "tool_choice",
        "invalid_value",
    ),
    ("text", {"prompt": ""}, None, "invalid_value"),
    ("text", {"prompt": []}, None, "invalid_value"),
    ("text", {"prompt": [[]]}, None, "invalid_value"),
    ("text", {"prompt": [257]}, "prompt", "invalid_value"),
    ("text", {"prompt": [-1]}, None, "invalid_value"),
    ("text", {"prompt": ["a"] * 129}, None, "invalid_value"),
    ("text", {"prompt": "x" * 256}, None, "context_length_exceeded"),
    ("text", {"prompt": "x" * 40_000}, None, "context_length_exceeded"),
    ("text", {"prompt": "\ud800"}, None, "invalid_value"),
    ("text", {"best_of": 2}, "best_of", "invalid_value"),
    ("text", {"suffix": "x"}, "suffix", "invalid_value"),
    ("text", {"prompt_logprobs": 5}, "prompt_logprobs", "unsupported_parameter"),
]


@pytest.mark.parametrize(
    ("kind", "parameters", "param", "code"), REFUSED, ids=lambda v: str(v)[:40]
)
@pytest.mark.parametrize("stream", [False, True])
def test_refused(
    server: Running,
    kind: str,
    parameters: dict[str, Any],
    param: str | None,
    code: str,
    stream: bool,
) -> None:
    path, base = ("chat/completions", CHAT) if kind == "chat" else ("completions", TEXT)
    body = json.dumps({**base, **parameters, "stream": stream})
    with server.http() as http:
        response = http.post(
            f"/v1/{path}", content=body, headers={"content-type": "application/json"}
        )
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error" and error["code"] == code, error
    assert param is None or error["param"] == param, error


def test_the_client_sees_codes(server: Running) -> None:
    client = server.openai()
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt="x" * 256)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="gpt-4", prompt="x")
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"{", "invalid_json"),
        (b"[" * 100_000, None),
        (b"\xff\xfe", None),
        (b"", "missing_required_parameter"),
        (b"3", None),
        (b'{"model": NaN}', None),
    ],
)
def test_bad_bodies(server: Running, content: bytes, code: str | None) -> None:
    with server.http() as http:
        response = http.post(
            "/v1/chat/completions", content=content, headers={"content-type": "application/json"}
        )
    assert response.status_code == 400, response.text
    assert code in (None, response.json()["error"]["code"])


def test_bodies_of_pages_are_refused(server: Running) -> None:
    """A page may send text/plain to any address without asking."""
    with server.http() as http:
        response = http.post(
            "/v1/chat/completions", content=json.dumps(CHAT), headers={"content-type": "text/plain"}
        )
    assert response.status_code == 400


def test_large_bodies_are_refused_unread(server: Running) -> None:
    with server.http() as http:
        response = http.post("/v1/completions", json={**TEXT, "prompt": "x" * (2 << 20)})
        assert response.status_code == 413
        assert response.json()["error"]["code"] == "request_too_large"

        def chunks() -> Any:
            for _ in range(64):
                yield b"x" * (1 << 15)

        response = http.post("/v1/completions", content=chunks())
        assert response.status_code == 413


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/", 405),
        ("GET", "/v1/models/../../etc/passwd", 404),
        ("GET", "/v1/models/..%2f..%2fetc%2fpasswd", 404),
        ("GET", "/v1/chat/completions", 405),
        ("POST", "/v1/chat/completions/", 404),
        ("GET", "/docs", 404),
    ],
)
def test_unknown_routes(server: Running, method: str, path: str, status: int) -> None:
    with server.http() as http:
        response = http.request(method, path)
    assert response.status_code == status
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_callers_cannot_name_requests(server: Running) -> None:
    """Whatever they call theirs, ids are the server's own."""
    client = server.openai()
    ids = {
        client.completions.create(
            model=MODEL, prompt="a", max_tokens=1, extra_headers={"x-request-id": "mine"}
        ).id
        for _ in range(3)
    }
    assert len(ids) == 3


BOMBS: list[dict[str, Any]] = [
    schema({"type": "string", "pattern": "(a+)+b"}),
    schema({"type": "string", "pattern": "((a{0,100}){0,100}){0,100}b"}),
    schema({"type": "string", "pattern": "(x|" * 500 + "y" + ")" * 500}),
    schema({"anyOf": [{"type": "string", "pattern": "x" * i + ".*y"} for i in range(200)]}),
    schema({"type": "array", "minItems": 10**9, "items": {"type": "integer"}}),
    schema({"$ref": "#"}),
    schema({"$ref": "http://169.254.169.254/schema.json"}),
    schema({"$ref": "file:///etc/passwd"}),
    {"messages": [{"role": "user", "content": "{{ ''.__class__.__mro__ }}{% for x in y %}"}]},
    {"messages": [{"role": "user", "content": "<eos>" * 10, "name": "../../etc/passwd"}]},
    {"user": "../../etc/passwd", "metadata": {"../..": "\u0000"}},
    {"n": 128, "max_tokens": 1},
    {"stop": ["\U0001f600" * 500], "logit_bias": {str(i): -100 for i in range(256)}},
]


def test_bombs_harm_nobody(server: Running) -> None:
    """Refused or answered, while another stream keeps its tokens."""
    client = server.openai()
    canary: dict[str, Any] = {
        "model": MODEL,
        "prompt": "abc",
        "temperature": 0,
        "max_tokens": 240,
        "extra_body": {"ignore_eos": True},
    }
    expected = client.completions.create(**canary).choices[0].text
    stream = client.completions.create(stream=True, **canary)
    text = next(iter(stream)).choices[0].text
    with server.http() as http:
        for bomb in BOMBS:
            response = http.post("/v1/chat/completions", json={**CHAT, **bomb})
            assert response.status_code in (200, 400), response.text
    assert text + "".join(chunk.choices[0].text for chunk in stream) == expected
    assert server.service.engine.num_restarts == 0
