"""The weights of a model in the layout of the native kernels, as one file to map.

    bytes 0-7    "TAELTILE"
    bytes 8-15   length of the header, little-endian
    header       JSON: layout version, digest of the contents, and for every parameter its
                 format, shape, offset from the start of the data and size
    data         at the next multiple of 4096; every parameter at a multiple of 64

Matrices are in tiles (csrc/quant/formats.hpp), vectors in float32 under the format "vector".
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import mmap
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tael.loader.checkpoint import Checkpoint
from tael.loader.weights import read_parameter, row_order
from tael.models.spec import ModelSpec
from tael.quant.repack import TILE_ROWS, repack, tiles_bytes

LAYOUT_VERSION = 1
"""Files of another version are made anew."""
MAGIC = b"TAELTILE"
ALIGNMENT = 64
PAGE = 4096
CHUNK_BYTES = 4 << 20
"""Source bytes in flight per thread while repacking."""
WRITE_BYTES = 8 << 20
"""Written at a time. Linux (6.16 and later on ext4, earlier on XFS) then keeps the file in pages
of 2 MiB, and maps them as such: decoding reads up to a fifth faster."""
SYNC_BYTES = 64 << 20
"""The disk is told to write every so many bytes, while the next are repacked: it is the slowest of
all that have a part in this."""

Bytes = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class TileTensor:
    """One parameter. ``format`` is a key of ``FORMATS``, or "vector"."""

    format: str
    shape: tuple[int, ...]
    data: Bytes


@dataclass(frozen=True, slots=True)
class TileFile:
    """A mapped file. Pages come into memory as they are first read."""

    tensors: dict[str, TileTensor]
    num_bytes: int
    """Of the parameters."""
    digest: str
    """Of the parameters: equal digests mean equal weights."""


def open_tile_file(path: Path) -> TileFile:
    """Raises ValueError for a file that is not whole or of another layout."""
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages
            mapped.madvise(mmap.MADV_HUGEPAGE)
    length = int.from_bytes(mapped[8:16], "little")
    if mapped[:8] != MAGIC or 16 + length > len(mapped):
        raise ValueError(f"{path} is no tile file")
    header = json.loads(mapped[16 : 16 + length])
    data_start = _round_up(16 + length, PAGE)
    if (
        header["layout_version"] != LAYOUT_VERSION
        or len(mapped) != data_start + header["num_bytes"]
    ):
        raise ValueError(f"{path} is of another layout or not whole")
    data = np.frombuffer(mapped, np.uint8, offset=data_start)
    return TileFile(_tensors(header["tensors"], data), header["num_bytes"], header["digest"])


def blank_tile_file(checkpoint: Checkpoint, spec: ModelSpec) -> TileFile:
    """The file that ``write_tile_file`` would make, of zeros that take no memory: a backend can
    be made from it to learn what it needs."""
    places, num_bytes = _places(checkpoint, spec)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    mapped = mmap.mmap(-1, num_bytes, flags=flags, prot=mmap.PROT_READ)
    return TileFile(_tensors(places, np.frombuffer(mapped, np.uint8)), num_bytes, "")


def write_tile_file(
    path: Path,
    checkpoint: Checkpoint,
    spec: ModelSpec,
    progress: Callable[[float], None] | None = None,
) -> None:
    """Repack all parameters of a model. Memory stays bounded by a few chunks per core;
    ``progress`` receives the share done. Raises OSError if the file cannot be written."""
    places, num_bytes = _places(checkpoint, spec)
    header: dict[str, Any] = {
        "layout_version": LAYOUT_VERSION,
        "num_bytes": num_bytes,
        "digest": "0" * 64,
        "tensors": places,
    }
    header_bytes = len(json.dumps(header))  # the digest is known last, but not its length
    data_start = _round_up(16 + header_bytes, PAGE)
    digest = hashlib.blake2b(digest_size=32)
    done = 0
    with (
        open(path, "wb", buffering=0) as file,
        ThreadPoolExecutor(os.cpu_count()) as pool,
        ThreadPoolExecutor(1) as hasher,
        _Writer(file) as writer,
    ):
        for name, place in places.items():
            digest.update(json.dumps([name, place["format"], place["shape"]]).encode())
            writer.pad(data_start + place["offset"])
            for chunk in _in_order(pool, _chunks(checkpoint, spec, name)):
                hashed = hasher.submit(digest.update, chunk.data)
                writer.write(chunk)
                hashed.result()
                done += chunk.nbytes
                if progress:
                    progress(done / num_bytes)
        writer.pad(data_start + num_bytes)
        header["digest"] = digest.hexdigest()
        writer.finish(MAGIC + header_bytes.to_bytes(8, "little") + json.dumps(header).encode())


class _Writer:
    """Gathers what is written one after another into pieces of ``WRITE_BYTES``, and has a thread
    that brings them to the disk meanwhile."""

    def __init__(self, file: io.RawIOBase) -> None:
        self._file = file
        self._piece = np.empty(WRITE_BYTES, np.uint8)
        self._position = 0
        self._syncing = ThreadPoolExecutor(1)
        self._syncs: list[Future[None]] = []

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self._syncing.shutdown(cancel_futures=True)

    def write(self, data: Bytes) -> None:
        while len(data):
            start = self._position % WRITE_BYTES
            count = min(len(data), WRITE_BYTES - start)
            self._piece[start : start + count] = data[:count]
            self._position += count
            data = data[count:]
            if start + count == WRITE_BYTES:
                self._write_all(self._piece)
                if self._position % SYNC_BYTES == 0:
                    self._syncs.append(self._syncing.submit(os.fsync, self._file.fileno()))

    def pad(self, position: int) -> None:
        self.write(np.zeros(position - self._position, np.uint8))

    def finish(self, header: bytes) -> None:
        """Put ``header`` over the start of the file. All of it is on the disk afterwards."""
        self._write_all(self._piece[: self._position % WRITE_BYTES])
        self._file.seek(0)
        self._file.write(header)
        for sync in self._syncs:
            sync.result()  # the system reports an error once, to the call that met it
        os.fsync(self._file.fileno())

    def _write_all(self, data: Bytes) -> None:
        while len(data):  # the system may write less than asked
            data = data[self._file.write(data.data) or 0 :]


def tile_file_bytes(checkpoint: Checkpoint, spec: ModelSpec) -> int:
    """Bytes of the parameters in the file that ``write_tile_file`` would make."""
    return _places(checkpoint, spec)[1]


def _places(checkpoint: Checkpoint, spec: ModelSpec) -> tuple[dict[str, Any], int]:
    """Format, shape, offset and size of every parameter; bytes of all."""
    places: dict[str, Any] = {}
    offset = 0
    sources = dict(spec.sources)
    for name, shape in spec.parameters().items():
        if len(shape) == 1:
            format_name, num_bytes = "vector", 4 * shape[0]
        else:
            format_name = checkpoint.tensors[sources[name].name].type
            num_bytes = tiles_bytes(format_name, *shape)
        places[name] = {
            "format": format_name,
            "shape": shape,
            "offset": offset,
            "num_bytes": num_bytes,
        }
        offset += _round_up(num_bytes, ALIGNMENT)
    return places, offset


def _tensors(places: dict[str, Any], data: Bytes) -> dict[str, TileTensor]:
    return {
        name: TileTensor(
            place["format"],
            tuple(place["shape"]),
            data[place["offset"] : place["offset"] + place["num_bytes"]],
        )
        for name, place in places.items()
    }


def _chunks(checkpoint: Checkpoint, spec: ModelSpec, name: str) -> Iterator[Callable[[], Bytes]]:
    """Work items that yield the bytes of one parameter in order."""
    source = dict(spec.sources)[name]
    shape = spec.parameters()[name]
    if len(shape) == 1:
        yield lambda: read_parameter(checkpoint, spec, name).view(np.uint8)
        return
    if source.offset:
        raise ValueError(f"{name}: only vectors may have an offset")
    num_rows, num_columns = shape
    info = checkpoint.tensors[source.name]
    order = row_order(source, num_rows)
    step = num_rows
    if order is None:  # else rows change places all over the matrix; such matrices are small
        row_bytes = max(1, tiles_bytes(info.type, TILE_ROWS, num_columns) // TILE_ROWS)
        step = max(1, CHUNK_BYTES // row_bytes // TILE_ROWS) * TILE_ROWS
    for start in range(0, num_rows, step):

        def read(start: int = start, count: int = min(step, num_rows - start)) -> Bytes:
            rows = checkpoint.read_rows(info.name, start, count)
            return repack(info.type, rows if order is None else rows[order], num_columns)

        yield read


def _in_order(pool: ThreadPoolExecutor, items: Iterator[Callable[[], Bytes]]) -> Iterator[Bytes]:
    """The results of work items, computed a few ahead: ``pool.map`` would hold all of them."""
    ahead: deque[Future[Bytes]] = deque()
    for item in items:
        ahead.append(pool.submit(item))
        if len(ahead) > (os.cpu_count() or 1):
            yield ahead.popleft().result()
    while ahead:
        yield ahead.popleft().result()


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
