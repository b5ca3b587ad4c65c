"""The page: what is served, to whom, and what a real browser makes of it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from playwright.sync_api import Page, expect, sync_playwright
from running import MODEL, Running, eventually, running

from tael.economics.journal import Outcome
from tael.economics.keys import Keys
from tael.economics.ledger import Ledger
from tael.economics.rate_card import Rate, RateCard, Tier
from tael.server.page import FILES

CARD = RateCard("1", "USD", (Rate("*", (Tier(input=10**9, output=10**10),)),))
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on the PATH")


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keys]:
    keys = Keys(tmp_path_factory.mktemp("keys") / "keys.sqlite")
    yield keys
    keys.close()


@pytest.fixture(scope="module")
def guarded(
    folder: Path, keys: Keys, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    """A server that has keys and prices."""
    ledger = Ledger(tmp_path_factory.mktemp("ledger") / "ledger.sqlite", CARD)
    keys.create("first")
    with running(folder, keys=keys, ledger=ledger) as server:
        yield server
    ledger.close()


def get(server: Running, path: str, token: str | None = None) -> httpx.Response:
    with server.http() as http:
        return http.get(path, headers={"authorization": f"Bearer {token}"} if token else {})


def live(server: Running, token: str | None = None) -> dict[str, Any]:
    response = get(server, "/live", token)
    assert response.status_code == 200
    figures: dict[str, Any] = response.json()
    return figures


@pytest.mark.parametrize("path", FILES)
def test_files_need_no_key_and_allow_nothing(guarded: Running, path: str) -> None:
    response = get(guarded, path)
    assert response.status_code == 200
    assert response.headers["content-type"] == FILES[path][1]
    assert response.headers["x-content-type-options"] == "nosniff"
    policy = dict(
        part.strip().partition(" ")[::2]
        for part in response.headers["content-security-policy"].split(";")
    )
    assert policy["default-src"] == policy["frame-ancestors"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert "unsafe" not in response.headers["content-security-policy"]


@pytest.mark.parametrize("path", FILES)
def test_files_ask_nobody_else(server: Running, path: str) -> None:
    text = get(server, path).text
    text = text.replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert not re.search(r"//\w+\.|https?:|\burl\(|@import|\bimport\b", text)
    # Text of a model never becomes markup.
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text)
    assert not re.search(r"<script>|<style|\bstyle=|\bon\w+=", text)


@pytest.mark.parametrize("path", ["/index.html", "/page", "/page/", "/page.css/", "//", "/page.py"])
def test_nothing_else_is_a_file(guarded: Running, path: str) -> None:
    assert get(guarded, path).status_code == 401


def test_live_figures(server: Running) -> None:
    before = live(server)
    prompt = "the same beginning of more than a block, and again "
    for _ in range(2):
        server.openai().completions.create(
            model=MODEL, prompt=prompt, max_tokens=8, extra_body={"ignore_eos": True}
        )
    eventually(server.is_idle)
    after = live(server)
    assert after["model"] == MODEL and after["ready"] is True
    assert after["requests"] == {"running": 0, "waiting": 0}
    assert after["output_tokens_per_s"] > 0
    own = {name: after["key"][name] - before["key"][name] for name in list(after["key"])[:3]}
    assert own == {"prompt_tokens": 2 * len(prompt), "cached_tokens": 32, "output_tokens": 16}
    assert after["key"]["cost"] is None  # there is no ledger
    (memory,) = after["tiers"]
    assert memory["name"] == "memory" and memory["used_bytes"] == 0
    assert 0 < memory["cached_bytes"] < memory["capacity_bytes"]


def test_live_figures_of_a_running_request(server: Running) -> None:
    body = {"model": MODEL, "prompt": "a", "max_tokens": 200, "ignore_eos": True, "stream": True}
    with server.http() as http, http.stream("POST", "/v1/completions", json=body) as response:
        next(response.iter_lines())
        eventually(lambda: live(server)["requests"]["running"] == 1)
        assert live(server)["tiers"][0]["used_bytes"] > 0


def test_live_needs_a_key(guarded: Running) -> None:
    for token in (None, "tael_0123456789abcdef_" + 64 * "0"):
        assert get(guarded, "/live", token).status_code == 401


def test_a_key_sees_its_own_cost_and_hits_only(guarded: Running, keys: Keys) -> None:
    (_, payer), (_, other) = keys.create("payer"), keys.create("other")
    before = live(guarded, other)
    for _ in range(2):
        guarded.openai(payer).completions.create(model=MODEL, prompt="a" * 40, max_tokens=4)
    eventually(guarded.is_idle)
    ledger = guarded.service.ledger
    assert ledger is not None
    ledger.settle("unknown", guarded.service.usage_of_key["x"], Outcome.ABORTED).exception()
    own = live(guarded, payer)["key"]
    assert own["prompt_tokens"] == 80 and own["cached_tokens"] == 32
    # 48 at 1000 nano, 32 at a tenth of that; output at 10 times it.
    expected = 48 * 1000 + 32 * 100 + own["output_tokens"] * 10_000
    assert own["cost"] == {"currency": "USD", "nano": expected}
    after = live(guarded, other)
    assert after["key"] == before["key"]
    assert after["key"]["cost"] == {"currency": "USD", "nano": 0}
    assert payer.split("_")[1] not in str(after)


class Browser:
    """A page, and what it complained of and asked for."""

    def __init__(self, page: Page, origin: str) -> None:
        self.page = page
        self.complaints: list[str] = []
        self.elsewhere: list[str] = []
        page.on("console", lambda m: m.type in ("error", "warning") and self.complain(m.text))
        page.on("pageerror", lambda error: self.complain(str(error)))
        page.on("request", lambda r: r.url.startswith(f"{origin}/") or self.elsewhere.append(r.url))
        page.goto(origin)

    def complain(self, text: str) -> None:
        self.complaints.append(text)

    def text(self, selector: str) -> str:
        return self.page.locator(selector).inner_text()


@contextmanager
def browser(origin: str, **context: Any) -> Iterator[Browser]:
    # As root, as containers are, Chromium has no sandbox.
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield Browser(chromium.new_context(**context).new_page(), origin)
        chromium.close()
