"""Prefix hits, windows and block tables."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tael.cache import manager as manager_module
from tael.cache.block_pool import BlockPool
from tael.cache.manager import CacheManager
from tael.cache.prefix_cache import longest_prefix
from tael.models.spec import CacheGroup
from tael.request import Request, SamplingParams

BLOCK = 4
FULL = CacheGroup(layers=(0,), window=None, block_bytes=100)
WINDOW = CacheGroup(layers=(1,), window=6, block_bytes=10)


def make_request(token_ids: list[int], salt: str = "") -> Request:
    return Request("r", token_ids, SamplingParams(), cache_salt=salt)


def make_manager(*groups: CacheGroup, num_blocks: int = 16) -> CacheManager:
    return CacheManager(groups, (num_blocks,) * len(groups), BLOCK, b"model")


def start(manager: CacheManager, request: Request, most: int) -> bool:
    """For up to so many tokens behind the prefix that is found."""
    return manager.start(
        request, lambda: min(request.num_tokens - request.num_computed_tokens, most)
    )


def compute(manager: CacheManager, request: Request, num_new_tokens: int) -> None:
    assert manager.allocate(request, num_new_tokens)
    request.num_computed_tokens += num_new_tokens
    manager.publish(request)
    manager.trim(request)
    manager.check()


def run(manager: CacheManager, request: Request) -> int:
    """Compute a request in one step and free it; returns its prefix hit in tokens."""
    assert start(manager, request, request.num_tokens)
    num_hit_tokens = request.num_computed_tokens
    compute(manager, request, request.num_tokens - num_hit_tokens)
    manager.free(request)
    manager.check()
    return num_hit_tokens


def test_bytes_by_state() -> None:
    packed = CacheGroup(layers=(2,), window=None, block_bytes=3, open_block_bytes=7)
    manager = CacheManager((FULL, packed), (16, 8), BLOCK, b"model", num_open_blocks=4)
    assert manager.pool_bytes == 16 * 100 + 8 * 3 + 4 * 7
    assert manager.referenced_bytes == manager.cached_bytes == 0
    request = make_request(list(range(9)))
    assert start(manager, request, 9)
    compute(manager, request, 9)  # two whole blocks, and one that is open
    assert manager.referenced_bytes == 3 * (100 + 3) + 7
    manager.free(request)
    assert manager.referenced_bytes == 0
    assert manager.cached_bytes == 2 * (100 + 3)


@pytest.mark.parametrize(
    ("num_tokens", "num_hit_tokens"), [(3, 0), (4, 0), (5, 4), (8, 4), (9, 8), (11, 8)]
)
def test_a_hit_is_whole_blocks_and_leaves_a_token_to_compute(
    num_tokens: int, num_hit_tokens: int
) -> None:
    manager = make_manager(FULL)
    tokens = list(range(num_tokens))
    assert run(manager, make_request(tokens)) == 0
    assert run(manager, make_request(tokens)) == num_hit_tokens
    assert manager.num_prefix_query_tokens == 2 * num_tokens
    assert manager.num_prefix_hit_tokens == num_hit_tokens


def test_a_hit_ends_where_the_tokens_differ() -> None:
    manager = make_manager(FULL)
    run(manager, make_request(list(range(16))))
    assert run(manager, make_request([*range(9), 99, *range(10, 16)])) == 8
    assert run(manager, make_request([99, *range(1, 16)])) == 0


def test_salts_do_not_share() -> None:
    manager = make_manager(FULL)
    run(manager, make_request(list(range(16)), salt="a"))
    assert run(manager, make_request(list(range(16)), salt="b")) == 0
    assert run(manager, make_request(list(range(16)), salt="a")) == 12


def test_running_requests_share_blocks() -> None:
    manager = make_manager(FULL)
    first, second = make_request(list(range(10))), make_request(list(range(12)))
    assert start(manager, first, 10)
    compute(manager, first, 10)
    assert start(manager, second, 12)
    assert second.num_computed_tokens == 8
    [table], [other] = manager.block_tables(first), manager.block_tables(second)
    assert table[:2] == other[:2] and table[2] != other[2]
    assert manager.kv_bytes(first) == manager.kv_bytes(second) == 300
    assert manager.num_referenced == 4
    manager.free(first)
    manager.check()
    assert manager.num_referenced == 3


def test_only_computed_blocks_are_published() -> None:
    manager = make_manager(FULL)
    first, second = make_request(list(range(20))), make_request(list(range(20)))
    assert start(manager, first, 20)
    assert start(manager, second, 20)
    assert second.num_computed_tokens == 0, "the KV of the first does not exist yet"
    manager.free(second)
    compute(manager, first, 7)
    assert start(manager, second, 20)
    assert second.num_computed_tokens == 4


def test_a_window_releases_what_no_later_query_sees() -> None:
    manager = make_manager(FULL, WINDOW)
    request = make_request(list(range(40)))
    assert start(manager, request, 8)
    compute(manager, request, 8)
    full, window = manager.block_tables(request)
    assert -1 not in full + window, "position 8 looks back to 3"
    compute(manager, request, 1)
    assert window[0] == -1, "position 9 looks back to 4"
    compute(manager, request, 23)
    assert [block == -1 for block in window] == [True] * 6 + [False] * 2  # 32 looks back to 27
    assert -1 not in full
    assert manager.kv_bytes(request) == 8 * 100 + 2 * 10


@pytest.mark.parametrize("chunk", [1, 3, 4, 7, 16, 40])
@pytest.mark.parametrize("window", [1, 2, 4, 5, 6, 30])
def test_a_request_never_holds_more_than_the_formula_says(chunk: int, window: int) -> None:
    group = CacheGroup(layers=(0,), window=window, block_bytes=1)
    manager = make_manager(group, num_blocks=group.num_blocks(40, chunk, BLOCK))
    request = make_request(list(range(40)))
    assert start(manager, request, chunk)
    while request.num_computed_tokens < 40:
        compute(manager, request, min(chunk, 40 - request.num_computed_tokens))


def test_a_hit_needs_only_the_window_in_a_window_group() -> None:
    manager = make_manager(FULL, WINDOW)
    run(manager, make_request(list(range(40))))
    early = [manager.pools[1].take() for _ in range(manager.pools[1].num_free + 8)]
    for block in reversed(early):  # eviction took the blocks that left the window first
        manager.pools[1].deref(block)
    request = make_request([*range(40), 41])
    assert start(manager, request, 40)
    assert request.num_computed_tokens == 40
    window = manager.block_tables(request)[1]
    assert [block == -1 for block in window] == [True] * 8 + [False] * 3  # 40 looks back to 35
    manager.free(request)

    # Elsewhere the window is gone, so a shorter prefix is no hit although full attention has it.
    assert run(manager, make_request(list(range(20)))) == 0


@settings(max_examples=100)
@given(
    windows=st.lists(st.none() | st.integers(1, 20), min_size=1, max_size=3),
    present=st.lists(st.tuples(*[st.integers(0, 4)] * 3), max_size=10),
)
def test_the_longest_prefix_is_found(
    windows: list[int | None], present: list[tuple[int, int, int]]
) -> None:
    groups = [CacheGroup(layers=(), window=window, block_bytes=1) for window in windows]
    pools = [BlockPool(len(present) + 1) for _ in groups]
    hashes = [bytes([i]) for i in range(len(present))]
    for i, pool in enumerate(pools):
        for j, block_hash in enumerate(hashes):
            if present[j][i] > 0:
                pool.publish(pool.take(), block_hash)

    def can_go_on(end: int) -> bool:
        return all(
            pool.lookup(hashes[j]) is not None
            for group, pool in zip(groups, pools, strict=True)
            for j in range(group.first_block(end * BLOCK, BLOCK), end)
        )

    expected = max(end for end in range(len(hashes) + 1) if can_go_on(end))
    assert longest_prefix(groups, pools, hashes, BLOCK) == expected


def test_a_chain_is_evicted_from_its_end() -> None:
    manager = make_manager(FULL, num_blocks=11)
    run(manager, make_request(list(range(40))))
    run(manager, make_request([99] * 12))  # takes the free block, then two of the chain
    assert run(manager, make_request([*range(40), 40])) == 32


def test_all_groups_or_none() -> None:
    manager = CacheManager((FULL, WINDOW), (8, 2), BLOCK, b"model")
    request = make_request(list(range(32)))
    assert not start(manager, request, 12), "the window group has 2 of 3 blocks"
    assert manager.num_referenced == 0 and request.num_computed_tokens == 0
    assert start(manager, request, 8)
    assert not manager.allocate(request, 12)
    assert [len(table) for table in manager.block_tables(request)] == [2, 2]
    manager.check()


def test_hits_are_not_evicted_to_make_room_for_their_own_request() -> None:
    # vLLM #33775: blocks taken for one group evicted the hits of another.
    manager = CacheManager((FULL, WINDOW), (4, 3), BLOCK, b"model")
    run(manager, make_request(list(range(9))))
    request = make_request(list(range(24)))
    assert not start(manager, request, 16), "2 of 3 blocks are hits, and 4 more are wanted"
    manager.check()
    assert run(manager, make_request(list(range(9)))) == 8, "and the hits survived the refusal"


def test_hashes_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    num_hashed = 0

    def counted(parent: bytes, token_ids: list[int]) -> bytes:
        nonlocal num_hashed
        num_hashed += 1
        return parent[:28] + bytes(token_ids)

    monkeypatch.setattr(manager_module, "block_hash", counted)
    manager = make_manager(FULL)
    request = make_request(list(range(40)))
    for _ in range(2):  # the second time as after a preemption
        assert start(manager, request, 4)
        while request.num_computed_tokens < 40:
            compute(manager, request, 1)
        manager.free(request)
    assert num_hashed == 10
