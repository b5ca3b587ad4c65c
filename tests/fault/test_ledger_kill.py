"""A writer of the ledger is killed for real. benchmarks/ledger_kill.py does it 200 times."""

from __future__ import annotations

from benchmarks import ledger_kill


def test_kill_nine() -> None:
    result = ledger_kill.run(num_kills=6, seed=7)
    assert result.pop("kills") == 6
    assert result.pop("requests_acknowledged") > 10
    assert result.pop("requests_recovered") > 0
    assert not any(result.values()), result
