"""Tables and plots of the documents from the result files.

python -m benchmarks.report      writes both, into the places that the documents keep for them
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks import long_context_tables as long_context
from benchmarks.cases import GRID, GROUPS
from benchmarks.markdown import number, table, time
from tael.evals.limits import Limits
from tael.evals.plot import Line, plot
from tael.evals.speed import TokenCost

RESULTS = Path(__file__).with_name("results")
DOCS = Path(__file__).parents[1] / "docs"
DOCUMENTS = tuple(DOCS / f"{name}.md" for name in ("performance", "long-context", "server"))
MODELS = ("smollm2-135m", "gemma3-270m", "qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b")
PLOTTED = "qwen2.5-coder-0.5b"


def tables(results: Path = RESULTS) -> dict[str, str]:
    """Name of a place in a document -> the Markdown that belongs there."""
    reports = speed_reports(results)
    texts = {"ratios": ratio_table(reports)}
    texts |= {model: model_table(report) for model, report in reports.items()}
    makers = {
        "kernels": ("kernels", kernel_table),
        "overhead": ("overhead", overhead_table),
        "speculation": ("speculation", speculation_table),
        "kv-formats": ("kv-formats", long_context.format_table),
        "long-context": ("long-context", long_context.mode_table),
        "long-context-1.5b": ("long-context-1.5b", long_context.mode_table),
        "long-prefill": ("long-prefill", long_context.prefill_table),
        "long-prefill-amx": ("long-prefill-amx", long_context.prefill_table),
        "tiered": ("tiered", long_context.tier_table),
        "million-tokens": ("million-tokens", long_context.length_table),
        "context-0.5b": ("context-qwen2.5-coder-0.5b", long_context.quality_table),
        "context-0.5b-prompt": ("context-qwen2.5-coder-0.5b-prompt", long_context.quality_table),
        "calibration-0.5b": ("calibration-qwen2.5-coder-0.5b", long_context.quality_table),
        "context-1.5b": ("context-qwen2.5-coder-1.5b", long_context.quality_table),
        "server-load": ("server-load", load_table),
        "server-peer": ("server-load", peer_table),
        "server-disconnects": ("server-disconnects", disconnect_table),
        "server-kill": ("server-kill", kill_table),
        "server-hang": ("server-kill", hang_table),
    }
    for place, (name, make) in makers.items():
        file = results / f"{name}.json"
        if file.exists():
            texts[place] = make(json.loads(file.read_text()))
    return texts


def speed_reports(results: Path) -> dict[str, Any]:
    """The result files of ``benchmarks.compare``, in the order of the models."""
    files = {model: results / f"speed-{model}.json" for model in MODELS}
    return {model: json.loads(file.read_text()) for model, file in files.items() if file.exists()}


def ratio_table(reports: dict[str, Any]) -> str:
    """Tael's speed over llama.cpp's, case by case."""
    rows = []
    for case in GRID:
        cells = [report["cases"].get(case, {}).get("ratio", {}) for report in reports.values()]
        rows.append((case, *(number(cell.get("llama.cpp"), 2) for cell in cells)))
    return table(("case", *reports), rows)


def model_table(report: dict[str, Any]) -> str:
    """Tokens per second of every engine at every case, the machine's limit, and Tael's share."""
    cases = report["cases"]
    names = list(dict.fromkeys(name for case in cases.values() for name in case["engines"]))
    names.sort(key=lambda name: name != "tael")
    head = ["case", *(name.replace("tael", "Tael") for name in names), "limit", "Tael's share"]
    rows = []
    for name in dict.fromkeys((*GRID, *GROUPS["depths"], *GROUPS["batches"])):
        if name in cases:
            case = cases[name]
            speeds = [case["engines"].get(engine, {}).get("tokens_per_s") for engine in names]
            limit = workload_limit(case)
            share = case.get("share_of_read_bandwidth", speeds[0] / limit)
            cells = (*(number(speed, 1) for speed in speeds), f"{limit:.0f}", f"{share:.0%}")
            rows.append((name, *cells))
    return table(head, rows)


def kernel_table(report: dict[str, Any]) -> str:
    """The lowest and highest ratio over the shapes, by weight type and tokens."""
    ratios: dict[str, dict[int, list[float]]] = {}
    for cell in report["cells"]:
        by_tokens = ratios.setdefault(cell["type"], {})
        by_tokens.setdefault(cell["num_tokens"], []).append(cell["ratio"])
    columns = sorted({tokens for by_tokens in ratios.values() for tokens in by_tokens})
    rows = []
    for name, by_tokens in ratios.items():
        spans = (by_tokens.get(tokens, []) for tokens in columns)
        rows.append((name, *(f"{min(s):.2f}-{max(s):.2f}" if s else "" for s in spans)))
    return table(("weights", *columns), rows)


def overhead_table(report: dict[str, Any]) -> str:
    """What Python takes of a decode step, by model, batch and speculation."""
    head = ("model", "batch", "speculation", "tokens a step", "step", "Python", "share")
    rows = []
    for result in report["results"]:
        rows.append(
            (
                result["model"],
                result["batch"],
                "on" if result["speculation"] else "off",
                number(result["tokens_per_step"], 1),
                f"{result['step_ms']:.2f} ms",
                f"{result['python_ms']:.2f} ms",
                f"{result['python_share']:.1%}",
            )
        )
    return table(head, rows)


def speculation_table(report: dict[str, Any]) -> str:
    """Decoding with speculation beside decoding without it."""
    head = ("model", "task", "drafts accepted", "plain", "speculative", "ratio")
    rows = []
    for result in report["results"]:
        for case in result["cases"]:
            rows.append(
                (
                    result["model"],
                    case["case"],
                    f"{case['num_accepted_tokens']} of {case['num_draft_tokens']}",
                    f"{case['plain_tokens_per_s']:.1f}",
                    f"{case['speculative_tokens_per_s']:.1f}",
                    f"{case['ratio']:.2f}",
                )
            )
    return table(head, rows)


LATENCIES = {
    "first_token_s": "first token",
    "inter_token_s": "between tokens",
    "answer_s": "whole answer",
}


USERS = ("alone", "streams", "overload", "overload_few")
"""Parts of a report of ``benchmarks.server_load``."""


def load_table(report: dict[str, Any]) -> str:
    """What users saw, by how many they were."""
    times = [f"{name}, p50 / p99" for name in LATENCIES.values()]
    head = ("users", "answers", "errors", "tokens/s", *times, "refused", "refusal p99")
    rows = []
    for result in (report[name] for name in USERS if name in report):
        rows.append(
            (
                result["users"],
                f"{result['answers']:,}",
                result["errors"],
                f"{result['output_tokens_per_s']:.0f}",
                *(_latency(result[latency]) for latency in LATENCIES),
                f"{result.get('refused', 0):,}",
                f"{1e3 * result['refused_s']['p99']:.0f} ms" if "refused_s" in result else "-",
            )
        )
    return table(head, rows)


def peer_table(report: dict[str, Any]) -> str:
    """Tael and llama-server under the same users: of each the mean of its rounds."""
    result = report.get("side_by_side")
    if result is None:
        return ""
    head = ("", "Tael", "llama-server", "Tael / llama-server")
    rows = []
    sides = [result["tael"], result["llama-server"]]
    cells = [f"{mean(r['output_tokens_per_s'] for r in side):.0f}" for side in sides]
    ratio = result["ratio"]
    rows.append(("output tokens/s", *cells, f"{ratio['output_tokens_per_s']:.2f}"))
    for latency, name in LATENCIES.items():
        for rank in ("p50", "p99"):
            cells = [time(mean(r[latency][rank] for r in side)) for side in sides]
            rows.append((f"{name}, {rank}", *cells, f"{ratio[f'{latency} {rank}']:.2f}"))
    return table(head, rows)


def disconnect_table(report: dict[str, Any]) -> str:
    """What is left when clients have gone."""
    result = report["results"]
    seen = ("disconnects", "requests_recorded", "prompt_tokens", "output_tokens")
    found = ("where", "reasons", *seen)
    others = sum(abs(value) for name, value in result.items() if name not in found)
    head = ("disconnects", "requests on record", "prompt tokens", "output tokens", "all else")
    cells = [*(f"{result[name]:,}" for name in seen), f"{others:g}"]
    return table(head, [cells])


def kill_table(report: dict[str, Any]) -> str:
    """What is left when engines and servers were killed, and how long each was away."""
    result = report["kills"]
    seen = ("kills", "requests_seen", "answered_whole", "streams_ended_by_error")
    found = (*seen, "settled_by_recovery", "recovery_s")
    others = sum(abs(value) for name, value in result.items() if name not in found)
    head = ("kills", "requests seen", "answered whole", "streams ended by an error event")
    head += ("settled by the next start", "engine away", "server away", "all else")
    cells = [f"{result[name]:,}" for name in (*seen, "settled_by_recovery")]
    cells += [f"{result['recovery_s'][name]['median']:.1f} s" for name in ("engine", "server")]
    return table(head, [(*cells, others)])


def hang_table(report: dict[str, Any]) -> str:
    """What follows when the engine stops, at the worst, and when the server is told to end."""
    hangs, drain = report["hangs"], report["drain"]
    ended = sum(hang["streams_ended_by_error"] for hang in hangs)
    worst = {name: f"{max(hang[name] for hang in hangs):.1f} s" for name in hangs[0]}
    return table(
        ("signal", "what follows"),
        [
            (
                f"SIGSTOP of the engine, {len(hangs)} times",
                f"not ready after {worst['not_ready_s']}; {ended} of "
                f"{sum(hang['streams'] for hang in hangs)} streams ended by an error event, after "
                f"{worst['streams_ended_s']}; ready again after {worst['ready_again_s']}",
            ),
            (
                f"SIGTERM of the server under {drain['streams']} streams",
                f"{drain['answered_whole']} answered whole; exit code {drain['exit_code']}",
            ),
        ],
    )


def decode_limit(case: dict[str, Any]) -> float:
    """Tokens per second that decoding with these weights cannot exceed."""
    limits = Limits(**case["limits"])
    return TokenCost(**case["cost"]).decode_limit(limits, case["workload"]["batch_size"])


def workload_limit(case: dict[str, Any]) -> float:
    """Tokens per second that the whole workload cannot exceed, its prompts computed at the rate of
    int8 dot products and its other tokens decoded at their limit."""
    workload, rate = case["workload"], case["limits"]["int8_ops_per_s"]
    num_prompt, num_decode = workload["num_prompt_tokens"], workload["num_decode_tokens"]
    batch_size = workload["batch_size"]
    prompt_s = batch_size * num_prompt * case["cost"]["layer_ops"] / rate if rate else 0.0
    least_s = prompt_s + batch_size * num_decode / decode_limit(case)
    return float(batch_size * (num_prompt + num_decode) / least_s)


def plots(results: Path = RESULTS) -> dict[str, tuple[dict[str, Line], dict[str, Line]]]:
    """Group of cases -> (lines of the engines, the machine's limit)."""
    file = results / f"speed-{PLOTTED}.json"
    cases = json.loads(file.read_text())["cases"] if file.exists() else {}
    drawn: dict[str, tuple[dict[str, Line], dict[str, Line]]] = {}
    for group, x in (("depths", "depth"), ("batches", "batch_size")):
        points = [cases[name] for name in GROUPS[group] if name in cases]
        lines: dict[str, list[tuple[float, float]]] = {}
        for case in points:
            for engine, result in case["engines"].items():
                point = (case["workload"][x], result["decode_tokens_per_s"])
                lines.setdefault("Tael" if engine == "tael" else engine, []).append(point)
        limit = [(case["workload"][x], decode_limit(case)) for case in points]
        if points:
            drawn[group] = (dict(lines), {"limit of the machine": limit})
    return drawn


def main() -> None:
    texts = tables()
    for document in DOCUMENTS:
        text = document.read_text()
        for place in _places(text):
            begin, end = _marks(place)
            before, after = text.split(begin)
            text = before + begin + texts.get(place, "") + end + after.split(end, 1)[1]
        document.write_text(text)
    labels = {"depths": "tokens in the cache", "batches": "sequences at once"}
    for group, (lines, limits) in plots().items():
        plot(
            DOCS / f"performance-{group}.png",
            lines,
            limits,
            title=f"{PLOTTED}: decode",
            x_label=labels[group],
            log_x=group == "batches",
        )
    file = RESULTS / "million-tokens.json"
    if file.exists():
        plot(
            DOCS / "million-tokens.png",
            long_context.length_lines(json.loads(file.read_text())),
            {},
            title="up to a million tokens in one memory budget",
            x_label="tokens of context",
            y_label="ratio",
            log_x=True,
        )


def placed_tables() -> dict[str, str]:
    """What the documents have in their places."""
    texts = [document.read_text() for document in DOCUMENTS]
    return {
        place: text.split(_marks(place)[0])[1].split(_marks(place)[1])[0]
        for text in texts
        for place in _places(text)
    }


def _places(text: str) -> list[str]:
    return re.findall(r"<!-- table (\S+) -->", text)


def _marks(place: str) -> tuple[str, str]:
    return f"<!-- table {place} -->\n", "\n<!-- end -->"


def _latency(percentiles: dict[str, float]) -> str:
    return " / ".join(map(time, percentiles.values()))


if __name__ == "__main__":
    main()
