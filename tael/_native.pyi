"""The native kernels, csrc/bindings.cpp."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

BLOCK_TOKENS: int
MAX_HEAD_DIM: int
MIN_BUDGET_BLOCKS: int
SUPERBLOCK_BLOCKS: int
MIN_SCORED_SUPERBLOCKS: int
COMPILER: str

def supported_isas() -> list[str]:
    """Instruction sets that this build has and this CPU runs, best first."""

def num_tiles(rows: int) -> int: ...
def tile_bytes(format: str, columns: int) -> int: ...
def repack(
    format: str, rows: NDArray[np.uint8], columns: int, tiles: NDArray[np.uint8]
) -> None: ...
def dequantize_row(matrix: Matrix, row: int) -> NDArray[np.float32]:
    """[1, columns]"""

def matmul(
    matrix: Matrix, x: NDArray[np.float32], isa: str, num_threads: int
) -> NDArray[np.float32]:
    """[num_tokens, columns] times the transposed matrix: [num_tokens, rows]"""

def time_matmul(
    matrices: Sequence[Matrix],
    x: NDArray[np.float32],
    isa: str,
    num_threads: int,
    min_seconds: float,
) -> float:
    """Seconds that the products of x with matrices of one shape take, one after the other: the mean
    over passes that take min_seconds, after as long a warm-up."""

def read_bytes_per_s(num_threads: int, num_bytes: int) -> float: ...
def int8_ops_per_s(num_threads: int) -> float | None: ...
def bf16_flops_per_s(num_threads: int) -> float | None: ...

class Matrix:
    def __init__(self, format: str, rows: int, columns: int, tiles: NDArray[np.uint8]) -> None: ...

SLOT_ALIGNMENT: int

class LostBlocks(Exception): ...

def min_slots(num_threads: int) -> int: ...

class TieredPool:
    def __init__(
        self, fd: int, num_blocks: int, heads_per_block: int, slots: NDArray[np.uint8]
    ) -> None: ...
    def read_block(self, block: int, out: NDArray[np.uint8]) -> None: ...
    def write_block(self, block: int, payload: NDArray[np.uint8]) -> None: ...
    def take_lost(self) -> tuple[list[int], str]: ...
    @property
    def num_bytes(self) -> int: ...
    @property
    def counters(self) -> dict[str, int]: ...

class Model:
    def __init__(
        self,
        isa: str,
        num_threads: int,
        hidden_size: int,
        vocab_size: int,
        norm_eps: float,
        embedding_scale: float,
    ) -> None: ...
    def add_rope(self, inv_freq: Sequence[float], attention_factor: float) -> int: ...
    def set_ends(
        self, embedding: Matrix, lm_head: Matrix, norm: NDArray[np.float32] | None
    ) -> None: ...
    def add_layer(
        self, attention: Mapping[str, Any], ffn: Mapping[str, Any], norms: Mapping[str, Any]
    ) -> None: ...
    def allocate(
        self,
        max_tokens: int,
        max_seqs: int,
        max_logits: int,
        max_model_len: int,
        num_candidates: int,
    ) -> None: ...
    def bind_kv(
        self,
        cache_group: int,
        blocks: NDArray[np.uint8],
        open_blocks: NDArray[np.uint8] | None = None,
        summaries: NDArray[np.uint8] | None = None,
    ) -> None: ...
    def bind_tiered_kv(
        self,
        cache_group: int,
        tiered: TieredPool,
        open_blocks: NDArray[np.uint8],
        summaries: NDArray[np.uint8] | None = None,
    ) -> None: ...
    @property
    def workspace_bytes(self) -> int: ...
    @property
    def superblock_bytes(self) -> int: ...
    def forward(
        self,
        token_ids: NDArray[np.int32],
        positions: NDArray[np.int32],
        query_start: NDArray[np.int32],
        block_tables: Sequence[NDArray[np.int32]],
        open_tables: Sequence[NDArray[np.int32]],
        logits_indices: NDArray[np.int32],
        temperatures: NDArray[np.float32],
        full_logits: NDArray[np.bool_],
        kv_budgets: NDArray[np.int32] | None = None,
        restored_blocks: Sequence[Sequence[int]] = (),
    ) -> tuple[
        NDArray[np.int32],
        NDArray[np.float32],
        NDArray[np.float64],
        NDArray[np.float64],
        NDArray[np.float32],
    ]:
        """The arrays of ``HeadOutput``. The lock is released meanwhile."""
    def draw(self, row: int, uniform: float) -> tuple[int, float]:
        """That of ``HeadOutput``."""
