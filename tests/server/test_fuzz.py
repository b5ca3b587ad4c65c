"""A few hundred of the requests that ``benchmarks/server_fuzz.py`` makes by thousands."""

from __future__ import annotations

from threading import Event, Thread

import pytest
from running import MODEL, Running

pytest.importorskip("schemathesis", reason="needs Python 3.11")

from benchmarks import server_fuzz


def test_made_up_requests(server: Running) -> None:
    """No 5xx, no broken connection, and a stream beside them keeps its tokens."""
    canary, ended = server_fuzz.Canary(), Event()
    thread = Thread(target=canary.run, args=(server.url, MODEL, ended))
    thread.start()
    try:
        fuzzed = server_fuzz.fuzz(server.url, MODEL, num_examples=30, seed=1, has_boundaries=False)
    finally:
        ended.set()
        thread.join()
    assert fuzzed.faults == [] and canary.faults == []
    assert fuzzed.cases > 150 and canary.streams > 1
    assert {200, 400} <= set(fuzzed.by_status)
    assert server.service.engine.num_restarts == 0
