"""A folder of blocks as a whole: listed, verified and emptied. For a person, not for an engine, but
one may be using it meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tael.errors import TaelError
from tael.memory.tiers import block_file
from tael.memory.tiers.block_file import BadBlockError, CorruptError
from tael.memory.tiers.files import PAGE, Files, aligned_buffer


@dataclass(slots=True)
class Section:
    """The blocks of one fingerprint."""

    fingerprint: dict[str, str]
    num_blocks: int = 0
    num_tokens: int = 0
    """Of the first cache group, so that none counts twice. One that several sequences begin with
    is there once."""
    num_bytes: int = 0
    last_used_ns: int = 0


def sections(folder: Path) -> list[Section]:
    """By last use, the latest first. Files whose header cannot be read are left out."""
    files, page = Files(), aligned_buffer(PAGE)
    found: dict[str, Section] = {}
    for path, _, num_bytes, time_ns in _blocks(files, folder):
        try:
            if files.read(path, page) < PAGE:
                continue
            header = block_file.read_header(page)
        except (OSError, BadBlockError):
            continue
        section = found.setdefault(repr(header.fingerprint), Section(header.fingerprint))
        section.num_blocks += 1
        section.num_tokens += len(header.token_ids) if header.group == 0 else 0
        section.num_bytes += num_bytes
        section.last_used_ns = max(section.last_used_ns, time_ns)
    return sorted(found.values(), key=lambda section: -section.last_used_ns)


def verify(folder: Path, report: Callable[[Path, str], None]) -> tuple[int, int]:
    """Read all files and remove those that are not the block of their name, after ``report``ing
    why; one that cannot be read is reported only. Returns how many were right and how many not."""
    files = Files()
    num_right = num_wrong = 0
    for path, key, num_bytes, _ in _blocks(files, folder):
        buffer = aligned_buffer(max(num_bytes, PAGE))
        try:
            if num_bytes % PAGE or files.read(path, buffer) < len(buffer):
                raise CorruptError("the file is cut off")
            block_file.check_alone(buffer, key)
            num_right += 1
        except FileNotFoundError:
            continue  # evicted meanwhile
        except OSError as error:
            report(path, f"cannot be read: {error.strerror}; left alone")
            num_wrong += 1
        except BadBlockError as error:
            report(path, f"{error}; removed")
            files.unlink(path)
            num_wrong += 1
    return num_right, num_wrong


def clear(folder: Path) -> tuple[int, int]:
    """Remove all blocks, and what a killed process has written of others. Returns how many there
    were, and their bytes."""
    files = Files()
    num_blocks = num_bytes = 0
    for name, size, _ in _list(files, folder):
        if block_file.parse_file_name(name) or block_file.is_part(name):
            files.unlink(folder / name)
            num_blocks, num_bytes = num_blocks + 1, num_bytes + size
    return num_blocks, num_bytes


def _blocks(files: Files, folder: Path) -> Iterator[tuple[Path, bytes, int, int]]:
    """(path, key, bytes, time of last use in ns)"""
    for name, num_bytes, time_ns in _list(files, folder):
        if key := block_file.parse_file_name(name):
            yield folder / name, key, num_bytes, time_ns


def _list(files: Files, folder: Path) -> list[tuple[str, int, int]]:
    try:
        return files.list(folder)
    except OSError as error:
        raise TaelError(f"cannot list {folder}: {error.strerror}; check the path.") from error
