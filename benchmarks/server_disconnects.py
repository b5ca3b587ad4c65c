"""Clients that go away at random points of their requests; blocks and ledger must balance.

    python -m benchmarks.server_disconnects [--model NAME] [--disconnects 2000]

Some leave while they send, others right after, while the prompt is computed, at the first token,
or in the middle of the answer; some close the connection, some reset it; one in eight stays.
Then no request, no token and no KV block may be held any more, every reservation of the ledger must
be settled once, at the price of what the engine says that it computed, and that must cover what
clients received. Results go to ``benchmarks/results/server-disconnects.json``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import socket
import struct
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.serving import NAME, Answer, Serving, charges_of, connect, read_head, request_bytes
from tael.errors import TaelError
from tael.loader.sources import resolve

RESULTS = Path(__file__).with_name("results") / "server-disconnects.json"
POINTS = ("while sending", "after sending", "in the prompt", "at the first token", "in the answer")
NUM_CLIENTS = 16
MAX_TOKENS = 64
LONGEST_PROMPT_S = 0.3
"""After which a client leaves that waits for its prompt at most."""
WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "sleeps")


def random_body(rng: random.Random, is_stream: bool) -> dict[str, Any]:
    """A request of one prompt or several, with one answer to each or several."""
    prompts = [
        " ".join(rng.choices(WORDS, k=rng.randrange(5, 250))) for _ in range(rng.choice([1, 1, 2]))
    ]
    return {
        "model": NAME,
        "prompt": prompts,
        "n": rng.choice([1, 1, 1, 3]),
        "max_tokens": rng.randrange(1, MAX_TOKENS),
        "temperature": 0.7,
        "seed": rng.randrange(1 << 31),
        "ignore_eos": True,
        "logprobs": 0,  # of every token that comes, to count them
        "stream": is_stream,
        **({"stream_options": {"include_usage": True}} if is_stream else {}),
    }


async def client(port: int, rng: random.Random, point: str | None) -> Answer:
    """Send a request and go away at ``point``, or stay. What was seen until then."""
    answer = Answer()
    is_stream = point in POINTS[3:] or rng.random() < 0.75
    message = request_bytes(random_body(rng, is_stream))
    reader, writer = await connect(port)
    try:
        if point == "while sending":
            writer.write(message[: rng.randrange(1, len(message))])
            await writer.drain()
            return answer
        writer.write(message)
        await writer.drain()
        if point == "after sending":
            return answer
        if point == "in the prompt":
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(read_head(reader, answer), rng.random() * LONGEST_PROMPT_S)
            return answer
        await read_head(reader, answer)
        num_wanted = {"at the first token": 1, "in the answer": rng.randrange(1, MAX_TOKENS)}
        while line := await reader.readline():
            answer.read(line)
            if point is not None and answer.num_tokens >= num_wanted[point]:
                return answer
    finally:
        if rng.random() < 0.5:
            linger = struct.pack("ii", 1, 0)  # reset, not closed
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        writer.close()
    return answer


async def clients(port: int, num_disconnects: int, seed: int) -> list[tuple[str, Answer]]:
    """All of them, NUM_CLIENTS at a time: where each left, and what it saw."""
    rng = random.Random(seed)
    seen: list[tuple[str, Answer]] = []
    plan: list[tuple[int, str | None]] = []
    while sum(point is not None for _, point in plan) < num_disconnects:
        point = None if rng.random() < 1 / 8 else rng.choice(POINTS)
        plan.append((rng.randrange(1 << 31), point))
    waiting = iter(plan)

    async def some() -> None:
        for client_seed, point in waiting:
            answer = await client(port, random.Random(client_seed), point)
            seen.append((point or "not at all", answer))

    await asyncio.gather(*(some() for _ in range(NUM_CLIENTS)))
    return seen


def held(metrics: dict[str, float]) -> dict[str, float]:
    """What requests hold."""
    names = ("num_requests_held", "num_tokens_held", "num_requests_queued", "kv_blocks_referenced")
    return {name: metrics[name] for name in names}


def run(
    model: Path, folder: Path, num_disconnects: int, seed: int, *options: str
) -> dict[str, Any]:
    """All counts after the first few should be 0."""
    serving = Serving(model, folder, *options)
    serving.start()
    try:
        serving.wait_until_ready()
        baseline = held(serving.metrics())
        seen = asyncio.run(clients(serving.port, num_disconnects, seed))
        deadline_s = time.monotonic() + 60
        while held(serving.metrics()) != baseline and time.monotonic() < deadline_s:
            time.sleep(0.01)
        metrics = serving.metrics()
    finally:
        if serving.stop():
            raise TaelError("the server failed; see its log.")
    left = {name: value - baseline[name] for name, value in held(metrics).items()}
    return {**check(serving.ledger, seen, metrics), **{f"{k}_more": v for k, v in left.items()}}


def check(
    ledger: Path, seen: list[tuple[str, Answer]], metrics: dict[str, float]
) -> dict[str, Any]:
    """Compare the ledger with what clients have seen and with what the engine has counted."""
    charges, wrong = charges_of(ledger)
    answers = [answer for _, answer in seen if answer.request_id]
    whole = [answer for answer in answers if answer.is_whole]
    settled = {a.request_id: charges[a.request_id] for a in answers if a.request_id in charges}

    def usage_differs(answer: Answer) -> bool:
        charge, usage = settled[answer.request_id], answer.usage or {}
        counts = (usage.get("prompt_tokens"), usage.get("completion_tokens"))
        return counts != (charge.num_prompt_tokens, charge.num_output_tokens)

    sums = {
        "prompt_tokens_total": sum(c.num_prompt_tokens for c in charges.values()),
        "generation_tokens_total": sum(c.num_output_tokens for c in charges.values()),
    }
    return {
        "disconnects": sum(point in POINTS for point, _ in seen),
        "where": dict(sorted(Counter(point for point, _ in seen).items())),
        "requests_recorded": len(charges),
        "reasons": dict(sorted(Counter(c.reason for c in charges.values()).items())),
        "prompt_tokens": sums["prompt_tokens_total"],
        "output_tokens": sums["generation_tokens_total"],
        "refused": sum(a.status not in (0, 200) for _, a in seen),
        "not_whole": sum(point == "not at all" and not a.is_whole for point, a in seen),
        "lost": len(answers) - len(settled),
        **wrong,
        "usage_differs": sum(map(usage_differs, whole)),
        "delivered_and_not_charged": sum(
            answer.num_tokens > settled[answer.request_id].num_output_tokens for answer in answers
        ),
        "sums_differ_by": sum(abs(value - metrics[name]) for name, value in sums.items()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2:135m")
    parser.add_argument("--disconnects", type=int, default=2000)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # not without the server
    with tempfile.TemporaryDirectory() as folder:
        options = ("--context", "2048", "--memory", "1GiB", "--threads", "1")
        result = run(resolve(args.model), Path(folder), args.disconnects, 1, *options)
    report = {**machine.stamp(), "model": args.model, "results": result}
    args.output.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
