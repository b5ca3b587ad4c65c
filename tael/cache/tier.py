"""What a tier below the pools promises: a larger and slower place for complete blocks.

A transfer has three moments. *Prepare* names the blocks; from then on the caller keeps a
reference to each (they are pinned), so nobody else gets or writes them. The tier then moves the
bytes in its own time. *Complete* hands the transfers back, and the caller drops the references.
What has not begun to move can be cancelled at any moment, without waiting for the tier.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


class Lookup(enum.Enum):
    HIT = "hit"
    MISS = "miss"
    PENDING = "pending"
    """On its way into the tier or out of it: ask again."""


@dataclass(frozen=True, slots=True, eq=False)
class Transfer:
    """One block of one cache group, and all that says what must be in it. Equal only to
    itself, since each holds a reference of its own."""

    group: int
    block: int
    """Of the group's pool."""
    block_hash: bytes
    parent: bytes
    """The hash of the block before, or the root of the chain."""
    token_ids: tuple[int, ...]

    @property
    def key(self) -> bytes:
        return block_key(self.group, self.block_hash)


def block_key(group: int, block_hash: bytes) -> bytes:
    """The name of a block in a tier: groups keep different bytes of the same tokens."""
    return block_hash + bytes([group])


@dataclass(eq=False, slots=True)
class Load:
    """Blocks that are wanted together, in the order in which they are useful."""

    transfers: tuple[Transfer, ...]
    num_tokens: int
    """That need not be computed then."""
    num_loaded: int = 0
    """Of them, from the first, those whose verified bytes are in their blocks. The rest could not
    be had."""


class Tier(Protocol):
    """Called from the engine's thread only. No method waits for the device but ``wait`` and
    ``close``, and none raises because of it: what cannot be read is a miss."""

    def lookup(self, key: bytes) -> Lookup:
        """Where a block is."""

    def load_pays(self, num_bytes: int, num_tokens: int) -> bool:
        """Whether loading is expected to be faster than computing the tokens again."""

    def forgive(self) -> None:
        """A request did without loading, which would not have paid: think a little better of
        loading, so that it is tried, and measured, again once in a while."""

    def prepare_load(self, load: Load) -> None:
        """Begin to fill the blocks of ``load``, which are pinned."""

    def complete_load(self) -> list[Load]:
        """The loads that have ended since the last call."""

    def cancel_load(self, load: Load) -> None:
        """Give up a load that has not ended: no block of it is written any more."""

    def prepare_store(self, chain: Sequence[bytes], transfers: Sequence[Transfer]) -> None:
        """Begin to keep ``transfers``, whose blocks are pinned. ``chain`` has the keys of the whole
        sequence, from its first block; all were used just now."""

    def complete_store(self) -> list[Transfer]:
        """The stores since the last call that no longer need their block: it was copied, or given
        up."""

    def cancel_store(self, group: int, max_num_blocks: int) -> list[Transfer]:
        """Give up blocks of a group that are not copied yet, the last of all first. They are not
        handed back again."""

    def observe_prefill(self, num_tokens: int, elapsed_s: float) -> None:
        """Tell how fast tokens are computed, for ``load_pays``."""

    def wait(self, timeout_s: float) -> None:
        """Return when a load has ended, or after ``timeout_s``."""

    def close(self) -> None:
        """Finish storing and stop."""
