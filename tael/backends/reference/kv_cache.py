"""Paged keys and values in float32."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tael.backends.reference.key_summary import KeySummaries, summarize_keys
from tael.backends.reference.kv_format import decoded
from tael.backends.reference.layers import Float32
from tael.config import BLOCK_SIZE
from tael.models.spec import ModelSpec, cache_groups

Int32 = NDArray[np.int32]


class KVCache:
    """For each layer an array [num_blocks, 2, BLOCK_SIZE, num_kv_heads, head_dim]: keys, values.

    ``num_blocks`` is per cache group. Position p of a sequence lies in slot ``p % BLOCK_SIZE``
    of block ``block_table[p // BLOCK_SIZE]``. Of a compressed format, a second array holds complete
    blocks as they are read back.
    """

    def __init__(self, spec: ModelSpec, num_blocks: list[int]) -> None:
        groups = cache_groups(spec, BLOCK_SIZE)
        self.group_of_layer = {i: g for g, group in enumerate(groups) for i in group.layers}
        self._formats = [layer.mixer.kv_format for layer in spec.layers]
        self._layers, self._complete = [], []
        for i, layer in enumerate(spec.layers):
            shape = (2, BLOCK_SIZE, layer.mixer.num_kv_heads, layer.mixer.head_dim)
            blocks = np.zeros((num_blocks[self.group_of_layer[i]], *shape), np.float32)
            self._layers.append(blocks)
            self._complete.append(blocks if self._formats[i] == "bf16" else np.zeros_like(blocks))

    def write(self, layer: int, table: Int32, positions: Int32, k: Float32, v: Float32) -> None:
        """``table`` [max_num_blocks]; ``k`` and ``v`` [num_positions, num_kv_heads, head_dim]."""
        blocks, slots = _locate(table, positions)
        self._layers[layer][blocks, 0, slots] = k
        self._layers[layer][blocks, 1, slots] = v
        for block in blocks[slots == BLOCK_SIZE - 1]:
            self._complete[layer][block] = self._read_back(layer, self._layers[layer][block])

    def read(
        self, layer: int, table: Int32, positions: Int32, query_block: int
    ) -> tuple[Float32, Float32]:
        """What queries in the ``query_block``-th block of the sequence see at ``positions``."""
        blocks, slots = _locate(table, positions)
        kv = self._complete[layer][blocks, :, slots]
        own = positions // BLOCK_SIZE == query_block
        kv[own] = self._layers[layer][blocks[own], :, slots[own]]
        return kv[:, 0], kv[:, 1]

    def summaries(self, layer: int, blocks: Int32) -> KeySummaries:
        return summarize_keys(self._layers[layer][blocks, 0])

    def _read_back(self, layer: int, block: Float32) -> Float32:
        return decoded(self._formats[layer], block)


def _locate(table: Int32, positions: Int32) -> tuple[Int32, Int32]:
    blocks = table[positions // BLOCK_SIZE]
    if (blocks < 0).any():  # numpy would take the last block
        raise IndexError(f"no block at positions {positions[blocks < 0]}")
    return blocks, positions % BLOCK_SIZE
