"""Every weight format decodes to the bits that the gguf package's reference gives."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from tael.quant.dequantize import dequantize
from tael.quant.formats import FORMATS

F16_FIELDS = {
    "Q4_0": [0],
    "Q4_1": [0, 2],
    "Q5_0": [0],
    "Q5_1": [0, 2],
    "Q8_0": [0],
    "Q2_K": [80, 82],
    "Q3_K": [108],
    "Q4_K": [0, 2],
    "Q5_K": [0, 2],
    "Q6_K": [208],
    "IQ4_NL": [0],
}


def random_rows(name: str, num_rows: int, num_columns: int, seed: int) -> NDArray[np.uint8]:
    """Random bytes with finite scales: the sign of a NaN product is not defined."""
    rng = np.random.default_rng(seed)
    format = FORMATS[name]
    if format.block_elements == 1:
        values = rng.standard_normal((num_rows, num_columns), dtype=np.float32)
        if name == "BF16":
            return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
        return values.astype({"F32": np.float32, "F16": np.float16}[name]).view(np.uint8)
    raw = rng.integers(0, 256, (num_rows, format.row_bytes(num_columns)), dtype=np.uint8)
    blocks = raw.reshape(-1, format.block_bytes)
    for at in F16_FIELDS.get(name, []):
        scales = rng.uniform(-60000, 60000, (len(blocks), 1)) * 2.0 ** rng.integers(
            -30, 1, (len(blocks), 1)
        )
        blocks[:, at : at + 2] = scales.astype(np.float16).view(np.uint8)
    if name == "MXFP4":
        blocks[:, 0] %= 252  # larger exponents overflow float32
    return raw


def test_formats_are_those_of_gguf() -> None:
    assert len(FORMATS) == 15
    for name, format in FORMATS.items():
        gguf_id = gguf.GGMLQuantizationType[name]
        sizes = gguf.GGML_QUANT_SIZES[gguf_id]
        assert (name, int(gguf_id), *sizes) == (
            format.name,
            format.gguf_id,
            format.block_elements,
            format.block_bytes,
        )


def test_row_bytes() -> None:
    assert FORMATS["Q6_K"].row_bytes(512) == 420
    with pytest.raises(ValueError, match="500 columns"):
        FORMATS["Q6_K"].row_bytes(500)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("num_rows", [0, 1, 37])
def test_bitwise_equal_to_reference(name: str, num_rows: int) -> None:
    raw = random_rows(name, num_rows, 512, seed=FORMATS[name].gguf_id)
    ours = dequantize(name, raw, 512)
    assert ours.dtype == np.float32 and ours.shape == (num_rows, 512)
    if num_rows:
        theirs = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[name])
        assert np.array_equal(ours.view(np.uint32), theirs.view(np.uint32))


def test_mxfp4_covers_every_exponent() -> None:
    raw = np.zeros((252, 17), np.uint8)
    raw[:, 0] = np.arange(252)
    raw[:, 1:] = 0x72  # 1.0 in the first half, 6.0 in the second
    values = dequantize("MXFP4", raw, 32)
    assert np.array_equal(values[:, 0], 2.0 ** (np.arange(252) - 127.0))
    assert values[127, 16] == 6.0


def test_rows_may_be_a_slice() -> None:
    raw = random_rows("Q4_K", 8, 256, seed=1)
    assert np.array_equal(dequantize("Q4_K", raw[::2], 256), dequantize("Q4_K", raw, 256)[::2])
