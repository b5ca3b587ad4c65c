"""Memory of the process as the system counts it."""

from __future__ import annotations

import mmap

from tael.memory.process import peak_rss_bytes, rss_bytes

SIZE = 64 << 20


def test_rss_follows_touched_pages_and_the_peak_stays() -> None:
    before = rss_bytes()
    memory = mmap.mmap(-1, SIZE)
    memory.write(b"x" * SIZE)
    grown = rss_bytes()
    assert grown - before > SIZE / 2
    memory.close()
    assert rss_bytes() < grown - SIZE / 2
    assert peak_rss_bytes() >= grown - (4 << 20)  # the kernel counts some pages late
