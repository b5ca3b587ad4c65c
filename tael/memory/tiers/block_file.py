"""One KV block as a file.

    bytes 0-7       "TAELKV" and the version of this layout
    bytes 8-39      BLAKE3 of all that follows
    bytes 40-43     length of the header, little-endian
    header          JSON: the fingerprint, the identity of the block, the size of the payload
    from byte 4096  the payload, padded to a whole page

The header of a block can be computed from what is asked for. So a reader does not interpret what it
finds: it compares all of it, byte for byte, with what must be there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from blake3 import blake3

from tael.cache.block_hash import block_hash
from tael.cache.tier import Transfer, block_key
from tael.memory.tiers.files import PAGE, PART_SUFFIX, Bytes, round_up

FORMAT_VERSION = 1
MAGIC = b"TAELKV" + FORMAT_VERSION.to_bytes(2, "little")
SUFFIX = ".kv"
_CHECKSUM_END = 40
_JSON_START = 44


class BadBlockError(Exception):
    """The file is not what its name says."""


class CorruptError(BadBlockError):
    """It is not what was written."""


class MismatchError(BadBlockError):
    """It is whole, and of another block, model or machine."""


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says of itself."""

    fingerprint: dict[str, str]
    group: int
    block_hash: bytes
    parent: bytes
    token_ids: tuple[int, ...]
    payload_bytes: int


def file_name(key: bytes) -> str:
    return key.hex() + SUFFIX


def parse_file_name(name: str) -> bytes | None:
    """The key of a block; None if the file is not one."""
    stem = name.removesuffix(SUFFIX)
    if stem == name or len(stem) != 66 or not set(stem) <= set("0123456789abcdef"):
        return None
    return bytes.fromhex(stem)


def is_part(name: str) -> bool:
    """Of the file of a block that is not whole yet."""
    stem = name.removesuffix(PART_SUFFIX)
    return stem != name and parse_file_name(stem) is not None


def file_bytes(payload_bytes: int) -> int:
    return PAGE + round_up(payload_bytes)


def payload(buffer: Bytes, payload_bytes: int) -> Bytes:
    """The part of a file's bytes that is the block."""
    return buffer[PAGE : PAGE + payload_bytes]


def seal(
    buffer: Bytes, fingerprint: Mapping[str, str], transfer: Transfer, payload_bytes: int
) -> None:
    """Make ``buffer``, which has the payload in its place, the file of a block."""
    buffer[:PAGE] = _array(_page(fingerprint, transfer, payload_bytes))
    buffer[PAGE + payload_bytes :] = 0
    buffer[8:_CHECKSUM_END] = _array(_checksum(buffer))


def check(
    buffer: Bytes, fingerprint: Mapping[str, str], transfer: Transfer, payload_bytes: int
) -> None:
    """Raise BadBlockError unless ``buffer`` is exactly the file that ``seal`` makes for this block
    of this model, with the payload of that time."""
    _check_checksum(buffer)
    expected = _page(fingerprint, transfer, payload_bytes)
    if buffer[_CHECKSUM_END:PAGE].tobytes() != expected[_CHECKSUM_END:]:
        raise MismatchError("the header is of another block or fingerprint")


def check_alone(buffer: Bytes, key: bytes) -> None:
    """Raise BadBlockError unless ``buffer`` is a whole file and the block that its name says."""
    _check_checksum(buffer)
    header = read_header(buffer)
    if (
        block_hash(header.parent, header.token_ids) != header.block_hash
        or block_key(header.group, header.block_hash) != key
    ):
        raise MismatchError("the name is of another block")


def read_header(page: Bytes) -> Header:
    """Parse the first page of a file, unverified: for listings. Raises CorruptError."""
    length = int.from_bytes(page[_CHECKSUM_END:_JSON_START].tobytes(), "little")
    try:
        if page[:8].tobytes() != MAGIC:
            raise ValueError("not a block")
        data: Any = json.loads(page[_JSON_START : _JSON_START + length].tobytes())
        return Header(
            fingerprint={str(name): str(value) for name, value in data["fingerprint"].items()},
            group=int(data["group"]),
            block_hash=bytes.fromhex(data["block_hash"]),
            parent=bytes.fromhex(data["parent"]),
            token_ids=tuple(map(int, data["token_ids"])),
            payload_bytes=int(data["payload_bytes"]),
        )
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptError("the header cannot be read") from error


def _page(fingerprint: Mapping[str, str], transfer: Transfer, payload_bytes: int) -> bytes:
    """The first page of a file, without its checksum."""
    header = {
        "fingerprint": dict(fingerprint),
        "group": transfer.group,
        "block_hash": transfer.block_hash.hex(),
        "parent": transfer.parent.hex(),
        "token_ids": transfer.token_ids,
        "payload_bytes": payload_bytes,
    }
    text = json.dumps(header, sort_keys=True).encode()
    page = MAGIC + bytes(32) + len(text).to_bytes(4, "little") + text
    if len(page) > PAGE:
        raise ValueError(f"a header of {len(text)} bytes does not fit a page")
    return page.ljust(PAGE, b"\0")


def _array(data: bytes) -> Bytes:
    return np.frombuffer(data, np.uint8)


def _checksum(buffer: Bytes) -> bytes:
    return blake3(buffer[_CHECKSUM_END:].data).digest()


def _check_checksum(buffer: Bytes) -> None:
    if buffer[:8].tobytes() != MAGIC or buffer[8:_CHECKSUM_END].tobytes() != _checksum(buffer):
        raise CorruptError("the checksum is wrong")
