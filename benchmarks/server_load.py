"""32 users of a chat server, ten times as many as it has places for, and llama-server beside it.

    python -m benchmarks.server_load [--model NAME] [--streams-s 600] [--overload-s 120] ...

The users are those of ``benchmarks.chat_users``, run by locust on the same machine. Then Tael and
``llama-server`` serve the same users in turn, with as many slots, threads and the same model file;
``llama-server`` first tries its settings and goes on with the fastest. Only what comes after the
warm-up counts. Results go to ``benchmarks/results/server-load.json``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import msgspec

from benchmarks import machine
from benchmarks.chats import Sample
from benchmarks.peers import llama_cpp
from benchmarks.serving import Serving, free_port, responds, wait_until
from tael.errors import TaelError
from tael.loader.sources import resolve

RESULTS = Path(__file__).with_name("results") / "server-load.json"
ROOT = Path(__file__).parents[1]
NUM_USERS = 32
NUM_FEW = 2
OVERLOAD = 10
MAX_TOKENS = 2048
"""Of a request: more than the longest of ``benchmarks.chats``."""
PEER_OPTIONS = (
    ("-fa", "on"),
    ("-fa", "off"),
    ("-fa", "on", "--kv-unified"),
)


def measure(
    url: str, num_users: int, duration_s: float, warm_up_s: float, rate: float | None = None
) -> dict[str, Any]:
    """What so many users see in ``duration_s`` after the warm-up."""
    with tempfile.NamedTemporaryFile(suffix=".jsonl") as file:
        command = [sys.executable, "-m", "locust", "-f", str(ROOT / "benchmarks/chat_users.py")]
        command += ["--headless", "--host", url, "--users", str(num_users)]
        command += ["--spawn-rate", str(max(1.0, num_users / warm_up_s))]
        command += ["--run-time", f"{warm_up_s + duration_s:.0f}s"]
        command += ["--samples", file.name, "--exit-code-on-error", "0", "--loglevel", "ERROR"]
        command += [] if rate is None else ["--rate", str(rate)]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        if done.returncode:
            raise TaelError(f"locust failed: {done.stderr[-500:]}")
        lines = Path(file.name).read_bytes().splitlines()
    samples = [msgspec.json.decode(line, type=Sample) for line in lines]
    return {
        "users": num_users,
        "offered_requests_per_s": rate and round(rate, 2),
        **summary(samples, warm_up_s, warm_up_s + duration_s),
    }


def summary(samples: list[Sample], begin_s: float, end_s: float) -> dict[str, Any]:
    """Of what came in between, be it a token, an answer's end or a refusal."""
    ended = [s for s in samples if s.end_s is not None and begin_s <= s.end_s]
    answers = [s for s in ended if s.status == 200 and s.error is None]
    refused = [s for s in ended if s.status in (429, 503)]
    failed = [s for s in ended if s.error is not None or s.status not in (200, 429, 503)]
    errors = [s.error or f"status {s.status}" for s in failed]
    firsts = [s.pieces_s[0] - s.start_s for s in samples if s.pieces_s and s.pieces_s[0] > begin_s]
    gaps = [b - a for s in samples for a, b in pairwise(s.pieces_s) if b > begin_s]
    seconds = end_s - begin_s
    result: dict[str, Any] = {
        "seconds": seconds,
        "answers": len(answers),
        "errors": len(errors),
        "requests_per_s": round(len(answers) / seconds, 3),
        "output_tokens_per_s": round(sum(num_tokens(s, begin_s) for s in samples) / seconds, 1),
        "first_token_s": percentiles(firsts),
        "inter_token_s": percentiles(gaps),
        "answer_s": percentiles([s.end_s - s.start_s for s in answers if s.end_s]),
    }
    if errors:
        result["first_errors"] = errors[:5]
    if refused:
        result["refused"] = len(refused)
        result["refused_without_retry_after"] = sum(s.retry_after is None for s in refused)
        result["refused_s"] = percentiles([s.end_s - s.start_s for s in refused if s.end_s])
    return result


def num_tokens(sample: Sample, begin_s: float) -> float:
    """Output tokens that came after ``begin_s``. A piece may have several: as many as the others
    of its answer, or one if that has not ended."""
    num_pieces = len(sample.pieces_s)
    pieces = sum(time_s > begin_s for time_s in sample.pieces_s)
    return pieces * sample.num_output_tokens / num_pieces if sample.num_output_tokens else pieces


def percentiles(values: Sequence[float]) -> dict[str, float] | None:
    """By nearest rank."""
    ranked = sorted(values)
    if not ranked:
        return None
    return {
        f"p{percent}": round(ranked[math.ceil(percent / 100 * len(ranked)) - 1], 4)
        for percent in (50, 99)
    }


@contextmanager
def tael(model: Path, num_threads: int, num_places: int = NUM_USERS) -> Iterator[str]:
    """The address of a server of so many places, and no queue beside."""
    with tempfile.TemporaryDirectory() as folder:
        serving = Serving(model, Path(folder), *tael_options(num_threads, num_places))
        serving.start()
        try:
            serving.wait_until_ready()
            yield serving.url
        finally:
            serving.stop()


