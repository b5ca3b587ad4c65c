"""Models made ready for a fast start, and kept in the cache.

A prepared model is a folder: ``weights.tael`` (see ``tile_file``), ``spec.json``, the files of
``Tokenizer.save`` and ``source.json``, which names what it was made from. A warm start maps the
first and reads the others; the original is not opened. The folder is made beside its place and
renamed, so it is whole or absent; one process at a time does that.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tael.errors import TaelError
from tael.loader.checkpoint import Checkpoint
from tael.loader.gguf import GGUFCheckpoint
from tael.loader.paths import prepared_dir
from tael.loader.safetensors import SafetensorsCheckpoint
from tael.loader.tile_file import (
    LAYOUT_VERSION,
    TileFile,
    open_tile_file,
    tile_file_bytes,
    write_tile_file,
)
from tael.loader.tokenizer import Tokenizer
from tael.models.registry import read_spec
from tael.models.spec import ModelSpec
from tael.models.spec_json import spec_from_json, spec_to_json

SCRATCH_SUFFIX = ".part"
WEIGHTS = "weights.tael"

_DAMAGED = (OSError, ValueError, LookupError, TypeError, TaelError)
"""What reading a prepared model raises if it is not whole."""


@dataclass(frozen=True, slots=True)
class PreparedModel:
    spec: ModelSpec
    tokenizer: Tokenizer
    weights: TileFile


def load_prepared(path: Path, progress: Callable[[float], None] | None = None) -> PreparedModel:
    """The model at ``path``, prepared now if it was not before. ``progress`` receives the share
    done while weights are repacked. Raises TaelError for a bad model or a full disk."""
    folder = prepared_dir() / _key(path)
    with suppress(*_DAMAGED):
        return _open(folder)
    try:
        with _only_process(folder.parent):
            with suppress(*_DAMAGED):
                return _open(folder)
            # It is absent, damaged or of another version of Tael.
            shutil.rmtree(folder, ignore_errors=True)
            spec, tokenizer = _prepare(path, folder, progress)
            return PreparedModel(spec, tokenizer, open_tile_file(folder / WEIGHTS))
    except OSError as error:
        raise TaelError(
            f"cannot write the repacked model to {folder.parent}: {error.strerror}; free some "
            "space or set XDG_CACHE_HOME to another place."
        ) from error


def _open(folder: Path) -> PreparedModel:
    return PreparedModel(
        spec=spec_from_json(json.loads((folder / "spec.json").read_text())),
        tokenizer=Tokenizer.load(folder),
        weights=open_tile_file(folder / WEIGHTS),
    )


def prepared_names() -> dict[str, str]:
    """File names of the models that are prepared, by the digest of their weights."""
    names = {}
    for source in prepared_dir().glob("*/source.json"):
        with suppress(*_DAMAGED):
            digest = open_tile_file(source.parent / WEIGHTS).digest
            names[digest] = Path(json.loads(source.read_text())["path"]).name
    return names


def open_checkpoint(path: Path) -> Checkpoint:
    """A GGUF file or a Hugging Face folder. Raises TaelError if it is neither."""
    return SafetensorsCheckpoint(path) if path.is_dir() else GGUFCheckpoint(path)


def load_tokenizer(path: Path, checkpoint: Checkpoint) -> Tokenizer:
    if checkpoint.format == "gguf":
        return Tokenizer.from_gguf(checkpoint.metadata)
    return Tokenizer.from_directory(path)


def _key(path: Path) -> str:
    """Identity of the files as they are now: a replaced file is another model."""
    path = path.resolve()
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    stats = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file()]
    return hashlib.sha256(json.dumps([LAYOUT_VERSION, stats]).encode()).hexdigest()[:32]


@contextmanager
def _only_process(folder: Path) -> Iterator[None]:
    """Let one process at a time write to ``folder``, and remove what others left unfinished when
    they were killed. The kernel drops the lock of a dead process."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(folder.name + ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for scratch in folder.glob(f"*{SCRATCH_SUFFIX}"):
            shutil.rmtree(scratch, ignore_errors=True)
        yield


def _prepare(
    path: Path, folder: Path, progress: Callable[[float], None] | None
) -> tuple[ModelSpec, Tokenizer]:
    checkpoint = open_checkpoint(path)
    spec = read_spec(checkpoint)
    tokenizer = load_tokenizer(path, checkpoint)
    _remove_older(path, folder.parent)
    needed = tile_file_bytes(checkpoint, spec)
    free = shutil.disk_usage(folder.parent).free
    if free < needed:
        raise TaelError(
            f"repacking needs {needed >> 20} MiB in {folder.parent}, and {free >> 20} MiB are "
            "free; free some space or set XDG_CACHE_HOME to another disk."
        )
    scratch = folder.with_name(folder.name + SCRATCH_SUFFIX)
    scratch.mkdir()
    try:
        write_tile_file(scratch / WEIGHTS, checkpoint, spec, progress)
        tokenizer.save(scratch)
        (scratch / "spec.json").write_text(json.dumps(spec_to_json(spec)))
        (scratch / "source.json").write_text(json.dumps({"path": str(path.resolve())}))
        os.rename(scratch, folder)
        return spec, tokenizer
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def _remove_older(path: Path, folder: Path) -> None:
    """Earlier states of the same file."""
    for source in folder.glob("*/source.json"):
        with suppress(*_DAMAGED):
            if json.loads(source.read_text())["path"] == str(path.resolve()):
                shutil.rmtree(source.parent, ignore_errors=True)
