"""What a run of the effective-context suite says, from made-up cells."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from context_results import COST, TASKS, cell, result

from tael.config import EngineConfig
from tael.errors import TaelError
from tael.evals.context.cell import Cost
from tael.evals.context.modes import EXACT, parse_mode, parse_modes
from tael.evals.context.plot import plot_quality
from tael.evals.context.report import Slo, by_depth, flips, headline, render, retentions, to_json

SLO = Slo(time_to_first_token_s=10.0, s_per_token=0.1, memory_bytes=None)


def test_headlines_come_first() -> None:
    made = result(10, 9, 8)
    assert headline(made, "exact", SLO).ec_rel == 4096
    assert headline(made, "q8", SLO).ec_rel == headline(made, "q8", SLO).ec_abs == 2048
    lines = render(made, SLO).splitlines()
    assert lines[1].split() == ["mode", "EC_rel", "EC@SLO", "EC_abs"]
    assert lines[3].split() == ["q8", "2,048", "2,048", "2,048"]


@pytest.mark.parametrize(
    "cost",
    [
        replace(COST, time_to_first_token_s=11.0),
        replace(COST, s_per_token=0.2),
        replace(COST, peak_rss_bytes=3 << 30),
    ],
)
def test_a_length_outside_of_the_slo_does_not_count(cost: Cost) -> None:
    made = result(10, 10, 10, mode_cells={2048: cell(10, cost)})
    slo = replace(SLO, memory_bytes=2 << 30)
    assert headline(made, "q8", slo).ec_rel == 4096
    assert headline(made, "q8", slo).ec_slo == 1024


def test_running_out_of_memory_is_a_failure() -> None:
    failed = replace(cell(0), cost=None, error="it does not fit")
    made = result(10, 10, 10, mode_cells={4096: failed})
    assert headline(made, "q8", SLO).ec_rel == 2048
    assert retentions(made, "q8", 4096) == {}
    assert not list(flips(made))
    assert "failed: it does not fit" in render(made, SLO)


def test_retention_is_by_kind_and_flips_are_listed() -> None:
    made = result(10, 9, 10)
    assert set(retentions(made, "q8", 2048)) == {"retrieval", "reasoning"}
    assert retentions(made, "q8", 2048)["retrieval"].mean == pytest.approx(-0.1)
    found = list(flips(made))
    assert len(found) == 40 and {flip.length for flip in found} == {2048}
    assert {(flip.exact, flip.answer, flip.change) for flip in found} == {("1.0", "0.0", -1.0)}
    assert re.search(r"q8 +2,048 .* -10\.0 \[.*\] lost .* -40 \+0", render(made, SLO))


def test_tasks_that_the_exact_model_fails_tell_nothing() -> None:
    """Of a mode: it can lose nothing there."""
    made = result(10, 10, 10)
    answers = cell(10).answers | {"multikey": cell(0).answers["multikey"]}
    made.cells["exact", 4096] = replace(cell(10), answers=answers)
    assert set(retentions(made, "q8", 4096)) == {"reasoning"}
    assert "points at 4,096 tokens are without multikey" in render(made, SLO)
    made.cells["exact", 4096] = replace(cell(0), cost=None, error="it does not fit")
    assert retentions(made, "q8", 4096) == {} and not list(flips(made))


def test_scores_by_depth() -> None:
    first, second, last = by_depth(result(10, 5, 10), "q8", 2048)
    assert first == 1.0 and last == 0.0
    assert second is not None and 0 < second < 1


def test_json_has_every_answer() -> None:
    report = json.loads(json.dumps(to_json(result(10, 9, 8), SLO)))
    assert report["modes"]["q8"]["ec_rel"] == 2048
    assert len(report["cells"]) == 6
    assert report["cells"][0]["answers"]["multikey"][0][0] == {"text": "1.0", "score": 1.0}
    assert report["cells"][3]["retention"]["retrieval"]["verdict"] == "lost"


def test_without_a_task_that_counts_there_is_no_headline(tmp_path: Path) -> None:
    full = result(10, 10, 10)
    cells = {
        key: replace(c, answers={}, log_likelihoods={t: [[-0.25]] for t in TASKS})
        for key, c in full.cells.items()
    }
    made = replace(full, counted=(), cells=cells)
    assert "no effective context" in " ".join(render(made, SLO).split())
    assert "-0.250" in render(made, SLO)
    assert "ec_rel" not in to_json(made, SLO)["modes"]["q8"]
    with pytest.raises(TaelError, match="no task"):
        plot_quality(tmp_path / "plot.png", made, "title")


def test_plot(tmp_path: Path) -> None:
    plot_quality(tmp_path / "plot.png", result(10, 9, 8), "title")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_modes_change_settings() -> None:
    mode = parse_mode("slow=speculation:off")
    assert mode.config(EngineConfig(num_threads=1)) == EngineConfig(
        num_threads=1, speculation=False
    )
    assert EXACT.config(EngineConfig()) == EngineConfig()


@pytest.mark.parametrize(
    "text",
    ["q8", "=speculation:off", "a=speculation:maybe", "a=memory_bytes:1", "exact=speculation:off"],
)
def test_bad_modes_are_refused(text: str) -> None:
    with pytest.raises(TaelError):
        parse_mode(text)


def test_modes_of_one_name_are_refused() -> None:
    with pytest.raises(TaelError, match="'a'"):
        parse_modes(["a=speculation:off", "b=speculation:off", "a=speculation:on"])
