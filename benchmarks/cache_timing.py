"""Can a tenant tell by the time to the first token what another one has asked?

    python -m benchmarks.cache_timing [--trials 100]

In each trial a victim sends a prompt that nobody has sent before. Then a prober sends that prompt
and another one as new, and the times to their first tokens are compared. A classifier without any
knowledge is right half of the time (area under the curve 0.5). The positive control is a prober of
the victim's own tenant, who shares its cache and must be right almost always: if it is not, the
clock is too coarse to prove anything. Results go to ``benchmarks/results/cache-timing.json``.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from contextlib import closing
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

from openai import OpenAI

from benchmarks import machine
from benchmarks.serving import NAME, Serving
from tael.economics.keys import Keys
from tael.errors import TaelError
from tael.loader.sources import resolve

RESULTS = Path(__file__).with_name("results") / "cache-timing.json"
NUM_PROMPT_TOKENS = 300
MAX_TOKEN_ID = 20_000
PROBERS = ("same_tenant", "other_tenant")


def area_under_curve(positives: list[float], negatives: list[float]) -> float:
    """The chance that a positive is smaller than a negative."""
    pairs = list(product(positives, negatives))
    return sum((a < b) + (a == b) / 2 for a, b in pairs) / len(pairs)


def chance_deviation(num_each: int) -> float:
    """The standard deviation of that area for times that tell nothing (Mann and Whitney, 1947)."""
    return ((2 * num_each + 1) / (12 * num_each**2)) ** 0.5


def seconds_to_first_token(client: OpenAI, prompt: list[int]) -> tuple[float, int]:
    """And how many tokens of the prompt were reported as cached."""
    start = time.perf_counter()
    stream = client.completions.create(
        model=NAME,
        prompt=prompt,
        max_tokens=1,
        stream=True,
        stream_options={"include_usage": True},
    )
    next(iter(stream))
    elapsed = time.perf_counter() - start
    usage = [chunk.usage for chunk in stream][-1]
    assert usage is not None and usage.prompt_tokens_details is not None
    return elapsed, usage.prompt_tokens_details.cached_tokens or 0


def measure(clients: dict[str, OpenAI], num_trials: int) -> dict[str, Any]:
    """Times of the probes, and how well they tell."""
    rng = random.Random(1)

    def fresh() -> list[int]:
        return [rng.randrange(1000, MAX_TOKEN_ID) for _ in range(NUM_PROMPT_TOKENS)]

    results = {}
    for prober in PROBERS:
        asked, new, num_cached = [], [], 0
        for _ in range(num_trials):
            secret, other = fresh(), fresh()
            seconds_to_first_token(clients["victim"], secret)
            probes = [(secret, asked), (other, new)]
            for prompt, times in rng.sample(probes, 2):  # in either order
                elapsed, cached = seconds_to_first_token(clients[prober], prompt)
                times.append(elapsed)
                num_cached += cached
        results[prober] = {
            "area_under_curve": round(area_under_curve(asked, new), 3),
            "median_ms_asked": round(1000 * median(asked), 1),
            "median_ms_new": round(1000 * median(new), 1),
            "cached_tokens_reported": num_cached,
        }
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2:135m")
    parser.add_argument("--trials", type=int, default=100)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        server = Serving(
            resolve(args.model), Path(folder), "--context", "1024", "--memory", "700MiB"
        )
        with closing(Keys(Path(folder) / "keys.sqlite")) as keys:
            tenants = {"victim": "one", "same_tenant": "one", "other_tenant": "another"}
            tokens = {name: keys.create(name, tenant=of)[1] for name, of in tenants.items()}
        server.start()
        try:
            server.wait_until_ready()
            clients = {
                name: OpenAI(base_url=f"{server.url}/v1", api_key=token)
                for name, token in tokens.items()
            }
            results = measure(clients, args.trials)
        finally:
            server.stop()
    report = {
        **machine.stamp(),
        "model": args.model,
        "trials": args.trials,
        "prompt_tokens": NUM_PROMPT_TOKENS,
        "deviation_by_chance": round(chance_deviation(args.trials), 3),
        "results": results,
    }
    RESULTS.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(results, indent=2))
    if results["same_tenant"]["area_under_curve"] < 0.95:
        raise TaelError("the positive control failed: these times prove nothing.")


if __name__ == "__main__":
    main()
