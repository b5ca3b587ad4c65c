"""How many bytes there are, and how they are divided. Arithmetic only: nothing is allocated."""

from __future__ import annotations

import os
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tael.config import SchedulerConfig
from tael.errors import TaelError
from tael.models.spec import TIERED_SLOT_BYTES, CacheGroup

_UNITS: dict[str, int] = {
    "": 1,
    "B": 1,
    **{f"{prefix}B": 1000**i for i, prefix in enumerate("KMGT", start=1)},
    **{f"{prefix}iB": 1024**i for i, prefix in enumerate("KMGT", start=1)},
}


def parse_bytes(text: str) -> int:
    """Bytes in "2GiB", "1.5 GB", "800MiB" or "1000000". Raises TaelError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text, re.IGNORECASE)
    units = {name.lower(): size for name, size in _UNITS.items()}
    size = units.get(match[2].lower()) if match else None
    if match is None or size is None or (num_bytes := round(float(match[1]) * size)) < 1:
        raise TaelError(
            f'"{text}" is not a size in bytes; write a number and a unit, such as 2GiB or 800MiB.'
        )
    return num_bytes


def format_bytes(num_bytes: int) -> str:
    """The size to three digits, such as "1.5 GiB"."""
    size, unit = float(num_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1000:
            break
        size, unit = size / 1024, larger
    return f"{size:.3g} {unit}"


def available_memory_bytes() -> int:
    """What this process can take without swapping or being killed: the machine's available
    memory, or what the limits of its control groups leave if that is less."""
    if not Path("/proc/meminfo").exists():  # macOS says only how much there is in all
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return _linux_available_bytes(Path("/"))


def _linux_available_bytes(root: Path) -> int:
    meminfo = (root / "proc/meminfo").read_text()
    available = re.search(r"^MemAvailable:\s+(\d+) kB$", meminfo, re.MULTILINE)
    if available is None:
        raise TaelError("the kernel does not say how much memory is available; give --memory.")
    return min([int(available[1]) * 1024, *_cgroup_headrooms(root)])


def _cgroup_headrooms(root: Path) -> Iterator[int]:
    """What the control group of this process and each one above it leave, version 1 and 2.
    A container may see only its own part of the hierarchy, so folders may be missing."""
    membership = root / "proc/self/cgroup"
    for line in membership.read_text().splitlines() if membership.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount, limit_name, usage_name = "sys/fs/cgroup", "memory.max", "memory.current"
            cache_keys = {"active_file", "inactive_file"}
        elif "memory" in controllers.split(","):
            mount = "sys/fs/cgroup/memory"
            limit_name, usage_name = "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache_keys = {"total_active_file", "total_inactive_file"}
        else:
            continue
        top = root / mount
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):
            if (folder / limit_name).exists():
                limit = (folder / limit_name).read_text().strip()
                if limit != "max":
                    usage = int((folder / usage_name).read_text())
                    # Usage counts the page cache, which the kernel gives up on demand.
                    stat = (folder / "memory.stat").read_text().splitlines()
                    entries = (entry.split() for entry in stat)
                    cache = sum(int(value) for key, value in entries if key in cache_keys)
                    yield max(0, int(limit) - usage + cache)
            if folder == top:
                break


def kv_budget(
    memory_bytes: int, weights_bytes: int, workspace_bytes: int, baseline_bytes: int
) -> int:
    """Bytes of ``memory_bytes`` left for the KV cache after the weights, the buffers of a step
    and the process itself. Raises TaelError if nothing is left."""
    taken = weights_bytes + workspace_bytes + baseline_bytes
    if taken >= memory_bytes:
        raise TaelError(
            f"the memory budget of {format_bytes(memory_bytes)} is too small: weights "
            f"{format_bytes(weights_bytes)}, workspace {format_bytes(workspace_bytes)} and the "
            f"program {format_bytes(baseline_bytes)} take {format_bytes(taken)} before any "
            "context; raise --memory above that or choose a smaller model."
        )
    return memory_bytes - taken


@dataclass(frozen=True, slots=True)
class PoolPlan:
    """How the KV bytes are divided among the cache groups."""

    num_blocks: tuple[int, ...]
    max_model_len: int
    """The longest context that fits empty pools, at most what was asked for."""
    kv_bytes: int
    """In memory, of all blocks, those that are being filled included."""
    num_slots: int = 0
    """KV heads of the first group in memory, where its complete blocks are tiered."""


def plan_pools(
    groups: Sequence[CacheGroup],
    kv_bytes: int,
    block_size: int,
    max_model_len: int,
    scheduler: SchedulerConfig,
) -> PoolPlan:
    """Divide ``kv_bytes`` among the groups.

    First every group gets what one request of ``max_model_len`` needs, that length being lowered
    until it fits. The rest goes to all groups evenly, block for block: requests shorter than a
    window take as many blocks of it as of full attention. A group stops growing at what
    ``max_num_seqs`` requests of that length can use. Raises TaelError if not even one block
    beyond the largest step fits.
    """
    chunk = scheduler.max_num_batched_tokens

    def needed(num_tokens: int) -> list[int]:
        return [group.num_blocks(num_tokens, chunk, block_size) for group in groups]

    longest = max_model_len
    open_bytes = scheduler.max_num_open_blocks * sum(group.open_block_bytes for group in groups)

    def size(num_blocks: Sequence[int]) -> int:
        complete = sum(
            n * group.block_bytes
            + group.superblock_bytes(n, scheduler.max_num_seqs, longest, block_size)
            for n, group in zip(num_blocks, groups, strict=True)
        )
        return complete + open_bytes

    shortest = min(max_model_len, chunk + block_size)
    if (least := size(needed(shortest))) > kv_bytes:
        raise TaelError(
            f"the memory budget leaves {format_bytes(kv_bytes)} for the KV cache and a context of "
            f"{shortest} tokens needs {format_bytes(least)}; raise --memory by at least "
            f"{format_bytes(least - kv_bytes)}."
        )
    lengths = range(1, max_model_len + 1)
    max_model_len = bisect_right(lengths, kv_bytes, key=lambda length: size(needed(length)))
    one = needed(max_model_len)
    most = [scheduler.max_num_seqs * n for n in one]

    def grown(level: int) -> tuple[int, ...]:
        return tuple(max(low, min(level, high)) for low, high in zip(one, most, strict=True))

    levels = range(1, max(most) + 1)
    level = bisect_right(levels, kv_bytes, key=lambda level: size(grown(level)))
    return PoolPlan(grown(level), max_model_len, size(grown(level)))


def plan_tiered_pools(
    groups: Sequence[CacheGroup],
    kv_bytes: int,
    disk_bytes: int,
    block_size: int,
    max_model_len: int,
    scheduler: SchedulerConfig,
) -> PoolPlan:
    """As ``plan_pools``, with the complete blocks of full attention on disk.

    There are as many of these as ``disk_bytes`` hold and ``max_num_seqs`` requests can use, but
    what they take in memory without their KV is at most two thirds of it. Windows get what they can
    use of the other third, up to a half of that, and the rest holds KV of blocks on disk. Raises
    TaelError for a model without full attention, and if a step does not fit.
    """
    full, *windows = groups
    if full.window is not None:
        raise TaelError("this model keeps no KV beyond its windows; leave out --kv-disk.")
    chunk = scheduler.max_num_batched_tokens
    open_bytes = scheduler.max_num_open_blocks * full.open_block_bytes
    num_blocks = min(
        disk_bytes // full.disk_block_bytes,
        (kv_bytes - open_bytes) * 2 // 3 // full.memory_block_bytes,
        scheduler.max_num_seqs * full.num_blocks(max_model_len, chunk, block_size),
    )
    shortest = min(max_model_len, chunk + block_size)
    if num_blocks * block_size < shortest:
        least = format_bytes(-(-shortest // block_size) * full.disk_block_bytes)
        raise TaelError(
            f"a context of {shortest} tokens takes {least} on disk, and memory besides that this "
            "budget does not leave; raise --kv-disk or --memory."
        )
    rest = kv_bytes - open_bytes - num_blocks * full.memory_block_bytes
    rest -= full.superblock_bytes(num_blocks, scheduler.max_num_seqs, max_model_len, block_size)
    max_model_len = min(max_model_len, num_blocks * block_size)
    window_blocks: tuple[int, ...] = ()
    if windows:
        plan = plan_pools(windows, rest // 2, block_size, max_model_len, scheduler)
        window_blocks, max_model_len = plan.num_blocks, plan.max_model_len
        rest -= plan.kv_bytes
    slot_bytes = full.slot_bytes + TIERED_SLOT_BYTES
    num_slots = max(0, min(rest // slot_bytes, num_blocks * full.num_heads))
    return PoolPlan(
        (num_blocks, *window_blocks),
        max_model_len,
        kv_bytes - rest + num_slots * slot_bytes,
        num_slots,
    )
