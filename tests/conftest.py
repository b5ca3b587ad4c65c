from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

from tael import _native
from tael.loader.sources import resolve

# The same examples in every run, however long one takes.
settings.register_profile("tael", derandomize=True, deadline=None)
settings.load_profile("tael")


@pytest.fixture(scope="session")
def model_path() -> Callable[[str], Path]:
    """The file of a catalogue model: from the directory TAEL_TEST_MODELS ("smollm2-135m.gguf"),
    or pulled."""
    directory = os.environ.get("TAEL_TEST_MODELS")

    def path(name: str) -> Path:
        if directory:
            return Path(directory) / f"{name.replace(':', '-')}.gguf"
        return resolve(name)

    return path


@pytest.fixture(params=_native.supported_isas())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs the test once with the kernels of every instruction set of this CPU."""
    monkeypatch.setenv("TAEL_ISA", request.param)
    return str(request.param)
