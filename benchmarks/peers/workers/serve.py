"""Runs in the environment of a peer and measures it for ``benchmarks.peers.WorkerEngine``: a
workload in JSON on standard input, its times on standard output. Imports nothing of Tael."""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Callable
from typing import Any

Add = Callable[[list[list[int]], int], None]
"""Queue prompts of token ids, each for this many output tokens, greedily and past any end."""

Step = Callable[[], tuple[set[int], bool]]
"""Compute a step. Returns which prompts have got a token, by their place in the list, and whether
any is unfinished."""

VOCABULARY = range(1000, 30000)
"""Token ids that every model has and that are words to it."""


def serve(add: Add, step: Step) -> None:
    """Answer workloads until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the peer prints
    for line in sys.stdin:
        print(json.dumps(_measure(json.loads(line), add, step)), file=answers, flush=True)


def _measure(workload: dict[str, int], add: Add, step: Step) -> dict[str, Any]:
    """As ``tael.evals.speed.measure``."""
    depth, batch_size = workload["depth"], workload["batch_size"]
    prompts = [random.Random(i).choices(VOCABULARY, k=depth) for i in range(batch_size)]
    if depth:
        add(prompts, 1)
        while step()[1]:
            pass
    fresh = max(workload["num_prompt_tokens"], 0 if depth else 1)
    prompts = [prompt + random.choices(VOCABULARY, k=fresh) for prompt in prompts]
    start = time.perf_counter()
    add(prompts, workload["num_decode_tokens"] + 1)
    started: set[int] = set()
    while len(started) < batch_size:
        produced, unfinished = step()
        started |= produced
    first = time.perf_counter()
    num_decoded_tokens = 0
    while unfinished:
        produced, unfinished = step()
        num_decoded_tokens += len(produced)
    return {
        "prefill_s": first - start if workload["num_prompt_tokens"] else 0.0,
        "decode_s": time.perf_counter() - first if workload["num_decode_tokens"] else 0.0,
        "num_decoded_tokens": num_decoded_tokens,
    }
