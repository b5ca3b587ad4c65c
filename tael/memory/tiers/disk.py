"""Idle prefixes on disk: the ``Tier`` of a folder, with one file a block.

One thread does all input and output, so that no step waits for the disk. It moves bytes through a
buffer of its own: what it reads is checked there before it is put into a block, and a block is
pinned only for the copy, not for the writing.

Doubt is a miss. A file that is not what it must be is removed and counted. A disk that is full or
fails is given a second chance, a write one with files evicted; after that the tier is off, for as
long as the process lives, with a line in the log.
"""

from __future__ import annotations

import fcntl
import logging
import os
import stat
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tael.cache.tier import Load, Lookup, Transfer
from tael.errors import LostBlocksError, TaelError
from tael.memory.kv_store import KVStore
from tael.memory.tiers import block_file
from tael.memory.tiers.block_file import BadBlockError, CorruptError, file_bytes, file_name
from tael.memory.tiers.files import Files, aligned_buffer
from tael.memory.tiers.index import ENTRY_BYTES, Index
from tael.memory.tiers.policy import LoadPolicy
from tael.models.spec import CacheGroup

logger = logging.getLogger(__name__)

LOCK = "lock"
EVICTED_SHARE = 8
"""A disk that is full gets this part of the files back before the second try."""
FLUSH_S = 30.0
"""How long ``close`` waits for stores."""


@dataclass(slots=True)
class Counters:
    """Since the start of the process."""

    num_stored_blocks: int = 0
    num_loaded_blocks: int = 0
    num_dropped_blocks: int = 0
    """Not stored, since a request needed the memory, the folder is too small or the tier is off."""
    num_evicted_blocks: int = 0
    num_corrupt_blocks: int = 0
    """Files that were cut off or had another checksum..."""
    num_mismatched_blocks: int = 0
    """...and whole ones that were of another block or fingerprint. Both kinds are removed."""
    num_missing_blocks: int = 0
    """Files that somebody else removed."""
    num_io_errors: int = 0
    num_timeouts: int = 0
    """Loads that took so long that computing was better."""
    loaded_bytes: int = 0
    stored_bytes: int = 0


@dataclass(eq=False, slots=True)
class _Store:
    chain: dict[bytes, None]
    """The keys of a whole sequence, from its first block."""
    transfers: deque[Transfer]
    """Those that are not copied yet."""


