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
    ("chat", {"repetition_penalty": 5e-324}, "repetition_penalty", "invalid_value"),
    ("chat", {"n": 0}, "n", "invalid_value"),
    ("chat", {"n": 10**9}, "n", "invalid_value"),
    ("chat", {"max_tokens": 0}, "max_tokens", "invalid_value"),
    ("chat", {"max_tokens": 2**64}, "max_tokens", "invalid_value"),
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
    ("chat", {"chat_template_kwargs": {"a": 1}}, "chat_template_kwargs", "unsupported_parameter"),
    ("chat", {"request_id": "x"}, "request_id", "unsupported_parameter"),
    ("responses", {"input": []}, None, "invalid_value"),
    ("responses", {"input": [{"type": "reasoning"}]}, "input[0]", "invalid_value"),
    ("responses", {"input": [{"type": []}]}, "input[0]", "invalid_value"),
    ("responses", {"input": [3]}, None, "invalid_value"),
    ("responses", {"input": [{"role": "user"}]}, "input[0].content", "missing_required_parameter"),
    ("responses", {"previous_response_id": "x"}, "previous_response_id", "unsupported_parameter"),
    ("responses", {"tools": [{"type": "web_search"}]}, None, "invalid_value"),
    ("responses", {"tool_choice": "required"}, "tool_choice", "invalid_value"),
    (
        "responses",
        {"input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": "["}]},
        "input",
        "invalid_value",
    ),
    *[
        (
            "responses",
            {"tools": [{"type": "function", "name": "f", "parameters": {"a": value}}]},
            "tools[0].parameters",
            "invalid_value",
        )
        for value in (float("nan"), float("inf"), "\ud800", {"\udfff": 1})
    ],
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
    path, base = {
        "chat": ("chat/completions", CHAT),
        "text": ("completions", TEXT),
        "responses": ("responses", {"model": MODEL, "input": "hi"}),
    }[kind]
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
