"""Reads GGUF, version 3, little-endian: one file or several parts.

The layout is that of ggml's docs/gguf.md. The file is not trusted: every count is compared
with a cap and with the bytes that are left before anything is made from it, so what the reader
holds stays within about eight times the header it was given.
"""

from __future__ import annotations

import mmap
import re
import struct
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

# Generous: vocabularies of 260,000 tokens make headers of 7 MB; big models have 2,000 tensors.
MAX_HEADER_BYTES = 64 << 20
MAX_NAME_BYTES = 256
MAX_ARRAY_LENGTH = 1 << 22
MAX_METADATA_KEYS = 1 << 12
MAX_TENSORS = 1 << 16
MAX_DIMENSIONS = 4

# Metadata types, with the code that struct and numpy share for those of fixed size.
_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_STRING, _ARRAY = 8, 9

_FORMAT_BY_ID = {format.gguf_id: format for format in FORMATS.values()}

# Types that exist and are not read, so that an error can name them.
_OTHER_TYPES = {
    9: "Q8_1",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    40: "NVFP4",
}

_PART_NAME = re.compile(r"(?P<stem>.*)-(?P<part>\d{5})-of-(?P<count>\d{5})\.gguf")


class GGUFCheckpoint:
    """A model in GGUF. Implements ``tael.loader.checkpoint.Checkpoint``.

    Metadata values are Python scalars, strings, lists of strings and numpy arrays.
    An element of a list of strings is a token's bytes as often as it is text, so bytes that are
    not UTF-8 become surrogates: ``value.encode("utf-8", "surrogateescape")`` gives back exactly
    the bytes in the file. In a single string they become U+FFFD.

    A model in parts ("name-00001-of-00003.gguf") is opened by the name of its first part.

    Raises TaelError for a file that cannot be opened, is damaged or holds what Tael does not
    read.
    """

    format = "gguf"

    def __init__(self, path: Path) -> None:
        first = WeightFile(path)
        metadata, stored = _parse(first)
        self.files = _part_paths(first, metadata)
        for part in map(WeightFile, self.files[1:]):
            _, more = _parse(part)
            if repeated := stored.keys() & more.keys():
                raise part.damaged(f"tensor {min(repeated)!r} is in an earlier part too")
            stored |= more
        num_tensors = _integer(first, metadata, "split.tensors.count", len(stored))
        if num_tensors != len(stored):
            raise first.damaged(f"its parts hold {len(stored)} of {num_tensors} tensors")
        self.metadata: Mapping[str, Any] = metadata
        self.tensors: Mapping[str, TensorInfo] = {n: t.info for n, t in stored.items()}
        self._stored = stored

    def read_rows(self, name: str, start: int, count: int) -> NDArray[np.uint8]:
        """Raw bytes of ``count`` rows, [count, row_bytes]. A vector is one row."""
        return self._stored[name].read_rows(start, count)


def _part_paths(first: WeightFile, metadata: Mapping[str, Any]) -> tuple[Path, ...]:
    path, count = first.path, _integer(first, metadata, "split.count", 0)
    if count <= 1:
        return (path,)
    name = _PART_NAME.fullmatch(path.name)
    if name is None or int(name["count"]) != count:
        raise TaelError(f"{path} is a part of {count} and was renamed; give it its name back")
    paths = tuple(
        path.with_name(f"{name['stem']}-{part:05}-of-{count:05}.gguf")
        for part in range(1, count + 1)
    )
    if path != paths[0]:
        raise TaelError(f"{path} is one part of a model; open {paths[0].name} instead")
    return paths


def _integer(file: WeightFile, metadata: Mapping[str, Any], key: str, default: int) -> int:
    value = metadata.get(key, default)
    if type(value) is not int:
        raise file.damaged(f"metadata key {key!r} is not an integer")
    return value


def _parse(file: WeightFile) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """Metadata and tensors of one file."""
    with file.map(MAX_HEADER_BYTES) as data:
        header = _Header(file, data)
        header.check_version()
        num_tensors = header.count("tensors", MAX_TENSORS)
        num_keys = header.count("metadata keys", MAX_METADATA_KEYS)
        metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = header.name("metadata key")
            if key in metadata:
                raise file.damaged(f"metadata key {key!r} appears twice")
            metadata[key] = header.value(key, header.scalar("I"))
        alignment = _integer(file, metadata, "general.alignment", 32)
        if alignment < 1 or alignment & (alignment - 1):
            raise file.damaged(f"its alignment is {alignment}, which is no power of two")
        infos: dict[str, tuple[TensorInfo, int]] = {}
        end = 0
        for _ in range(num_tensors):
            start = _round_up(end, alignment)
            info = header.tensor_info(start)
            if info.name in infos:
                raise file.damaged(f"tensor {info.name!r} appears twice")
            infos[info.name] = (info, start)
            end = start + prod(info.shape[:-1]) * FORMATS[info.type].row_bytes(info.shape[-1])
        data_start = _round_up(header.position, alignment)
    if infos and data_start + end > file.num_bytes:
        needed = data_start + end
        raise file.damaged(f"its tensors end at byte {needed} and it has {file.num_bytes} bytes")
    return metadata, {n: StoredTensor(t, file, data_start + at) for n, (t, at) in infos.items()}


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