class DiskTier:
    """Keeps blocks of ``kv_store`` in ``folder``, which one process has at a time, and never more
    than ``capacity_bytes``. ``fingerprint`` is all that a block depends on besides its tokens.

    Raises TaelError if the folder cannot be used.
    """

    def __init__(
        self,
        folder: Path,
        capacity_bytes: int,
        kv_store: KVStore,
        fingerprint: Mapping[str, str],
    ) -> None:
        self.folder = folder
        self.counters = Counters()
        self.failure: str | None = None
        """Why the tier is off, if it is."""
        self.policy = LoadPolicy()
        self.index = Index(capacity_bytes)
        self._kv_store = kv_store
        self._fingerprint = fingerprint
        self._files = Files()
        self._buffer = aligned_buffer(max(map(self._file_bytes, range(len(kv_store.pools)))))
        # What follows, and the above, are seen by both threads, under the lock of the condition.
        self._changed = threading.Condition()
        self._loads: dict[Load, float] = {}
        """With the moment of its request. The first is in progress."""
        self._ended_loads: list[Load] = []
        self._stores: deque[_Store] = deque()
        self._copied: list[Transfer] = []
        self._in_transit: set[bytes] = set()
        self._is_closing = False
        self._lock_fd = _lock(folder)
        try:
            self._scan()
        except OSError as error:
            self._turn_off(error)
        # At the usual priority: a lower one makes a load take five times as long, and others lose
        # more by it in all (measured: 133 steps by 5 ms each, not 27 by 8 ms).
        self._thread = threading.Thread(target=self._run, name="tael-disk", daemon=True)
        self._thread.start()

    @property
    def used_bytes(self) -> int:
        with self._changed:
            return self.index.num_bytes

    def lookup(self, key: bytes) -> Lookup:
        with self._changed:
            if key in self._in_transit:
                return Lookup.PENDING
            return Lookup.HIT if key in self.index else Lookup.MISS

    def load_pays(self, num_bytes: int, num_tokens: int) -> bool:
        with self._changed:
            queued = sum(len(load.transfers) - load.num_loaded for load in self._loads)
            return self.policy.pays(num_bytes + queued * len(self._buffer), num_tokens)

    def forgive(self) -> None:
        with self._changed:
            self.policy.forgive()

    def prepare_load(self, load: Load) -> None:
        with self._changed:
            self._in_transit.update(transfer.key for transfer in load.transfers)
            self._loads[load] = time.monotonic()
            self._changed.notify_all()

    def complete_load(self) -> list[Load]:
        with self._changed:
            for load, start in list(self._loads.items()):
                elapsed_s = time.monotonic() - start
                if elapsed_s > self.policy.patience_s(load.num_tokens):
                    self.counters.num_timeouts += 1
                    self.policy.observe_timeout(load.num_loaded * len(self._buffer), elapsed_s)
                    self._end_load(load)
            ended, self._ended_loads = self._ended_loads, []
            return ended

    def cancel_load(self, load: Load) -> None:
        with self._changed:
            if load in self._loads:
                self._end_load(load)
            self._ended_loads.remove(load)

    def prepare_store(self, chain: Sequence[bytes], transfers: Sequence[Transfer]) -> None:
        with self._changed:
            if self.failure is not None or self._is_closing:
                self._copied += transfers
                self.counters.num_dropped_blocks += len(transfers)
                return
            for key in reversed(chain):  # the first block ends up as the one to evict last
                if key in self.index:
                    self.index.touch(key)
            self._in_transit.update(transfer.key for transfer in transfers)
            self._stores.append(_Store(dict.fromkeys(chain), deque(transfers)))
            self._changed.notify_all()

    def complete_store(self) -> list[Transfer]:
        with self._changed:
            copied, self._copied = self._copied, []
            return copied

    def cancel_store(self, group: int, max_num_blocks: int) -> list[Transfer]:
        cancelled: list[Transfer] = []
        with self._changed:
            for store in reversed(self._stores):
                others: list[Transfer] = []
                while store.transfers and len(cancelled) < max_num_blocks:
                    transfer = store.transfers.pop()
                    (cancelled if transfer.group == group else others).append(transfer)
                store.transfers.extend(reversed(others))
            self._in_transit.difference_update(transfer.key for transfer in cancelled)
            self.counters.num_dropped_blocks += len(cancelled)
        return cancelled

    def observe_prefill(self, num_tokens: int, elapsed_s: float) -> None:
        with self._changed:
            self.policy.observe_prefill(num_tokens, elapsed_s)

    def wait(self, timeout_s: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._ended_loads, timeout_s)

    def close(self) -> None:
        with self._changed:
            self._is_closing = True
            for load in list(self._loads):
                self._end_load(load)
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:  # the last reference may die anywhere
            self._thread.join(FLUSH_S)
            if self._thread.is_alive():
                self._turn_off(TimeoutError(f"stores did not end within {FLUSH_S:.0f} s"))
        os.close(self._lock_fd)

    def _scan(self) -> None:
        """Learn what earlier processes left here, and remove what they did not finish."""
        for name, num_bytes, _ in sorted(self._files.list(self.folder), key=lambda file: file[2]):
            if block_file.is_part(name):
                self._files.unlink(self.folder / name)
            elif key := block_file.parse_file_name(name):
                self.index.add(key, num_bytes)
        self._shrink(self.index.capacity_bytes, {})

    # What follows runs in the thread.

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._loads or self._stores or self._is_closing)
                load = next(iter(self._loads), None)
                if load is None and not self._stores:
                    return
            try:
                if load is not None:
                    self._load(load)
                else:
                    self._store_block()
            except OSError as error:
                self._turn_off(error)
            except Exception as error:  # of this program; requests must not wait for ever
                logger.exception("the disk tier failed")
                self._turn_off(error)

    def _load(self, load: Load) -> None:
        start, num_bytes = time.monotonic(), 0
        for transfer in load.transfers:
            if not self._read(transfer):
                break  # without this block the ones behind it are of no use
            payload_bytes = self._kv_store.payload_bytes(transfer.group)
            num_bytes += payload_bytes
            payload = block_file.payload(self._buffer, payload_bytes)
            with self._changed:
                if load not in self._loads:
                    return  # cancelled: the block is somebody else's
                self._kv_store.write_block(transfer.group, transfer.block, payload)
                load.num_loaded += 1
                self.counters.num_loaded_blocks += 1
                self.counters.loaded_bytes += payload_bytes
        with self._changed:
            if load in self._loads:
                self._end_load(load)
                if num_bytes:
                    self.policy.observe_load(num_bytes, time.monotonic() - start)

    def _read(self, transfer: Transfer) -> bool:
        """Bring a file into the buffer, and check it. One that is not right is removed."""
        path = self._path(transfer.key)
        buffer = self._buffer[: self._file_bytes(transfer.group)]
        payload_bytes = self._kv_store.payload_bytes(transfer.group)
        try:
            try:
                num_read = self._files.read(path, buffer)
            except FileNotFoundError:
                raise
            except OSError:
                self._count_error()
                num_read = self._files.read(path, buffer)
            if num_read < len(buffer):
                raise CorruptError("the file is cut off")
            block_file.check(buffer, self._fingerprint, transfer, payload_bytes)
            return True
        except FileNotFoundError:
            with self._changed:
                self.counters.num_missing_blocks += 1
        except BadBlockError as error:
            logger.warning("removing %s: %s", path, error)
            with self._changed:
                if isinstance(error, CorruptError):
                    self.counters.num_corrupt_blocks += 1
                else:
                    self.counters.num_mismatched_blocks += 1
        with self._changed:
            self.index.remove(transfer.key)
        self._files.unlink(path)  # of an absent file is no error
        return False

    def _store_block(self) -> None:
        """The next block of the first store, or its end."""
        with self._changed:
            store = self._stores[0]
            if not store.transfers:
                self._stores.popleft()
                transfer = None
            else:
                transfer = store.transfers[0]
        if transfer is None:
            self._note_use(store.chain)
            return
        num_bytes = self._file_bytes(transfer.group)
        if not self._shrink(self.index.capacity_bytes - num_bytes, store.chain):
            with self._changed:  # the folder is too small for the whole sequence
                self._drop(store)
            return
        payload_bytes = self._kv_store.payload_bytes(transfer.group)
        with self._changed:
            if not store.transfers or store.transfers[0] is not transfer:
                return  # cancelled: the block is somebody else's
            payload = block_file.payload(self._buffer, payload_bytes)
            try:
                self._kv_store.read_block(transfer.group, transfer.block, payload)
            except LostBlocksError:
                self._drop(store)
                return
            self._copied.append(store.transfers.popleft())
        self._write(transfer, payload_bytes, store.chain)
        with self._changed:
            self._in_transit.discard(transfer.key)
            if self.failure is None:
                self.index.add(transfer.key, num_bytes)
            self.counters.num_stored_blocks += 1
            self.counters.stored_bytes += payload_bytes

    def _write(self, transfer: Transfer, payload_bytes: int, chain: dict[bytes, None]) -> None:
        """Make a file of what is in the buffer."""
        path = self._path(transfer.key)
        buffer = self._buffer[: self._file_bytes(transfer.group)]
        block_file.seal(buffer, self._fingerprint, transfer, payload_bytes)
        try:
            self._files.write(path, buffer)
        except OSError:
            self._count_error()
            spared = self.index.num_bytes - self.index.num_bytes // EVICTED_SHARE
            self._shrink(spared - len(buffer), chain)
            self._files.write(path, buffer)

    def _note_use(self, chain: dict[bytes, None]) -> None:
        """Put a sequence at the end of the order of eviction, its first block last, and let the
        times of the files say so to later processes."""
        now = time.time_ns()
        for i, key in reversed(list(enumerate(chain))):
            with self._changed:
                if key not in self.index:
                    continue
                self.index.touch(key)
            try:
                self._files.touch(self._path(key), now - i)
            except FileNotFoundError:
                with self._changed:
                    self.index.remove(key)
            except OSError:  # the order of eviction is not worth more than this
                self._count_error()
                return

    def _shrink(self, max_bytes: int, chain: dict[bytes, None]) -> bool:
        """Evict files until the others hold at most ``max_bytes``. False, with as many evicted as
        may be, if that takes a file of ``chain``."""
        while self.index.num_bytes > max(max_bytes, 0):
            with self._changed:
                key = self.index.oldest()
                if key in chain:
                    return False
                self.index.remove(key)
                self.counters.num_evicted_blocks += 1
            self._files.unlink(self._path(key))
        return max_bytes >= 0

    def _count_error(self) -> None:
        with self._changed:
            self.counters.num_io_errors += 1

    def _turn_off(self, error: Exception) -> None:
        """Miss everything from now on."""
        with self._changed:
            self.failure = str(error)
            self.counters.num_io_errors += isinstance(error, OSError)
            for load in list(self._loads):
                self._end_load(load)
            for store in self._stores:
                self._drop(store)
            self._stores.clear()
            self._in_transit.clear()
            self.index.clear()
        logger.warning("prefixes are no longer kept in %s: %s", self.folder, error)

    # What follows is called under the lock.

    def _end_load(self, load: Load) -> None:
        del self._loads[load]
        self._in_transit.difference_update(transfer.key for transfer in load.transfers)
        self._ended_loads.append(load)
        self._changed.notify_all()

    def _drop(self, store: _Store) -> None:
        self._copied += store.transfers
        self._in_transit.difference_update(transfer.key for transfer in store.transfers)
        self.counters.num_dropped_blocks += len(store.transfers)
        store.transfers.clear()

    def _path(self, key: bytes) -> Path:
        return self.folder / file_name(key)

    def _file_bytes(self, group: int) -> int:
        return file_bytes(self._kv_store.payload_bytes(group))


def overhead_bytes(capacity_bytes: int, groups: Sequence[CacheGroup]) -> int:
    """Memory that a tier takes in this process."""
    sizes = [file_bytes(group.payload_bytes) for group in groups]
    return max(sizes) + ENTRY_BYTES * (capacity_bytes // min(sizes))


def _lock(folder: Path) -> int:
    """Keep other processes out, until this one closes the descriptor or dies."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.stat().st_mode & stat.S_IWOTH:
            raise TaelError(
                f"everybody can write into {folder}, and so plant KV; choose another folder, or "
                f"run: chmod o-w {folder}"
            )
        fd = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, mode=0o600)
    except OSError as error:
        raise TaelError(
            f"cannot keep KV blocks in {folder}: {error.strerror}; choose another folder."
        ) from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        raise TaelError(
            f"{folder} is in use by another process; give each its own folder for KV blocks."
        ) from error
    return fd
