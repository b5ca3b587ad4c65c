"""Requests that schemathesis makes up from the OpenAPI document, right and wrong ones.

    python -m benchmarks.server_fuzz [--seeds 1,2,3,4,5] [--examples 800]

Nothing may be answered with 5xx, take a minute, or break its connection; and a stream that is
asked for over and over meanwhile must have the same tokens each time. A seed is a run against a
fresh server of a tiny random model. Results go to ``benchmarks/results/server-fuzz.json``; seeds
that are there already and were not asked for stay.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from threading import Event, Thread
from typing import Any

import httpx2 as httpx
import schemathesis
from openai import OpenAI
from schemathesis.engine import events, from_schema

from benchmarks import machine
from benchmarks.serving import NAME, serving
from tael.errors import TaelError

RESULTS = Path(__file__).with_name("results") / "server-fuzz.json"
TIMEOUT_S = 60


@dataclass
class Fuzzed:
    """What became of the requests of one run."""

    cases: int = 0
    by_operation: Counter[str] = field(default_factory=Counter)
    by_status: Counter[int] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)


@dataclass
class Canary:
    """A stream that is asked for again and again."""

    streams: int = 0
    tokens: int = 0
    faults: list[str] = field(default_factory=list)

    def run(self, url: str, model: str, ended: Event) -> None:
        client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=TIMEOUT_S)
        first: str | None = None
        while not ended.is_set():
            try:
                stream = client.completions.create(
                    model=model,
                    prompt="abc",
                    temperature=0,
                    max_tokens=200,
                    stream=True,
                    extra_body={"ignore_eos": True},
                )
                text = "".join(chunk.choices[0].text for chunk in stream)
            except Exception as error:  # whatever it is, it must not have happened
                self.faults.append(repr(error))
                continue
            first = first or text
            self.streams += 1
            self.tokens += 200
            if text != first:
                self.faults.append(f"other tokens: {text!r}")


def fuzz(
    url: str, model: str, *, num_examples: int, seed: int, has_boundaries: bool = True
) -> Fuzzed:
    """Send made-up requests: ``num_examples`` random ones to every operation, and the boundary
    values of every parameter, which no seed changes."""
    config = schemathesis.Config.from_dict(
        {
            "base-url": url,
            "seed": seed,
            "workers": 2,
            "continue-on-failure": True,
            "request-timeout": TIMEOUT_S,
            "generation": {"max-examples": num_examples, "no-shrink": True, "database": "none"},
            "checks": {"enabled": False, "not_a_server_error": {"enabled": True}},
            "phases": {
                "stateful": {"enabled": False},
                "coverage": {"enabled": has_boundaries},
            },
            "output": {"sanitization": {"enabled": False}},
        }
    )
    document = httpx.get(f"{url}/openapi.json").json()
    for schema in document["components"]["schemas"].values():
        if "model" in schema.get("properties", {}):  # any other ends with 404
            schema["properties"]["model"] = {"enum": [model]}
    fuzzed = Fuzzed()
    for event in from_schema(schemathesis.openapi.from_dict(document, config=config)).execute():
        if isinstance(event, events.ScenarioFinished):
            _count(fuzzed, event)
        elif isinstance(event, events.NonFatalError):
            fuzzed.faults.append(f"{event.label}: {event.value!r}")
        elif isinstance(event, events.FatalError):
            raise event.exception
        elif isinstance(event, events.EngineFinished) and event.stop_reason != "completed":
            fuzzed.faults.append(f"it stopped: {event.stop_reason}")
    return fuzzed


def _count(fuzzed: Fuzzed, event: events.ScenarioFinished) -> None:
    recorder = event.recorder
    for case_id, interaction in recorder.interactions.items():
        fuzzed.cases += 1
        fuzzed.by_operation[recorder.label] += 1
        response = interaction.response
        if response is None:
            fuzzed.faults.append(f"no answer: {recorder.cases[case_id].value.as_curl_command()}")
            continue
        fuzzed.by_status[response.status_code] += 1
        if response.status_code >= 500:
            curl = recorder.cases[case_id].value.as_curl_command()
            fuzzed.faults.append(f"{response.status_code}: {curl}")


def run(model: Path, *, num_examples: int, seed: int) -> dict[str, Any]:
    """One run against a server of its own."""
    canary, ended = Canary(), Event()
    start = time.monotonic()
    with serving(model, "--parallel", "8", "--memory", "400MiB") as server:
        thread = Thread(target=canary.run, args=(server.url, NAME, ended))
        thread.start()
        try:
            fuzzed = fuzz(
                server.url,
                NAME,
                num_examples=num_examples,
                seed=seed,
                has_boundaries=seed == 1,
            )
        finally:
            ended.set()
            thread.join()
    return {
        "seconds": round(time.monotonic() - start),
        "requests": {
            "cases": fuzzed.cases,
            "by_operation": fuzzed.by_operation,
            "by_status": dict(sorted(fuzzed.by_status.items())),
            "faults": fuzzed.faults,
        },
        "canary": asdict(canary),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", default="1,2,3,4,5")
    parser.add_argument("--examples", type=int, default=800)
    args = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from byte_llama import save_byte_llama

    kept = json.loads(RESULTS.read_text())["runs"] if RESULTS.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        save_byte_llama(Path(folder), head_dim=16)
        for seed in args.seeds.split(","):
            kept[seed] = run(Path(folder), num_examples=args.examples, seed=int(seed))
            report = {
                **machine.stamp(),
                "schemathesis": version("schemathesis"),
                "total": total(kept),
                "runs": dict(sorted(kept.items(), key=lambda item: int(item[0]))),
            }
            RESULTS.write_text(json.dumps(report, indent=2) + "\n")
            print(f"seed {seed}: {json.dumps(total({seed: kept[seed]}))}", flush=True)
    if total(kept)["faults"]:
        raise TaelError(f"there are faults; {RESULTS.name} lists them.")


def total(runs: dict[str, Any]) -> dict[str, int]:
    """Of all seeds."""
    parts = [run[part] for run in runs.values() for part in ("requests", "canary")]
    return {
        "cases": sum(run["requests"]["cases"] for run in runs.values()),
        "canary_streams": sum(run["canary"]["streams"] for run in runs.values()),
        "canary_tokens": sum(run["canary"]["tokens"] for run in runs.values()),
        "faults": sum(len(part["faults"]) for part in parts),
    }


if __name__ == "__main__":
    main()
