"""Blocks that are partly in memory and wholly in a file come back as they went, or not at all."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from tael import _native
from tael.backends.cpu.tiered_blocks import CPUTieredBlocks
from tael.errors import LostBlocksError, TaelError
from tael.models.spec import CacheGroup

NUM_BLOCKS = 40
GROUP = CacheGroup(
    layers=(0, 1, 2),
    window=None,
    block_bytes=0,
    open_block_bytes=1,
    num_heads=100,  # more than are moved at once
    head_bytes=700,
    is_tiered=True,
)


@pytest.fixture
def blocks(tmp_path: Path) -> CPUTieredBlocks:
    """Room in memory for five blocks of forty."""
    return CPUTieredBlocks(GROUP, NUM_BLOCKS, 500, tmp_path, num_threads=1)


def payload(blocks: CPUTieredBlocks, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, blocks.block_bytes, np.uint8)


def read(blocks: CPUTieredBlocks, block: int) -> np.ndarray:
    out = np.zeros(blocks.block_bytes, np.uint8)
    blocks.read_block(block, out)
    return out


def fill(blocks: CPUTieredBlocks) -> None:
    for block in range(NUM_BLOCKS):
        blocks.write_block(block, payload(blocks, block))


def test_any_order_of_reads_and_writes(blocks: CPUTieredBlocks) -> None:
    rng = np.random.default_rng(0)
    seeds: dict[int, int] = {}
    for i in range(1500):
        block = int(rng.integers(NUM_BLOCKS))
        if block not in seeds or rng.random() < 0.3:
            blocks.write_block(block, payload(blocks, i))
            seeds[block] = i
        else:
            assert np.array_equal(read(blocks, block), payload(blocks, seeds[block]))
    counters = blocks.counters
    assert counters["num_loads"] > 50_000 and counters["num_hits"] > 5_000
    assert counters["num_errors"] == 0 and not blocks.take_lost()[0]


def test_what_is_read_often_stays(blocks: CPUTieredBlocks) -> None:
    fill(blocks)
    before = blocks.counters["num_loads"]
    for block in range(1, NUM_BLOCKS):
        read(blocks, 0)
        read(blocks, block)
    assert blocks.counters["num_loads"] - before <= (NUM_BLOCKS + 3) * GROUP.num_heads


def test_what_was_read_often_outlives_what_is_read_once(blocks: CPUTieredBlocks) -> None:
    fill(blocks)
    for _ in range(5):
        read(blocks, 0)
    for block in range(1, 7):  # more than there is room for
        read(blocks, block)
    before = blocks.counters["num_loads"]
    read(blocks, 0)
    assert blocks.counters["num_loads"] == before


def flip(kv: NDArray[np.uint8]) -> None:
    """One bit of the second head of block 7."""
    kv[7, GROUP.slot_bytes + 99] ^= 16


def flip_two(kv: NDArray[np.uint8]) -> None:
    """The highest bits of two words that are 32 bytes apart."""
    kv[7, [7, 39]] ^= 128


def swap(kv: NDArray[np.uint8]) -> None:
    """Block 8 in the place of block 7."""
    kv[7] = kv[8]


def clear(kv: NDArray[np.uint8]) -> None:
    kv[7] = 0


def change(fd: int, damage: Callable[[NDArray[np.uint8]], None]) -> None:
    """By the pool's own descriptor: the page cache of another one would meet direct writes that are
    under way, for which the kernel reports EIO (dio_warn_stale_pagecache)."""
    size = GROUP.disk_block_bytes
    buffer = mmap.mmap(-1, 9 * size)
    os.preadv(fd, [buffer], 0)
    kv = np.frombuffer(buffer, np.uint8).reshape(9, size)
    damage(kv)
    os.pwrite(fd, memoryview(buffer)[7 * size : 8 * size], 7 * size)


def cut(fd: int) -> None:
    os.ftruncate(fd, 7 * GROUP.disk_block_bytes + 100)


@pytest.mark.parametrize("damage", [flip, flip_two, swap, cut, clear])
def test_a_damaged_file_is_noticed(damage: Callable[..., None], blocks: CPUTieredBlocks) -> None:
    fill(blocks)
    read(blocks, 1)
    read(blocks, 2)
    if damage is cut:
        cut(blocks._fd)
    else:
        change(blocks._fd, damage)
    with pytest.raises(LostBlocksError, match="could not be read back"):
        read(blocks, 7)
    lost, reason = blocks.take_lost()
    assert 7 in lost and "could not be read back" in reason
    assert blocks.take_lost() == (set(), "")
    assert blocks.counters["num_errors"] > 0
    assert np.array_equal(read(blocks, 6), payload(blocks, 6)), "the others are whole"
    if damage is not cut:
        blocks.write_block(7, payload(blocks, 70))
        fill_memory = [read(blocks, block) for block in range(7)]
        assert len(fill_memory) == 7
        assert np.array_equal(read(blocks, 7), payload(blocks, 70)), "the place can be used again"


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_WRONLY], ids=["writes", "reads"])
def test_a_disk_that_fails(flags: int, tmp_path: Path) -> None:
    """A file that may only be read, or only be written to."""
    path = tmp_path / "file"
    path.write_bytes(bytes(NUM_BLOCKS * GROUP.disk_block_bytes))
    fd = os.open(path, flags)
    slots = np.zeros((500 + 1, 1024), np.uint8).reshape(-1)
    start = -slots.ctypes.data % 1024
    pool = _native.TieredPool(
        fd, NUM_BLOCKS, GROUP.num_heads, slots[start : start + 500 * 1024].reshape(500, 1024)
    )
    data = np.ones(GROUP.disk_block_bytes, np.uint8)
    out = np.zeros(GROUP.disk_block_bytes, np.uint8)
    with pytest.raises(_native.LostBlocks):
        for block in range(NUM_BLOCKS):
            pool.write_block(block, data)
        for block in range(NUM_BLOCKS):
            pool.read_block(block, out)
    assert pool.take_lost()[0]
    del pool
    os.close(fd)


def test_no_room(tmp_path: Path) -> None:
    with pytest.raises(TaelError, match="4 threads need"):
        CPUTieredBlocks(GROUP, NUM_BLOCKS, 200, tmp_path, num_threads=4)
    with pytest.raises(TaelError, match="has no room"):
        CPUTieredBlocks(GROUP, 1 << 40, 500, tmp_path, num_threads=1)
    with pytest.raises(TaelError, match="no file for KV"):
        (tmp_path / "file").write_text("")
        CPUTieredBlocks(GROUP, NUM_BLOCKS, 500, tmp_path / "file" / "folder", num_threads=1)
    assert [p.name for p in tmp_path.iterdir()] == ["file"], "nothing is left"
