"""Tables of ``docs/long-context.md``, from the reports of its benchmarks."""

from __future__ import annotations

from typing import Any

from benchmarks.markdown import number, table, time
from tael.evals.plot import Line
from tael.memory.budget import format_bytes


def format_table(report: dict[str, Any]) -> str:
    """How far the predictions of each KV format are from those of bf16."""
    head = ("model", "format", "bytes a token", "divergence", "same token")
    rows = []
    for result in report["results"]:
        exact = result["formats"]["bf16"]["bytes_per_token"]
        for name, kv in result["formats"].items():
            if name != "bf16":
                size = f"{kv['bytes_per_token']:,} of {exact:,}"
                shares = (f"{kv['mean_kld']:.5f}", f"{kv['same_top']:.1%}")
                rows.append((result["model"], name, size, *shares))
    return table(head, rows)


def mode_table(report: dict[str, Any]) -> str:
    """What a token costs behind short and long contexts, by mode."""
    modes = report["modes"]
    shortest, longest = (f(next(iter(modes.values()))["depths"], key=int) for f in (min, max))
    head = ("mode", "KV bytes a token", f"prompt of {int(longest):,}")
    head += (f"ms a token at {int(shortest):,}", f"at {int(longest):,}", "ratio")
    return table(
        head,
        [
            (
                name,
                f"{mode['kv_bytes_per_token']:,}",
                time(mode["depths"][longest]["prefill_s"]),
                f"{mode['depths'][shortest]['decode_ms']:.1f}",
                f"{mode['depths'][longest]['decode_ms']:.1f}",
                f"{mode['depths'][longest]['ratio_to_shortest']:.2f}",
            )
            for name, mode in modes.items()
        ],
    )


def prefill_table(report: dict[str, Any]) -> str:
    """A prompt that fills the context: exact, read sparsely, and with llama.cpp."""
    engines, to_sparse = report["engines"], report["ratio_of_sparse"]
    return table(
        ("", "tokens/s", "sparse is faster by"),
        [
            (name, f"{engine['prefill_tokens_per_s']:.0f}", number(to_sparse.get(name), 2))
            for name, engine in engines.items()
        ],
    )


def tier_table(report: dict[str, Any]) -> str:
    """Decoding behind a context of which a part is on disk, beside one that is all in memory."""
    start = report["start"]["disk"]
    rows = (
        ("tokens of context", f"{report['num_tokens']:,}"),
        ("KV of it", format_bytes(start["kv_bytes"])),
        ("in memory", f"{report['share_of_kv_in_memory']:.0%} of it"),
        ("memory budget", format_bytes(report["memory_bytes"])),
        ("peak RSS", format_bytes(report["peak_rss_bytes"])),
        ("speed, all KV in memory = 1", f"{report['speed_to_memory']:.2f}"),
        ("same tokens", "yes" if report["same_tokens"] else "no"),
    )
    return table(("", ""), rows)


def length_table(report: dict[str, Any]) -> str:
    """Time and memory by the length of the context."""
    head = (
        "tokens of context",
        "KV",
        "ms a token",
        "to the shortest",
        "read from disk",
        "peak RSS",
    )
    return table(
        head,
        [
            (
                f"{int(depth):,}",
                format_bytes(row["kv_bytes"]),
                f"{row['decode_ms']:.1f}",
                f"{row['ratio_to_shortest']:.2f}",
                f"{row['share_from_disk']:.1%}",
                format_bytes(row["peak_rss_bytes"]),
            )
            for depth, row in report["depths"].items()
        ],
    )


def length_lines(report: dict[str, Any]) -> dict[str, Line]:
    """Of these, what must not grow."""
    rows = [(int(depth), row) for depth, row in report["depths"].items()]
    budget = report["memory_bytes"]
    return {
        "time a token, at the shortest = 1": [(n, row["ratio_to_shortest"]) for n, row in rows],
        "peak memory, budget = 1": [(n, row["peak_rss_bytes"] / budget) for n, row in rows],
    }


def quality_table(report: dict[str, Any]) -> str:
    """The cells of a run of ``tael bench context``."""
    costs = ("KV", "first token", "ms a token")
    head = ("mode", "length", "score (95%)", "retention, pp", "better / worse", "KLD", *costs)
    rows = []
    for cell in report["cells"]:
        if cell["error"]:
            failed = (cell["mode"], f"{cell['length']:,}", f"failed: {cell['error']}")
            rows.append((*failed, *(len(head) - len(failed)) * "-"))
            continue
        changes = [
            flip["change"]
            for flip in report["flips"]
            if (flip["mode"], flip["length"]) == (cell["mode"], cell["length"])
        ]
        better = sum(change > 0 for change in changes)
        score, cost, divergence = cell["score"], cell["cost"], cell["divergence"]
        rows.append(
            (
                cell["mode"],
                f"{cell['length']:,}",
                f"{score['mean']:.1%} [{score['low']:.1%}, {score['high']:.1%}]",
                "; ".join(
                    f"{kind} {100 * e['mean']:+.1f} [{100 * e['low']:+.1f}, {100 * e['high']:+.1f}]"
                    for kind, e in cell["retention"].items()
                )
                or "-",
                f"{better} / {len(changes) - better}" if cell["mode"] != "exact" else "-",
                f"{divergence['mean_kld']:.4f}" if divergence else "-",
                format_bytes(cost["kv_bytes"]),
                f"{cost['time_to_first_token_s']:.0f} s",
                f"{1000 * cost['s_per_token']:.1f}",
            )
        )
    return table(head, rows)
