"""Random rows of any weight format."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tael.quant.dequantize import dequantize
from tael.quant.formats import FORMATS

# Where a block's scale lies, and its minimum with the multiple of the scale that centres values.
_SCALES: dict[str, tuple[int, int | None, float]] = {
    "Q4_0": (0, None, 0),
    "Q4_1": (0, 2, -7.5),
    "Q5_0": (0, None, 0),
    "Q5_1": (0, 2, -15.5),
    "Q8_0": (0, None, 0),
    "Q2_K": (80, 82, 1.5),
    "Q3_K": (108, None, 0),
    "Q4_K": (0, 2, 7.5),
    "Q5_K": (0, 2, 15.5),
    "Q6_K": (208, None, 0),
    "IQ4_NL": (0, None, 0),
}


def random_rows(
    name: str, num_rows: int, num_columns: int, *, seed: int = 0, std: float = 1.0
) -> NDArray[np.uint8]:
    """Raw rows, [num_rows, row_bytes]: every bit pattern of values and sub-scales, with block
    scales that vary and give the weights about the standard deviation ``std``."""
    rng = np.random.default_rng(seed)
    if name in ("F32", "F16", "BF16"):
        values = (std * rng.standard_normal((num_rows, num_columns))).astype(np.float32)
        if name == "BF16":
            return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
        return values.astype(np.float16 if name == "F16" else np.float32).view(np.uint8)
    fmt = FORMATS[name]
    shape = (num_rows, num_columns // fmt.block_elements)
    blocks = rng.integers(0, 256, (*shape, fmt.block_bytes), dtype=np.uint8)
    if name == "MXFP4":
        blocks[..., 0] = np.round(np.log2(std)) + rng.integers(123, 127, shape)
        return blocks.reshape(num_rows, -1)
    offset, minimum_offset, ratio = _SCALES[name]

    def scale_by(scale: NDArray[np.float64]) -> None:
        blocks[..., offset : offset + 2] = scale.astype(np.float16)[..., None].view(np.uint8)
        if minimum_offset is not None:
            minimum = (scale * ratio).astype(np.float16)[..., None]
            blocks[..., minimum_offset : minimum_offset + 2] = minimum.view(np.uint8)

    scale_by(np.ones(shape))
    unit = dequantize(name, blocks.reshape(num_rows, -1), num_columns).std()
    scale_by(rng.choice([-1, 1], shape) * rng.uniform(0.5, 1.5, shape) * std / unit)
    return blocks.reshape(num_rows, -1)
