"""Tael and its peers side by side: the same model file, threads and tokens, in turn.

    python -m benchmarks.compare [--models NAME,...] [--cases grid,depths,...] [--peers llama.cpp]

For every model and case, each engine measures once to warm up, and an engine with several settings
tries them all and goes on with the fastest. Then come rounds of one measurement each, in one order
and the other, with the limits of the machine measured in between. A ratio is the median of the
rounds' ratios. Results go to ``benchmarks/results/speed-MODEL.json``; cases that are there already
and were not asked for stay.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import machine, peers
from benchmarks.cases import DECODE, MODELS, fitted, label, named
from tael.errors import TaelError
from tael.evals.limits import Limits
from tael.evals.speed import Speed, Workload, measure, token_cost
from tael.llm import LLM
from tael.loader.prepared import load_prepared
from tael.loader.sources import resolve

RESULTS = Path(__file__).with_name("results")


class TaelRunner:
    """Tael in this process. Its threads sleep between two measurements."""

    options: list[str] = []  # noqa: RUF012

    def __init__(self, llm: LLM, workload: Workload) -> None:
        self._llm, self._workload = llm, workload

    def measure(self) -> Speed:
        return measure(self._llm.engine, self._workload)

    def close(self) -> None:
        pass


def fastest(
    runners: list[peers.Runner], limits: Callable[[], Limits]
) -> tuple[peers.Runner, dict[str, float]]:
    """Measure each once; close all but the fastest. Also returns what they reached."""
    speeds = []
    for runner in runners:
        limits()  # waits until the machine is quiet
        speeds.append(runner.measure().tokens_per_s)
    best = runners[speeds.index(max(speeds))]
    for runner in runners:
        if runner is not best:
            runner.close()
    tried = {
        " ".join(runner.options): round(speed, 2)
        for runner, speed in zip(runners, speeds, strict=True)
    }
    return best, tried


def compare(
    candidates: dict[str, list[peers.Runner]], num_rounds: int, limits: Callable[[], Limits]
) -> dict[str, Any]:
    """Rounds of one workload. Tael's runners are called "tael"."""
    with ExitStack() as stack:
        for runner in chain.from_iterable(candidates.values()):
            stack.callback(runner.close)
        chosen = {name: fastest(runners, limits) for name, runners in candidates.items()}
        samples: dict[str, list[Speed]] = {name: [] for name in chosen}
        measured_limits = []
        for i in range(num_rounds):
            measured_limits.append(limits())
            for name in sorted(chosen, reverse=bool(i % 2)):
                samples[name].append(chosen[name][0].measure())
    rates = {name: [s.tokens_per_s for s in speeds] for name, speeds in samples.items()}
    return {
        "limits": machine.middle(measured_limits),
        "read_bytes_per_s": [round(limit.read_bytes_per_s) for limit in measured_limits],
        "engines": {
            name: {**summary(speeds), "options": chosen[name][0].options, "tried": chosen[name][1]}
            for name, speeds in samples.items()
        },
        "ratio": {
            name: median_ratio(rates["tael"], rates[name]) for name in rates if name != "tael"
        },
    }


def summary(speeds: list[Speed]) -> dict[str, Any]:
    """The median speeds, and the times that they come from."""
    return {
        "tokens_per_s": round(median(s.tokens_per_s for s in speeds), 2),
        "prefill_tokens_per_s": round(median(s.prefill_tokens_per_s for s in speeds), 2)
        if speeds[0].prefill_s
        else None,
        "decode_tokens_per_s": round(median(s.decode_tokens_per_s for s in speeds), 2)
        if speeds[0].decode_s
        else None,
        "prefill_s": [round(s.prefill_s, 4) for s in speeds],
        "decode_s": [round(s.decode_s, 4) for s in speeds],
    }


def median_ratio(values: list[float], others: list[float]) -> float:
    return round(median(a / b for a, b in zip(values, others, strict=True)), 3)


def measure_model(
    name: str,
    cases: dict[str, Workload],
    modules: list[Any],
    num_rounds: int,
    num_threads: int,
    results: Path,
) -> None:
    """All cases of one model that fit its context, each saved as it is done."""
    path = resolve(name)
    model = label(name)
    weights = load_prepared(path).weights
    limits = machine.QuietMachine(num_threads)
    with ExitStack() as stack:
        llm = stack.enter_context(LLM(str(path), num_threads=num_threads))
        engines: dict[str, peers.Engine] = {}
        for peer in modules:
            engines[peer.NAME] = peer.engine(path, num_threads)
            stack.callback(engines[peer.NAME].close)
        spec = llm.engine.spec
        for case, wanted in cases.items():
            workload = fitted(wanted, spec.max_position_embeddings)
            if workload is None:
                continue
            candidates: dict[str, list[peers.Runner]] = {"tael": [TaelRunner(llm, workload)]}
            for peer_name, engine in engines.items():
                candidates[peer_name] = engine.runners(workload)
            # In the middle of the decoding.
            last = workload.depth + workload.num_prompt_tokens + workload.num_decode_tokens // 2
            cost = token_cost(spec, weights, last)
            result = compare(candidates, num_rounds, limits)
            result["cost"] = asdict(cost)
            if workload == DECODE or workload.depth:
                num_bytes = cost.weight_bytes + cost.kv_bytes
                seconds = result["engines"]["tael"]["decode_s"]
                rates = [num_bytes * workload.num_decode_tokens / s for s in seconds]
                result["share_of_read_bandwidth"] = median_ratio(rates, result["read_bytes_per_s"])
            result = {
                "date": machine.today(),
                "versions": machine.versions() | {peer.NAME: peer.VERSION for peer in modules},
                "workload": asdict(workload),
                **result,
            }
            save(results / f"speed-{model}.json", model, case, result)
            print(line(model, case, result), flush=True)


def save(output: Path, model: str, case: str, result: dict[str, Any]) -> None:
    """Add a case to a result file, in place of its earlier result. Raises TaelError if the file
    is of another machine."""
    report: dict[str, Any] = {"model": model, "machine": machine.machine(), "cases": {}}
    if output.exists():
        earlier = json.loads(output.read_text())
        if earlier["machine"] != report["machine"]:
            raise TaelError(f"{output} is of another machine; give another --results.")
        report = earlier
    report["cases"][case] = result
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=2) + "\n")


def line(model: str, case: str, result: dict[str, Any]) -> str:
    engines = ", ".join(f"{name} {e['tokens_per_s']}" for name, e in result["engines"].items())
    ratios = ", ".join(f"{ratio} x {name}" for name, ratio in result["ratio"].items())
    return f"{model} {case}: {engines} tokens/s; {ratios}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", default=",".join(MODELS), help="catalogue names or paths")
    parser.add_argument("--cases", default="grid", help="cases and groups of benchmarks/cases.py")
    parser.add_argument("--peers", default="llama.cpp")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # not without the peers
    modules = [peers.peer(name) for name in args.peers.split(",")]
    for model in args.models.split(","):
        measure_model(model, named(args.cases), modules, args.rounds, args.threads, args.results)


if __name__ == "__main__":
    main()
