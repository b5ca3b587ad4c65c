"""Complete blocks of a cache group in a file, as many of them as there is room for in memory."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import tempfile
import weakref
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tael import _native
from tael.backends.blocks import zeroed_blocks
from tael.config import SLOT_ALIGNMENT
from tael.errors import LostBlocksError, TaelError
from tael.models.spec import CacheGroup

if _native.SLOT_ALIGNMENT != SLOT_ALIGNMENT:
    raise ImportError("tael._native was built for other slots; build it again.")

Bytes = NDArray[np.uint8]


class CPUTieredBlocks:
    """``TieredBlocks``: a file without a name, which ends with the process, and what of it is in
    memory: ``num_slots`` KV heads of single layers and blocks (csrc/tiers/tiered_pool.hpp).

    Raises TaelError if ``folder`` has no room for ``num_blocks``, or the slots are too few for that
    many threads.
    """

    def __init__(
        self, group: CacheGroup, num_blocks: int, num_slots: int, folder: Path, num_threads: int
    ) -> None:
        least = min(_native.min_slots(num_threads), num_blocks * group.num_heads)
        if num_slots < least:
            raise TaelError(
                f"the memory budget leaves room for {num_slots} pieces of KV blocks and "
                f"{num_threads} threads need {least} of {group.slot_bytes} bytes; raise --memory."
            )
        self.block_bytes = group.disk_block_bytes
        self.file_bytes = num_blocks * group.disk_block_bytes
        self._fd = _nameless_file(folder, self.file_bytes)
        # Also when what follows fails.
        weakref.finalize(self, os.close, self._fd)
        self._slots = zeroed_blocks(num_slots, group.slot_bytes)
        self.native = _native.TieredPool(self._fd, num_blocks, group.num_heads, self._slots)

    @property
    def num_bytes(self) -> int:
        return self._slots.nbytes + self.native.num_bytes

    @property
    def counters(self) -> dict[str, int]:
        return self.native.counters

    def read_block(self, block: int, out: Bytes) -> None:
        try:
            self.native.read_block(block, out)
        except _native.LostBlocks as error:
            raise LostBlocksError(str(error)) from None

    def write_block(self, block: int, kv: Bytes) -> None:
        self.native.write_block(block, kv)

    def take_lost(self) -> tuple[set[int], str]:
        blocks, reason = self.native.take_lost()
        return set(blocks), reason


def _nameless_file(folder: Path, num_bytes: int) -> int:
    """A file with room for ``num_bytes``, past the page cache where the file system can do that."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        fd, name = tempfile.mkstemp(prefix="kv-", suffix=".part", dir=folder)
        os.unlink(name)
    except OSError as error:
        raise TaelError(f"no file for KV can be made in {folder}: {error.strerror}.") from error
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(fd, 0, num_bytes)
        else:
            os.ftruncate(fd, num_bytes)
    except OSError as error:
        os.close(fd)
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise TaelError(
                f"{folder} has no room for {num_bytes} bytes of KV; give a smaller --kv-disk."
            ) from error
        raise TaelError(
            f"{num_bytes} bytes cannot be reserved in {folder}: {error.strerror}; KV needs a "
            "folder on another file system."
        ) from error
    _open_directly(fd)
    return fd


def _open_directly(fd: int) -> None:
    """Past the page cache, where the file system does that in pieces of SLOT_ALIGNMENT: what does
    not fit the memory budget must not take memory elsewhere."""
    if not hasattr(os, "O_DIRECT"):
        return
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    room = mmap.mmap(-1, mmap.PAGESIZE)
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT)
        os.preadv(fd, [memoryview(room)[SLOT_ALIGNMENT : 2 * SLOT_ALIGNMENT]], SLOT_ALIGNMENT)
    except OSError:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags)
