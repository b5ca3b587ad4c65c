"""Blocks change between free, cached and referenced, and none is ever lost."""

from __future__ import annotations

import pytest

from tael.cache.block_hash import block_hash, root_hash
from tael.cache.block_pool import BlockPool


def counts(pool: BlockPool) -> tuple[int, int, int]:
    pool.check()
    return pool.num_free, pool.num_cached, pool.num_referenced


def cached(pool: BlockPool, *hashes: bytes) -> list[int]:
    """Blocks published under ``hashes`` and released in this order."""
    blocks = [pool.take() for _ in hashes]
    for block, name in zip(blocks, hashes, strict=True):
        pool.publish(block, name)
    for block in blocks:
        pool.deref(block)
    return blocks


def test_states() -> None:
    pool = BlockPool(3)
    assert counts(pool) == (3, 0, 0)
    private, public = pool.take(), pool.take()
    pool.publish(public, b"x")
    assert counts(pool) == (1, 0, 2)
    pool.deref(private)
    assert counts(pool) == (2, 0, 1), "what nobody can find is free"
    pool.deref(public)
    assert counts(pool) == (2, 1, 0), "what can be found stays"
    assert pool.lookup(b"x") == public
    pool.ref(public)
    pool.ref(public)
    assert counts(pool) == (2, 0, 1) and pool.ref_count(public) == 2
    pool.deref(public)
    assert counts(pool) == (2, 0, 1), "one holder is left"


def test_free_blocks_are_taken_before_cached_ones() -> None:
    pool = BlockPool(2)
    [block] = cached(pool, b"x")
    assert pool.take() != block
    assert pool.lookup(b"x") == block
    assert pool.take() == block, "the last block there is"
    assert pool.lookup(b"x") is None, "its content is forgotten"
    assert counts(pool) == (0, 0, 2)


def test_the_least_recently_used_block_is_evicted() -> None:
    pool = BlockPool(3)
    a, b, c = cached(pool, b"a", b"b", b"c")
    pool.ref(a)
    pool.deref(a)
    assert [pool.take(), pool.take(), pool.take()] == [b, c, a]


def test_a_referenced_block_is_never_evicted() -> None:
    pool = BlockPool(2)
    a, b = cached(pool, b"a", b"b")
    pool.ref(a)
    assert pool.num_available == 1
    assert pool.take() == b
    assert pool.num_available == 0
    assert pool.lookup(b"a") == a


def test_the_first_block_published_under_a_hash_stays() -> None:
    pool = BlockPool(2)
    first, second = pool.take(), pool.take()
    pool.publish(first, b"x")
    pool.publish(second, b"x")
    assert pool.lookup(b"x") == first
    pool.deref(second)
    assert counts(pool) == (1, 0, 1), "the duplicate is free at once"


def test_what_is_lost_is_found_no_more_and_taken_last() -> None:
    pool = BlockPool(5)
    [idle] = cached(pool, b"idle")
    held, private = pool.take(), pool.take()
    pool.publish(held, b"held")
    free = pool._free[-1]
    for block in (idle, held, private, free):
        pool.distrust(block)
    assert pool.lookup(b"idle") is None and pool.lookup(b"held") is None
    assert counts(pool) == (3, 0, 2), "what nobody holds is free"
    pool.deref(held)
    pool.deref(private)
    assert pool.take() not in (idle, held, private, free)
    last = pool.take()
    assert last in (idle, held, private, free), "there are no others"
    pool.publish(last, b"again")
    assert pool.lookup(b"again") == last
    pool.deref(last)
    assert counts(pool) == (4, 0, 1) and pool.lookup(b"again") is None, "it is not kept"


def test_a_doubtful_block_is_taken_after_cached_ones() -> None:
    pool = BlockPool(2)
    [idle] = cached(pool, b"idle")
    doubtful = pool.take()
    pool.distrust(doubtful)
    pool.deref(doubtful)
    assert (pool.num_available, pool.num_trusted) == (2, 1)
    assert pool.take() == idle
    pool.check()
    assert pool.take() == doubtful


def test_check_notices_a_lost_block() -> None:
    pool = BlockPool(2)
    pool.take()
    pool._ref_counts[0] = 0
    with pytest.raises(AssertionError, match="lost"):
        pool.check()


def test_a_hash_covers_everything_that_shapes_the_kv() -> None:
    roots = {root_hash(model, salt) for model in (b"m", b"n") for salt in ("", "s")}
    assert len(roots) == 4
    assert root_hash(b"ms", "") != root_hash(b"m", "s")
    parent = root_hash(b"m", "")
    assert block_hash(parent, [1, 2]) != block_hash(parent, [2, 1])
    assert block_hash(block_hash(parent, [1]), [2]) != block_hash(block_hash(parent, [2]), [2])


def test_a_hash_means_the_same_in_every_process() -> None:
    # Computed once by hand: SHA-256 of the parent and the ids as little-endian int32.
    root = root_hash(b"model", "salt")
    assert root.hex() == "529b8bc132ba685cacf216c58032a2ffd6147dc9582966d7db5fa4262571de82"
    assert (
        block_hash(root, [1, 2, 70000]).hex()
        == "7e08922f085c044d68767b3eb1111ba7f382df6934e19454afd0c9690851b61b"
    )
