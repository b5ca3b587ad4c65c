"""What is known of the keys of a block without reading them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tael.backends.reference.layers import Float32


@dataclass(frozen=True, slots=True)
class KeySummaries:
    """The least and the largest key of every channel (Quest, arXiv:2406.10774), and in which
    quarter between these each key is."""

    least: Float32
    """[num_blocks, num_kv_heads, head_dim]"""
    largest: Float32
    codes: Float32
    """[num_blocks, BLOCK_SIZE, num_kv_heads, head_dim], 0 to 3"""

    def of_head(self, head: int) -> KeySummaries:
        return KeySummaries(self.least[:, head], self.largest[:, head], self.codes[:, :, head])

    def of_blocks(self, blocks: NDArray[np.int64]) -> KeySummaries:
        return KeySummaries(self.least[blocks], self.largest[blocks], self.codes[blocks])


def summarize_keys(keys: Float32) -> KeySummaries:
    """``keys`` [num_blocks, BLOCK_SIZE, num_kv_heads, head_dim]."""
    least, largest = keys.min(axis=1), keys.max(axis=1)
    step = (largest - least)[:, None] * np.float32(0.25)
    codes = np.floor((keys - least[:, None]) / np.where(step > 0, step, np.float32(1)))
    return KeySummaries(least, largest, np.minimum(codes, np.float32(3)))


def bound_scores(q: Float32, least: Float32, largest: Float32) -> Float32:
    """What the heads ``q`` [H, D] can be expected to score at most with keys of each range [N, D]:
    [N]. Of every channel the farther end counts whole and the nearer one a quarter."""
    ends = q[:, None] * least, q[:, None] * largest
    expected = np.maximum(*ends) + np.float32(0.25) * np.minimum(*ends)
    scores: Float32 = expected.sum(axis=-1).max(axis=0)
    return scores


def key_scores(q: Float32, blocks: KeySummaries) -> Float32:
    """The most that a key of each block scores with any of the heads ``q`` [H, D] if each channel
    is in the middle of its quarter: [N]. What codes are multiplied with is rounded to 8 bits."""
    step = (blocks.largest - blocks.least) * np.float32(0.25)
    base = (q[:, None] * (blocks.least + step / 2)).sum(axis=-1)
    weights = q[:, None] * step
    most = np.abs(weights).max(axis=-1, keepdims=True)
    rounded = np.rint(weights * (np.float32(127) / np.where(most > 0, most, np.float32(1))))
    sums = np.einsum("hnd,ntd->hnt", rounded, blocks.codes).max(axis=-1)
    scores: Float32 = (base + most[..., 0] * np.float32(1 / 127) * sums).max(axis=0)
    return scores
