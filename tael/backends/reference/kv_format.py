"""What the KV formats keep of a complete block."""

from __future__ import annotations

import numpy as np

from tael.backends.reference.layers import Float32


def decoded(kv_format: str, block: Float32) -> Float32:
    """Keys and values [2, BLOCK_SIZE, num_kv_heads, head_dim] as they are read back."""
    if kv_format == "bf16":
        return block
    keys, values = block
    return np.stack(
        [
            _int8(keys, axis=0),  # a scale per channel
            _int8(values, axis=-1) if kv_format == "q8" else _nibbles(values, axis=-1),
        ]
    )


def bf16(x: Float32) -> Float32:
    """To the nearest, ties to even."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    rounded = bits + 0x7FFF + (bits >> 16 & 1) & np.uint32(0xFFFF0000)
    return rounded.view(np.float32)


def _int8(x: Float32, axis: int) -> Float32:
    """x = scale * q, |q| <= 127."""
    scale = bf16(np.abs(x).max(axis=axis, keepdims=True) / np.float32(127))
    q: Float32 = np.clip(np.rint(x * _inverse(scale)), -127, 127)
    return scale * q


def _nibbles(x: Float32, axis: int) -> Float32:
    """x = scale * q + minimum, 0 <= q <= 15."""
    minimum = bf16(x.min(axis=axis, keepdims=True))
    scale = bf16((x.max(axis=axis, keepdims=True) - minimum) / np.float32(15))
    q: Float32 = np.clip(np.rint((x - minimum) * _inverse(scale)), 0, 15)
    return scale * q + minimum


def _inverse(scale: Float32) -> Float32:
    with np.errstate(divide="ignore"):
        return np.where(scale > 0, np.float32(1) / scale, np.float32(0))
