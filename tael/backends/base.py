"""What the engine asks of a backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from tael.config import SchedulerConfig
from tael.models.spec import CacheGroup

NUM_CANDIDATES = 64
"""Most likely tokens that a step gives for each row of logits: so many as to hold what most filters
leave, so few that finding them costs less than the exponentials."""

WITH_PREVIOUS = -1
"""Instead of the KV budget of a token: it reads what the token before it reads."""


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """The tokens of one step. Sequence s owns tokens ``query_start[s]:query_start[s + 1]``,
    at consecutive positions; the KV of all its earlier positions exists."""

    token_ids: NDArray[np.int32]
    """[num_tokens]"""
    positions: NDArray[np.int32]
    """[num_tokens]"""
    query_start: NDArray[np.int32]
    """[num_seqs + 1]"""
    block_tables: tuple[NDArray[np.int32], ...]
    """One per cache group: [num_seqs, max_num_blocks]. Entry b of a row is the block that holds
    positions ``b * block_size`` onward; -1 where no query of this step looks."""
    logits_indices: NDArray[np.int32]
    """[num_logits] tokens whose logits are wanted. No more than there are tokens."""
    temperatures: NDArray[np.float32]
    """[num_logits], above 0: for ``sum_exp_at_temperature`` and ``draw``."""
    full_logits: NDArray[np.bool_]
    """[num_logits] whether all logits of the row are wanted."""
    open_tables: tuple[NDArray[np.int32], ...] = ()
    """One per cache group, or none if no group fills its blocks in a pool of their own:
    [num_seqs, max_num_open_blocks]. Entry i of a row is the block of that pool for entry
    ``positions[query_start[s]] // block_size + i`` of the block table."""
    kv_budgets: NDArray[np.int32] | None = None
    """[num_tokens] blocks that a token's queries read of each KV head under full attention, its own
    included: the first and the last few, and those whose keys can be expected to score highest. At
    least MIN_BUDGET_BLOCKS; 0, or None for all: every block; WITH_PREVIOUS: those of the token
    before it, which must be in the same block. The queries of both choose these."""
    restored_blocks: tuple[Sequence[int], ...] = ()
    """One per cache group, or none: the blocks that got other content since the last step by other
    means than a step."""


@dataclass(frozen=True, slots=True)
class HeadOutput:
    """What a step tells of each row of logits: enough to sample from most distributions. Valid
    until the next step.

    A row with a NaN, or without a finite maximum, has sums that are NaN."""

    top_token_ids: NDArray[np.int32]
    """[num_logits, min(NUM_CANDIDATES, vocab_size)], most likely first, of equal logits the lowest
    id first."""
    top_logits: NDArray[np.float32]
    """Their logits."""
    sum_exp: NDArray[np.float64]
    """[num_logits] of exp(logit - maximum) over the vocabulary."""
    sum_exp_at_temperature: NDArray[np.float64]
    """[num_logits] of exp((logit - maximum) / temperature)."""
    logits: NDArray[np.float32]
    """[num_logits, vocab_size], anything where ``full_logits`` was false."""
    draw: Callable[[int, float], tuple[int, float]]
    """``draw(row, uniform)``: the token at quantile ``uniform`` of [0, 1) of the distribution at
    the row's temperature, in order of id, and its logit. Never one of probability zero."""


class TieredBlocks(Protocol):
    """The complete blocks of one cache group: all of them on disk, a part in memory."""

    @property
    def block_bytes(self) -> int:
        """Of what ``read_block`` copies."""

    @property
    def num_bytes(self) -> int:
        """In memory."""

    @property
    def file_bytes(self) -> int:
        """On disk."""

    @property
    def counters(self) -> Mapping[str, int]:
        """Of KV heads: ``num_hits`` that were in memory or on their way when they were read,
        ``num_loads`` that were not, ``num_prefetches`` that a layer asked for ahead of the next,
        ``num_stores`` and ``num_errors``."""

    def read_block(self, block: int, out: NDArray[np.uint8]) -> None:
        """Copy the KV of a complete block to ``out``, uint8 [block_bytes]. Raises
        LostBlocksError."""

    def write_block(self, block: int, kv: NDArray[np.uint8]) -> None:
        """The inverse of ``read_block``, into any block."""

    def take_lost(self) -> tuple[set[int], str]:
        """The blocks that could not be written or read back since the last call, and why."""


class Backend(Protocol):
    """Computes a model. Holds its weights; the KV blocks are bound once at start."""

    @property
    def weights_bytes(self) -> int:
        """Memory that the weights take, mapped files included."""

    @property
    def fingerprint(self) -> dict[str, str]:
        """What the KV of given tokens depends on besides the ``ModelSpec``, equal in any two
        processes that compute the same bits. Empty if no two are known to."""

    def reserve(self, scheduler: SchedulerConfig, max_model_len: int) -> int:
        """Allocate what ``forward`` needs for steps within these bounds. Returns the bytes, logits
        included. Called once, at start."""

    def tier(
        self, group: CacheGroup, num_blocks: int, num_slots: int, folder: Path
    ) -> TieredBlocks:
        """Complete blocks of a group in a file in ``folder``, with ``num_slots`` of their KV heads
        in memory. Raises TaelError if that cannot be."""

    def bind_kv(
        self,
        pools: Sequence[NDArray[np.uint8] | TieredBlocks],
        open_pools: Sequence[NDArray[np.uint8]] = (),
        summaries: Sequence[NDArray[np.uint8]] = (),
    ) -> None:
        """Hand over the block pools, one per cache group: uint8 [num_blocks, kv_block_bytes],
        zeroed, or what ``tier`` made; those of blocks that are being filled, [num_open_blocks,
        open_block_bytes], if some group has one; and the key summaries, [num_heads, num_blocks,
        head_summary_bytes], likewise. The layout inside is the backend's own."""

    def forward(self, batch: ForwardBatch) -> HeadOutput:
        """Compute the batch and write its KV. Of sequences with blocks that ``take_lost`` names
        afterwards, nothing is right."""
