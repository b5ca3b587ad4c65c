"""Modes with names: chosen by what was measured, kept as a file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from context_results import cell, result

from tael.config import MODES, EngineConfig
from tael.errors import TaelError
from tael.evals.context.calibrate import calibration, ladder
from tael.evals.context.focus import best_layers
from tael.evals.context.modes import parse_mode
from tael.evals.context.suite import Result
from tael.loader import modes
from tael.loader.modes import (
    MARGINS,
    VERSION,
    Calibration,
    Measured,
    find_calibration,
    mode_settings,
    read_calibration,
    save_calibration,
)

FOUND = Calibration(
    version=VERSION,
    model="m",
    digest="d",
    lengths=(1024, 8192),
    tasks=("multikey",),
    num_questions=100,
    candidates=(
        Measured({"kv_format": "q8"}, -0.01),
        Measured({"kv_format": "k8v4"}, -0.03),
        Measured({"kv_format": "k8v4", "kv_budget": 2048, "kv_focus": (9, 11)}, -0.08),
        Measured({"kv_format": "k8v4", "kv_budget": 1024}, -0.01),
    ),
)


@pytest.fixture(autouse=True)
def data_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    return tmp_path


def test_the_last_before_the_first_outside_of_the_margin_is_chosen() -> None:
    assert set(MODES) == {"exact", *MARGINS}
    assert FOUND.mode("frugal").settings == {"kv_format": "k8v4"}
    assert FOUND.mode("balanced").settings == {"kv_format": "q8"}
    hopeless = replace(FOUND, candidates=FOUND.candidates[2:])
    assert hopeless.mode("frugal").settings == {}, "exact is always within the margin"


def test_a_calibration_is_kept_by_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert find_calibration("d") is None
    path = save_calibration(FOUND)
    assert find_calibration("d") == FOUND and find_calibration("e") is None
    assert mode_settings("frugal", "d", 8192) == {"kv_format": "k8v4"}
    with pytest.raises(TaelError, match="run tael calibrate"):
        mode_settings("frugal", "e", 8192)
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    path.rename(shipped / path.name)
    monkeypatch.setattr(modes, "SHIPPED", shipped)
    assert find_calibration("d") == FOUND
    save_calibration(replace(FOUND, lengths=(512,)))
    assert find_calibration("d") != FOUND, "the user's own comes first"


def test_a_context_longer_than_was_measured_is_noted(caplog: pytest.LogCaptureFixture) -> None:
    save_calibration(FOUND)
    mode_settings("frugal", "d", 8192)
    assert not caplog.records
    mode_settings("frugal", "d", 8193)
    assert "was measured up to 8,192 tokens" in caplog.text


def test_a_file_of_other_weights_or_another_version_is_refused() -> None:
    path = save_calibration(FOUND)
    path.rename(path.with_name("e.json"))
    with pytest.raises(TaelError, match="is damaged"):
        find_calibration("e")
    save_calibration(replace(FOUND, version=VERSION + 1))
    with pytest.raises(TaelError, match="of another version"):
        find_calibration("d")


SHIPPED = sorted(modes.SHIPPED.glob("*.json"))
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: read_calibration(path).model)
def test_what_is_shipped_is_of_a_result_file(path: Path) -> None:
    shipped = find_calibration(path.stem)
    assert shipped is not None
    name = shipped.model.replace(":", "-")
    measured = json.loads((RESULTS / f"calibration-{name}.json").read_text())
    assert tuple(measured["tasks"]) == shipped.tasks
    bounds: dict[str, list[float]] = {}
    for of_length in measured["cells"]:
        assert of_length["error"] is None
        if of_length["mode"] != "exact":
            retention = of_length["retention"]["retrieval"]
            assert tuple(retention["tasks"]) == shipped.tasks
            assert retention["num_questions"] >= shipped.num_questions
            bounds.setdefault(of_length["mode"], []).append(retention["lower_bound"])
    assert [min(of_lengths) for of_lengths in bounds.values()] == [
        candidate.lower_bound for candidate in shipped.candidates
    ]
    assert [mode.settings for mode in ladder(())] == [c.settings for c in shipped.candidates]


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"candidates": [{"settings": 1}]}'])
def test_a_damaged_file_is_refused(text: str) -> None:
    path = save_calibration(FOUND)
    path.write_text(text)
    with pytest.raises(TaelError, match="is damaged"):
        read_calibration(path)


def test_a_mode_chooses_alone() -> None:
    for settings in ({"kv_format": "q8"}, {"kv_budget": 2048}, {"prefill_budget": 2048}):
        with pytest.raises(TaelError, match="leave out either"):
            EngineConfig(mode="balanced", **settings)  # type: ignore[arg-type]
    with pytest.raises(TaelError, match="no mode 'fast'"):
        EngineConfig(mode="fast")


def test_a_calibration_has_the_worst_length_of_every_candidate() -> None:
    made = result(10, 10, 9)
    found = calibration(made, "d")
    assert (found.digest, found.lengths, found.num_questions) == ("d", (1024, 2048, 4096), 400)
    (measured,) = found.candidates
    assert measured.settings == {"speculation": False}
    assert -0.15 < measured.lower_bound < -0.1
    assert calibration(result(10, 10, 10), "d").mode("balanced").settings, "nothing was lost"


def test_a_candidate_that_fails_has_lost_all() -> None:
    failed = replace(cell(10), cost=None, error="it does not fit")
    made: Result = result(10, 10, 10, mode_cells={4096: failed})
    assert calibration(made, "d").candidates[0].lower_bound == -1.0


def test_lengths_at_which_the_exact_model_tells_nothing_are_refused() -> None:
    made = result(10, 10, 10)
    made.cells["exact", 4096] = replace(cell(0), cost=None, error="it does not fit")
    with pytest.raises(TaelError, match=r"at 4,096 tokens the exact model fails \(it does not"):
        calibration(made, "d")
    made.cells["exact", 4096] = cell(3)
    with pytest.raises(TaelError, match="answers too few"):
        calibration(made, "d")


@pytest.mark.parametrize("focus", [(), (9, 11)])
def test_the_ladder_can_be_run(focus: tuple[int, ...]) -> None:
    configs = [mode.config(EngineConfig()) for mode in ladder(focus)]
    assert len({repr(config) for config in configs}) == len(configs)
    assert configs[-1].reads_sparsely and not configs[0].reads_sparsely
    assert [config.kv_focus for config in configs] == [(), focus, focus, focus]


def test_layers_are_chosen_by_what_they_gain() -> None:
    gains = {0: -0.1, 1: 0.02, 2: 0.5, 3: 0.11, 4: 0.3}
    assert best_layers(gains, lost=1.0, most=2) == (2, 4)
    assert best_layers(gains, lost=1.0, most=4) == (2, 3, 4), "of 0.02 nothing is known"
    assert best_layers(gains, lost=-1.0, most=9) == (1, 2, 3, 4), "one that loses is not"
    assert best_layers(gains, lost=9.0, most=9) == ()


def test_a_mode_names_layers() -> None:
    assert parse_mode("a=kv_budget:2048,kv_focus:9+11").settings["kv_focus"] == (9, 11)
    for text in ("9,11", "9-11", "+", ""):
        with pytest.raises(TaelError, match=r"numbers with \+|cannot read|no setting"):
            parse_mode(f"a=kv_focus:{text}")
