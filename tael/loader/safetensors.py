"""Reads a Hugging Face model directory: ``config.json`` and safetensors files.

The safetensors package is not used: through numpy it has no bfloat16, and it hands out whole
tensors or slices of a mapping, not bounded reads. The format is short: the length of a header
(8 bytes, little-endian), the header (JSON: name to dtype, shape and byte range), the data. As
the package does, this reader demands that the byte ranges cover the data with no gap and no
overlap. Files are not trusted: sizes are bounded before anything is read or made.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tael.errors import TaelError
from tael.loader.checkpoint import TensorInfo
from tael.loader.weight_file import StoredTensor, WeightFile
from tael.quant.formats import FORMATS

# The index of a model of 90,000 tensors has 9 MB. Parsed JSON takes up to 25 times its text.
MAX_JSON_BYTES = 16 << 20
MAX_NAME_LENGTH = 256
MAX_DIMENSIONS = 8

_DTYPES = ("F32", "F16", "BF16")
_SHARD_NAME = re.compile(r"[\w.-]+\.safetensors")


class SafetensorsCheckpoint:
    """A model directory as Hugging Face lays it out. Implements
    ``tael.loader.checkpoint.Checkpoint``; ``metadata`` is the contents of ``config.json``.

    Weights are in ``model.safetensors``, or else in the shards that
    ``model.safetensors.index.json`` names.

    Raises TaelError for a directory that lacks these, a file that is damaged, or a tensor that
    is not F32, F16 or BF16.
    """

    format = "hf"

    def __init__(self, directory: Path) -> None:
        self.metadata: Mapping[str, Any] = _read_json(WeightFile(directory / "config.json"))
        single = directory / "model.safetensors"
        index = directory / "model.safetensors.index.json"
        if single.is_file():
            self.files: tuple[Path, ...] = (single,)
            stored = _parse(WeightFile(single))
        elif index.is_file():
            shards = _read_index(WeightFile(index))
            self.files = tuple(directory / shard for shard in shards)
            stored = {}
            for path, names in zip(self.files, shards.values(), strict=True):
                shard = _parse(WeightFile(path))
                if missing := names - shard.keys():
                    raise TaelError(f"{path} lacks tensor {min(missing)!r}; pull the model again")
                stored |= {name: tensor for name, tensor in shard.items() if name in names}
        else:
            raise TaelError(
                f"{directory} has no model.safetensors; pull the model, or convert its weights "
                "to safetensors or GGUF"
            )
        self.tensors: Mapping[str, TensorInfo] = {n: t.info for n, t in stored.items()}
        self._stored = stored

    def read_rows(self, name: str, start: int, count: int) -> NDArray[np.uint8]:
        """Raw bytes of ``count`` rows, [count, row_bytes]. A vector is one row."""
        return self._stored[name].read_rows(start, count)


def _read_json(file: WeightFile, offset: int = 0, num_bytes: int | None = None) -> dict[str, Any]:
    """The JSON object in a part of a file, or in all of it."""
    if num_bytes is None:
        num_bytes = file.num_bytes
    if num_bytes > MAX_JSON_BYTES:
        raise file.damaged(f"{num_bytes} bytes of JSON, and {MAX_JSON_BYTES} is the most allowed")
    try:
        contents = json.loads(file.read(offset, num_bytes).tobytes().decode())
    except (ValueError, RecursionError) as error:
        raise file.damaged("what should be JSON is not") from error
    if not isinstance(contents, dict):
        raise file.damaged("its JSON is not an object")
    return contents


def _read_index(file: WeightFile) -> dict[str, set[str]]:
    """Shard to the names of its tensors. A shard lies in the directory of its index."""
    weight_map = _read_json(file).get("weight_map")
    if not isinstance(weight_map, dict):
        raise file.damaged("it has no weight_map")
    shards: dict[str, set[str]] = {}
    for name, shard in weight_map.items():
        _check_name(file, name)
        if not isinstance(shard, str) or not _SHARD_NAME.fullmatch(shard):
            raise file.damaged(f"tensor {name!r} is in {shard!r:.80}, which is no shard's name")
        shards.setdefault(shard, set()).add(name)
    return shards


def _parse(file: WeightFile) -> dict[str, StoredTensor]:
    """The tensors of one file, in the order of their data."""
    if file.num_bytes < 8:
        raise file.damaged(f"it has {file.num_bytes} bytes")
    header_bytes = int(file.read(0, 8).view("<u8")[0])
    data_start = 8 + header_bytes
    if data_start > file.num_bytes:
        raise file.damaged("it ends within its header")
    header = _read_json(file, 8, header_bytes)
    header.pop("__metadata__", None)
    entries = [_parse_entry(file, name, entry) for name, entry in header.items()]
    entries.sort(key=lambda entry: entry[1])
    end = 0
    for info, start, next_end in entries:
        if start != end:
            raise file.damaged(f"tensor {info.name!r} starts at {start} and not at {end}")
        end = next_end
    if data_start + end != file.num_bytes:
        raise file.damaged(
            f"its tensors end at byte {data_start + end} and it has {file.num_bytes} bytes"
        )
    return {info.name: StoredTensor(info, file, data_start + at) for info, at, _ in entries}


def _parse_entry(file: WeightFile, name: str, entry: Any) -> tuple[TensorInfo, int, int]:
    """A tensor and the byte range of its data."""
    _check_name(file, name)
    match entry:
        case {"dtype": str(dtype), "shape": [*dims], "data_offsets": [int(start), int(end)]}:
            # A scalar is a vector of one.
            shape = tuple(dims) or (1,)
        case _:
            raise file.damaged(f"the description of tensor {name!r} is incomplete")
    if dtype not in _DTYPES:
        raise TaelError(
            f"{file.path}: tensor {name!r} has type {dtype!r:.20}, which Tael does not read; use "
            f"a model in {', '.join(_DTYPES)}, or in GGUF"
        )
    if len(shape) > MAX_DIMENSIONS or not all(
        type(dim) is int and 0 < dim <= file.num_bytes for dim in shape
    ):
        raise file.damaged(f"tensor {name!r} has an impossible shape")
    if end - start != prod(shape) * FORMATS[dtype].block_bytes:
        raise file.damaged(f"tensor {name!r} of shape {shape} has {end - start} bytes")
    return TensorInfo(name, dtype, shape), start, end


def _check_name(file: WeightFile, name: str) -> None:
    # Names are shown to people: no control characters, nothing that cannot be printed.
    if not 0 < len(name) <= MAX_NAME_LENGTH or not name.isprintable():
        raise file.damaged(f"{name!r:.80} is no tensor name")
