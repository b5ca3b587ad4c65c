"""The identity of a full block: a SHA-256 chain over everything its KV depends on.

The KV of a block depends on the model and on every token up to the block's end, so a block's
hash covers its own tokens and the hash of the block before it. Being a cryptographic hash of
values, and not of Python objects, it means the same in every process and on disk, and one
tenant cannot construct another's.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence


def root_hash(fingerprint: bytes, cache_salt: str) -> bytes:
    """The parent of every first block. ``fingerprint`` stands for all that shapes the KV of a
    given token sequence: weights, RoPE settings, KV format."""
    return hashlib.sha256(hashlib.sha256(fingerprint).digest() + cache_salt.encode()).digest()


def block_hash(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """The identity of the block that holds ``token_ids`` after the block ``parent``."""
    return hashlib.sha256(parent + struct.pack(f"<{len(token_ids)}i", *token_ids)).digest()
