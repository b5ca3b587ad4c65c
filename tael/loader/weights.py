"""Reads parameters of a model as float32, as its ``ModelSpec`` defines them."""

from __future__ import annotations

from math import prod

import numpy as np
from numpy.typing import NDArray

from tael.loader.checkpoint import Checkpoint
from tael.models.spec import ModelSpec, ParameterSource
from tael.quant.dequantize import dequantize

CHUNK_ELEMENTS = 1 << 22
"""Elements decoded at a time, to bound the decoder's temporaries (about 100 MB)."""


def read_parameter(checkpoint: Checkpoint, spec: ModelSpec, name: str) -> NDArray[np.float32]:
    """The parameter in its shape of ``spec.parameters()``."""
    source = dict(spec.sources)[name]
    info = checkpoint.tensors[source.name]
    *outer, num_columns = info.shape
    num_rows = prod(outer)
    values = np.empty((num_rows, num_columns), np.float32)
    step = max(1, CHUNK_ELEMENTS // num_columns)
    for start in range(0, num_rows, step):
        count = min(step, num_rows - start)
        raw = checkpoint.read_rows(info.name, start, count)
        values[start : start + count] = dequantize(info.type, raw, num_columns)
    order = row_order(source, num_rows)
    if order is not None:
        values = values[order]
    values += np.float32(source.offset)
    return values.reshape(info.shape)


def row_order(source: ParameterSource, num_rows: int) -> NDArray[np.intp] | None:
    """[num_rows]: the row of the source that each row of the parameter comes from; None: the
    same row."""
    if not source.interleaved_heads:
        return None
    rows = np.arange(num_rows, dtype=np.intp).reshape(source.interleaved_heads, -1, 2)
    return rows.swapaxes(1, 2).reshape(-1)
