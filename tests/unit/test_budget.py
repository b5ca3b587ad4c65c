"""Sizes in words, what the machine has, how it is divided, and the memory itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tael.config import SchedulerConfig
from tael.errors import TaelError
from tael.memory.budget import (
    PoolPlan,
    _linux_available_bytes,
    available_memory_bytes,
    format_bytes,
    kv_budget,
    parse_bytes,
    plan_pools,
    plan_tiered_pools,
)
from tael.memory.kv_store import KVStore
from tael.models.spec import CacheGroup

GIB = 1024**3


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("2GiB", 2 * GIB),
        ("1.5 gib", 3 * GIB // 2),
        ("2GB", 2_000_000_000),
        ("800MiB", 800 * 1024**2),
        ("1000000", 1_000_000),
        ("5 B", 5),
        ("1TB", 10**12),
    ],
)
def test_parse_bytes(text: str, num_bytes: int) -> None:
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize(
    "text", ["", "GiB", "-1GiB", "2 G iB", "2GiBs", "0", "1e9", "nan", "2,5GB"]
)
def test_what_is_not_a_size_is_refused(text: str) -> None:
    with pytest.raises(TaelError, match="is not a size"):
        parse_bytes(text)


def test_format_bytes() -> None:
    sizes = [5, 1024, 1_500_000, 3 * GIB // 2, 999 * GIB, 1000 * GIB]
    assert [format_bytes(size) for size in sizes] == [
        "5 B",
        "1 KiB",
        "1.43 MiB",
        "1.5 GiB",
        "999 GiB",
        "0.977 TiB",
    ]


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def test_memory_of_a_machine_without_limits(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "proc/meminfo": "MemTotal: 9000 kB\nMemAvailable:    5000 kB\n",
            "proc/self/cgroup": "0::/user\n",
            "sys/fs/cgroup/user/memory.max": "max\n",
        },
    )
    assert _linux_available_bytes(tmp_path) == 5000 * 1024


def test_memory_under_a_version_2_limit(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "proc/meminfo": "MemAvailable:    5000 kB\n",
            "proc/self/cgroup": "0::/outer/inner\n",
            "sys/fs/cgroup/outer/inner/memory.max": "max\n",
            "sys/fs/cgroup/outer/memory.max": "3000000\n",
            "sys/fs/cgroup/outer/memory.current": "1000000\n",
            "sys/fs/cgroup/outer/memory.stat": "anon 7\nactive_file 200000\ninactive_file 300000\n",
        },
    )
    assert _linux_available_bytes(tmp_path) == 2_500_000, "page cache can be given up"


def test_memory_under_a_version_1_limit_seen_from_inside_a_container(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "proc/meminfo": "MemAvailable:    5000 kB\n",
            "proc/self/cgroup": "5:cpu,cpuacct:/x\n4:memory:/docker/abc\n1:name=systemd:/\n0::/\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "1000\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "1500\n",
            "sys/fs/cgroup/memory/memory.stat": "total_inactive_file 100\ninactive_file 9\n",
        },
    )
    assert _linux_available_bytes(tmp_path) == 0


def test_memory_of_this_machine() -> None:
    assert 1024**2 < available_memory_bytes() < 2**60


def test_weights_beyond_the_budget_are_refused_with_the_numbers() -> None:
    assert kv_budget(10 * GIB, 2 * GIB, GIB, GIB) == 6 * GIB
    with pytest.raises(TaelError, match=r"budget of 1 GiB .* weights 2 GiB, .* take 3\.5 GiB"):
        kv_budget(GIB, 2 * GIB, GIB, GIB // 2)


windows = st.none() | st.integers(1, 200)
groups_of_models = st.lists(
    st.builds(CacheGroup, layers=st.just(()), window=windows, block_bytes=st.integers(1, 5000)),
    min_size=1,
    max_size=3,
).map(tuple)
scheduler_configs = st.integers(1, 20).flatmap(
    lambda n: st.builds(SchedulerConfig, st.just(n), st.integers(n, 300))
)


def try_plan(*args: object) -> PoolPlan | None:
    try:
        return plan_pools(*args)  # type: ignore[arg-type]
    except TaelError:
        return None


@settings(max_examples=100)
@given(
    groups=groups_of_models,
    kv_bytes=st.integers(0, 3_000_000),
    more=st.integers(1, 1_000_000),
    block_size=st.sampled_from([1, 4, 32]),
    max_model_len=st.integers(2, 4000),
    scheduler=scheduler_configs,
)
def test_plans(
    groups: tuple[CacheGroup, ...],
    kv_bytes: int,
    more: int,
    block_size: int,
    max_model_len: int,
    scheduler: SchedulerConfig,
) -> None:
    plan = try_plan(groups, kv_bytes, block_size, max_model_len, scheduler)
    larger = try_plan(groups, kv_bytes + more, block_size, max_model_len, scheduler)
    assume(larger is not None)
    assert larger is not None
    if plan is None:
        return
    sizes = [n * group.block_bytes for n, group in zip(plan.num_blocks, groups, strict=True)]
    assert plan.kv_bytes == sum(sizes) <= kv_bytes, "the budget is obeyed"
    assert 2 <= plan.max_model_len <= max_model_len

    chunk, num_seqs = scheduler.max_num_batched_tokens, scheduler.max_num_seqs
    for group, num_blocks in zip(groups, plan.num_blocks, strict=True):
        one = group.num_blocks(plan.max_model_len, chunk, block_size)
        assert one <= num_blocks <= num_seqs * one, "enough for one, never more than all can use"

    assert plan.max_model_len <= larger.max_model_len
    if plan.max_model_len == larger.max_model_len:
        assert all(a <= b for a, b in zip(plan.num_blocks, larger.num_blocks, strict=True))
    if plan.max_model_len < max_model_len:
        longer = [g.num_blocks(plan.max_model_len + 1, chunk, block_size) for g in groups]
        needed = sum(n * group.block_bytes for n, group in zip(longer, groups, strict=True))
        assert needed > kv_bytes, "no context is given away"


FULL = CacheGroup(layers=(0,), window=None, block_bytes=1000)
WINDOW = CacheGroup(layers=(1,), window=64, block_bytes=5000)
SCHEDULER = SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=64)


def test_a_plan_by_hand() -> None:
    # 1024 tokens: 32 blocks of full attention; 64 new + 63 seen tokens touch 5 of the window.
    assert plan_pools((FULL, WINDOW), 57_000, 32, 1024, SCHEDULER) == PoolPlan(
        (32, 5), 1024, 57_000
    )
    assert plan_pools((FULL, WINDOW), 56_999, 32, 1024, SCHEDULER).max_model_len == 31 * 32
    # More memory: first the window pool catches up, up to 8 requests' worth, then the other.
    assert plan_pools((FULL, WINDOW), 157_000, 32, 1024, SCHEDULER).num_blocks == (32, 25)
    assert plan_pools((FULL, WINDOW), 300_000, 32, 1024, SCHEDULER).num_blocks == (100, 40)
    assert plan_pools((FULL, WINDOW), 10**9, 32, 1024, SCHEDULER).num_blocks == (256, 40)


def test_a_budget_too_small_is_refused_with_the_numbers() -> None:
    # The largest step and one more block: 3 blocks each.
    assert plan_pools((FULL, WINDOW), 18_000, 32, 1024, SCHEDULER).max_model_len == 96
    with pytest.raises(TaelError, match=r"of 96 tokens needs 17\.6 KiB; .* at least 1 B"):
        plan_pools((FULL, WINDOW), 17_999, 32, 1024, SCHEDULER)


TIERED = CacheGroup(
    layers=(0,),
    window=None,
    block_bytes=1000,
    open_block_bytes=2000,
    num_heads=2,
    head_bytes=400,
    head_summary_bytes=100,
)
"""In memory 516 bytes a block and 528 a slot, on disk 1,024 a block; 18 open blocks."""


def test_a_tiered_plan_by_hand() -> None:
    def plan(kv_bytes: int, disk_bytes: int, *windows: CacheGroup) -> PoolPlan:
        groups = (TIERED, *windows)
        return plan_tiered_pools(groups, kv_bytes, disk_bytes, 32, 1024, SCHEDULER)

    # The disk decides, then the memory, then what eight requests can use.
    assert plan(136_000, 40 * 1024 + 1) == PoolPlan((40,), 1024, 36_000 + 40 * 516 + 80 * 528, 80)
    assert plan(46_000, 40 * 1024) == PoolPlan((12,), 384, 36_000 + 12 * 516 + 7 * 528, 7)
    assert plan(10**9, 10**9).num_blocks == (256,)
    # A window gets what a request of the length needs, and half of the rest at most.
    assert plan(136_000, 40 * 1024, WINDOW) == PoolPlan(
        (40, 7), 1024, 36_000 + 40 * 516 + 35_000 + 80 * 528, 80
    )


def test_a_tiered_context_shorter_than_a_step() -> None:
    plan = plan_tiered_pools((TIERED,), 136_000, 40 * 1024, 32, 64, SchedulerConfig(1, 512))
    assert (plan.num_blocks, plan.max_model_len, plan.num_slots) == ((2,), 64, 4)


def test_a_tiered_plan_that_cannot_be() -> None:
    with pytest.raises(TaelError, match="no KV beyond its windows"):
        plan_tiered_pools((WINDOW,), 10**9, 10**9, 32, 1024, SCHEDULER)
    with pytest.raises(TaelError, match="raise --kv-disk or --memory"):
        plan_tiered_pools((TIERED,), 10**9, 2 * 1024, 32, 1024, SCHEDULER)
    with pytest.raises(TaelError, match="raise --kv-disk or --memory"):
        plan_tiered_pools((TIERED,), 30_000, 10**9, 32, 1024, SCHEDULER)


def test_the_store_is_zero_aligned_and_writable() -> None:
    store = KVStore((FULL, WINDOW), (3, 2))
    assert [pool.shape for pool in store.pools] == [(3, 1000), (2, 5000)]
    assert store.num_bytes == 13_000
    for pool in store.pools:
        assert pool.dtype == np.uint8 and pool.flags.c_contiguous
        assert pool.ctypes.data % 4096 == 0
        assert not pool.any()
        pool[-1, -1] = 7
        assert pool.sum() == 7


def test_the_store_takes_memory_only_when_written() -> None:
    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    before = resident_bytes()
    store = KVStore((FULL,), (200_000,))
    assert resident_bytes() - before < 50_000_000
    store.pools[0][:100_000] = 1
    assert resident_bytes() - before > 90_000_000
