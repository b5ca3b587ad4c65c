"""What is on the disk, in order of last use."""

from __future__ import annotations

ENTRY_BYTES = 256
"""Memory of an entry. Measured: up to 158, and more for a moment while the table grows."""


class Index:
    """The files of a folder that holds at most ``capacity_bytes``. Bookkeeping only."""

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.num_bytes = 0
        self._files: dict[bytes, int] = {}  # insertion order is the order of last use

    def __len__(self) -> int:
        return len(self._files)

    def __contains__(self, key: bytes) -> bool:
        return key in self._files

    def add(self, key: bytes, num_bytes: int) -> None:
        """A file that is used now, new or in place of an older one of its name."""
        self.remove(key)
        self._files[key] = num_bytes
        self.num_bytes += num_bytes

    def remove(self, key: bytes) -> None:
        self.num_bytes -= self._files.pop(key, 0)

    def touch(self, key: bytes) -> None:
        """Note a use of a file that is here."""
        self._files[key] = self._files.pop(key)

    def oldest(self) -> bytes:
        """The file that was not used for longest."""
        return next(iter(self._files))

    def clear(self) -> None:
        self._files.clear()
        self.num_bytes = 0
