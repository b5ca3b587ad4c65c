"""Cells that an earlier run has measured, so that a run of hours that was ended goes on.

A cell is kept under the digest of all that it depends on: its questions and settings, the model's
weights, and the files of this package, kernels included. So a cell of another build is not found.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path
from typing import Any

import msgspec

import tael
from tael import _native
from tael.errors import TaelError
from tael.evals.context.cell import Cell


class KeptCells:
    """In ``folder``, which is made if it is not there. Without one nothing is kept. Raises
    TaelError if it cannot be."""

    def __init__(self, folder: Path | None, weights_digest: str) -> None:
        self._folder = folder
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise TaelError(
                    f"cannot use {folder}: {error.strerror}; name another folder."
                ) from error
            self._common = [weights_digest, package_digest()]

    def find(self, job: Any) -> Cell | None:
        """Of a job, which msgspec can write. What is damaged is as if it were not there."""
        if self._folder is None:
            return None
        with contextlib.suppress(OSError, msgspec.DecodeError):
            return msgspec.json.decode(self._path(job).read_bytes(), type=Cell)
        return None

    def keep(self, job: Any, cell: Cell) -> None:
        """But for a failure, which may have been the machine's."""
        if self._folder is None or cell.error is not None:
            return
        path = self._path(job)
        part = path.with_suffix(f".{os.getpid()}.part")
        part.write_bytes(msgspec.json.encode(cell))
        part.replace(path)

    def rows_of(self, job: Any) -> Path | None:
        """A folder for the distributions of a job, which others are compared with."""
        if self._folder is None:
            return None
        rows = self._path(job).with_suffix(".rows")
        rows.mkdir(exist_ok=True)
        return rows

    def _path(self, job: Any) -> Path:
        assert self._folder is not None
        text = msgspec.json.encode([*self._common, job], order="deterministic", enc_hook=str)
        return self._folder / f"{hashlib.sha256(text).hexdigest()}.json"


def package_digest() -> str:
    """Of Tael's modules and kernels."""
    root = Path(tael.__file__).parent
    digest = hashlib.sha256()
    for path in (*sorted(root.rglob("*.py")), Path(_native.__file__)):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode() + path.read_bytes())
    return digest.hexdigest()
