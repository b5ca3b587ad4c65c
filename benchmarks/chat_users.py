"""What users of a chat server see: a file for locust, which ``benchmarks.server_load`` runs.

    locust -f benchmarks/chat_users.py --headless --host URL --users 32 --samples FILE

Each user sends its next request when it has the answer to the last, or, with ``--rate``, so that
all together send so many a second. Every request becomes a line of FILE.
"""

from __future__ import annotations

import random
import time
from argparse import ArgumentParser
from itertools import count
from typing import Any, BinaryIO

import msgspec
from locust import FastHttpUser, events, task
from locust.env import Environment

from benchmarks.chats import Sample, chat

CHAT = "/v1/chat/completions"


class Run:
    """What the users of this process share."""

    samples: BinaryIO
    begin_s: float
    pace_s: float = 0.0
    """Between two requests of a user."""
    numbers = count()


@events.init_command_line_parser.add_listener
def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--samples", required=True, help="Where the requests are written.")
    parser.add_argument("--rate", type=float, help="Requests a second, of all users together.")


@events.test_start.add_listener
def begin(environment: Environment, **_: Any) -> None:
    options = environment.parsed_options
    assert options is not None
    Run.samples = open(options.samples, "wb")  # noqa: SIM115
    Run.begin_s = time.perf_counter()
    if options.rate:
        Run.pace_s = options.num_users / options.rate


@events.quitting.add_listener
def end(**_: Any) -> None:
    Run.samples.close()


class ChatUser(FastHttpUser):
    """Sends chats, one after the other."""

    network_timeout = 300.0

    def on_start(self) -> None:
        self._number = next(Run.numbers)
        self._seeds = count()
        time.sleep(Run.pace_s * random.Random(self._number).random())  # not all at once

    def wait_time(self) -> float:
        return max(0.0, Run.pace_s - (time.perf_counter() - self._begin_s))

    @task
    def chat(self) -> None:
        self._begin_s = time.perf_counter()
        body = msgspec.json.encode(chat(f"{self._number}/{next(self._seeds)}"))
        headers = {"content-type": "application/json"}
        sample = Sample(time.perf_counter() - Run.begin_s)
        try:
            self._ask(body, headers, sample)
        finally:  # also if the run ends
            Run.samples.write(msgspec.json.encode(sample) + b"\n")

    def _ask(self, body: bytes, headers: dict[str, str], sample: Sample) -> None:
        with self.client.post(
            CHAT, data=body, headers=headers, stream=True, catch_response=True
        ) as response:
            sample.status = response.status_code
            if sample.status == 200:
                self._follow(response.stream, sample)
            elif sample.status:
                sample.retry_after = response.headers.get("retry-after")
                response.content  # noqa: B018  the connection is used again
            else:
                sample.error = str(response.error)
            sample.end_s = time.perf_counter() - Run.begin_s
            if sample.error is None and sample.status in (200, 429, 503):
                response.success()
            else:
                response.failure(sample.error or f"status {sample.status}")

    def _follow(self, lines: Any, sample: Sample) -> None:
        """Read the events of an answer."""
        while line := lines.readline(b"\n"):
            if line.startswith(b"data: [DONE]"):
                lines.read()
                if not sample.pieces_s:
                    sample.error = "an answer without a token"
                return
            if not line.startswith(b"data: "):
                continue
            event = msgspec.json.decode(line[6:])
            if "error" in event:
                sample.error = event["error"]["message"]
                return
            if event.get("usage"):
                sample.num_output_tokens = event["usage"]["completion_tokens"]
            if event["choices"] and event["choices"][0]["delta"].get("content"):
                sample.pieces_s.append(time.perf_counter() - Run.begin_s)
        sample.error = "a stream that just ended"
