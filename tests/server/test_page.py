"""The page: what is served, to whom, and what a real browser makes of it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Thread
from typing import Any

import httpx2 as httpx
import pytest
from playwright.sync_api import Browser, Page, Request, Route, expect, sync_playwright
from running import MODEL, Running, eventually, running

from tael.economics.journal import Outcome
from tael.economics.keys import Keys
from tael.economics.ledger import Ledger
from tael.economics.rate_card import Rate, RateCard, Tier
from tael.request import Usage
from tael.server.page import FILES

CARD = RateCard("1", "USD", (Rate("*", (Tier(input=10**9, output=10**10),)),))
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


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


@contextmanager
def busy(server: Running) -> Iterator[None]:
    """Somebody else's requests, one after the other."""
    ended = Event()
    body = {"model": MODEL, "prompt": "a", "max_tokens": 200, "n": 4, "ignore_eos": True}

    def call() -> None:
        with server.http() as http:
            while not ended.is_set():
                assert http.post("/v1/completions", json=body).status_code == 200

    thread = Thread(target=call)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


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


@pytest.mark.parametrize("path", ["/index.html", "/page", "/page/", "/page.css/", "/page.py"])
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
    eventually(lambda: live(server)["tiers"][0]["cached_bytes"] > 0)
    (memory,) = live(server)["tiers"]
    assert memory["name"] == "memory" and memory["used_bytes"] == 0
    assert memory["cached_bytes"] < memory["capacity_bytes"]


def test_live_figures_of_a_running_request(server: Running) -> None:
    with busy(server):
        eventually(lambda: live(server)["requests"]["running"] > 0)
        eventually(lambda: live(server)["tiers"][0]["used_bytes"] > 0)


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
    ledger.settle("unknown", Usage(), Outcome.ABORTED).exception()  # what came before is written
    own = live(guarded, payer)["key"]
    assert own["prompt_tokens"] == 80 and own["cached_tokens"] == 32
    # 48 at 1000 nano, 32 at a tenth of that; output at 10 times it.
    expected = 48 * 1000 + 32 * 100 + own["output_tokens"] * 10_000
    assert own["cost"] == {"currency": "USD", "nano": expected}
    after = live(guarded, other)
    assert after["key"] == before["key"]
    assert after["key"]["cost"] == {"currency": "USD", "nano": 0}
    assert payer.split("_")[1] not in str(after)


ENDLESS = {"temperature": 0, "ignore_eos": True}
"""Laid over what the page asks for: an answer that ends with the context, the same each time."""

FIRST_TEXT = """() => new Promise((done) => {
    const has = () => document.querySelector(".assistant .text")?.textContent && done();
    new MutationObserver(has).observe(document.getElementById("log"),
        {childList: true, subtree: true, characterData: true});
    has();
})"""


@dataclass
class Visit:
    """A page, and what it complained of and asked for."""

    page: Page
    origin: str
    complaints: list[str] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)
    sent: list[dict[str, Any]] = field(default_factory=list)
    """The bodies of its requests for answers."""

    def begin(self) -> None:
        page = self.page
        page.on("console", lambda m: m.type in ("error", "warning") and self.complain(m.text))
        page.on("pageerror", lambda error: self.complain(str(error)))
        page.on("request", self.note)
        page.route("**/v1/chat/completions", self.answer)
        page.goto(self.origin)

    def complain(self, text: str) -> None:
        self.complaints.append(text)

    def note(self, request: Request) -> None:
        if not request.url.startswith(f"{self.origin}/"):
            self.elsewhere.append(request.url)

    def answer(self, route: Route) -> None:
        body = json.loads(route.request.post_data or "")
        self.sent.append(body)
        route.continue_(post_data=json.dumps({**body, **ENDLESS}))

    def say(self, text: str) -> None:
        """By keyboard, with the cursor where it is."""
        self.page.keyboard.type(text)
        self.page.keyboard.press("Enter")

    def texts(self, selector: str) -> list[str]:
        return self.page.locator(selector).all_inner_texts()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("there is no chromium on the PATH")
    with sync_playwright() as playwright:
        # No sandbox: as root, which containers run as, Chromium has none.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def visit(chromium: Browser, server: Running, **options: Any) -> Iterator[Visit]:
    with chromium.new_context(**options) as context:
        visit = Visit(context.new_page(), server.url)
        visit.begin()
        yield visit
        assert not visit.elsewhere


