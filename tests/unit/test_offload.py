"""What moves between pools and a tier, with a tier that does nothing by itself."""

from __future__ import annotations

from collections.abc import Sequence

from tael.cache.manager import CacheManager
from tael.cache.offload import Readiness
from tael.cache.tier import Load, Lookup, Transfer
from tael.models.spec import CacheGroup
from tael.request import Request, SamplingParams

BLOCK = 4
GROUP = CacheGroup(layers=(0,), window=None, block_bytes=100, open_block_bytes=0)


class IdleTier:
    """Has everything that is in ``kept``. Its transfers wait until a test ends them."""

    def __init__(self) -> None:
        self.kept: set[bytes] = set()
        self.pays = True
        self.num_forgiven = 0
        self.loads: list[Load] = []
        self.ended: list[Load] = []
        self.stores: list[Transfer] = []

    def lookup(self, key: bytes) -> Lookup:
        return Lookup.HIT if key in self.kept else Lookup.MISS

    def load_pays(self, num_bytes: int, num_tokens: int) -> bool:
        return self.pays

    def forgive(self) -> None:
        self.num_forgiven += 1

    def prepare_load(self, load: Load) -> None:
        self.loads.append(load)

    def complete_load(self) -> list[Load]:
        ended, self.ended = self.ended, []
        return ended

    def cancel_load(self, load: Load) -> None:
        self.loads.remove(load)

    def prepare_store(self, chain: Sequence[bytes], transfers: Sequence[Transfer]) -> None:
        self.stores += transfers

    def complete_store(self) -> list[Transfer]:
        return []

    def cancel_store(self, group: int, max_num_blocks: int) -> list[Transfer]:
        cancelled = self.stores[-max_num_blocks:] if self.stores else []
        del self.stores[len(self.stores) - len(cancelled) :]
        return cancelled

    def observe_prefill(self, num_tokens: int, elapsed_s: float) -> None: ...

    def wait(self, timeout_s: float) -> None: ...

    def close(self) -> None: ...


def manager_of(num_blocks: int) -> tuple[CacheManager, IdleTier]:
    tier = IdleTier()
    return CacheManager((GROUP,), (num_blocks,), BLOCK, b"model", 0, tier), tier


def request_of(name: str, first: int, num_tokens: int) -> Request:
    """With tokens from ``first`` on."""
    token_ids = list(range(first, first + num_tokens))
    return Request(name, token_ids, SamplingParams(max_tokens=1))


def start(manager: CacheManager, request: Request) -> bool:
    return manager.start(request, lambda: request.num_tokens - request.num_computed_tokens)


def compute(manager: CacheManager, request: Request) -> None:
    assert start(manager, request)
    request.num_computed_tokens = request.num_tokens
    manager.publish(request)


def end(manager: CacheManager, request: Request) -> None:
    manager.store(request)
    manager.free(request)


def keep_all(manager: CacheManager, tier: IdleTier, request: Request) -> None:
    """Let the tier alone have the prefix of a request."""
    compute(manager, request)
    end(manager, request)
    tier.kept |= {transfer.key for transfer in tier.stores}
    num_blocks = manager.pools[0].num_blocks
    other = request_of("other", 1000, num_blocks * BLOCK)
    compute(manager, other)  # which evicts all others
    manager.free(other)
    manager.forget(0, [])
    assert all(manager.pools[0].lookup(t.block_hash) is None for t in tier.loads)


def test_a_waiting_request_is_forgiven_once() -> None:
    manager, tier = manager_of(8)
    keep_all(manager, tier, request_of("a", 0, 4 * BLOCK + 1))
    tier.pays = False
    again = request_of("b", 0, 4 * BLOCK + 1)
    for _ in range(100):
        assert manager.restore(again) is Readiness.READY
    assert tier.num_forgiven == 1
    manager.restore(request_of("c", 0, 4 * BLOCK + 1))
    assert tier.num_forgiven == 2


def test_nothing_is_loaded_into_doubtful_blocks() -> None:
    """Nobody would find it there, and the request would wait for it again and again."""
    manager, tier = manager_of(8)
    keep_all(manager, tier, request_of("a", 0, 4 * BLOCK + 1))
    again = request_of("b", 0, 4 * BLOCK + 1)
    manager.forget(0, range(4))
    assert manager.restore(again) is Readiness.PENDING, "there are four others"
    manager.collect()
    tier.ended, tier.loads[0].num_loaded = [tier.loads[0]], 4
    manager.collect()
    assert manager.restore(again) is Readiness.READY
    manager.forget(0, range(8))
    assert manager.restore(again) is Readiness.READY, "it computes"
    assert len(tier.loads) == 1
    manager.check()


def test_stores_are_cancelled_until_there_is_room() -> None:
    """The last of them may be of blocks that others hold too."""
    manager, tier = manager_of(5)
    first, second = request_of("a", 0, 2 * BLOCK), request_of("b", 100, 2 * BLOCK)
    for request in (first, second):
        compute(manager, request)
        end(manager, request)
    assert len(tier.stores) == 4
    again = request_of("c", 100, 2 * BLOCK + 1)  # has the blocks of b, and one more
    compute(manager, again)
    assert manager.pools[0].num_available == 0
    needs_one = request_of("d", 200, 2 * BLOCK)
    assert start(manager, needs_one), "both blocks of a"
    manager.check()
