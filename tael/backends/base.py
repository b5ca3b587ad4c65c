"""What the engine asks of a backend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from tael.config import SchedulerConfig


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
    """[num_logits] tokens whose logits are wanted."""


class Backend(Protocol):
    """Computes a model. Holds its weights; the KV blocks are bound once at start."""

    @property
    def weights_bytes(self) -> int:
        """Memory that the weights take, mapped files included."""

    def reserve(self, scheduler: SchedulerConfig, max_model_len: int) -> int:
        """Allocate what ``forward`` needs for steps within these bounds. Returns the bytes, logits
        included. Called once, at start."""

    def bind_kv(self, pools: list[NDArray[np.uint8]]) -> None:
        """Hand over the block pools, one per cache group: uint8 [num_blocks, block_bytes],
        zeroed. The layout inside a block is the backend's own."""

    def forward(self, batch: ForwardBatch) -> NDArray[np.float32]:
        """Compute the batch, write its KV, return logits [num_logits, vocab_size]. The array is
        valid until the next call."""
