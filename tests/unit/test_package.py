"""What ``import tael`` brings."""

from __future__ import annotations

import subprocess
import sys

import pytest

import tael


def test_import_is_light() -> None:
    script = "import sys, tael; print(*sorted(m for m in sys.modules if m.startswith('tael')))"
    script += "; print(*{'numpy', 'torch', 'tokenizers', 'click'}.intersection(sys.modules))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert result.stdout.decode().splitlines() == ["tael", ""]


def test_exports() -> None:
    assert all(getattr(tael, name) for name in tael.__all__)
    with pytest.raises(AttributeError, match="nothing"):
        _ = tael.nothing