def test_a_chat(server: Running, chromium: Browser) -> None:
    with visit(chromium, server) as it:
        page = it.page
        expect(page.locator("#model")).to_have_text(MODEL)
        expect(page.locator("#state")).to_have_text("ready")
        expect(page.locator("#input")).to_be_focused()
        before = page.locator("#tiers").inner_text()

        page.keyboard.type("two")
        page.keyboard.press("Shift+Enter")
        it.say("lines <b>&amp;")
        expect(page.locator(".assistant .note")).to_contain_text("Cut off")
        assert it.sent[0]["messages"] == [{"role": "user", "content": "two\nlines <b>&amp;"}]
        assert it.texts(".user .text") == ["two\nlines <b>&amp;"]
        assert len(page.locator(".assistant .text").text_content() or "") > 50
        expect(page.locator("#log b")).to_have_count(0)
        expect(page.locator("#rate")).not_to_have_text("0.0")
        expect(page.locator("#tiers")).not_to_have_text(before)

        it.say("too long by now")
        expect(page.locator(".assistant .error")).to_contain_text("maximum context length is 256")
        assert len(it.sent[1]["messages"]) == 3
        expect(page.locator("#input")).to_have_value("too long by now")
        assert [text for text in it.complaints if "400 (Bad Request)" not in text] == []


def test_an_answer_is_text(server: Running, chromium: Browser) -> None:
    """Whatever a model says."""
    evil = "<img src=/nothing onerror=alert(1)><script>alert(1)</script>"
    events = [{"choices": [{"index": 0, "delta": {"content": evil}, "finish_reason": None}]}]
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
    with visit(chromium, server) as it:
        it.page.route("**/v1/chat/completions", lambda route: route.fulfill(body=body))
        expect(it.page.locator("#state")).to_have_text("ready")
        it.say("a")
        expect(it.page.locator(".assistant .text")).to_have_text(evil)
        expect(it.page.locator("#log img, #log script")).to_have_count(0)
        assert it.complaints == []


def test_escape_stops(server: Running, chromium: Browser) -> None:
    with visit(chromium, server) as it, busy(server):
        page = it.page
        expect(page.locator("#running")).to_have_text(re.compile("[1-9]"))
        expect(page.locator("#tiers .legend .used")).not_to_contain_text("0 B")
        it.say("a")
        page.evaluate(FIRST_TEXT)
        engine = server.service.engine.pid
        assert engine is not None
        os.kill(engine, signal.SIGSTOP)  # so that the answer does not end before the key arrives
        try:
            expect(page.locator("#stop")).to_be_visible()
            page.keyboard.press("Escape")
            expect(page.locator(".assistant .note")).to_have_text("Stopped.")
        finally:
            os.kill(engine, signal.SIGCONT)
        expect(page.locator("#stop")).to_be_hidden()
        said = page.locator(".assistant .text").text_content()
        it.say("b")  # what was said stays in the conversation
        expect(page.locator(".assistant")).to_have_count(2)
        assert [message["content"] for message in it.sent[1]["messages"]] == ["a", said, "b"]
        page.get_by_role("button", name="New chat").click()
        expect(page.locator("#log article")).to_have_count(0)
        assert it.complaints == []


def test_a_key_is_asked_for(guarded: Running, keys: Keys, chromium: Browser) -> None:
    _, token = keys.create("page")
    with visit(chromium, guarded) as it:
        page = it.page
        expect(page.get_by_label("API key")).to_be_focused()
        it.say("wrong")
        expect(page.get_by_role("alert")).to_have_text("Incorrect API key provided.")
        expect(page.get_by_label("API key")).to_be_focused()
        it.say(token)
        expect(page.locator("#state")).to_have_text("ready")
        expect(page.locator("#cost")).to_have_text("0.00 USD")
        expect(page.get_by_label("Message")).to_be_focused()
        it.say("a")
        expect(page.locator("#cost")).to_have_text(re.compile(r"0\.00[1-9]\d+ USD"))
        page.reload()
        expect(page.locator("#state")).to_have_text("ready")
        page.get_by_role("button", name="Forget key").click()
        page.reload()
        expect(page.locator("#key-form")).to_be_visible()
        assert all("401 (Unauthorized)" in text for text in it.complaints)


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits(server: Running, chromium: Browser, width: int, scheme: Any) -> None:
    size: Any = {"width": width, "height": 740}
    with visit(chromium, server, viewport=size, color_scheme=scheme) as it:
        expect(it.page.locator("#state")).to_have_text("ready")
        it.say("word" * 30)
        expect(it.page.locator(".assistant .note")).not_to_be_empty()
        for selector in ("#send", "#input", "header", "#live summary"):
            box = it.page.locator(selector).bounding_box()
            assert box is not None
            assert box["x"] >= 0 and box["x"] + box["width"] <= width
            assert box["y"] >= 0 and box["y"] + box["height"] <= 740
        assert it.page.evaluate("document.documentElement.scrollWidth") <= width
        back = it.page.evaluate("getComputedStyle(document.body).backgroundColor")
        brightness = sum(map(int, re.findall(r"\d+", back)))
        assert (brightness < 200) == (scheme == "dark")
        if folder := os.environ.get("TAEL_SCREENSHOTS"):
            it.page.screenshot(path=f"{folder}/page-{scheme}-{width}.png")