def tael_options(num_threads: int, num_places: int = NUM_USERS) -> list[str]:
    options = ["--parallel", str(num_places), "--max-requests", str(num_places)]
    options += ["--context", str(MAX_TOKENS), "--memory", "3GiB"]
    return [*options, "--threads", str(num_threads)]


@contextmanager
def llama_server(model: Path, num_threads: int, options: Sequence[str]) -> Iterator[str]:
    port = free_port()
    command = llama_cpp.server(model, num_threads, NUM_USERS, MAX_TOKENS)
    command += ["--host", "127.0.0.1", "--port", str(port), *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: responds(f"http://127.0.0.1:{port}/health"), process)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def alone_and_overloaded(model: Path, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One user, a user for each place, and then so many that they ask for ten times as much; last,
    as many for a server of few places, which is as fast for each as one that is idle."""
    with tael(model, args.threads) as url:
        alone = measure(url, 1, args.alone_s, args.warm_up_s)
        yield {"alone": alone}
        streams = measure(url, NUM_USERS, args.streams_s, args.warm_up_s)
        yield {"streams": {**streams, "times_alone": ratios(streams, alone)}}
        rate = OVERLOAD * streams["requests_per_s"]
        overload = measure(url, OVERLOAD * NUM_USERS, args.overload_s, args.warm_up_s, rate)
        yield {"overload": {**overload, "times_streams": ratios(overload, streams)}}
    with tael(model, args.threads, NUM_FEW) as url:
        rate = OVERLOAD * NUM_FEW * alone["requests_per_s"]
        few = measure(url, OVERLOAD * NUM_FEW, args.overload_s, args.warm_up_s, rate)
        yield {"overload_few": {**few, "times_alone": ratios(few, alone)}}


def side_by_side(model: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Rounds of either server, in turn."""
    tried = {}
    for options in PEER_OPTIONS:
        with llama_server(model, args.threads, options) as url:
            result = measure(url, NUM_USERS, args.try_s, args.warm_up_s)
            tried[options] = result["output_tokens_per_s"]
    best = max(tried, key=lambda options: tried[options])
    rounds: dict[str, list[dict[str, Any]]] = {"tael": [], "llama-server": []}
    for _ in range(args.rounds):
        for name, serving in (
            ("tael", tael(model, args.threads)),
            ("llama-server", llama_server(model, args.threads, best)),
        ):
            with serving as url:
                result = measure(url, NUM_USERS, args.round_s, args.round_warm_up_s)
            rounds[name].append(result)
    by_round = [ratios(a, b) for a, b in zip(rounds["tael"], rounds["llama-server"], strict=True)]
    return {
        "tried": {" ".join(options): speed for options, speed in tried.items()},
        "options": list(best),
        **rounds,
        "ratio": {name: round(median(r[name] for r in by_round), 3) for name in by_round[0]},
    }


def ratios(result: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    """Of a result to another. Less is better, but for tokens per second. Raises TaelError if there
    is nothing to compare."""
    name = "output_tokens_per_s"
    quotients = {name: round(result[name] / other[name], 3)}
    for name in ("first_token_s", "inter_token_s", "answer_s"):
        if result[name] is None or other[name] is None:
            raise TaelError("no answer ended in the time given; give more.")
        for rank, value in result[name].items():
            quotients[f"{name} {rank}"] = round(value / other[name][rank], 3)
    return quotients


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="qwen2.5-coder:0.5b")
    parser.add_argument("--alone-s", type=float, default=45)
    parser.add_argument("--streams-s", type=float, default=600)
    parser.add_argument("--overload-s", type=float, default=75)
    parser.add_argument("--try-s", type=float, default=50, help="for each setting of llama-server")
    parser.add_argument("--round-s", type=float, default=150)
    parser.add_argument("--warm-up-s", type=float, default=15)
    parser.add_argument("--round-warm-up-s", type=float, default=40, help="of a side by side")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--parts", default="users,peer", help="the others stay as they are")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # not without the server
    model = resolve(args.model)
    if "users" in args.parts.split(","):
        for part in alone_and_overloaded(model, args):
            add(args, part)
    if "peer" in args.parts.split(","):
        add(args, {"side_by_side": side_by_side(model, args)})


def add(args: argparse.Namespace, part: dict[str, Any]) -> None:
    """Put a part into the result file. Raises TaelError if that is of another machine or model."""
    versions = {llama_cpp.NAME: llama_cpp.VERSION, "locust": version("locust")}
    report = {
        **machine.stamp(),
        "versions": machine.versions() | versions,
        "model": args.model,
        "tael_options": tael_options(args.threads),
    }
    if args.output.exists():
        earlier = json.loads(args.output.read_text())
        if any(earlier[name] != report[name] for name in ("machine", "model")):
            raise TaelError(f"{args.output} is of another machine or model; name another --output.")
        report = {**earlier, **report}
    args.output.write_text(json.dumps({**report, **part}, indent=2) + "\n")
    print(json.dumps(part, indent=2), flush=True)


if __name__ == "__main__":
    main()
