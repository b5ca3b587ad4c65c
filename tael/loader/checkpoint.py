"""What a model file offers, whatever its format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a checkpoint. ``shape`` is in Hugging Face order, [rows, columns]; a row is
    contiguous in the file."""

    name: str
    type: str
    """A key of ``tael.quant.formats.FORMATS``."""
    shape: tuple[int, ...]


class Checkpoint(Protocol):
    """Read access to the files of one model. Tensors are read in row ranges, so that loading
    needs a bounded buffer and not the whole file in memory."""

    @property
    def format(self) -> str:
        """ "gguf" or "hf"."""

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold the weights."""

    @property
    def metadata(self) -> Mapping[str, Any]:
        """GGUF metadata, or the contents of ``config.json``."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    def read_rows(self, name: str, start: int, count: int) -> NDArray[np.uint8]:
        """Raw bytes of ``count`` rows, [count, row_bytes]. A vector is one row."""
