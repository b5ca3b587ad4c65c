"""The block tables of all requests: who holds which block of which cache group."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain
from typing import TypeAlias

from tael.cache.block_hash import block_hash, root_hash
from tael.cache.block_pool import BlockPool
from tael.cache.offload import Offload, Readiness
from tael.cache.prefix_cache import longest_prefix
from tael.cache.tier import Tier
from tael.models.spec import CacheGroup
from tael.request import Request

Table: TypeAlias = "array[int]"
"""Blocks. An array, which numpy copies in no time: every step reads that of every request."""

RELEASED = -1
"""In a block table: no query looks at these positions any more."""


@dataclass(slots=True)
class _Holding:
    """The blocks of one running request."""

    tables: tuple[Table, ...]
    firsts: list[int]
    """Per group, the first entry of the table that is not released."""
    num_published: int
    """Leading blocks already offered to the prefix cache."""
    open_tables: tuple[Table, ...]
    """Per group that fills blocks in a pool of their own: those of table entries..."""
    first_open: int
    """...from this one on."""


class CacheManager:
    """Hands out the blocks of every cache group, shares complete ones between requests and
    takes them back. Complete ones outlive their place in the pools if there is a ``tier``.

    A step of a request goes ``start`` (once) or ``allocate``, then the forward pass, then
    ``publish`` and ``trim``. ``free`` ends it at any point. The caller owns
    ``num_computed_tokens``, except that ``start`` sets it to what the prefix cache holds.
    """

    def __init__(
        self,
        groups: tuple[CacheGroup, ...],
        num_blocks: tuple[int, ...],
        block_size: int,
        fingerprint: bytes,
        num_open_blocks: int = 0,
        tier: Tier | None = None,
    ) -> None:
        self.groups = groups
        self.pools = tuple(BlockPool(n) for n in num_blocks)
        self.open_pools = tuple(
            BlockPool(num_open_blocks if group.open_block_bytes else 0) for group in groups
        )
        self.block_size = block_size
        self.num_prefix_query_tokens = 0
        """Tokens of the requests that ``start`` accepted, and..."""
        self.num_prefix_hit_tokens = 0
        """...those of them that it found in the cache, and..."""
        self.num_restored_tokens = 0
        """...of these, those that came from the tier."""
        self._fingerprint = fingerprint
        self._holdings: dict[Request, _Holding] = {}
        self._offload = Offload(groups, self.pools, block_size, tier) if tier else None

    def collect(self) -> None:
        """Note what the tier has done since the last step."""
        if self._offload:
            self._offload.collect()

    def restore(self, request: Request) -> Readiness:
        """Bring back what the tier holds of a waiting request's prefix. To be called until the
        request is ready to ``start``."""
        if self._offload is None:
            return Readiness.READY
        return self._offload.restore(request, self._chain(request, self._num_reusable(request)))

    def take_restored(self) -> tuple[list[int], ...]:
        """By group, the blocks that the tier has filled since the last call; empty without one."""
        return self._offload.take_restored() if self._offload else ()

    def start(self, request: Request, num_new_tokens: Callable[[], int]) -> bool:
        """Give a request its longest cached prefix, set ``num_computed_tokens`` to that, and give
        it blocks for as many more tokens as it is then said to compute. All of it or, when the
        pools cannot provide the blocks, nothing."""
        num_hashes = self._num_reusable(request)
        hashes = self._extend_hashes(request, num_hashes)[:num_hashes]
        num_hits = longest_prefix(self.groups, self.pools, hashes, self.block_size)
        num_computed_tokens = num_hits * self.block_size

        # Hits are referenced in all groups before a block is taken in any: taking may evict.
        tables = tuple(array("i") for _ in self.groups)
        open_tables = tuple(array("i") for _ in self.groups)
        holding = _Holding(tables, [], num_hits, open_tables, num_hits)
        for group, pool, table in zip(self.groups, self.pools, holding.tables, strict=True):
            first = group.first_block(num_computed_tokens, self.block_size)
            holding.firsts.append(first)
            table.extend([RELEASED] * first)
            for hit in hashes[first:num_hits]:
                block = pool.lookup(hit)
                assert block is not None
                pool.ref(block)
                table.append(block)
        self._holdings[request] = holding

        request.num_computed_tokens = num_computed_tokens
        if not self.claim(request, num_new_tokens(), loads=False):
            self.free(request)
            request.num_computed_tokens = 0
            return False
        self.num_prefix_query_tokens += request.num_tokens
        self.num_prefix_hit_tokens += num_computed_tokens
        request.num_offered_blocks = max(request.num_offered_blocks, num_hits)
        if request.num_resident_tokens is not None:
            num_restored_tokens = max(0, num_computed_tokens - request.num_resident_tokens)
            self.num_restored_tokens += num_restored_tokens
            if request.usage.num_preemptions == 0:  # as num_cached_tokens
                request.usage.num_restored_tokens = num_restored_tokens
            request.num_resident_tokens = None
        return True

    def allocate(self, request: Request, num_new_tokens: int) -> bool:
        """Extend the block tables of a started request to hold ``num_new_tokens`` after the
        computed ones: in all groups, or False and no change."""
        holding, counts = self._holdings[request], self._num_missing(request, num_new_tokens)
        if any(n > pool.num_available for n, pool in zip(counts, self.pools, strict=True)):
            return False
        for pool, table, count in zip(self.pools, holding.tables, counts, strict=True):
            table.extend(pool.take() for _ in range(count))
        for group, pool, table in zip(
            self.groups, self.open_pools, holding.open_tables, strict=True
        ):
            if group.open_block_bytes:  # of these there are always enough
                num_open_blocks = len(holding.tables[0]) - holding.first_open
                table.extend(pool.take() for _ in range(num_open_blocks - len(table)))
        return True

    def claim(self, request: Request, num_new_tokens: int, *, loads: bool = True) -> bool:
        """As ``allocate``, and take from the tier's stores, and from its ``loads``, the blocks
        that they pin if there are no others."""
        if self._offload:
            self._offload.reclaim(self._num_missing(request, num_new_tokens), loads=loads)
        return self.allocate(request, num_new_tokens)

    def publish(self, request: Request) -> None:
        """Offer the blocks that the last step completed to other requests. Call it when their
        KV exists and ``num_computed_tokens`` says so, before ``trim``. Prompt tokens of blocks
        that the cache had not are counted in the usage, once if they are computed again."""
        holding = self._holdings[request]
        num_full = request.num_computed_tokens // self.block_size
        hashes = self._extend_hashes(request, num_full)
        num_prompt_blocks = request.num_prompt_tokens // self.block_size
        for i in range(holding.num_published, num_full):
            groups = zip(self.pools, holding.tables, strict=True)
            num_new = sum(pool.publish(table[i], hashes[i]) for pool, table in groups)
            if num_new > 0 and request.num_offered_blocks <= i < num_prompt_blocks:
                request.usage.num_cache_write_tokens += self.block_size
        holding.num_published = num_full
        request.num_offered_blocks = max(request.num_offered_blocks, num_full)

    def forget(self, group: int, blocks: Iterable[int]) -> None:
        """Let nobody find blocks whose KV is lost, and take them for other KV only when there are
        no others, cached ones included. Requests that hold them are the caller's."""
        for block in blocks:
            self.pools[group].distrust(block)

    def trim(self, request: Request) -> None:
        """Release the blocks that have left the windows: the next query of the request, at
        position ``num_computed_tokens``, and all later ones look past them. Release too the
        blocks after that position, which only rejected drafts have written to: were they kept,
        a wrong guess could cost another request its place. A block that is complete needs its
        place among the open ones no longer."""
        holding = self._holdings[request]
        num_blocks = -(-request.num_computed_tokens // self.block_size)
        self._close(holding, request.num_computed_tokens // self.block_size, num_blocks)
        for i, group in enumerate(self.groups):
            table = holding.tables[i]
            while len(table) > num_blocks:
                self.pools[i].deref(table.pop())
            first = group.first_block(request.num_computed_tokens, self.block_size)
            for j in range(holding.firsts[i], first):
                self.pools[i].deref(table[j])
                table[j] = RELEASED
            holding.firsts[i] = first

    def store(self, request: Request) -> None:
        """Let the tier keep the complete blocks of a request that is about to be freed."""
        if self._offload:
            num_published = self._holdings[request].num_published
            self._offload.store(request, self._chain(request, num_published))

    def free(self, request: Request) -> None:
        """Take back all blocks of a started request."""
        holding = self._holdings.pop(request)
        self._close(holding, len(holding.tables[0]), len(holding.tables[0]))
        for pool, table, first in zip(self.pools, holding.tables, holding.firsts, strict=True):
            # Last block first: a chain of blocks is evicted from its end, where it is shared
            # least and where a gap costs least.
            for block in reversed(table[first:]):
                pool.deref(block)

    def block_tables(self, request: Request) -> tuple[Table, ...]:
        """One table per group; entry i is the block of positions ``i * block_size`` onward, or
        RELEASED. They are the live tables: read them before the next call, do not write."""
        return self._holdings[request].tables

    def open_tables(self, request: Request) -> tuple[Table, ...]:
        """One table per group, of blocks in the pool of those that are being filled: entry i is
        that of entry ``num_computed_tokens // block_size + i`` of the block table. Empty for a
        group that has no such pool. Live, as ``block_tables``."""
        return self._holdings[request].open_tables

    def kv_bytes(self, request: Request) -> int:
        """Bytes of the blocks that a request references; a shared block counts in full."""
        holding = self._holdings[request]
        return sum(
            (len(table) - first) * group.block_bytes + len(open_table) * group.open_block_bytes
            for group, table, first, open_table in zip(
                self.groups, holding.tables, holding.firsts, holding.open_tables, strict=True
            )
        )

    def can_ever_hold(self, num_tokens: int, num_new_tokens: int) -> bool:
        """Whether empty pools hold one request on its way to ``num_tokens``, computed at most
        ``num_new_tokens`` a step."""
        return all(
            group.num_blocks(num_tokens, num_new_tokens, self.block_size) <= pool.num_blocks
            for group, pool in zip(self.groups, self.pools, strict=True)
        )

    @property
    def num_free(self) -> int:
        """Blocks of all groups."""
        return sum(pool.num_free for pool in self.pools)

    @property
    def num_cached(self) -> int:
        return sum(pool.num_cached for pool in self.pools)

    @property
    def num_referenced(self) -> int:
        return sum(pool.num_referenced for pool in self.pools)

    @property
    def pool_bytes(self) -> int:
        """Of the blocks of all pools, and..."""
        return self._bytes(lambda pool: pool.num_blocks)

    @property
    def referenced_bytes(self) -> int:
        """...of those that requests or transfers hold, and..."""
        return self._bytes(lambda pool: pool.num_referenced)

    @property
    def cached_bytes(self) -> int:
        """...of those that nobody holds and the prefix cache offers."""
        return self._bytes(lambda pool: pool.num_cached)

    def check(self) -> None:
        """Assert every invariant of the pools, and that references are what tables and
        transfers say."""
        for i, pool in enumerate(self.pools):
            pool.check()
            ref_counts = [0] * pool.num_blocks
            for holding in self._holdings.values():
                table, first = holding.tables[i], holding.firsts[i]
                assert all(block == RELEASED for block in table[:first])
                for block in table[first:]:
                    ref_counts[block] += 1
            for group, block in self._offload.pins() if self._offload else ():
                if group == i:
                    ref_counts[block] += 1
            assert ref_counts == [pool.ref_count(b) for b in range(pool.num_blocks)]
        for i, pool in enumerate(self.open_pools):
            pool.check()
            tables = [holding.open_tables[i] for holding in self._holdings.values()]
            assert pool.num_referenced == sum(map(len, tables)) == len(set(chain(*tables)))

    def _bytes(self, num_blocks: Callable[[BlockPool], int]) -> int:
        return sum(
            num_blocks(pool) * group.block_bytes + num_blocks(open_pool) * group.open_block_bytes
            for group, pool, open_pool in zip(self.groups, self.pools, self.open_pools, strict=True)
        )

    def _close(self, holding: _Holding, first: int, end: int) -> None:
        """Give back the open blocks before table entry ``first`` and from ``end`` on."""
        for pool, table in zip(self.open_pools, holding.open_tables, strict=True):
            closed = table[: first - holding.first_open] + table[end - holding.first_open :]
            del table[end - holding.first_open :], table[: first - holding.first_open]
            for block in closed:
                pool.deref(block)
        holding.first_open = first

    def _num_reusable(self, request: Request) -> int:
        """Blocks that a request may read instead of computing. A hit leaves a token to compute: the
        logits after the last one are what is asked for. Those of a prompt are in no cache."""
        if request.wants_prompt_logits:
            return 0
        return (request.num_tokens - 1) // self.block_size

    def _num_missing(self, request: Request, num_new_tokens: int) -> list[int]:
        """Per group, the blocks that its table lacks to hold ``num_new_tokens`` more."""
        num_blocks = -(-(request.num_computed_tokens + num_new_tokens) // self.block_size)
        return [max(0, num_blocks - len(table)) for table in self._holdings[request].tables]

    def _chain(self, request: Request, num_blocks: int) -> list[bytes]:
        """The root and the identities of the first ``num_blocks`` blocks."""
        root = root_hash(self._fingerprint, request.cache_salt)
        return [root, *self._extend_hashes(request, num_blocks)[:num_blocks]]

    def _extend_hashes(self, request: Request, num_blocks: int) -> list[bytes]:
        """The identities of at least the first ``num_blocks`` blocks. They stay with the
        request, so each is computed once, preemption included."""
        hashes = request.block_hashes
        for i in range(len(hashes), num_blocks):
            parent = hashes[-1] if hashes else root_hash(self._fingerprint, request.cache_salt)
            start = i * self.block_size
            hashes.append(block_hash(parent, request.token_ids[start : start + self.block_size]))
        return hashes
