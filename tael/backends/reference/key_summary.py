"""What is known of the keys of a block without reading them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tael.backends.reference.layers import Float32

NUM_PIECES = 4


@dataclass(frozen=True, slots=True)
class KeySummaries:
    """The least and the largest key of every channel (Quest, arXiv:2406.10774), of blocks and of
    pieces of them. The latter in fifteenths of the way from the one to the other of the block."""

    least: Float32
    """[num_blocks, num_kv_heads, head_dim]"""
    largest: Float32
    piece_least: Float32
    """[num_blocks, NUM_PIECES, num_kv_heads, head_dim]"""
    piece_largest: Float32

    def of_head(self, head: int) -> KeySummaries:
        return KeySummaries(
            self.least[:, head],
            self.largest[:, head],
            self.piece_least[:, :, head],
            self.piece_largest[:, :, head],
        )


def summarize_keys(keys: Float32) -> KeySummaries:
    """``keys`` [num_blocks, BLOCK_SIZE, num_kv_heads, head_dim]."""
    least, largest = keys.min(axis=1), keys.max(axis=1)
    pieces = keys.reshape(len(keys), NUM_PIECES, -1, *keys.shape[2:])
    start, step = least[:, None], (largest - least)[:, None] * np.float32(1 / 15)
    one = np.where(step > 0, step, np.float32(1))
    below = np.clip(np.floor((pieces.min(axis=2) - start) / one), 0, 15)
    above = np.clip(np.ceil((pieces.max(axis=2) - start) / one), 0, 15)
    return KeySummaries(least, largest, start + step * below, start + step * above)
