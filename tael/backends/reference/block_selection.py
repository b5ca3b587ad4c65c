"""Which blocks a query reads under a budget."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tael.backends.reference.key_summary import KeySummaries, bound_scores, key_scores
from tael.backends.reference.layers import Float32
from tael.config import (
    MIN_BUDGET_BLOCKS,
    MIN_SCORED_SUPERBLOCKS,
    NUM_RECENT_BLOCKS,
    NUM_SINK_BLOCKS,
    SUPERBLOCK_BLOCKS,
)

CANDIDATES_PER_BLOCK = 3
"""Blocks whose keys are scored, for each that is read."""

CHOOSER_STEP = 2
"""Of tokens that choose together, every other does: the one beside it wants much the same."""


def layer_budgets(budgets: NDArray[np.int32], percent: int) -> NDArray[np.int32]:
    """Of KV budgets in blocks, what a layer with ``percent`` of them reads. 0 stays: all."""
    own: NDArray[np.int32] = np.maximum(MIN_BUDGET_BLOCKS, budgets * percent // 100)
    return np.where(budgets > 0, own, 0).astype(np.int32)


def chosen_blocks(q: Float32, summaries: KeySummaries, budget: int) -> NDArray[np.int64]:
    """``budget`` - 1 of a sequence's complete blocks, ascending, for the query heads ``q`` [H, D]
    that share a KV head. ``summaries`` are of that head.

    The first and the last few, and those whose keys can be expected to score highest with any of
    the heads: three times as many by the bounds of a block, and of these by its keys in two bits a
    channel; of equal ones the earliest. Where there are many superblocks, these are of the best of
    them, or behind the last.
    """
    least, largest = summaries.least, summaries.largest
    num_blocks = len(least)
    recent = np.arange(num_blocks - NUM_RECENT_BLOCKS, num_blocks)
    between = np.arange(NUM_SINK_BLOCKS, num_blocks - NUM_RECENT_BLOCKS)
    num_superblocks = num_blocks // SUPERBLOCK_BLOCKS
    most = max(MIN_SCORED_SUPERBLOCKS, budget // 8)
    if num_superblocks > most:
        shape = (num_superblocks, SUPERBLOCK_BLOCKS, -1)
        end = num_superblocks * SUPERBLOCK_BLOCKS
        scores = bound_scores(
            q, least[:end].reshape(shape).min(axis=1), largest[:end].reshape(shape).max(axis=1)
        )
        left_out = np.argsort(-scores, kind="stable")[most:]
        between = between[~np.isin(between // SUPERBLOCK_BLOCKS, left_out)]
    num_scored = budget - 1 - NUM_SINK_BLOCKS - NUM_RECENT_BLOCKS
    scores = bound_scores(q, least[between], largest[between])
    between = _best(between, scores, CANDIDATES_PER_BLOCK * num_scored)
    chosen = _best(between, key_scores(q, summaries.of_blocks(between)), num_scored)
    return np.concatenate([np.arange(NUM_SINK_BLOCKS), chosen, recent])


def _best(blocks: NDArray[np.int64], scores: Float32, num: int) -> NDArray[np.int64]:
    return np.sort(blocks[np.argsort(-scores, kind="stable")[:num]])
