"""The memory of KV blocks."""

from __future__ import annotations

import mmap

import numpy as np
from numpy.typing import NDArray


def zeroed_blocks(num_blocks: int, block_bytes: int) -> NDArray[np.uint8]:
    """uint8 [num_blocks, block_bytes] at the start of a page, taken from the machine as it is first
    written."""
    if num_blocks * block_bytes == 0:
        return np.zeros((num_blocks, block_bytes), np.uint8)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = mmap.mmap(-1, num_blocks * block_bytes, flags=flags)
    return np.frombuffer(memory, np.uint8).reshape(num_blocks, block_bytes)
