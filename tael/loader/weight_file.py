"""Files of weights, and bounded reads of the rows in them."""

from __future__ import annotations

import mmap
import os
import weakref
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tael.errors import TaelError
from tael.loader.checkpoint import TensorInfo
from tael.quant.formats import FORMATS


class WeightFile:
    """A file held open, so that replacing it on disk does not change a model under its reader.

    Rows are read with ``pread``, not through a mapping: a file that shrinks then ends in an
    error and not in SIGBUS, and what was read is not counted as memory of this process.
    """

    def __init__(self, path: Path) -> None:
        try:
            if not path.is_file():
                raise TaelError(f"{path}: no such file; check the name or pull the model")
            self._fd = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise TaelError(f"{path}: {error.strerror}; make the file readable") from error
        weakref.finalize(self, os.close, self._fd)
        self.path = path
        self.num_bytes = os.fstat(self._fd).st_size

    def damaged(self, what: str) -> TaelError:
        """The error for contents that no correct writer produces."""
        return TaelError(f"{self.path} is damaged: {what}; delete it and pull it again")

    def map(self, max_bytes: int) -> mmap.mmap:
        """A read-only mapping of at most the first ``max_bytes``."""
        if self.num_bytes == 0:
            raise self.damaged("it is empty")
        length = min(self.num_bytes, max_bytes)
        try:
            return mmap.mmap(self._fd, length, access=mmap.ACCESS_READ)
        except OSError as error:
            raise TaelError(f"{self.path}: {error.strerror}; copy it to a local disk") from error

    def read(self, offset: int, num_bytes: int) -> NDArray[np.uint8]:
        """The bytes at ``offset``: [num_bytes]."""
        out = np.empty(num_bytes, np.uint8)
        done = 0
        while done < num_bytes:  # Linux transfers less than 2 GiB a call
            try:
                count = os.preadv(self._fd, [out.data[done:]], offset + done)
            except OSError as error:
                raise TaelError(f"{self.path}: {error.strerror}; check the disk") from error
            if count == 0:
                raise self.damaged("it became shorter while it was read")
            done += count
        return out


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor and where its rows lie."""

    info: TensorInfo
    file: WeightFile
    offset: int

    def read_rows(self, start: int, count: int) -> NDArray[np.uint8]:
        """As ``Checkpoint.read_rows``."""
        *outer, num_columns = self.info.shape
        if not 0 <= start <= start + count <= prod(outer):
            raise IndexError(f"rows {start} to {start + count} of {self.info}")
        row_bytes = FORMATS[self.info.type].row_bytes(num_columns)
        raw = self.file.read(self.offset + start * row_bytes, count * row_bytes)
        return raw.reshape(count, row_bytes)
