"""Which blocks of one cache group are free, cached or referenced."""

from __future__ import annotations


class BlockPool:
    """A fixed number of blocks. Each one is

    - *referenced*: at least one request holds it (``ref_count`` above 0);
    - *cached*: nobody holds it, but its KV is complete and published under a hash, so that it
      can be found again until it is evicted, the least recently used first;
    - *free*: neither.

    A block whose content was lost once is *doubtful* from then on, since its place may be bad: it
    is taken when there is no other, and what is written to it is not found by others once its
    last reference is gone.

    Every operation takes constant time.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        # A stack: what was used last is taken first, so untouched memory stays untouched.
        self._free = list(reversed(range(num_blocks)))
        self._cached: dict[int, None] = {}  # insertion order is the order of last use
        self._doubtful: set[int] = set()
        self._free_doubtful: list[int] = []
        self._ref_counts = [0] * num_blocks
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._published: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        return len(self._free) + len(self._free_doubtful)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_referenced(self) -> int:
        return self.num_blocks - self.num_free - self.num_cached

    @property
    def num_available(self) -> int:
        """Blocks that ``take`` can hand out."""
        return self.num_free + self.num_cached

    @property
    def num_trusted(self) -> int:
        """Of these, the ones that are not doubtful, which are taken first."""
        return len(self._free) + self.num_cached

    def ref_count(self, block: int) -> int:
        return self._ref_counts[block]

    def lookup(self, block_hash: bytes) -> int | None:
        """The block published under a hash."""
        return self._published.get(block_hash)

    def has(self, block_hash: bytes) -> bool:
        return block_hash in self._published

    def take(self) -> int:
        """A block for new KV with one reference: a free one, else the least recently used
        cached one, whose content is forgotten, else a doubtful one. Ask ``num_available`` first."""
        if self._free:
            block = self._free.pop()
        elif not self._cached:
            block = self._free_doubtful.pop()
        else:
            block = next(iter(self._cached))
            del self._cached[block]
            evicted = self._hashes[block]
            assert evicted is not None
            del self._published[evicted]
            self._hashes[block] = None
        self._ref_counts[block] = 1
        return block

    def ref(self, block: int) -> None:
        """Add a reference to a cached or referenced block."""
        self._cached.pop(block, None)
        self._ref_counts[block] += 1

    def deref(self, block: int) -> None:
        """Drop a reference. With the last one the block becomes cached, or free if it was
        never published."""
        self._ref_counts[block] -= 1
        if self._ref_counts[block] == 0:
            if block in self._doubtful:
                self._unpublish(block)
                self._free_doubtful.append(block)
            elif self._hashes[block] is None:
                self._free.append(block)
            else:
                self._cached[block] = None

    def publish(self, block: int, block_hash: bytes) -> bool:
        """Let a referenced block, now complete, be found under its hash. If another block is
        already published under it, that one stays, this one remains private and the answer is
        False."""
        if block_hash in self._published:
            return False
        self._published[block_hash] = block
        self._hashes[block] = block_hash
        return True

    def distrust(self, block: int) -> None:
        """Let a block be found no more, whose content is lost, and doubt it from now on. Linear in
        the number of blocks."""
        self._unpublish(block)
        if block in self._doubtful:
            return
        self._doubtful.add(block)
        if self._ref_counts[block] == 0:
            if block in self._cached:
                del self._cached[block]
            else:
                self._free.remove(block)
            self._free_doubtful.append(block)

    def _unpublish(self, block: int) -> None:
        block_hash = self._hashes[block]
        if block_hash is not None:
            del self._published[block_hash]
            self._hashes[block] = None

    def check(self) -> None:
        """Assert every invariant; linear in the number of blocks."""
        free, cached = {*self._free, *self._free_doubtful}, set(self._cached)
        referenced = {b for b, count in enumerate(self._ref_counts) if count > 0}
        assert min(self._ref_counts, default=0) >= 0, "negative ref_count"
        assert len(free) == self.num_free, "a block is free twice"
        assert set(self._free_doubtful) == self._doubtful & free, "a doubtful block is among others"
        assert free | cached | referenced == set(range(self.num_blocks)), "a block is lost"
        assert self.num_free + self.num_cached + len(referenced) == self.num_blocks
        hashed = {h: b for b, h in enumerate(self._hashes) if h is not None}
        assert hashed == self._published, "hashes and blocks disagree"
        assert cached <= set(hashed.values()), "a cached block has no hash"
        assert not cached & self._doubtful, "a doubtful block is cached"
        assert not free & set(hashed.values()), "a free block has a hash"
