"""The bytes of the KV cache."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tael.backends.base import TieredBlocks
from tael.backends.blocks import zeroed_blocks
from tael.models.spec import CacheGroup


class KVStore:
    """Two arrays of blocks per cache group, for the life of the engine. Complete blocks of the
    first group may be ``tiered`` instead of an array.

    The memory is anonymous and private: zero, aligned to a page, and taken from the machine
    only as blocks are first written (``zeroed_blocks``).
    """

    def __init__(
        self,
        groups: Sequence[CacheGroup],
        num_blocks: Sequence[int],
        num_open_blocks: int = 0,
        tiered: TieredBlocks | None = None,
    ) -> None:
        self.tiered = tiered
        self.pools: list[NDArray[np.uint8] | TieredBlocks] = [
            tiered if tiered and i == 0 else zeroed_blocks(num_blocks[i], group.kv_block_bytes)
            for i, group in enumerate(groups)
        ]
        """uint8 [num_blocks, kv_block_bytes] each. What is inside a block is the backend's own."""
        self.summaries = [
            zeroed_blocks(group.num_heads, n * group.head_summary_bytes).reshape(
                group.num_heads, n, group.head_summary_bytes
            )
            for group, n in zip(groups, num_blocks, strict=True)
        ]
        """uint8 [num_heads, num_blocks, head_summary_bytes] each: those of one head side by side,
        since a query reads them all. In the blocks, far apart, they take five times as long."""
        self.open_pools: list[NDArray[np.uint8]] = [
            zeroed_blocks(num_open_blocks if group.open_block_bytes else 0, group.open_block_bytes)
            for group in groups
        ]
        """uint8 [num_open_blocks, open_block_bytes] each: blocks that are being filled, of the
        groups that compress them when they are complete."""

    def payload_bytes(self, group: int) -> int:
        """Of what ``read_block`` copies."""
        num_heads, _, head_bytes = self.summaries[group].shape
        return self._kv_bytes(group) + num_heads * head_bytes

    def read_block(self, group: int, block: int, out: NDArray[np.uint8]) -> None:
        """Copy all that is kept of a complete block to ``out``, uint8 [payload_bytes]."""
        pool, kv_bytes = self.pools[group], self._kv_bytes(group)
        if isinstance(pool, np.ndarray):
            out[:kv_bytes] = pool[block]
        else:
            pool.read_block(block, out[:kv_bytes])
        out[kv_bytes:] = self.summaries[group][:, block].ravel()

    def write_block(self, group: int, block: int, payload: NDArray[np.uint8]) -> None:
        """The inverse of ``read_block``, into any block."""
        pool, kv_bytes, summaries = self.pools[group], self._kv_bytes(group), self.summaries[group]
        if isinstance(pool, np.ndarray):
            pool[block] = payload[:kv_bytes]
        else:
            pool.write_block(block, payload[:kv_bytes])
        summaries[:, block] = payload[kv_bytes:].reshape(len(summaries), -1)

    @property
    def num_bytes(self) -> int:
        """In memory."""
        return sum(
            pool.nbytes if isinstance(pool, np.ndarray) else pool.num_bytes
            for pool in (*self.pools, *self.summaries, *self.open_pools)
        )

    def _kv_bytes(self, group: int) -> int:
        pool = self.pools[group]
        return int(pool.shape[1]) if isinstance(pool, np.ndarray) else pool.block_bytes
