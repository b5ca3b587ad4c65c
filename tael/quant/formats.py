"""The weight formats that Tael reads.

A row of a weight is a sequence of blocks, each decoded alone. All integers and floats are
little-endian; "f16" is an IEEE half. Element order within a packed field is in
``dequantize.py``, which is the executable definition.

========  ====  ========  =====  ==============================================================
name      id    elements  bytes  fields of a block, in file order (bytes)
========  ====  ========  =====  ==============================================================
F32       0     1         4      f32
F16       1     1         2      f16
BF16      30    1         2      upper half of an f32
Q4_0      2     32        18     f16 scale (2), 4-bit values (16), offset by 8
Q4_1      3     32        20     f16 scale (2), f16 minimum (2), 4-bit values (16)
Q5_0      6     32        22     f16 scale (2), fifth bits (4), low 4 bits (16), offset by 16
Q5_1      7     32        24     f16 scale (2), f16 minimum (2), fifth bits (4), low 4 bits (16)
Q8_0      8     32        34     f16 scale (2), int8 values (32)
Q2_K      10    256       84     16 x (4-bit scale, 4-bit minimum) (16), 2-bit values (64),
                                 f16 scale of the scales (2), f16 scale of the minimums (2)
Q3_K      11    256       110    third bits, inverted (32), low 2 bits (64),
                                 16 x 6-bit scale (12), offset by 32, f16 scale of them (2)
Q4_K      12    256       144    f16 scale of the scales (2), f16 scale of the minimums (2),
                                 8 x (6-bit scale, 6-bit minimum) (12), 4-bit values (128)
Q5_K      13    256       176    as Q4_K up to the minimums (16), fifth bits (32),
                                 low 4 bits (128)
Q6_K      14    256       210    low 4 bits (128), upper 2 bits (64), 16 x int8 scale (16),
                                 f16 scale of the scales (2); values offset by 32
IQ4_NL    20    32        18     f16 scale (2), 4-bit indices into a fixed table (16)
MXFP4     39    32        17     power-of-two scale, E8M0 (1), 4-bit E2M1 values (16)
========  ====  ========  =====  ==============================================================
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Format:
    """How elements of one weight format are grouped into bytes."""

    name: str
    gguf_id: int
    block_elements: int
    block_bytes: int

    def row_bytes(self, num_columns: int) -> int:
        """Bytes of a row of ``num_columns`` elements, a multiple of ``block_elements``."""
        num_blocks, rest = divmod(num_columns, self.block_elements)
        if rest:
            raise ValueError(f"{num_columns} columns are no whole number of {self.name} blocks")
        return num_blocks * self.block_bytes


FORMATS: dict[str, Format] = {
    format.name: format
    for format in (
        Format("F32", 0, 1, 4),
        Format("F16", 1, 1, 2),
        Format("BF16", 30, 1, 2),
        Format("Q4_0", 2, 32, 18),
        Format("Q4_1", 3, 32, 20),
        Format("Q5_0", 6, 32, 22),
        Format("Q5_1", 7, 32, 24),
        Format("Q8_0", 8, 32, 34),
        Format("Q2_K", 10, 256, 84),
        Format("Q3_K", 11, 256, 110),
        Format("Q4_K", 12, 256, 144),
        Format("Q5_K", 13, 256, 176),
        Format("Q6_K", 14, 256, 210),
        Format("IQ4_NL", 20, 32, 18),
        Format("MXFP4", 39, 32, 17),
    )
}
