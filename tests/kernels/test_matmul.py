"""Repacking and matrix products of every format, on every instruction set this CPU has."""

from __future__ import annotations

import numpy as np
import pytest
from random_weights import random_rows

from tael import _native
from tael.quant.dequantize import dequantize
from tael.quant.formats import FORMATS

ISAS = _native.supported_isas()
FLOATS = ("F32", "F16", "BF16")


def matrix(name: str, raw: np.ndarray, columns: int) -> _native.Matrix:
    num_rows = raw.shape[0]
    tiles = np.empty(_native.num_tiles(num_rows) * _native.tile_bytes(name, columns), np.uint8)
    _native.repack(name, raw, columns, tiles)
    return _native.Matrix(name, num_rows, columns, tiles)


def quantized(x: np.ndarray) -> np.ndarray:
    """What int8 activations with one scale per 32 columns stand for."""
    groups = x.reshape(x.shape[0], -1, 32)
    largest = np.abs(groups).max(-1, keepdims=True)
    inverse = np.divide(np.float32(127), largest, where=largest > 0, out=np.zeros_like(largest))
    return (np.rint(groups * inverse) * (largest / np.float32(127))).reshape(x.shape)


@pytest.mark.parametrize("name", FORMATS)
def test_repacking_loses_nothing(name: str) -> None:
    columns = 512
    raw = random_rows(name, 21, columns)
    expected = dequantize(name, raw, columns)
    w = matrix(name, raw, columns)
    for row in (0, 1, 15, 16, 20):
        actual = _native.dequantize_row(w, row)[0]
        np.testing.assert_array_equal(actual.view(np.uint32), expected[row].view(np.uint32))


@pytest.mark.parametrize("name", FORMATS)
def test_tiles_are_as_long_as_the_source(name: str) -> None:
    assert _native.tile_bytes(name, 512) == 16 * FORMATS[name].row_bytes(512)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("num_tokens", [1, 3, 16, 33, 293, 512])
@pytest.mark.parametrize("name", FORMATS)
def test_matmul_equals_reference(name: str, num_tokens: int, isa: str) -> None:
    """Several panels; a block of 288 tokens and a few beyond it; a tile without a neighbour."""
    columns, num_rows = 1280, 37
    raw = random_rows(name, num_rows, columns)
    x = np.random.default_rng(1).standard_normal((num_tokens, columns), np.float32)
    x[:, 64:96] = 0  # a group without any activation
    weights = dequantize(name, raw, columns).astype(np.float64)
    inputs = x if name in FLOATS else quantized(x)
    expected = inputs.astype(np.float64) @ weights.T
    actual = _native.matmul(matrix(name, raw, columns), x, isa, 2)
    size = np.abs(inputs.astype(np.float64)) @ np.abs(weights.T)
    assert np.abs(actual - expected).max() <= 3e-6 * size.max()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("num_tokens", [23, 75])
@pytest.mark.parametrize("name", FORMATS)
def test_a_token_does_not_depend_on_its_batch(name: str, num_tokens: int, isa: str) -> None:
    """Few packs and many, the last of them not full; a tile that has no neighbour."""
    columns = 256
    w = matrix(name, random_rows(name, 48, columns), columns)
    x = np.random.default_rng(2).standard_normal((num_tokens, columns), np.float32)
    together = _native.matmul(w, x, isa, 2)
    for token in range(len(x)):
        alone = _native.matmul(w, x[token : token + 1], isa, 1)
        np.testing.assert_array_equal(alone[0].view(np.uint32), together[token].view(np.uint32))


@pytest.mark.parametrize("isa", ISAS)
def test_extreme_values_do_not_saturate(isa: str) -> None:
    """Largest magnitudes of weights and activations: 16-bit sums inside AVX2 must hold."""
    columns = 64
    raw = np.zeros((16, 2, 34), np.uint8)
    raw[..., :2] = np.ones((16, 2, 1), np.float16).view(np.uint8)
    raw[..., 2:] = np.int8(-128).view(np.uint8)
    x = np.where(np.arange(columns) % 3 == 0, -1.0, 1.0).astype(np.float32)[None]
    expected = dequantize("Q8_0", raw.reshape(16, -1), columns) @ x[0]
    actual = _native.matmul(matrix("Q8_0", raw.reshape(16, -1), columns), x, isa, 1)
    np.testing.assert_allclose(actual[0], expected, rtol=1e-6)


def test_columns_that_fill_no_group_are_padded() -> None:
    raw = random_rows("BF16", 5, 40)
    x = np.random.default_rng(3).standard_normal((2, 40), np.float32)
    expected = x @ dequantize("BF16", raw, 40).T
    for isa in ISAS:
        np.testing.assert_allclose(
            _native.matmul(matrix("BF16", raw, 40), x, isa, 1), expected, rtol=1e-5, atol=1e-5
        )
