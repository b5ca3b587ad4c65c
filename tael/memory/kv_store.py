"""The bytes of the KV cache."""

from __future__ import annotations

import mmap
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tael.models.spec import CacheGroup


class KVStore:
    """One array of blocks per cache group, for the life of the engine.

    The memory is anonymous and private: zero, aligned to a page, and taken from the machine
    only as blocks are first written.
    """

    def __init__(self, groups: Sequence[CacheGroup], num_blocks: Sequence[int]) -> None:
        self.pools: list[NDArray[np.uint8]] = [
            _zeros(n, group.block_bytes) for group, n in zip(groups, num_blocks, strict=True)
        ]
        """uint8 [num_blocks, block_bytes] each. What is inside a block is the backend's own."""

    def payload_bytes(self, group: int) -> int:
        """Of what ``read_block`` copies."""
        pool = self.pools[group]
        return pool.nbytes // len(pool)

    def read_block(self, group: int, block: int, out: NDArray[np.uint8]) -> None:
        """Copy all that is kept of a complete block to ``out``, uint8 [payload_bytes]."""
        out[:] = self.pools[group][block]

    def write_block(self, group: int, block: int, payload: NDArray[np.uint8]) -> None:
        """The inverse of ``read_block``, into any block."""
        self.pools[group][block] = payload

    @property
    def num_bytes(self) -> int:
        return sum(pool.nbytes for pool in self.pools)


def _zeros(num_blocks: int, block_bytes: int) -> NDArray[np.uint8]:
    memory = mmap.mmap(-1, num_blocks * block_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(memory, np.uint8).reshape(num_blocks, block_bytes)
