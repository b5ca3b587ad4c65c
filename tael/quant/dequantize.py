"""The executable definition of every weight format: raw blocks to float32.

The order of the float operations is part of the definition, and is that of ggml's reference
(ggml-quants.c), so results are equal bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from tael.quant.formats import FORMATS

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


def dequantize(format_name: str, raw: Bytes, num_columns: int) -> Floats:
    """Decode rows of a weight.

    raw: [num_rows, row_bytes], as read from a file; format_name: a key of ``FORMATS``.
    Returns [num_rows, num_columns]. The result takes several times the space of ``raw`` while
    it is computed: decode a large weight in ranges of rows.
    """
    blocks = raw.reshape(-1, FORMATS[format_name].block_bytes)
    return _DECODERS[format_name](blocks).reshape(len(raw), num_columns)


# Each decoder below takes [num_blocks, block_bytes] and returns num_blocks * block_elements
# floats in order, in any shape.


def _f32(blocks: Bytes) -> Floats:
    return blocks.view("<f4").astype(np.float32)


def _f16(blocks: Bytes) -> Floats:
    return blocks.view("<f2").astype(np.float32)


def _bf16(blocks: Bytes) -> Floats:
    return (blocks.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)


def _q4_0(blocks: Bytes) -> Floats:
    return _half(blocks, 0) * _signed(_nibbles(blocks[:, 2:]), 8)


def _q4_1(blocks: Bytes) -> Floats:
    return _half(blocks, 0) * _nibbles(blocks[:, 4:]).astype(np.float32) + _half(blocks, 2)


def _q5_0(blocks: Bytes) -> Floats:
    return _half(blocks, 0) * _signed(_five_bits(blocks[:, 2:6], blocks[:, 6:]), 16)


def _q5_1(blocks: Bytes) -> Floats:
    values = _five_bits(blocks[:, 4:8], blocks[:, 8:]).astype(np.float32)
    return _half(blocks, 0) * values + _half(blocks, 2)


def _q8_0(blocks: Bytes) -> Floats:
    return _half(blocks, 0) * blocks[:, 2:].view(np.int8).astype(np.float32)


def _q2_k(blocks: Bytes) -> Floats:
    scale = _half(blocks, 80) * (blocks[:, :16] & np.uint8(15)).astype(np.float32)
    minimum = _half(blocks, 82) * (blocks[:, :16] >> np.uint8(4)).astype(np.float32)
    values = _unpack(blocks[:, 16:80].reshape(-1, 2, 32), 2).reshape(-1, 16, 16)
    return scale[:, :, None] * values.astype(np.float32) - minimum[:, :, None]


def _q3_k(blocks: Bytes) -> Floats:
    scale_low = _unpack(blocks[:, 96:104], 4).reshape(-1, 16)
    scale_high = _unpack(blocks[:, 104:108], 2).reshape(-1, 16)
    scale = _half(blocks, 108) * _signed(scale_low | (scale_high << np.uint8(4)), 32)
    low = _unpack(blocks[:, 32:96].reshape(-1, 2, 32), 2).reshape(-1, 16, 16)
    high = _unpack(blocks[:, :32], 1).reshape(-1, 16, 16)
    # A set third bit means that 4 is not subtracted: the value is offset by 4.
    return scale[:, :, None] * _signed(low | (high << np.uint8(2)), 4)


def _q4_k(blocks: Bytes) -> Floats:
    scale, minimum = _k_scales(blocks)
    values = _unpack(blocks[:, 16:].reshape(-1, 4, 32), 4).reshape(-1, 8, 32)
    return scale * values.astype(np.float32) - minimum


def _q5_k(blocks: Bytes) -> Floats:
    scale, minimum = _k_scales(blocks)
    low = _unpack(blocks[:, 48:].reshape(-1, 4, 32), 4).reshape(-1, 8, 32)
    values = low | (_unpack(blocks[:, 16:48], 1) << np.uint8(4))
    return scale * values.astype(np.float32) - minimum


def _q6_k(blocks: Bytes) -> Floats:
    scale = _half(blocks, 208) * blocks[:, 192:208].view(np.int8).astype(np.float32)
    low = _unpack(blocks[:, :128].reshape(-1, 2, 64), 4).reshape(-1, 16, 16)
    high = _unpack(blocks[:, 128:192].reshape(-1, 2, 32), 2).reshape(-1, 16, 16)
    return scale[:, :, None] * _signed(low | (high << np.uint8(4)), 32)


def _iq4_nl(blocks: Bytes) -> Floats:
    return _half(blocks, 0) * _IQ4_NL_VALUES[_nibbles(blocks[:, 2:])]


def _mxfp4(blocks: Bytes) -> Floats:
    # The exponent bias is 127; one more halves the doubled values of the table.
    scale = np.ldexp(np.float32(1), blocks[:, :1].astype(np.int32) - 128)
    return scale * _E2M1_DOUBLED[_nibbles(blocks[:, 1:])]


def _half(blocks: Bytes, at: int) -> Floats:
    """The f16 at byte ``at`` of each block: [num_blocks, 1]."""
    return blocks[:, at : at + 2].view("<f2").astype(np.float32)


def _unpack(packed: Bytes, bits: int) -> Bytes:
    """Fields of ``bits`` bits: [..., n] to [..., 8 // bits, n], lowest field of all bytes first."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    return (packed[..., None, :] >> shifts) & np.uint8((1 << bits) - 1)


def _nibbles(packed: Bytes) -> Bytes:
    """[num_blocks, 16] to [num_blocks, 32]: the low halves, then the high halves."""
    return _unpack(packed, 4).reshape(-1, 32)


def _five_bits(high: Bytes, low: Bytes) -> Bytes:
    """[num_blocks, 32] from a bit mask [num_blocks, 4] and nibbles [num_blocks, 16]."""
    return _nibbles(low) | (np.unpackbits(high, axis=1, bitorder="little") << np.uint8(4))


def _signed(values: Bytes, offset: int) -> Floats:
    return (values.view(np.int8) - np.int8(offset)).astype(np.float32)


def _k_scales(blocks: Bytes) -> tuple[Floats, Floats]:
    """Scales and minimums of the 8 sub-blocks of Q4_K and Q5_K: [num_blocks, 8, 1] each.

    Of the 12 bytes, the first four hold scales 0 to 3 in their low 6 bits, the next four
    minimums 0 to 3. The low 4 bits of scales and minimums 4 to 7 are the halves of the last
    four, and their top 2 bits fill the first eight bytes.
    """
    first, second, third = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    low, top = np.uint8(0x3F), np.uint8(0x30)
    scales = [first & low, (third & np.uint8(15)) | ((first >> np.uint8(2)) & top)]
    minimums = [second & low, (third >> np.uint8(4)) | ((second >> np.uint8(2)) & top)]
    scale = _half(blocks, 0) * np.concatenate(scales, axis=1).astype(np.float32)
    minimum = _half(blocks, 2) * np.concatenate(minimums, axis=1).astype(np.float32)
    return scale[:, :, None], minimum[:, :, None]


_IQ4_NL_VALUES = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32
)

# E2M1 of the OCP Microscaling Formats specification v1.0, times two.
_E2M1_DOUBLED = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)

_DECODERS: dict[str, Callable[[Bytes], Floats]] = {
    "F32": _f32,
    "F16": _f16,
    "BF16": _bf16,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "MXFP4": _mxfp4,
}
