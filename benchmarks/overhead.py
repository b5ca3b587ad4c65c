"""What Python takes of a decode step: the scheduler, the batch, sampling, drafts, the text.

    python -m benchmarks.overhead [--models NAME,...] [--rounds 5]

Sequences of examples/stock.py decode greedily. A step counts while all of them decode, and its
Python is what is left of ``Engine.step`` without the native forward pass. Models, batches and
speculation take turns; a round is all of them. Results go to ``benchmarks/results/overhead.json``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import machine
from benchmarks.cases import label
from tael.engine.engine import Engine
from tael.llm import LLM
from tael.loader.sources import resolve
from tael.request import SamplingParams

RESULTS = Path(__file__).with_name("results") / "overhead.json"
MODELS = ("smollm2:135m", "qwen2.5-coder:0.5b")
NUM_PROMPT_TOKENS = {1: 768, 32: 96}
"""By batch: enough of the text to draft from, and little enough for many sequences."""
TEXT = (Path(__file__).parents[1] / "examples" / "stock.py").read_text()
NUM_DECODE_TOKENS = 40


class TimedModel:
    """Stands for the native model of a backend and adds up the seconds of its forward passes."""

    def __init__(self, native: Any) -> None:
        self._native = native
        self.seconds = 0.0

    def forward(self, *batch: Any) -> Any:
        start = time.perf_counter()
        output = self._native.forward(*batch)
        self.seconds += time.perf_counter() - start
        return output

    def __getattr__(self, name: str) -> Any:
        return getattr(self._native, name)


def decode_steps(
    engine: Engine, native: TimedModel, batch_size: int, speculation: bool, salt: str
) -> list[dict[str, float]]:
    """Seconds of every step in which all sequences decode, those of its forward pass, and the
    tokens that it gave."""
    tokens = engine.tokenizer.encode(TEXT)
    params = SamplingParams(temperature=0, max_tokens=NUM_DECODE_TOKENS, ignore_eos=True)
    for i in range(batch_size):
        prompt = (tokens[31 * i :] + tokens[: 31 * i])[: NUM_PROMPT_TOKENS[batch_size]]
        engine.add_request(f"{i}", prompt, params, cache_salt=salt, speculation=speculation)
    steps = []
    started: set[str] = set()
    while engine.has_unfinished():
        all_decode = len(started) == batch_size
        native.seconds = 0.0
        start = time.perf_counter()
        deltas = engine.step()
        step_s = time.perf_counter() - start
        started.update(delta.request_id for delta in deltas)
        if all_decode:
            num_tokens = sum(len(delta.token_ids) for delta in deltas)
            steps.append({"step": step_s, "native": native.seconds, "tokens": num_tokens})
        if any(delta.finish_reason is not None for delta in deltas):
            for i in range(batch_size):
                engine.abort(f"{i}")
    return steps


def summary(rounds: list[list[dict[str, float]]]) -> dict[str, Any]:
    """Medians over the rounds, each of the median of its steps."""

    def middle(value: Callable[[dict[str, float]], float]) -> float:
        return median(median(value(step) for step in steps) for steps in rounds)

    shares = [
        round(median(1 - step["native"] / step["step"] for step in steps), 4) for steps in rounds
    ]
    return {
        "num_steps": sum(len(steps) for steps in rounds),
        "tokens_per_step": round(
            sum(s["tokens"] for steps in rounds for s in steps) / sum(map(len, rounds)), 2
        ),
        "step_ms": round(1e3 * middle(lambda s: s["step"]), 3),
        "python_ms": round(1e3 * middle(lambda s: s["step"] - s["native"]), 3),
        "python_share": median(shares),
        "python_shares": shares,
    }


def measure(models: list[str], num_rounds: int) -> list[dict[str, Any]]:
    with ExitStack() as stack:
        engines: dict[str, tuple[Engine, TimedModel]] = {}
        for model in models:
            path = resolve(model)
            llm = stack.enter_context(LLM(str(path), max_model_len=1024, memory="2GiB"))
            backend: Any = llm.engine.backend
            backend._native = native = TimedModel(backend._native)
            engines[label(model)] = llm.engine, native
        cases = list(product(engines, NUM_PROMPT_TOKENS, (False, True)))
        rounds: dict[tuple[str, int, bool], list[list[dict[str, float]]]] = {c: [] for c in cases}
        for i in range(num_rounds + 1):
            for case in cases if i % 2 else cases[::-1]:
                model, batch_size, speculation = case
                steps = decode_steps(*engines[model], batch_size, speculation, f"{i} {case}")
                if i:  # the first warms up
                    rounds[case].append(steps)
    return [
        {"model": model, "batch": batch_size, "speculation": speculation, **summary(rounds[case])}
        for case in cases
        for model, batch_size, speculation in [case]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", default=",".join(MODELS), help="catalogue names or paths")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    report = {
        "machine": machine.machine(),
        "versions": machine.versions(),
        "date": machine.today(),
        "prompt_tokens": NUM_PROMPT_TOKENS,
        "rounds": args.rounds,
        "results": measure(args.models.split(","), args.rounds),
    }
    args.output.write_text(json.dumps(report, indent=2) + "\n")
    for result in report["results"]:
        print(result, flush=True)


if __name__ == "__main__":
    main()
