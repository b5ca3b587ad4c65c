"""A regression input for each class of attack on servers of models: all refused, or harmless."""

from __future__ import annotations

import copy
import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from running import MODEL, Running

from tael import LLM, SamplingParams

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
TEXT = {"model": MODEL, "prompt": "hi", "max_tokens": 1}


@contextmanager
def canary(server: Running) -> Iterator[None]:
    """A stream that must have the same tokens as without what happens meanwhile, of an engine that
    must live on."""
    client = server.openai()
    request: dict[str, Any] = {
        "model": MODEL,
        "prompt": "abc",
        "temperature": 0,
        "max_tokens": 240,
        "extra_body": {"ignore_eos": True},
    }
    expected = client.completions.create(**request).choices[0].text
    stream = client.completions.create(stream=True, **request)
    text = next(iter(stream)).choices[0].text
    yield
    assert text + "".join(chunk.choices[0].text for chunk in stream) == expected
    assert server.service.engine.num_restarts == 0


# Strings, in every field that takes one

FUNCTION = {"name": "f", "description": "x", "parameters": {"type": "object", "title": "x"}}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": "x"}'}}
COMMON = {"model": MODEL, "service_tier": "auto", "user": "u", "metadata": {"a": "x"}}
COMMON |= {"safety_identifier": "s", "prompt_cache_key": "p"}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        **COMMON,
        "max_tokens": 1,
        "stop": ["x"],
        "tools": [{"type": "function", "function": FUNCTION}],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
        "messages": [
            {"role": "system", "content": "s", "name": "n"},
            {"role": "user", "content": [{"type": "text", "text": "hi"}], "name": "n"},
            {"role": "assistant", "content": "a", "tool_calls": [CALL]},
            {"role": "tool", "content": "x", "tool_call_id": "c"},
        ],
    },
    "/v1/chat/completions ": {  # a second body for the same path
        **CHAT,
        "response_format": {
            "type": "json_schema",
            "json_schema": {
                "name": "n",
                "description": "d",
                "schema": {
                    "$id": "x",
                    "type": "object",
                    "properties": {"a": {"type": "string", "pattern": "x", "const": "x"}},
                    "required": ["a"],
                },
            },
        },
        "logit_bias": {"1": 1},
        "stream_options": {},
    },
    "/v1/completions": {**COMMON, **TEXT, "stop": "x", "suffix": "", "prompt": ["hi", "x"]},
    "/v1/responses": {
        **COMMON,
        "max_output_tokens": 1,
        "instructions": "i",
        "truncation": "disabled",
        "tools": [{"type": "function", **FUNCTION}],
        "tool_choice": {"type": "function", "name": "f"},
        "input": [
            {"type": "message", "role": "user", "content": "hi", "id": "i", "phase": "p"},
            {"role": "assistant", "content": [{"type": "output_text", "text": "x"}]},
            {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}", "id": "i"},
            {"type": "function_call_output", "call_id": "c", "output": "x"},
        ],
    },
    "/v1/messages": {
        "model": MODEL,
        "max_tokens": 1,
        "system": [{"type": "text", "text": "s", "cache_control": {"type": "ephemeral"}}],
        "stop_sequences": ["x"],
        "metadata": {"user_id": "u"},
        "service_tier": "auto",
        "tools": [{"name": "f", "description": "d", "input_schema": {"type": "object"}}],
        "tool_choice": {"type": "tool", "name": "f"},
        "messages": [
            {"role": "user", "content": "hi"},
            {
                "role": "assistant",
                "content": [{"type": "tool_use", "id": "c", "name": "f", "input": {"a": "x"}}],
            },
            {
                "role": "user",
                "content": [{"type": "tool_result", "tool_use_id": "c", "content": "x"}],
            },
        ],
    },
    "/tokenize": {"model": MODEL, "prompt": "x"},
}


