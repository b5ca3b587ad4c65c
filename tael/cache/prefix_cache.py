"""How much of a token sequence can be read from the cache instead of computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from tael.models.spec import CacheGroup


class Blocks(Protocol):
    """Where the blocks of a cache group are looked for."""

    def has(self, block_hash: bytes) -> bool: ...


def longest_prefix(
    groups: Sequence[CacheGroup],
    pools: Sequence[Blocks],
    hashes: Sequence[bytes],
    block_size: int,
) -> int:
    """The largest number of leading blocks after which computation can go on.

    A group can go on after ``n`` blocks if it still has every block that the query at position
    ``n * block_size`` looks at: all ``n`` under full attention, the last few under a window.
    ``hashes`` are the identities of the sequence's blocks, from the first.
    """
    end = len(hashes)
    windows = []
    for group, pool in zip(groups, pools, strict=True):
        if group.window is None:
            end = _first_gap(pool, hashes, 0, end)
        else:
            windows.append((group, pool))
    # Every end between a gap and the end that met it looks at the gap too, since it sees even
    # further back. So the gap is the next candidate, until no window has one.
    settled = False
    while not settled:
        candidate = end
        for group, pool in windows:
            first = group.first_block(end * block_size, block_size)
            end = _first_gap(pool, hashes, first, end)
        settled = end == candidate
    return end


def _first_gap(pool: Blocks, hashes: Sequence[bytes], start: int, end: int) -> int:
    """The first block of ``start`` to ``end`` that the pool lacks, else ``end``."""
    return next((i for i in range(start, end) if not pool.has(hashes[i])), end)
