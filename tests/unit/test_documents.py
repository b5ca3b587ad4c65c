"""Figures in documents are those of the result files, and links lead somewhere."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report
from tael.evals.context.tasks import TASKS
from tael.loader.modes import SHIPPED, read_calibration

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def kld_row(result: dict[str, object]) -> str:
    """The row of a result of benchmarks/kld.py."""
    tael, peer = result["tael"], result["llama.cpp"]
    assert isinstance(tael, dict) and isinstance(peer, dict)
    return (
        f"| {result['model']} | {result['positions']:,} "
        f"| {tael['mean_kld']:.5f} | {peer['mean_kld']:.5f} "
        f"| {100 * tael['same_top']:.1f}% | {100 * peer['same_top']:.1f}% |"
    )


def test_divergence_table() -> None:
    results = sorted((ROOT / "benchmarks" / "results").glob("kld-*.json"))
    expected = [kld_row(json.loads(path.read_text())) for path in results]
    rows = re.findall(r"^\| .*\.gguf \|.*%.*$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert expected and sorted(rows) == sorted(expected)


def test_start_table() -> None:
    results = json.loads((ROOT / "benchmarks" / "results" / "start.json").read_text())["results"]
    engines = ("cold", "warm", "llama.cpp")
    expected = [
        f"| {r['model']} | {r['bytes'] / 2**20:,.0f} MiB | "
        + " | ".join(f"{r['median_s'][engine]:.2f} s" for engine in engines)
        + " |"
        for r in results
    ]
    rows = re.findall(r"^\| .*\.gguf \|.* s \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert rows == expected


def test_activation_rounding_table() -> None:
    path = ROOT / "benchmarks" / "results" / "activation-rounding.json"
    cases = json.loads(path.read_text())["cases"]
    rows = re.findall(r"^\| (.*) \| (\d\.\d+) \|$", (ROOT / "docs/kernels.md").read_text(), re.M)
    assert rows == [(name, f"{max(0.0, case['mean_kld']):.5f}") for name, case in cases.items()]


def test_ledger_table() -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / "ledger-kill.json").read_text())
    counts = list(result["results"].values())
    rows = re.findall(r"^\| (\d.*) \|$", (ROOT / "docs" / "ledger.md").read_text(), re.MULTILINE)
    assert rows == [" | ".join(f"{count:,}" for count in [*counts[:3], sum(counts[3:])])]


def test_warm_prefix_figures() -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / "warm-prefix.json").read_text())
    text = " ".join((ROOT / "docs/cache.md").read_text().split())
    restoring, storing = result["decode_while_restoring"], result["decode_while_storing"]
    assert result["logits_bitwise_equal"] and result["times_sooner"] >= 10
    assert f"after {result['restored_s']:.2f} s instead of {result['cold_s']:.1f} s" in text
    assert f"{result['times_sooner']:.0f} times sooner" in text
    for case in (restoring, storing):
        busy, alone = case["busy_median_ms"], case["alone_median_ms"]
        assert f"{busy:.1f} ms instead of {alone:.1f} ms" in text
        assert f"{case['num_busy_steps']} steps" in text


def result_of(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def test_small_model_at_its_full_length() -> None:
    """docs/long-context.md: 0.5B passes no retrieval task behind 32K."""
    others = result_of("context-qwen2.5-coder-0.5b-others")
    both = result_of("context-qwen2.5-coder-0.5b")
    retrieval = {name for name, task in TASKS.items() if task.kind == "retrieval"}
    assert others["tasks"].keys() | both["tasks"].keys() == retrieval
    assert not any(others["tasks"].values())
    (exact,) = others["cells"]
    at_full_length = [cell for cell in both["cells"] if cell["length"] == exact["length"] == 32768]
    assert all(cell["retention"] == {} for cell in at_full_length) and at_full_length
    text = " ".join((ROOT / "docs/long-context.md").read_text().split())
    assert f"({others['num_questions']} questions each)" in text


def test_modes_that_come_with_tael() -> None:
    """docs/long-context.md says what they are."""
    (shipped,) = SHIPPED.glob("*.json")
    calibration = read_calibration(shipped)
    assert calibration.lengths == (8192,)
    assert calibration.mode("balanced").settings == {"kv_format": "q8", "kv_budget": 2048}
    assert calibration.mode("frugal").settings == {
        "kv_format": "k8v4",
        "kv_budget": 2048,
        "prefill_budget": 4096,
    }


def test_attacks_and_clients() -> None:
    """docs/server.md, "What was tried"."""
    text = " ".join((ROOT / "docs/server.md").read_text().split())
    fuzz, timing = result_of("server-fuzz")["total"], result_of("cache-timing")
    assert fuzz["cases"] >= 20_000 and fuzz["faults"] == 0
    assert f"{fuzz['cases']:,} requests" in text and f"{fuzz['canary_streams']:,} times" in text
    other, same = timing["results"]["other_tenant"], timing["results"]["same_tenant"]
    chance = timing["deviation_by_chance"]
    assert other["cached_tokens_reported"] == 0 < same["cached_tokens_reported"]
    assert abs(other["area_under_curve"] - 0.5) < 2 * chance
    assert f"{other['area_under_curve']:.2f} (by chance 0.50 ± {chance:.2f})" in text
    assert same["area_under_curve"] >= 0.95
    assert f"{same['area_under_curve']:.2f} for one's own tenant" in text
    checks = [
        check for form in result_of("compliance")["results"].values() for check in form.items()
    ]
    passed = [name for name, check in checks if check["status"] == "passed"]
    assert f"{len(passed)} checks" in text
    assert all(check["status"] == "skipped" for name, check in checks if name not in passed)
    harness = result_of("harness")
    assert harness["log_likelihood"]["worst_difference_from_engine"] == 0
    assert harness["generation"]["share_different_from_engine"] == 0
    assert f"{harness['log_likelihood']['requests']} log-likelihoods" in text
    assert f"{harness['generation']['requests']} texts" in text


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_links(path: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", path.read_text()):
        assert (path.parent / target).exists(), target


def test_python_takes_little_of_a_step() -> None:
    results = json.loads((ROOT / "benchmarks/results/overhead.json").read_text())["results"]
    cases = {(r["model"], r["batch"], r["speculation"]): r["python_share"] for r in results}
    bounds = {"smollm2-135m": 0.10, "qwen2.5-coder-0.5b": 0.05}
    assert len(cases) == len(bounds) * 2 * 2
    assert all(0 < share < bounds[model] for (model, *_), share in cases.items())


def test_performance_tables() -> None:
    expected = report.tables()
    placed = report.placed_tables()
    assert expected.keys() <= placed.keys()
    assert placed == dict.fromkeys(placed, "") | expected
