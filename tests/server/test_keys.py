"""Who may call, what is kept apart, and that every token is on the record."""

from __future__ import annotations

import os
import signal
import socket
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest
from running import MODEL, Running, eventually, running

from tael.economics.keys import Keys
from tael.economics.ledger import Ledger
from tael.economics.rate_card import Rate, RateCard, Tier
from tael.errors import TaelError

CARD = RateCard("1", "USD", (Rate("*", (Tier(input=10**9, output=10**10),)),))


@dataclass(frozen=True)
class Guarded:
    server: Running
    keys: Keys
    ledger_path: Path
    token: str

    def charges(self) -> list[dict[str, Any]]:
        """What the ledger says of the requests that are settled, oldest first."""
        connection = sqlite3.connect(self.ledger_path)
        connection.row_factory = sqlite3.Row
        rows = connection.execute(
            "SELECT * FROM charges JOIN reservations USING (request_id) ORDER BY charge_id"
        )
        return [dict(row) for row in rows]

    def num_open(self) -> int:
        (num,) = (
            sqlite3.connect(self.ledger_path)
            .execute(
                "SELECT count(*) FROM reservations WHERE request_id NOT IN "
                "(SELECT request_id FROM charges)"
            )
            .fetchone()
        )
        return int(num)


@pytest.fixture(scope="module")
def guarded(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    path = tmp_path_factory.mktemp("accounts")
    keys, ledger = Keys(path / "keys.sqlite"), Ledger(path / "ledger.sqlite", CARD)
    _, token = keys.create("test")
    with running(folder, keys=keys, ledger=ledger, stall_s=2.0) as server:
        yield Guarded(server, keys, path / "ledger.sqlite", token)
    ledger.close()
    keys.close()


ROUTES = [
    ("GET", "/live"),
    ("GET", "/metrics"),
    ("GET", "/openapi.json"),
    ("GET", "/v1/models"),
    ("GET", f"/v1/models/{MODEL}"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/responses"),
    ("POST", "/v1/messages"),
    ("POST", "/v1/messages/count_tokens"),
    ("POST", "/v1/embeddings"),
    ("POST", "/tokenize"),
    ("GET", "/health/live/"),
    ("GET", "//health/live"),
    ("GET", "/page.css/../live"),
    ("GET", "/health/live/../../v1/models"),
    ("GET", "/health/live%2f..%2f..%2fmetrics"),
    ("GET", "/HEALTH/LIVE"),
    ("GET", "/health/live;/../../v1/models"),
    ("GET", "/v1/models?path=/health/live"),
    ("GET", "/v1/models%00/health/live"),
    ("GET", "/%76%31/models"),
    ("GET", "/health/live%20"),
    ("HEAD", "/v1/models"),
    ("OPTIONS", "/v1/completions"),
    ("TRACE", "/v1/models"),
]


def test_metrics_on_a_listener_of_their_own(folder: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    keys = Keys(tmp_path / "keys.sqlite")
    _, token = keys.create("test")
    with (
        running(folder, keys=keys, metrics_address=("127.0.0.1", port)) as server,
        server.http() as callers,
        httpx.Client(base_url=f"http://127.0.0.1:{port}") as operators,
    ):
        assert "tael_engine_up 1.0" in operators.get("/metrics").text
        assert operators.get("/health/ready").json() == {"status": "ready"}
        for path in ("/v1/models", "/live", "/", "/openapi.json"):
            assert operators.get(path).status_code == 404, path
        headers = {"authorization": f"Bearer {token}"}
        assert callers.get("/metrics", headers=headers).status_code == 404
        assert callers.get("/v1/models", headers=headers).status_code == 200
    keys.close()


def credentials(token: str) -> list[dict[str, str]]:
    return [
        {},
        {"authorization": "Bearer"},
        {"authorization": f"Basic {token}"},
        {"authorization": f"Bearer {token}x"},
        {"authorization": f"Bearer {token[:-1]}"},
        {"authorization": "Bearer tael__"},
        {"x-api-key": token[:10]},
        {"authorization": "Bearer \xff"},
        {"x-forwarded-host": "localhost", "host": "localhost"},
        {"host": "localhost/health/live?"},
        {"x-original-url": "/health/live", "x-rewrite-url": "/health/live"},
        {"x-forwarded-prefix": "/health/live", "x-http-method-override": "GET"},
    ]


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_every_route_needs_a_key(guarded: Guarded, method: str, path: str) -> None:
    with guarded.server.http() as http:
        for headers in credentials(guarded.token):
            url = httpx.URL(guarded.server.url).copy_with(raw_path=path.encode())
            encoded = {name: value.encode("latin-1") for name, value in headers.items()}
            response = http.request(method, url, headers=encoded)
            assert response.status_code == 401, (path, headers, response.text)
            if method != "HEAD":
                error = response.json()["error"]
                assert error.get("code", "invalid_api_key") == "invalid_api_key"


def test_all_routes_are_in_that_list(guarded: Guarded) -> None:
    with guarded.server.http() as http:
        response = http.get("/openapi.json", headers={"authorization": f"Bearer {guarded.token}"})
    paths = {path.replace("{name}", MODEL) for path in response.json()["paths"]}
    assert paths - {"/health/live", "/health/ready"} <= {path for _, path in ROUTES}


def test_a_key_opens(guarded: Guarded) -> None:
    client = guarded.server.openai(guarded.token)
    assert [model.id for model in client.models.list()] == [MODEL]
    message = guarded.server.anthropic(guarded.token).messages.create(
        model=MODEL, max_tokens=1, messages=[{"role": "user", "content": "a"}]
    )
    assert message.usage.output_tokens == 1
    with guarded.server.http() as http:
        assert http.get("/health/ready").status_code == 200


def test_a_revoked_key_is_refused(guarded: Guarded) -> None:
    key, token = guarded.keys.create("short-lived")
    guarded.server.openai(token).models.list()
    guarded.keys.revoke(key.key_id)
    with pytest.raises(openai.AuthenticationError) as caught:
        guarded.server.openai(token).models.list()
    assert caught.value.code == "invalid_api_key"


def test_limits_of_a_key(guarded: Guarded) -> None:
    _, token = guarded.keys.create("limited", requests_per_min=2, tokens_per_min=60)
    client = guarded.server.openai(token)
    raw = client.completions.with_raw_response.create(model=MODEL, prompt="a" * 20, max_tokens=5)
    assert raw.headers["x-ratelimit-limit-requests"] == "2"
    assert raw.headers["x-ratelimit-remaining-requests"] == "1"
    with pytest.raises(openai.RateLimitError) as caught:
        client.completions.create(model=MODEL, prompt="a" * 20, max_tokens=30)
    assert caught.value.code == "rate_limit_exceeded"
    assert int(caught.value.response.headers["retry-after"]) >= 1


def test_tenants_do_not_see_each_others_prompts(guarded: Guarded) -> None:
    prompt = "The secret recipe of the house. " * 4

    def num_cached(token: str) -> int:
        client = guarded.server.openai(token)
        usage = client.completions.create(model=MODEL, prompt=prompt, max_tokens=1).usage
        assert usage is not None and usage.prompt_tokens_details is not None
        return usage.prompt_tokens_details.cached_tokens or 0

    (_, first), (_, second) = guarded.keys.create("a"), guarded.keys.create("b")
    assert num_cached(first) == 0
    assert num_cached(first) > 0  # the cache works
    assert num_cached(second) == 0


def test_the_ledger_is_the_sum_of_the_responses(guarded: Guarded) -> None:
    """In every dialect, streamed and not, for one prompt and many, cached and not."""
    _, token = guarded.keys.create("billed")
    openai, anthropic = guarded.server.openai(token), guarded.server.anthropic(token)
    before = len(guarded.charges())
    counts: list[tuple[int, int, int]] = []  # prompt, of which from the cache, output

    def of_openai(usage: Any) -> None:
        cached = usage.prompt_tokens_details.cached_tokens
        counts.append((usage.prompt_tokens, cached, usage.completion_tokens))

    for n in (1, 3):
        completion = openai.completions.create(
            model=MODEL, prompt=["a" * 40, "b"], n=n, max_tokens=5
        )
        of_openai(completion.usage)
        stream = openai.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "x" * 40}],
            max_tokens=5,
            n=n,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"service_tier": "default"},
        )
        of_openai([chunk.usage for chunk in stream][-1])
        response = openai.responses.create(model=MODEL, input="y" * 40, max_output_tokens=5)
        assert response.usage is not None
        cached = response.usage.input_tokens_details.cached_tokens
        counts.append((response.usage.input_tokens, cached, response.usage.output_tokens))
        with anthropic.messages.stream(
            model=MODEL, max_tokens=5, messages=[{"role": "user", "content": "z" * 40}]
        ) as events:
            usage = events.get_final_message().usage
        read, written = usage.cache_read_input_tokens or 0, usage.cache_creation_input_tokens or 0
        counts.append((usage.input_tokens + read + written, read, usage.output_tokens))
    eventually(lambda: len(guarded.charges()) == before + len(counts))
    rows = guarded.charges()[before:]
    assert any(cached for _, cached, _ in counts)
    for (prompt, cached, output), row in zip(counts, rows, strict=True):
        classes = row["fresh_tokens"], row["cache_read_tokens"], row["cache_write_tokens"]
        assert (sum(classes), classes[1], row["output_tokens"]) == (prompt, cached, output)
        # 1000 nano for a fresh one, a tenth of it for one from the cache, 10,000 for an output one.
        charge = 1000 * (prompt - cached) + 100 * cached + 10_000 * output
        assert (row["reason"], row["amount_nano"]) == ("finished", charge)
    assert guarded.num_open() == 0


