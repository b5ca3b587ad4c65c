"""Processes killed while they store blocks. ``python -m benchmarks.kill`` does it 200 times."""

from __future__ import annotations

from pathlib import Path

from byte_llama import save_byte_llama
from fault.kills import kill_often


def test_kill_while_storing(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    save_byte_llama(model, head_dim=16)
    result = kill_often(model, tmp_path / "kv", num_kills=6)
    assert result["num_restored_tokens"] > 0
