"""Kill a process that writes a ledger, again and again, and see what is left.

    python -m benchmarks.ledger_kill [--kills 200]

The writer serves made-up requests from several threads, and says on a pipe what the ledger has
acknowledged. It is killed (SIGKILL) after a random number of those lines, sometimes while it still
settles what the one before it left open. In the end every request that was acknowledged must be
settled exactly once: by the price that was acknowledged, or, if the writer died first, by the last
progress on record. Results go to ``benchmarks/results/ledger-kill.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from contextlib import closing
from itertools import count
from pathlib import Path

from tael.economics.journal import Outcome
from tael.economics.ledger import Ledger
from tael.economics.rate_card import Rate, RateCard, Tier
from tael.economics.report import usage_report
from tael.errors import TaelError
from tael.request import Usage

RESULTS = Path(__file__).with_name("results") / "ledger-kill.json"
CARD = RateCard("v1", "USD", (Rate("*", (Tier(10 * 10**6, 40 * 10**6),)),))
NUM_THREADS = 8
NUM_PROMPT_TOKENS = 100
MAX_OUTPUT_TOKENS = 9


def price(num_output_tokens: int) -> int:
    return 10 * NUM_PROMPT_TOKENS + 40 * num_output_tokens if num_output_tokens else 0


def write(path: Path, seed: int) -> None:
    """Serve until killed. A line: what was acknowledged, of which request, how many tokens."""
    os.write(1, b"open - 0\n")
    ledger = Ledger(path, CARD)

    def serve(thread: int) -> None:
        rng = random.Random(f"{seed}/{thread}")
        for i in count():
            request_id = f"{seed}/{thread}/{i}"
            ledger.reserve(
                request_id,
                key_id=f"key{thread}",
                model="m",
                num_prompt_tokens=NUM_PROMPT_TOKENS,
                max_output_tokens=MAX_OUTPUT_TOKENS,
            ).result()
            say("reserve", request_id, 0)
            num_tokens = rng.randrange(MAX_OUTPUT_TOKENS)
            for j in range(1, num_tokens + 1, 3):
                ledger.progress(request_id, Usage(NUM_PROMPT_TOKENS, num_output_tokens=j)).result()
                say("progress", request_id, j)
            usage = Usage(NUM_PROMPT_TOKENS, num_output_tokens=num_tokens)
            amount_nano = ledger.settle(request_id, usage, Outcome.ABORTED).result()
            assert amount_nano == price(num_tokens)
            say("settle", request_id, num_tokens)

    for thread in range(NUM_THREADS):
        threading.Thread(target=serve, args=(thread,)).start()


def say(what: str, request_id: str, num_tokens: int) -> None:
    os.write(1, f"{what} {request_id} {num_tokens}\n".encode())  # one write: lines stay whole


def write_and_kill(path: Path, seed: int, rng: random.Random) -> list[tuple[str, str, int]]:
    """What one writer acknowledged in its life."""
    command = [sys.executable, "-m", "benchmarks.ledger_kill", "--write", str(path), str(seed)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout
        # One in four dies early, perhaps during the recovery.
        num_lines = 1 if rng.random() < 0.25 else rng.randrange(2, 300)
        lines = [process.stdout.readline() for _ in range(num_lines)]
        try:
            process.wait(rng.random() * 0.02)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        lines += process.stdout.read().splitlines(keepends=True)
    if process.returncode != -signal.SIGKILL:
        raise TaelError("the writer ended by itself; run it by hand with --write to see why.")
    words = [line.decode().split() for line in lines if line.endswith(b"\n")]
    return [(what, request_id, int(num_tokens)) for what, request_id, num_tokens in words]


def check(path: Path, acknowledged: list[tuple[str, str, int]]) -> dict[str, int]:
    """Recover, then compare. Everything but the first two counts should be 0."""
    Ledger(path, CARD).close()
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        query = "SELECT request_id, amount_nano, output_tokens FROM charges"
        charges = connection.execute(query).fetchall()
        (num_reserved,) = connection.execute("SELECT count(*) FROM reservations").fetchone()
    num_charges = Counter(request_id for request_id, _, _ in charges)
    charged = {request_id: (amount, tokens) for request_id, amount, tokens in charges}
    delivered: dict[str, int] = {}
    settled: dict[str, int] = {}
    for what, request_id, num_tokens in acknowledged:
        if what != "open":
            delivered[request_id] = num_tokens
        if what == "settle":
            settled[request_id] = num_tokens
    _, report = usage_report(path, ["key"])
    sum_of_report = sum(int(row["amount_nano"]) for row in report)
    return {
        "requests_acknowledged": len(delivered),
        "requests_recovered": num_reserved - len(settled),
        "lost": sum(request_id not in charged for request_id in delivered),
        "settled_twice": sum(n > 1 for n in num_charges.values()),
        "never_settled": num_reserved - len(num_charges),
        "settlements_changed": sum(charged[i] != (price(n), n) for i, n in settled.items()),
        "progress_lost": sum(charged[i][1] < n for i, n in delivered.items()),
        "mispriced": sum(amount != price(tokens) for amount, tokens in charged.values()),
        "sum_differs_by": sum_of_report - sum(price(tokens) for _, tokens in charged.values()),
    }


def run(num_kills: int, seed: int) -> dict[str, int]:
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.sqlite"
        acknowledged: list[tuple[str, str, int]] = []
        for i in range(num_kills):
            acknowledged += write_and_kill(path, i, rng)
        return {"kills": num_kills, **check(path, acknowledged)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--write", nargs=2, metavar=("LEDGER", "SEED"), help="be the writer")
    args = parser.parse_args()
    if args.write:
        write(Path(args.write[0]), int(args.write[1]))
        return
    from benchmarks import machine

    result = run(args.kills, seed=1)
    report = {
        "machine": machine.machine(),
        "versions": machine.versions() | {"sqlite": sqlite3.sqlite_version},
        "date": machine.today(),
        "results": result,
    }
    RESULTS.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