def test_what_breaks_off_is_settled(guarded: Guarded) -> None:
    client = guarded.server.openai(guarded.token)
    before = len(guarded.charges())
    endless: dict[str, Any] = {"max_tokens": 200, "extra_body": {"ignore_eos": True}}
    stream = client.completions.create(model=MODEL, prompt="abc", stream=True, **endless)
    next(iter(stream))
    stream.close()
    eventually(lambda: len(guarded.charges()) == before + 1)
    row = guarded.charges()[-1]
    assert row["reason"] == "aborted" and 1 <= row["output_tokens"] < 200
    prompt = "once upon a time " * 6
    client.completions.create(model=MODEL, prompt=prompt, max_tokens=1)
    stream = client.completions.create(model=MODEL, prompt=prompt, stream=True, **endless)
    next(iter(stream))
    pid = guarded.server.service.engine.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(openai.APIError):
        for _ in stream:
            pass
    eventually(lambda: len(guarded.charges()) == before + 3)
    row = guarded.charges()[-1]
    assert row["reason"] == "failed" and row["output_tokens"] >= 1
    # What the engine had said of the prompt before it died.
    assert row["cache_read_tokens"] >= 32 and row["fresh_tokens"] < len(prompt)
    eventually(lambda: guarded.server.service.is_ready)
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model=MODEL, prompt="x" * 300)
    assert guarded.num_open() == 0


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "127.0.0.1.nip.io", ""])
def test_pages_cannot_reach_an_open_server(server: Running, host: str) -> None:
    """By a name of theirs that they point to the loopback interface."""
    with server.http() as http:
        response = http.get("/v1/models", headers={"host": host})
        assert response.status_code == 421
        for own in ("localhost", "127.0.0.1:80", "[::1]:8000"):
            assert http.get("/v1/models", headers={"host": own}).status_code == 200


def test_an_open_server_stays_on_the_loopback_interface(folder: Path) -> None:
    import asyncio

    from tael.server.messages import EngineSettings
    from tael.server.serve import ServerConfig, serve

    config = ServerConfig("m", EngineSettings(str(folder)), host="0.0.0.0", port=0)
    with pytest.raises(TaelError, match="keys"):
        asyncio.run(serve(config, keys=None, ledger=None))