def strings(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where the strings are in a body, keys of objects included: those end with None."""
    if isinstance(value, str):
        yield place
    elif isinstance(value, dict):
        for key, part in value.items():
            yield (*place, key, None)
            yield from strings(part, (*place, key))
    elif isinstance(value, list):
        for i, part in enumerate(value):
            yield from strings(part, (*place, i))


def replaced(body: dict[str, Any], place: tuple[Any, ...], text: str) -> dict[str, Any]:
    body = copy.deepcopy(body)
    *way, last = place
    target: Any = body
    if last is None:
        *way, key = way
        for part in way:
            target = target[part]
        target[text] = target.pop(key)
        return body
    for part in way:
        target = target[part]
    target[last] = text
    return body


@pytest.mark.parametrize("path", BODIES)
def test_no_string_is_a_path_an_address_or_code(
    server: Running, path: str, tmp_path: Path, folder: Path
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("tortoise-7316")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/secret"
        made = str(tmp_path / "made")
        attacks = [
            str(secret),
            f"../../../../../../../../..{secret}",
            f"..%2f..%2f..%2f..%2f..%2f..{secret}",
            f"....//....//....//....//....//{secret}",
            f"..\\..\\..\\..{secret}",
            f"{secret}\0.json",
            f"file://{secret}",
            url,
            f"{{{{ cycler.__init__.__globals__.os.mkdir({made!r}) }}}}",
            f"{{% include {str(secret)!r} %}}",
            f"${{jndi:{url}}}",
            f"$(mkdir {made}); `mkdir {made}`; | mkdir {made}",
            f"'; ATTACH DATABASE {made!r} AS x; --",
            "{0.__class__.__init__.__globals__} %s%n",
        ]
        files = set(folder.rglob("*"))
        body = BODIES[path]
        with server.http() as http:
            assert http.post(path.strip(), json=body).status_code == 200
            for place in strings(body):
                for attack in attacks:
                    response = http.post(path.strip(), json=replaced(body, place, attack))
                    assert response.status_code in (200, 400, 404), (place, attack, response.text)
                    assert "tortoise" not in response.text
        with pytest.raises(BlockingIOError):
            listener.accept()  # nobody has called
    assert set(tmp_path.iterdir()) == {secret} and set(folder.rglob("*")) == files
    assert server.service.engine.num_restarts == 0


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "URL"}},
        {"type": "input_audio", "input_audio": {"data": "URL", "format": "wav"}},
        {"type": "file", "file": {"file_id": "URL"}},
        {"type": "video_url", "video_url": {"url": "URL"}},
    ],
    ids=lambda part: part["type"],
)
def test_nothing_is_fetched(server: Running, part: dict[str, Any]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, server.http() as http:
        listener.setblocking(False)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/x.png"
        content = json.loads(json.dumps([part]).replace("URL", url))
        body = {**CHAT, "messages": [{"role": "user", "content": content}]}
        response = http.post("/v1/chat/completions", json=body)
        assert response.status_code == 400, response.text
        with pytest.raises(BlockingIOError):
            listener.accept()


# Work and memory that a small request asks for


def schema(value: Any) -> dict[str, Any]:
    return {
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": value}}
    }


def nested(depth: int) -> dict[str, Any]:
    value: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        value = {"type": "array", "items": value}
    return value


BOMBS: list[tuple[str, dict[str, Any]]] = [
    ("chat/completions", {**CHAT, **bomb})
    for bomb in [
        schema({"type": "string", "pattern": "(a+)+b"}),
        schema({"type": "string", "pattern": "((a{0,100}){0,100}){0,100}b"}),
        schema({"type": "string", "pattern": "(x|" * 500 + "y" + ")" * 500}),
        schema({"anyOf": [{"type": "string", "pattern": "x" * i + ".*y"} for i in range(200)]}),
        schema({"type": "array", "minItems": 10**9, "items": {"type": "integer"}}),
        schema({"$ref": "#"}),
        schema({"allOf": [{"$ref": "#"}, {"$ref": "#"}]}),
        schema({"$ref": "http://169.254.169.254/schema.json"}),
        schema({"$ref": "file:///etc/passwd"}),
        schema(nested(150)),
        schema({"properties": {f"p{i}": {"type": "integer"} for i in range(2000)}}),
        {"messages": [{"role": "user", "content": "{{ ''.__class__.__mro__ }}{% for x in y %}"}]},
        {"messages": [{"role": "user", "content": "<eos>" * 10, "name": "../../etc/passwd"}]},
        {"messages": [{"role": "user", "content": ""}] * 20_000},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * 20_000}]},
        {"user": "../../etc/passwd", "metadata": {"../..": "\u0000"}},
        {"metadata": {str(i): "x" for i in range(10_000)}},
        {"cache_salt": "x" * 500_000},
        {"n": 128},
        {"n": 128, "logprobs": True, "top_logprobs": 20},
        {"n": 2**70},
        {"max_tokens": 2**70},
        {"seed": -(2**70)},
        {"top_k": 2**40},
        {"temperature": 1e308},
        {"temperature": 5e-324, "top_p": 5e-324, "min_p": 1.0},
        {"repetition_penalty": 5e-324},
        {"repetition_penalty": 0.01, "temperature": 5e-324, "logprobs": True},
        {"stop": ["\U0001f600" * 500], "logit_bias": {str(i): -100 for i in range(256)}},
        {"stop": ["x" * 1024] * 17},
        {"logit_bias": {str(i): 1 for i in range(100_000)}},
        {"tools": [{"type": "function", "function": {"name": f"f{i}"}} for i in range(5000)]},
        {
            "tool_choice": "required",
            "tools": [{"type": "function", "function": {"name": "f" * 65}}],
        },
    ]
]
BOMBS += [
    ("completions", {**TEXT, **bomb})
    for bomb in [
        {"prompt": ["hi"] * 128, "n": 128, "max_tokens": 250},
        {"prompt": ["hi"] * 100_000},
        {"prompt": [[1]] * 100_000},
        {"prompt": [1] * 100_000},
        {"prompt": [2**31]},
        {"prompt": [2**70]},
        {"prompt": "x" * 500_000},
        {"prompt": "\U0001f600" * 100_000},
        {"logprobs": 2**40, "echo": True},
        {"best_of": 2**40},
        {"prompt_logprobs": 10**6},
        {"request_id": "mine"},
    ]
]
BOMBS += [
    ("responses", {"model": MODEL, "input": "x" * 500_000}),
    ("responses", {"model": MODEL, "input": [{"role": "user", "content": "x"}] * 20_000}),
    ("messages", {**CHAT, "stop_sequences": ["x"] * 10_000}),
    ("messages", {**CHAT, "system": "x" * 500_000}),
    ("../tokenize", {"prompt": "x" * 900_000}),
    ("../tokenize", {"messages": [{"role": "user", "content": "x" * 900_000}]}),
]


def test_bombs_harm_nobody(server: Running) -> None:
    """Refused or answered, while another stream keeps its tokens."""
    with canary(server), server.http() as http:
        for path, body in BOMBS:
            response = http.post(f"/v1/{path}", json=body)
            assert response.status_code in (200, 400), response.text


DEEP = "[" * 10_000 + "]" * 10_000


@pytest.mark.parametrize(
    "body",
    [
        f'{{"model": "{MODEL}", "prompt": {DEEP}}}',
        f'{{"model": "{MODEL}", "prompt": "x", "metadata": {DEEP}}}',
        f'{{"model": "{MODEL}", "prompt": "x", "seed": 1{"0" * 10_000}}}',
        f'{{"model": "{MODEL}", "prompt": "x", "temperature": 1e{"9" * 1000}}}',
        '{"model": "a", ' * 10_000,
        '{"prompt": "\\ud800\\udfff\\udfff"}',
    ],
    ids=lambda body: body[:60],
)
def test_json_that_is_hard_to_parse(server: Running, body: str) -> None:
    with server.http() as http:
        headers = {"content-type": "application/json"}
        for path in ("completions", "chat/completions", "responses", "messages"):
            response = http.post(f"/v1/{path}", content=body, headers=headers)
            assert response.status_code == 400, response.text


# What callers call their requests


def test_a_hundred_requests_share_an_id(server: Running, llm: LLM) -> None:
    """Whatever they call theirs, ids are the server's own, and everyone gets their own answer."""
    prompts = [f"prompt {i} " for i in range(100)]
    params = SamplingParams(temperature=0, max_tokens=4)
    expected = [result.text for result in llm.generate(prompts, params)]
    names = {"user": "mine", "safety_identifier": "mine", "prompt_cache_key": "mine"}

    def ask(prompt: str) -> tuple[str, str, str]:
        body = {**TEXT, "prompt": prompt, "max_tokens": 4, "temperature": 0, **names}
        headers = dict.fromkeys(("x-request-id", "idempotency-key", "traceparent"), "mine")
        with server.http() as http:
            response = http.post(
                "/v1/completions",
                json={**body, "metadata": {"request_id": "mine", "id": "mine"}},
                headers=headers,
            )
        answer = response.json()
        return answer["id"], response.headers["x-request-id"], answer["choices"][0]["text"]

    with ThreadPoolExecutor(16) as threads:
        answers = list(threads.map(ask, prompts))
    assert [text for _, _, text in answers] == expected
    assert len({name for name, _, _ in answers}) == len({name for _, name, _ in answers}) == 100


# HTTP itself


def exchange(server: Running, request: bytes) -> bytes:
    """All that comes back, until the server has closed the connection."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(1 << 16), b""))


HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"


@pytest.mark.parametrize(
    "request_",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET / HTTP\r\nhost: localhost\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\nhost: evil.example\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\nhost: localhost:\r\nhost: evil.example\r\n\r\n",
        b"QUERY /v1/completions HTTP/1.1\r\nhost: localhost\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\nx: " + b"x" * (1 << 20) + b"\r\n\r\n",
        b"GET /" + b"x" * (1 << 20) + b" HTTP/1.1\r\nhost: localhost\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\nbad header\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\nx: a\0b\r\n\r\n",
        HEAD + b"content-length: -1\r\n\r\n{}",
        HEAD + b"content-length: 1e3\r\n\r\n{}",
        HEAD + b"content-length: 2\r\ncontent-length: 3\r\n\r\n{}",
        HEAD + b"content-length: 2\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\nGET /live",
        HEAD + b"transfer-encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
        HEAD + b"transfer-encoding: chunked\r\n\r\nffffffffffffffffff\r\n{}\r\n0\r\n\r\n",
        HEAD + b"content-length: 999999999999999999999\r\n\r\n{}",
        HEAD + b"content-length: 100\r\n\r\n{}",  # and no more
        HEAD + b"expect: 100-continue\r\ncontent-length: 9999999\r\n\r\n",
        HEAD + b"upgrade: websocket\r\nconnection: upgrade\r\ncontent-length: 2\r\n\r\n{}",
    ],
    ids=lambda value: value[-40:].decode("latin-1").encode("unicode_escape").decode()[:40],
)
def test_what_is_hardly_http(server: Running, request_: bytes) -> None:
    """Refused, and nobody waits."""
    try:
        answer = exchange(server, request_)
    except OSError:  # it did not even want to read on
        answer = b""
    status = int(answer.split(b" ")[1]) if answer else 400
    assert 400 <= status < 500, answer[:200]
    assert answer.count(b"HTTP/1.1") <= 1
    with server.http() as http:
        assert http.get("/health/ready").status_code == 200


def test_a_refusal_arrives_although_the_body_is_not_read(server: Running) -> None:
    """A connection that is closed with unread bytes is reset, and may lose what was answered."""
    num_bytes = 32 << 20
    head = HEAD + f"content-length: {num_bytes}\r\n\r\n".encode()
    answer = exchange(server, head + b"x" * num_bytes)
    assert answer.startswith(b"HTTP/1.1 413 ") and b"request_too_large" in answer
