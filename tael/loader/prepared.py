"""Models repacked for the native kernels and kept on disk.

A prepared model is a folder of the cache:

    weights.tael     tensors at 64-byte boundaries: matrices in tiles, vectors in float32
    model.json       ModelSpec, place of every tensor, digest of the source's weights
    tokenizer files  as ``Tokenizer.save`` writes them
    source.json      what it was made from

A warm start maps ``weights.tael`` and reads the two small files; the original is not opened.
The folder is made beside its place and renamed, so it is whole or absent.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tael.errors import TaelError
from tael.loader.checkpoint import Checkpoint
from tael.loader.gguf import GGUFCheckpoint
from tael.loader.paths import prepared_dir
from tael.loader.safetensors import SafetensorsCheckpoint
from tael.loader.tokenizer import Tokenizer
from tael.loader.weights import read_parameter, row_order
from tael.models.registry import read_spec
from tael.models.spec import ModelSpec
from tael.models.spec_json import spec_from_json, spec_to_json
from tael.quant.repack import LAYOUT_VERSION, TILE_ROWS, repack, tiles_bytes

ALIGNMENT = 64
CHUNK_BYTES = 8 << 20
"""Source bytes in flight per thread while repacking."""


@dataclass(frozen=True, slots=True)
class PreparedTensor:
    """A parameter in ``weights.tael``. ``format`` is that of the tiles, or "vector"."""

    format: str
    shape: tuple[int, ...]
    data: NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class PreparedModel:
    """A model ready for the native kernels. The tensors are views of a mapped file."""

    spec: ModelSpec
    tokenizer: Tokenizer
    tensors: dict[str, PreparedTensor]
    weights_bytes: int
    weights_digest: str
    """Of the source's weights: equal digests mean equal parameters."""


def open_checkpoint(path: Path) -> Checkpoint:
    """A GGUF file or a Hugging Face folder. Raises TaelError if it is neither."""
    if path.is_dir():
        return SafetensorsCheckpoint(path)
    return GGUFCheckpoint(path)


def load_tokenizer(path: Path, checkpoint: Checkpoint) -> Tokenizer:
    if checkpoint.format == "gguf":
        return Tokenizer.from_gguf(checkpoint.metadata)
    return Tokenizer.from_directory(path)


def load_prepared(path: Path, progress: Callable[[float], None] | None = None) -> PreparedModel:
    """The model at ``path``, prepared now if it was not before. ``progress`` receives the share
    done while weights are repacked. Raises TaelError for a bad model or a full disk."""
    folder = prepared_dir() / _key(path)
    if not (folder / "model.json").exists():
        _prepare(path, folder, progress)
    return _open(folder)


def _key(path: Path) -> str:
    """Identity of the files as they are now: a replaced file is another model."""
    path = path.resolve()
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    stats = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file()]
    return hashlib.sha256(json.dumps([LAYOUT_VERSION, stats]).encode()).hexdigest()[:32]


