"""The bytes of the KV cache."""

from __future__ import annotations

import mmap
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tael.models.spec import CacheGroup


class KVStore:
    """Two arrays of blocks per cache group, for the life of the engine.

    The memory is anonymous and private: zero, aligned to a page, and taken from the machine
    only as blocks are first written.
    """

    def __init__(
        self, groups: Sequence[CacheGroup], num_blocks: Sequence[int], num_open_blocks: int = 0
    ) -> None:
        self.pools: list[NDArray[np.uint8]] = [
            _zeros(n, group.block_bytes) for group, n in zip(groups, num_blocks, strict=True)
        ]
        """uint8 [num_blocks, block_bytes] each. What is inside a block is the backend's own."""
        self.open_pools: list[NDArray[np.uint8]] = [
            _zeros(num_open_blocks if group.open_block_bytes else 0, group.open_block_bytes)
            for group in groups
        ]
        """uint8 [num_open_blocks, open_block_bytes] each: blocks that are being filled, of the
        groups that compress them when they are complete."""

    @property
    def num_bytes(self) -> int:
        return sum(pool.nbytes for pool in (*self.pools, *self.open_pools))


def _zeros(num_blocks: int, block_bytes: int) -> NDArray[np.uint8]:
    if num_blocks == 0:
        return np.zeros((0, block_bytes), np.uint8)
    memory = mmap.mmap(-1, num_blocks * block_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(memory, np.uint8).reshape(num_blocks, block_bytes)
