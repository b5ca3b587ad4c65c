"""Which blocks a query reads under a budget."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tael.backends.reference.layers import Float32
from tael.config import NUM_RECENT_BLOCKS, NUM_SINK_BLOCKS


def chosen_blocks(q: Float32, least: Float32, largest: Float32, budget: int) -> NDArray[np.int64]:
    """``budget`` - 1 of a sequence's complete blocks, ascending, for the query heads ``q`` [H, D]
    that share a KV head. ``least`` and ``largest`` [num_blocks, D] are of the keys of each block.

    The first and the last few, and those whose keys can score highest with any of the heads
    (Quest, arXiv:2406.10774); of equal ones the earliest.
    """
    bounds = np.maximum(q[:, None] * least, q[:, None] * largest).sum(axis=-1)
    scores = bounds.max(axis=0)
    num_blocks = len(least)
    recent = np.arange(num_blocks - NUM_RECENT_BLOCKS, num_blocks)
    between = np.arange(NUM_SINK_BLOCKS, num_blocks - NUM_RECENT_BLOCKS)
    best = between[np.argsort(-scores[between], kind="stable")]
    num_scored = budget - 1 - NUM_SINK_BLOCKS - NUM_RECENT_BLOCKS
    return np.concatenate([np.arange(NUM_SINK_BLOCKS), np.sort(best[:num_scored]), recent])