class _Header:
    """A cursor over the start of a file. Each method reads what it names and moves on."""

    def __init__(self, file: WeightFile, data: mmap.mmap) -> None:
        self._file = file
        self._data = data
        self.position = 0

    def check_version(self) -> None:
        path = self._file.path
        if self.take(4) != b"GGUF":
            raise TaelError(f"{path} is not a GGUF file; check the name or pull the model again")
        version = self.scalar("I")
        if version and version & 0xFFFF == 0:
            raise TaelError(f"{path} is big-endian GGUF; use a little-endian file")
        if version != 3:
            raise TaelError(f"{path} is GGUF version {version}; convert it to version 3")

    def take(self, num_bytes: int) -> bytes:
        end = self.position + num_bytes
        if end > len(self._data):
            raise self._ends_early()
        taken = self._data[self.position : end]
        self.position = end
        return taken

    def scalar(self, code: str) -> Any:
        code = "<" + code
        return struct.unpack(code, self.take(struct.calcsize(code)))[0]

    def count(self, what: str, cap: int) -> int:
        count: int = self.scalar("Q")
        if count > cap:
            raise self._file.damaged(f"it claims {count} {what}, and {cap} is the most allowed")
        return count

    def name(self, what: str) -> str:
        raw = self.take(self.count(f"bytes in a {what}", MAX_NAME_BYTES))
        try:
            name = raw.decode()
        except UnicodeDecodeError:
            name = ""
        # Names are shown to people: no control characters, nothing that cannot be printed.
        if not name or not name.isprintable():
            raise self._file.damaged(f"{raw!r} is no {what}")
        return name

    def value(self, key: str, type_id: int) -> Any:
        if type_id == _STRING:
            return self.take(self.scalar("Q")).decode("utf-8", "replace")
        if type_id == _ARRAY:
            item_type_id = self.scalar("I")
            count = self.count(f"values of {key!r}", MAX_ARRAY_LENGTH)
            if item_type_id == _STRING:
                return self.strings(count)
            return self.array(key, item_type_id, count)
        if type_id not in _SCALARS:
            raise self._file.damaged(f"metadata key {key!r} has the unknown type {type_id}")
        return self.scalar(_SCALARS[type_id])

    def array(self, key: str, type_id: int, count: int) -> NDArray[Any]:
        if type_id not in _SCALARS:
            raise self._file.damaged(f"metadata key {key!r} is an array of the type {type_id}")
        dtype = np.dtype("<" + _SCALARS[type_id])
        values = np.frombuffer(self.take(count * dtype.itemsize), dtype)
        # A byte that is neither 0 nor 1 must not become a numpy bool.
        return values.view(np.uint8) != 0 if dtype == np.bool_ else values

    def strings(self, count: int) -> list[str]:
        # Written out, since a vocabulary has hundreds of thousands: 0.5 us a string.
        data, end = self._data, self.position
        values = []
        for _ in range(count):
            start = end + 8
            end = start + int.from_bytes(data[end:start], "little")
            if end > len(data):
                raise self._ends_early()
            values.append(data[start:end].decode("utf-8", "surrogateescape"))
        self.position = end
        return values

    def tensor_info(self, expected_offset: int) -> TensorInfo:
        """The next tensor. It must start at ``expected_offset``: ggml demands that tensors
        follow each other with no gap but the alignment's, and so nothing can overlap."""
        name = self.name("tensor name")
        num_dimensions = self.scalar("I")
        if not 1 <= num_dimensions <= MAX_DIMENSIONS:
            raise self._file.damaged(f"tensor {name!r} has {num_dimensions} dimensions")
        # ggml lists the contiguous dimension first.
        shape = tuple(self.scalar("Q") for _ in range(num_dimensions))[::-1]
        type_id, offset = self.scalar("I"), self.scalar("Q")
        if type_id not in _FORMAT_BY_ID:
            type_name = _OTHER_TYPES.get(type_id, f"number {type_id}")
            raise TaelError(
                f"{self._file.path}: tensor {name!r} has type {type_name}, which Tael does not "
                f"read; use a file of {', '.join(list(FORMATS)[1:])}"
            )
        format = _FORMAT_BY_ID[type_id]
        if prod(shape) == 0 or shape[-1] % format.block_elements:
            raise self._file.damaged(f"tensor {name!r} cannot have shape {shape} as {format.name}")
        if offset != expected_offset:
            raise self._file.damaged(
                f"tensor {name!r} starts at {offset} and not at {expected_offset}"
            )
        return TensorInfo(name, format.name, shape)

    def _ends_early(self) -> TaelError:
        if len(self._data) == MAX_HEADER_BYTES:
            return self._file.damaged(f"its header is longer than {MAX_HEADER_BYTES >> 20} MiB")
        return self._file.damaged(f"it ends within its header, at {self._file.num_bytes} bytes")
