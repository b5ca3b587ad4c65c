"""A real server whose clients leave and which is killed, with its engine or without. The scripts of
benchmarks/ do the same 2,000 and 200 times."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from benchmarks import server_disconnects, server_kill

OPTIONS = ("--context", "1024", "--memory", "600MiB", "--threads", "1", "--drain-timeout", "10")


def test_disconnects(model_path: Callable[[str], Path], tmp_path: Path) -> None:
    model = model_path("smollm2:135m")
    result = server_disconnects.run(model, tmp_path, 60, 7, *OPTIONS)
    assert result.pop("disconnects") == 60
    assert set(result.pop("where")) == {*server_disconnects.POINTS, "not at all"}
    reasons = result.pop("reasons")
    assert reasons["aborted"] > reasons["finished"] > 0  # cut off, most of them
    assert result.pop("requests_recorded") > 20
    assert result.pop("prompt_tokens") > 0 and result.pop("output_tokens") > 0
    assert not any(result.values()), result


def test_kill_nine(model_path: Callable[[str], Path], tmp_path: Path) -> None:
    model = model_path("smollm2:135m")
    result = server_kill.kill_often(model, tmp_path, 6, 7, *OPTIONS)
    assert result.pop("kills") == 6
    assert result.pop("requests_seen") >= 8 and result.pop("answered_whole") > 0
    assert result.pop("streams_ended_by_error") + result.pop("settled_by_recovery") > 0
    assert set(result.pop("recovery_s")) == {"engine", "server"}
    assert not any(result.values()), result
