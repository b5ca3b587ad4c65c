"""Moves blocks between the pools and the tier below them.

A load fills blocks that nobody else can reach and then publishes them in the prefix cache, where
the request that waited, like any other, finds them. A store reads blocks that are published
already. Both pin their blocks by a reference; since a request that computes comes first, it gets
those references back when its pool runs short (``reclaim``).

``chain`` is everywhere what identifies the first blocks of a request, behind the root: ``chain[i]``
is the parent of block i, ``chain[i + 1]`` its own hash.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator, Sequence

from tael.cache.block_pool import BlockPool
from tael.cache.prefix_cache import longest_prefix
from tael.cache.tier import Load, Lookup, Tier, Transfer, block_key
from tael.models.spec import CacheGroup
from tael.request import Request


class Readiness(enum.Enum):
    """Of a request that wants to start."""

    READY = "ready"
    """What can be had of its prefix is in the pools."""
    PENDING = "pending"
    """Blocks are on their way."""
    FULL = "full"
    """They would be, if the pools had room for them."""


class Offload:
    """Between the pools of all cache groups and one tier."""

    def __init__(
        self,
        groups: tuple[CacheGroup, ...],
        pools: tuple[BlockPool, ...],
        block_size: int,
        tier: Tier,
    ) -> None:
        self._groups = groups
        self._pools = pools
        self._block_size = block_size
        self._tier = tier
        self._loads: dict[Load, list[tuple[int, int]]] = {}
        """With (group, block) of the part of the prefix that was in the pools already: it must not
        be evicted for the rest."""
        self._storing: set[Transfer] = set()
        """Stores whose block is yet to be copied."""
        self._restored: tuple[list[int], ...] = tuple([] for _ in groups)
        """Blocks that were loaded since the last ``take_restored``."""
        self._copied: list[Transfer] = []
        """Stores that no longer need their block; see ``collect``."""
        self._refused = ""
        """The last request that did better without loading."""

    def restore(self, request: Request, chain: Sequence[bytes]) -> Readiness:
        """Have the tier load what it holds of a request's prefix beyond what the pools hold, if
        that pays. To be called again until the request is ready."""
        hashes = chain[1:]
        num_hits = longest_prefix(self._groups, self._pools, hashes, self._block_size)
        views = [_PoolAndTier(g, pool, self._tier) for g, pool in enumerate(self._pools)]
        num_blocks = longest_prefix(self._groups, views, hashes, self._block_size)
        if num_blocks == num_hits:
            return Readiness.READY

        hits: list[tuple[int, int]] = []
        misses: list[tuple[int, int]] = []
        """(index in the chain, group)"""
        end = num_blocks * self._block_size
        for g, (group, pool) in enumerate(zip(self._groups, self._pools, strict=True)):
            for i in range(group.first_block(end, self._block_size), num_blocks):
                block = pool.lookup(hashes[i])
                if block is not None:
                    hits.append((g, block))
                elif self._tier.lookup(block_key(g, hashes[i])) is Lookup.PENDING:
                    return Readiness.PENDING
                else:
                    misses.append((i, g))
        num_bytes = sum(self._groups[g].payload_bytes for _, g in misses)
        num_tokens = (num_blocks - num_hits) * self._block_size
        if not self._tier.load_pays(num_bytes, num_tokens):
            if request.request_id != self._refused:  # once, however often it is asked for
                self._refused = request.request_id
                self._tier.forgive()
            return Readiness.READY

        for g, block in hits:
            self._pools[g].ref(block)
        num_misses = [sum(g == of for _, of in misses) for g in range(len(self._pools))]
        if not self.reclaim(num_misses, loads=False):
            self._deref(hits)
            return Readiness.FULL
        if any(n > pool.num_trusted for n, pool in zip(num_misses, self._pools, strict=True)):
            self._deref(hits)  # nobody would find what is loaded into a doubtful block
            return Readiness.READY
        load = Load(
            tuple(
                self._transfer(request, chain, i, g, self._pools[g].take())
                for i, g in sorted(misses)
            ),
            num_tokens,
        )
        self._loads[load] = hits
        self._tier.prepare_load(load)
        request.num_resident_tokens = num_hits * self._block_size
        return Readiness.PENDING

    def store(self, request: Request, chain: Sequence[bytes]) -> None:
        """Have the tier keep what the pools hold of a request's complete blocks. A window group has
        only its last ones, and those are what can be gone on from."""
        transfers = []
        for i, block_hash in enumerate(chain[1:]):
            for g, pool in enumerate(self._pools):
                block = pool.lookup(block_hash)
                key = block_key(g, block_hash)
                if block is not None and self._tier.lookup(key) is Lookup.MISS:
                    pool.ref(block)
                    transfers.append(self._transfer(request, chain, i, g, block))
        self._storing.update(transfers)
        groups = range(len(self._pools))
        self._tier.prepare_store([block_key(g, h) for h in chain[1:] for g in groups], transfers)

    def collect(self) -> None:
        """Publish what was loaded, and unpin what has ended."""
        for load in self._tier.complete_load():
            for transfer in load.transfers[: load.num_loaded]:
                self._pools[transfer.group].publish(transfer.block, transfer.block_hash)
                self._restored[transfer.group].append(transfer.block)
            self._end(load)
        copied = self._tier.complete_store()
        self._storing.difference_update(copied)
        self._copied += copied
        if not self._storing:
            self._release_copied()

    def take_restored(self) -> tuple[list[int], ...]:
        """By group, the blocks that were published since the last call."""
        restored, self._restored = self._restored, tuple([] for _ in self._groups)
        return restored

    def reclaim(self, num_blocks: Sequence[int], *, loads: bool) -> bool:
        """Make ``num_blocks`` of each pool available, by cancelling stores and, if they may be,
        ``loads``. Whether they are now."""
        if self._is_available(num_blocks):
            return True
        self._release_copied()
        for g, (pool, count) in enumerate(zip(self._pools, num_blocks, strict=True)):
            while (short := count - pool.num_available) > 0:  # a block may have other references
                cancelled = self._tier.cancel_store(g, short)
                if not cancelled:
                    break
                self._storing.difference_update(cancelled)
                self._deref((t.group, t.block) for t in cancelled)
        while loads and self._loads and not self._is_available(num_blocks):
            load = next(reversed(self._loads))
            self._tier.cancel_load(load)
            self._end(load)
        return self._is_available(num_blocks)

    def pins(self) -> Iterator[tuple[int, int]]:
        """(group, block) of every reference that a transfer holds."""
        for load, hits in self._loads.items():
            yield from hits
            yield from ((t.group, t.block) for t in load.transfers)
        yield from ((t.group, t.block) for t in (*self._storing, *self._copied))

    def _transfer(
        self, request: Request, chain: Sequence[bytes], i: int, group: int, block: int
    ) -> Transfer:
        start = i * self._block_size
        token_ids = tuple(request.token_ids[start : start + self._block_size])
        return Transfer(group, block, chain[i + 1], chain[i], token_ids)

    def _end(self, load: Load) -> None:
        # Last block first, as everywhere: a chain is evicted from its end.
        self._deref((t.group, t.block) for t in reversed(load.transfers))
        self._deref(reversed(self._loads.pop(load)))

    def _release_copied(self) -> None:
        # Blocks are copied from the first on, and would be evicted in that order if they were
        # unpinned one by one.
        self._deref((t.group, t.block) for t in reversed(self._copied))
        self._copied.clear()

    def _deref(self, pins: Iterable[tuple[int, int]]) -> None:
        for g, block in pins:
            self._pools[g].deref(block)

    def _is_available(self, num_blocks: Sequence[int]) -> bool:
        return all(n <= pool.num_available for n, pool in zip(num_blocks, self._pools, strict=True))


class _PoolAndTier:
    """One group's blocks, wherever they are: what ``longest_prefix`` asks."""

    def __init__(self, group: int, pool: BlockPool, tier: Tier) -> None:
        self._group = group
        self._pool = pool
        self._tier = tier

    def has(self, block_hash: bytes) -> bool:
        return self._pool.has(block_hash) or (
            self._tier.lookup(block_key(self._group, block_hash)) is not Lookup.MISS
        )
