"""Modes with names on a real model: measured by the command, then used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from tael import LLM, SamplingParams, TaelError
from tael.cli.main import main
from tael.loader.modes import find_calibration
from tael.loader.prepared import load_prepared

PARAMS = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)


def test_calibrate(
    model_path: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    path = model_path("smollm2:135m")
    with pytest.raises(TaelError, match="has not been measured"):
        LLM(str(path), mode="frugal")
    arguments = [str(path), "--lengths", "1K", "--tasks", "needle_digits,variables_4"]
    result = CliRunner().invoke(
        main, ["calibrate", *arguments, "--samples", "1", "--questions", "2", "--focus"]
    )
    assert result.exit_code == 0, result.output
    assert result.output.count("nats a token") == 30 + 1  # its layers, and all that is lost
    found = find_calibration(load_prepared(path).weights.digest)
    assert found is not None and found.tasks == ("needle_digits",) and found.num_questions == 2
    # Two questions can show no more than that less than most is lost.
    assert all(candidate.lower_bound < -0.7 for candidate in found.candidates)
    assert result.output.count("loses at most") == len(found.candidates) == 4
    assert "--mode balanced: as exact" in result.output
    with LLM(str(path), mode="frugal", max_model_len=512) as llm:
        assert llm.engine.config.kv_format == "bf16"
        assert llm.generate("The sea", PARAMS)[0].outputs[0].token_ids


def test_a_model_that_can_do_no_task_is_not_calibrated(
    model_path: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    arguments = [str(model_path("smollm2:135m")), "--lengths", "1K", "--tasks", "variables_4"]
    result = CliRunner().invoke(
        main, ["calibrate", *arguments, "--samples", "1", "--questions", "8"]
    )
    assert isinstance(result.exception, TaelError | SystemExit)
    assert "answers too few" in result.output + str(result.exception)
    assert not list(tmp_path.rglob("*.json"))


def test_a_mode_sets_the_engine(
    model_path: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = {"kv_format": "q8", "kv_budget": 1024}
    monkeypatch.setattr("tael.llm.mode_settings", lambda name, digest, context: chosen)
    with LLM(str(model_path("smollm2:135m")), mode="balanced", max_model_len=512) as llm:
        config = llm.engine.config
        assert (config.kv_format, config.kv_budget, config.mode) == ("q8", 1024, "exact")
        assert llm.engine.manager.groups[0].open_block_bytes > 0
    with pytest.raises(TaelError, match="without --rope-scaling"):
        LLM(str(model_path("smollm2:135m")), mode="balanced", rope_scaling="yarn")
    with pytest.raises(TaelError, match="cpu backend"):
        LLM(str(model_path("smollm2:135m")), mode="balanced", backend="reference")
