"""``tael keys`` and ``tael usage`` as a user runs them."""

from __future__ import annotations

import csv
import json
from contextlib import closing
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tael.cli.main import main
from tael.economics.journal import Outcome
from tael.economics.keys import Keys
from tael.economics.ledger import Ledger
from tael.economics.rate_card import FREE, Rate, RateCard, Tier
from tael.loader.paths import keys_file, ledger_file
from tael.request import Usage

CARD = RateCard("v1", "USD", (Rate("*", (Tier(10**9, 10**9),)),))
DAY_S = 86400.0


@pytest.fixture(autouse=True)
def data_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))


def tael(*args: str) -> Result:
    return CliRunner().invoke(main, args)


def fill(card: RateCard = CARD) -> None:
    """Three requests, one a day, of which the last was free."""
    now_s = 0.0
    with closing(Ledger(ledger_file(), card, clock=lambda: now_s)) as ledger:
        for request_id, key_id in (("a", "k1"), ("b", "k2"), ("c", "k2")):
            ledger.reserve(
                request_id, key_id=key_id, model="m", num_prompt_tokens=9, max_output_tokens=9
            )
            tokens = 0 if request_id == "c" else 2
            usage = Usage(2000, 200, 100, tokens)
            ledger.settle(request_id, usage, Outcome.ABORTED).result()
            now_s += DAY_S


def test_the_life_of_a_key() -> None:
    made = tael(
        *("keys", "create", "ann", "--tenant", "acme", "--share-group", "law"),
        *("--max-concurrency", "2", "--requests-per-min", "60", "--tokens-per-min", "1000"),
        *("--weight", "5"),
    )
    token = made.stdout.strip()
    keys = Keys(keys_file())
    key = keys.verify(token)
    assert key is not None and key.key_id in made.stderr and "cannot be shown again" in made.stderr
    listed = tael("keys", "list").stdout
    header, row = listed.splitlines()
    assert header.split()[:3] == ["KEY", "NAME", "TENANT"]
    assert row.split()[:4] == [key.key_id, "ann", "acme", "law"]
    assert "2 at a time, 60 requests/min, 1,000 tokens/min, weight 5" in row
    (entry,) = json.loads(tael("keys", "list", "--json").stdout)
    assert (entry["key_id"], entry["weight"], entry["revoked_at"]) == (key.key_id, 5, None)
    assert token.rpartition("_")[2] not in listed + json.dumps(entry)

    assert tael("keys", "revoke", key.key_id).exit_code == 0
    assert keys.verify(token) is None
    assert json.loads(tael("keys", "list", "--json").stdout)[0]["revoked_at"] > 0
    missing = tael("keys", "revoke", "nobody")
    assert missing.exit_code == 2 and "there is no key nobody" in missing.stderr


def test_the_files_may_be_elsewhere(tmp_path: Path) -> None:
    path = tmp_path / "mine.sqlite"
    token = tael("keys", "create", "ann", "--keys", str(path)).stdout.strip()
    assert Keys(path).verify(token) is not None
    assert not keys_file().exists()


def test_usage_as_a_table() -> None:
    fill()
    lines = tael("usage", "--by", "key").stdout.splitlines()
    assert [line.split() for line in lines] == [
        ["KEY", "REQUESTS", "FRESH", "CACHE", "READ", "CACHE", "WRITE", "OUTPUT", "USD"],
        ["k1", "1", "1,700", "200", "100", "2", "0.001822000"],
        ["k2", "2", "3,400", "400", "200", "2", "0.001822000"],
    ]


def test_usage_as_json_and_csv() -> None:
    fill()
    report = json.loads(tael("usage", "--by", "day,key,model", "--format", "json").stdout)
    assert report["currency"] == "USD"
    assert [(r["day"], r["key"], r["amount_nano"]) for r in report["rows"]] == [
        ("1970-01-01", "k1", 1_822_000),
        ("1970-01-02", "k2", 1_822_000),
        ("1970-01-03", "k2", 0),
    ]
    text = tael("usage", "--by", "day,key,model", "--format", "csv").stdout
    rows = list(csv.DictReader(text.splitlines()))
    assert [{**row, "currency": "USD"} for row in report["rows"]] == [
        {k: int(v) if k not in ("day", "key", "model", "currency") else v for k, v in row.items()}
        for row in rows
    ]


def test_usage_of_some_days() -> None:
    fill()
    for args, keys in (
        (("--since", "1970-01-02"), ["k2"]),
        (("--until", "1970-01-02"), ["k1"]),
        (("--since", "1970-01-04"), []),
    ):
        rows = json.loads(tael("usage", "--by", "key", "--format", "json", *args).stdout)["rows"]
        assert [row["key"] for row in rows] == keys
    assert tael("usage", "--since", "1970-01-04").exit_code == 0


def test_without_prices_tokens_are_counted() -> None:
    fill(FREE)
    assert tael("usage", "--by", "model").stdout.splitlines()[1].split()[-1] == "0.000000000"


def test_refund(tmp_path: Path) -> None:
    fill()
    assert tael("usage", "refund", "a", "--reason", "goodwill").stdout == (
        "a: now charged 0.000000000\n"
    )
    assert "no charge to correct" in tael("usage", "refund", "a", "--reason", "again").stderr
    card = tmp_path / "card.json"
    card.write_text(RateCard("v2", "USD", (Rate("*", (Tier(10**6, 10**6),)),)).encode())
    rated = tael("usage", "refund", "b", "--reason", "wrong card", "--rate-card", str(card))
    assert rated.stdout == "b: now charged 0.000001822\n"
    rows = json.loads(tael("usage", "--by", "key", "--format", "json").stdout)["rows"]
    assert [(r["key"], r["requests"], r["amount_nano"]) for r in rows] == [
        ("k1", 1, 0),
        ("k2", 2, 1822),
    ]


def test_errors_of_users() -> None:
    for args in (("usage",), ("usage", "refund", "a", "--reason", "x")):
        result = tael(*args)
        assert result.exit_code == 2 and "there is no ledger" in result.stderr
    assert not ledger_file().exists(), "asking makes none"
    assert "choose some of key,model,day" in tael("usage", "--by", "colour").stderr
    assert "choose some of key,model,day" in tael("usage", "--by", "key,key").stderr
