"""Kill the engine and the server (SIGKILL) under load, again and again; then stop the engine.

    python -m benchmarks.server_kill [--model NAME] [--kills 200]

Half of the kills hit the engine process, half the whole server, some while either starts. Clients
send requests all the time. A killed engine must end every stream with an error event and be
replaced; a killed server must, when it is started again, settle what it left open. In the end every
request that a client has seen must be settled exactly once: a whole answer at the usage that it
said, one that lost its engine at the tokens that came, one that lost its server at no more.

Then, with the default settings: the engine is stopped (SIGSTOP) under streams, and the server told
to end (SIGTERM) under streams. Results go to ``benchmarks/results/server-kill.json``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import machine
from benchmarks.serving import NAME, Answer, Serving, charges_of, connect, read_head, request_bytes
from tael.loader.sources import resolve

RESULTS = Path(__file__).with_name("results") / "server-kill.json"
NUM_CLIENTS = 8
NUM_STREAMS = 32
LONGEST_LIFE_S = 1.5
"""From when a server is ready until something is killed."""
MAX_DELTA_TOKENS = 16
"""That a step can give to a request."""


@dataclass
class Life:
    """Of a server process: what its clients have seen."""

    answers: list[Answer] = field(default_factory=list)
    is_killed: bool = False
    num_silent_ends: int = 0
    """Streams that ended with neither their end nor an error, while it lived."""


def body(rng: random.Random, max_tokens: int, is_stream: bool = True) -> dict[str, Any]:
    return {
        "model": NAME,
        "prompt": [rng.randrange(200) for _ in range(rng.randrange(5, 300))],
        "max_tokens": max_tokens,
        "seed": rng.randrange(1 << 31),
        "ignore_eos": True,
        "logprobs": 0,  # of every token that comes, to count them
        "stream": is_stream,
        **({"stream_options": {"include_usage": True}} if is_stream else {}),
    }


async def ask(port: int, body: dict[str, Any], answer: Answer) -> None:
    """Send a request and see what comes until the connection ends."""
    with suppress(OSError, asyncio.IncompleteReadError):
        reader, writer = await connect(port)
        try:
            writer.write(request_bytes(body))
            await read_head(reader, answer)
            while line := await reader.readline():
                answer.read(line)
        finally:
            writer.close()


class Killer:
    """Kills engines and servers, and restarts servers, while clients ask."""

    def __init__(self, serving: Serving, seed: int) -> None:
        self._serving = serving
        self._rng = random.Random(seed)
        self._is_over = False
        self.lives: list[Life] = []
        self.engine_pids: set[int] = set()
        self._killed_pid: int | None = None
        self.recovery_s: dict[str, list[float]] = {"engine": [], "server": []}

    async def run(self, num_kills: int) -> None:
        targets = ["engine", "server"] * (num_kills // 2)
        self._rng.shuffle(targets)
        await self._start()
        clients = [asyncio.create_task(self._client(i)) for i in range(NUM_CLIENTS)]
        while not any(answer.is_whole for answer in self.lives[0].answers):
            await asyncio.sleep(0.01)
        for target, following in zip(targets, [*targets[1:], None], strict=True):
            await asyncio.sleep(self._rng.random() * LONGEST_LIFE_S)
            begin_s = time.perf_counter()
            await (self._kill_engine() if target == "engine" else self._kill_server())
            if target != following or self._rng.random() < 0.6:  # or it is killed as it starts
                await asyncio.to_thread(self._serving.wait_until_ready, self._killed_pid)
                self.recovery_s[target].append(time.perf_counter() - begin_s)
        self._is_over = True
        await asyncio.gather(*clients)

    async def _start(self) -> None:
        self.lives.append(Life())
        self._serving.start()
        await asyncio.to_thread(self._serving.wait_until_ready)

    async def _kill_engine(self) -> None:
        pid = await asyncio.to_thread(self._serving.wait_for_engine, self._killed_pid)
        self._note(pid)
        os.kill(pid, signal.SIGKILL)

    async def _kill_server(self) -> None:
        self._note(self._serving.engine_pid)
        self.lives[-1].is_killed = True
        self._serving.kill()
        self.lives.append(Life())
        self._serving.start()

    def _note(self, pid: int | None) -> None:
        """An engine that must not outlive what comes."""
        self._killed_pid = pid
        if pid is not None:
            self.engine_pids.add(pid)

    async def _client(self, number: int) -> None:
        rng = random.Random(number)
        while not self._is_over:
            answer, life = Answer(), self.lives[-1]
            life.answers.append(answer)
            is_stream = rng.random() < 0.75
            max_tokens = rng.choice([20, 100, 600])
            await ask(self._serving.port, body(rng, max_tokens, is_stream), answer)
            is_ended = answer.is_whole or answer.error
            life.num_silent_ends += answer.status == 200 and not is_ended and not life.is_killed
            if answer.status != 200:
                await asyncio.sleep(0.02)


def kill_often(
    model: Path, folder: Path, num_kills: int, seed: int, *options: str
) -> dict[str, Any]:
    """All counts after ``recovery_s`` should be 0."""
    serving = Serving(model, folder, *options)
    killer = Killer(serving, seed)
    try:
        asyncio.run(killer.run(num_kills))
    finally:
        exit_code = serving.stop()
    recovery_s = {
        name: {"median": round(median(times), 2), "longest": round(max(times), 2)}
        for name, times in killer.recovery_s.items()
    }
    return {
        "kills": num_kills,
        **check(serving.ledger, killer.lives, recovery_s),
        "engines_left": sum(is_running(pid) for pid in killer.engine_pids),
        "exit_code": exit_code,
    }


def check(ledger: Path, lives: list[Life], recovery_s: dict[str, Any]) -> dict[str, Any]:
    """Compare the ledger with what clients have seen."""
    charges, wrong = charges_of(ledger)
    seen = [answer for life in lives for answer in life.answers if answer.request_id]
    settled = [(a, charges[a.request_id]) for a in seen if a.request_id in charges]
    whole = [(a, charge) for a, charge in settled if a.is_whole]
    failed = [(a, charge) for a, charge in settled if charge.reason == "failed"]
    recovered = [(a, charge) for a, charge in settled if charge.reason == "recovered"]
    return {
        "requests_seen": len(seen),
        "answered_whole": len(whole),
        "streams_ended_by_error": sum(a.status == 200 and bool(a.error) for a in seen),
        "settled_by_recovery": sum(c.reason == "recovered" for c in charges.values()),
        "recovery_s": recovery_s,
        "lost": len(seen) - len(settled),
        **wrong,
        "whole_and_not_so_charged": sum(
            (a.usage or {}).get("completion_tokens") != charge.num_output_tokens
            or (a.usage or {}).get("prompt_tokens") != charge.num_prompt_tokens
            for a, charge in whole
        ),
        "failed_and_not_charged_as_delivered": sum(
            a.num_tokens != charge.num_output_tokens for a, charge in failed
        ),
        "recovered_and_overcharged": sum(
            charge.num_output_tokens > a.num_tokens + MAX_DELTA_TOKENS for a, charge in recovered
        ),
        "streams_that_just_ended": sum(life.num_silent_ends for life in lives),
    }


def is_running(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


async def streams_under_way(serving: Serving, number: int) -> list[asyncio.Task[Answer]]:
    """Long streams, each of which has had a token."""
    rng = random.Random(0)
    answers = [Answer() for _ in range(number)]

    async def one(answer: Answer) -> Answer:
        await ask(serving.port, body(rng, 1000), answer)
        return answer

    tasks = [asyncio.create_task(one(answer)) for answer in answers]
    while not all(answer.num_tokens for answer in answers):
        await asyncio.sleep(0.01)
    return tasks


async def hang(serving: Serving) -> dict[str, float]:
    """Stop the engine. The seconds until each thing that ought to follow."""
    tasks = await streams_under_way(serving, NUM_CLIENTS)
    pid = serving.engine_pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    begin_s = time.perf_counter()
    seconds: dict[str, float] = {}
    while len(seconds) < 3:
        is_ready = await asyncio.to_thread(lambda: serving.is_ready)
        elapsed_s = round(time.perf_counter() - begin_s, 2)
        if not is_ready:
            seconds.setdefault("not_ready_s", elapsed_s)
        if all(task.done() for task in tasks):
            seconds.setdefault("streams_ended_s", elapsed_s)
        if is_ready and "not_ready_s" in seconds:
            seconds.setdefault("ready_again_s", elapsed_s)
        await asyncio.sleep(0.02)
    answers = await asyncio.gather(*tasks)
    again = Answer()
    await ask(serving.port, body(random.Random(1), 10), again)
    return {
        **seconds,
        "streams": len(answers),
        "streams_ended_by_error": sum(bool(answer.error) for answer in answers),
        "answered_after": float(again.is_whole),
    }


async def drain(serving: Serving) -> dict[str, int]:
    """Tell the server to end."""
    tasks = await streams_under_way(serving, NUM_STREAMS)
    exit_code = await asyncio.to_thread(serving.stop)
    answers = await asyncio.gather(*tasks)
    whole = sum(answer.is_whole for answer in answers)
    return {"streams": len(answers), "answered_whole": whole, "exit_code": exit_code}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2:135m")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--hangs", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # not without the server
    model = resolve(args.model)
    options = ("--context", "2048", "--memory", "1GiB", "--threads", "1")
    with tempfile.TemporaryDirectory() as folder:
        kills = kill_often(model, Path(folder), args.kills, 1, *options)
    with tempfile.TemporaryDirectory() as folder:
        serving = Serving(model, Path(folder), *options)
        serving.start()
        serving.wait_until_ready()
        hangs = [asyncio.run(hang(serving)) for _ in range(args.hangs)]
        drained = asyncio.run(drain(serving))
    report = {
        **machine.stamp(),
        "model": args.model,
        "kills": kills,
        "hangs": hangs,
        "drain": drained,
    }
    args.output.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
