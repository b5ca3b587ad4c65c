from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from byte_llama import assert_idle, save_byte_llama

from tael import LLM


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    save_byte_llama(path)
    return path


@pytest.fixture
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(str(folder), backend="reference") as llm:
        yield llm
        if llm._engine is not None:
            assert_idle(llm.engine)
