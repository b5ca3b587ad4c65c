from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from running import TOOL_TEMPLATE, Running, eventually, running, save_model

from tael import LLM


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    save_model(path, TOOL_TEMPLATE)
    return path


@pytest.fixture(scope="session")
def llm(folder: Path) -> Iterator[LLM]:
    """The same model in this process: what answers ought to be."""
    with LLM(str(folder), backend="reference") as llm:
        yield llm


@pytest.fixture(scope="session")
def shared_server(folder: Path) -> Iterator[Running]:
    with running(folder) as server:
        yield server


@pytest.fixture
def server(shared_server: Running) -> Iterator[Running]:
    """One for all tests that leave it as it was."""
    yield shared_server
    eventually(shared_server.is_idle)
