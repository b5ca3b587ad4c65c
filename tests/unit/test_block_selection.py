"""Sparse reading chooses the blocks that exact scores would choose."""

from __future__ import annotations

import numpy as np

from tael.backends.reference.block_selection import CANDIDATES_PER_BLOCK, chosen_blocks
from tael.backends.reference.key_summary import bound_scores, key_scores, summarize_keys
from tael.config import BLOCK_SIZE, MIN_BUDGET_BLOCKS, NUM_RECENT_BLOCKS, NUM_SINK_BLOCKS

HEAD_DIM, NUM_HEADS = 64, 7
BUDGET = 48
NUM_SCORED = BUDGET - MIN_BUDGET_BLOCKS
NUM_BLOCKS = NUM_SINK_BLOCKS + CANDIDATES_PER_BLOCK * NUM_SCORED + NUM_RECENT_BLOCKS
"""As many as have their keys scored, and those that are read in any case."""


def test_a_key_that_stands_out_is_read() -> None:
    """One key scores a fifth higher than all others. By what the keys of a block can score at most
    (Quest, arXiv:2406.10774) it would be overlooked in some cases; in two bits a channel it never
    is."""
    num_by_bounds = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        keys = rng.standard_normal((NUM_BLOCKS, 1, 1, HEAD_DIM)).astype(np.float32)
        keys = keys + rng.standard_normal((NUM_BLOCKS, BLOCK_SIZE, 1, HEAD_DIM), np.float32)
        q = rng.standard_normal((NUM_HEADS, HEAD_DIM)).astype(np.float32)
        block = int(rng.integers(NUM_SINK_BLOCKS, NUM_BLOCKS - NUM_RECENT_BLOCKS))
        missing = 1.2 * (keys @ q.T).max() - keys[block, 7, 0] @ q[0]
        keys[block, 7, 0] += missing / np.square(q[0]).sum() * q[0]
        summaries = summarize_keys(keys).of_head(0)
        assert block in chosen_blocks(q, summaries, BUDGET), seed
        ends = q[:, None] * summaries.least, q[:, None] * summaries.largest
        bounds = np.maximum(*ends).sum(axis=-1).max(axis=0)
        num_by_bounds += int((bounds > bounds[block]).sum()) < NUM_SCORED
    assert num_by_bounds < 40


def test_scores_follow_those_of_the_keys() -> None:
    rng = np.random.default_rng(0)
    keys = rng.standard_normal((50, BLOCK_SIZE, 1, HEAD_DIM)).astype(np.float32)
    q = rng.standard_normal((NUM_HEADS, HEAD_DIM)).astype(np.float32)
    exact = (keys[:, :, 0] @ q.T).max(axis=(1, 2))
    summaries = summarize_keys(keys).of_head(0)
    by_keys = np.corrcoef(exact, key_scores(q, summaries))[0, 1]
    by_bounds = np.corrcoef(exact, bound_scores(q, summaries.least, summaries.largest))[0, 1]
    assert by_keys > 0.8 > 0.6 > by_bounds


def test_codes_are_the_quarters_of_the_range() -> None:
    keys = np.linspace(-1, 3, BLOCK_SIZE, dtype=np.float32).reshape(1, BLOCK_SIZE, 1, 1)
    codes = summarize_keys(keys).codes[0, :, 0, 0]
    assert codes.tolist() == [0] * 8 + [1] * 8 + [2] * 8 + [3] * 8
    assert not summarize_keys(np.ones_like(keys)).codes.any()