def _open(folder: Path) -> PreparedModel:
    model = json.loads((folder / "model.json").read_text())
    with open(folder / "weights.tael", "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    weights = np.frombuffer(mapped, np.uint8)
    tensors = {
        name: PreparedTensor(
            t["format"], tuple(t["shape"]), weights[t["offset"] : t["offset"] + t["num_bytes"]]
        )
        for name, t in model["tensors"].items()
    }
    return PreparedModel(
        spec=spec_from_json(model["spec"]),
        tokenizer=Tokenizer.load(folder),
        tensors=tensors,
        weights_bytes=len(weights),
        weights_digest=model["weights_digest"],
    )


def _prepare(path: Path, folder: Path, progress: Callable[[float], None] | None) -> None:
    checkpoint = open_checkpoint(path)
    spec = read_spec(checkpoint)
    tokenizer = load_tokenizer(path, checkpoint)
    tensors, num_bytes = _layout(checkpoint, spec)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_older(path, folder.parent)
        free = shutil.disk_usage(folder.parent).free
        if free < num_bytes:
            raise TaelError(
                f"repacking needs {num_bytes >> 20} MiB in {folder.parent}, and {free >> 20} MiB "
                "are free; free some space or set XDG_CACHE_HOME to another disk."
            )
        scratch = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
        try:
            digest = _write_weights(scratch / "weights.tael", checkpoint, spec, tensors, progress)
            tokenizer.save(scratch)
            (scratch / "source.json").write_text(json.dumps({"path": str(path.resolve())}))
            model = {"spec": spec_to_json(spec), "tensors": tensors, "weights_digest": digest}
            (scratch / "model.json").write_text(json.dumps(model))
            os.rename(scratch, folder)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            # Another process may have prepared the same model meanwhile: then all is well.
            if not (folder / "model.json").exists():
                raise
    except OSError as error:
        raise TaelError(
            f"cannot write the repacked model to {folder.parent}: {error.strerror}; free some "
            "space or set XDG_CACHE_HOME to another place."
        ) from error


def _remove_older(path: Path, folder: Path) -> None:
    """Earlier versions of the same file."""
    for source in folder.glob("*/source.json"):
        if json.loads(source.read_text())["path"] == str(path.resolve()):
            shutil.rmtree(source.parent, ignore_errors=True)


def _layout(checkpoint: Checkpoint, spec: ModelSpec) -> tuple[dict[str, Any], int]:
    tensors: dict[str, Any] = {}
    offset = 0
    sources = dict(spec.sources)
    for name, shape in spec.parameters().items():
        if len(shape) == 1:
            format_name, num_bytes = "vector", 4 * shape[0]
        else:
            format_name = checkpoint.tensors[sources[name].name].type
            num_bytes = tiles_bytes(format_name, *shape)
        tensors[name] = {
            "format": format_name,
            "shape": shape,
            "offset": offset,
            "num_bytes": num_bytes,
        }
        offset += -(-num_bytes // ALIGNMENT) * ALIGNMENT
    return tensors, offset


def _write_weights(
    path: Path,
    checkpoint: Checkpoint,
    spec: ModelSpec,
    tensors: dict[str, Any],
    progress: Callable[[float], None] | None,
) -> str:
    """Writes all tensors; returns the digest over their contents in order."""
    digest = hashlib.blake2b(digest_size=32)
    total = sum(t["num_bytes"] for t in tensors.values())
    done = 0
    with open(path, "wb") as file, ThreadPoolExecutor(os.cpu_count()) as pool:
        for name, tensor in tensors.items():
            digest.update(json.dumps([name, tensor["format"], tensor["shape"]]).encode())
            file.seek(tensor["offset"])
            for chunk in pool.map(lambda read: read(), _chunks(checkpoint, spec, name, tensor)):
                digest.update(chunk)
                file.write(chunk)
                done += chunk.nbytes
                if progress:
                    progress(done / total)
        file.truncate(max(file.tell(), ALIGNMENT))
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _chunks(
    checkpoint: Checkpoint, spec: ModelSpec, name: str, tensor: dict[str, Any]
) -> Iterator[Callable[[], NDArray[np.uint8]]]:
    """Work items that each yield some bytes of one tensor, in order."""
    if tensor["format"] == "vector":
        yield lambda: read_parameter(checkpoint, spec, name).view(np.uint8)
        return
    num_rows, num_columns = tensor["shape"]
    source = dict(spec.sources)[name]
    if source.offset:
        raise ValueError(f"{name}: an offset needs a float vector")
    order = row_order(source, num_rows)
    step = num_rows
    if order is None:  # else rows of the whole matrix change places; such matrices are small
        step = max(1, CHUNK_BYTES * num_rows // tensor["num_bytes"] // TILE_ROWS) * TILE_ROWS
    for start in range(0, num_rows, step):

        def read(start: int = start, count: int = min(step, num_rows - start)) -> NDArray[np.uint8]:
            rows = checkpoint.read_rows(source.name, start, count)
            return repack(tensor["format"], rows if order is None else rows[order], num_columns)

        yield read

