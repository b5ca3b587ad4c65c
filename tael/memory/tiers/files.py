"""The system calls of the disk tier, in one place: what a test can make fail."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

PAGE = 4096
"""Direct I/O moves whole pages between page-aligned places. Devices ask for 512 or 4096 bytes."""
PART_SUFFIX = ".part"
"""Of a file that is not whole yet."""

Bytes = NDArray[np.uint8]


class Files:
    """Files that are written once and read whole, past the page cache where the file system can do
    that: what is kept here was evicted from memory and must not come back through another door.

    Sizes are multiples of ``PAGE`` and buffers come from ``aligned_buffer``. Every method raises
    OSError.
    """

    def __init__(self) -> None:
        self._direct = getattr(os, "O_DIRECT", 0)

    def read(self, path: Path, buffer: Bytes) -> int:
        """Fill ``buffer`` from the start of a file. Returns the bytes that it had, if fewer."""
        with self._open(path, os.O_RDONLY) as fd:
            num_read = 0
            while num_read < len(buffer):
                count = self.pread(fd, buffer[num_read:].data, num_read)
                if count == 0:
                    break
                num_read += count
            self._forget_pages(fd)
        return num_read

    def write(self, path: Path, buffer: Bytes) -> None:
        """Make a file that is whole and on the disk, or absent."""
        part = path.with_name(path.name + PART_SUFFIX)
        try:
            with self._open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as fd:
                num_written = 0
                while num_written < len(buffer):
                    num_written += self.pwrite(fd, buffer[num_written:].data, num_written)
                self.fsync(fd)
                self._forget_pages(fd)
            self.rename(part, path)
        except OSError:
            with suppress(OSError):
                self.unlink(part)
            raise

    def list(self, folder: Path) -> list[tuple[str, int, int]]:
        """(name, bytes, time of last use in ns) of the files of a folder."""
        files = []
        with os.scandir(folder) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):  # removed meanwhile
                    if entry.is_file(follow_symlinks=False):
                        stat = entry.stat(follow_symlinks=False)
                        files.append((entry.name, stat.st_size, stat.st_mtime_ns))
        return files

    def touch(self, path: Path, time_ns: int) -> None:
        """Set the time of last use."""
        os.utime(path, ns=(time_ns, time_ns))

    def unlink(self, path: Path) -> None:
        path.unlink(missing_ok=True)

    def open(self, path: Path, flags: int) -> int:
        # A link that somebody planted is not followed.
        return os.open(path, flags | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0), mode=0o600)

    def pread(self, fd: int, buffer: memoryview, offset: int) -> int:
        return os.preadv(fd, [buffer], offset)

    def pwrite(self, fd: int, buffer: memoryview, offset: int) -> int:
        return os.pwrite(fd, buffer, offset)

    def fsync(self, fd: int) -> None:
        os.fsync(fd)

    def rename(self, source: Path, target: Path) -> None:
        source.rename(target)

    @contextmanager
    def _open(self, path: Path, flags: int) -> Iterator[int]:
        try:
            fd = self.open(path, flags | self._direct)
        except OSError as error:
            if error.errno != errno.EINVAL or not self._direct:
                raise
            self._direct = 0  # tmpfs before Linux 6.6, some network file systems
            fd = self.open(path, flags)
        try:
            yield fd
        finally:
            os.close(fd)

    def _forget_pages(self, fd: int) -> None:
        if not self._direct and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def aligned_buffer(num_bytes: int) -> Bytes:
    """uint8 [num_bytes], zeroed, at the start of a page."""
    return np.frombuffer(mmap.mmap(-1, num_bytes), np.uint8)


def round_up(num_bytes: int) -> int:
    """To whole pages."""
    return -(-num_bytes // PAGE) * PAGE
