"""Answers look as ``llm-comply`` reads the specifications of the APIs.

The model here is random, so its answers end where the context does, and its tool calls too.
``benchmarks/compliance.py`` makes the checks that need a real one.
"""

from __future__ import annotations

import pytest
from running import MODEL, Running

from benchmarks import compliance


@pytest.mark.parametrize("form", compliance.SPECS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compliance(server: Running, form: str) -> None:
    results = compliance.checked(
        server.url,
        MODEL,
        form,
        skipped=(compliance.TestCategory.MULTIMODAL, compliance.TestCategory.TOOLS),
        ignored=("finish_reason: expected 'stop'", "stop_reason: expected", "expected status="),
    )
    assert len(results) >= 7
    assert not {result.id: result.errors for result in results if result.status.value == "failed"}
