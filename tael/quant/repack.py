"""Repacks weights into the tile layout of the native kernels (csrc/quant/formats.hpp)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tael import _native

TILE_ROWS = 16


def tiles_bytes(format_name: str, num_rows: int, num_columns: int) -> int:
    """Bytes of a matrix in tiles: those of the source, but for a last tile that is not full."""
    return _native.num_tiles(num_rows) * _native.tile_bytes(format_name, num_columns)


def repack(format_name: str, rows: NDArray[np.uint8], num_columns: int) -> NDArray[np.uint8]:
    """Rows as in the file, [num_rows, row_bytes], to whole tiles, [bytes]. No bit is lost. The
    interpreter lock is released meanwhile."""
    tiles = np.empty(tiles_bytes(format_name, len(rows), num_columns), np.uint8)
    _native.repack(format_name, np.ascontiguousarray(rows), num_columns, tiles)
    return tiles
