"""Whatever the disk does, the tokens are those of an engine without one."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from byte_llama import save_byte_llama
from disk_engines import FaultyFiles, assert_same, install, make_engine, prompts, run

from tael.cache.tier import Transfer
from tael.llm import RequestOutput
from tael.loader.prepared import PreparedModel, load_prepared
from tael.memory.tiers import block_file
from tael.memory.tiers.disk import DiskTier
from tael.memory.tiers.files import PAGE, Files, aligned_buffer
from tael.server.engine_process import EngineLoop

PROMPTS = prompts(4)

READ_SITES = ["open", "pread"]
WRITE_SITES = ["open", "pwrite", "fsync", "rename", "touch"]
ERRORS = ["EIO", "ENOSPC"]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> PreparedModel:
    path = tmp_path_factory.mktemp("model")
    save_byte_llama(path, head_dim=16)
    return load_prepared(path)


@pytest.fixture(scope="session")
def cold(model: PreparedModel) -> list[RequestOutput]:
    return run(make_engine(model, None), PROMPTS)


def lives(
    model: PreparedModel, folder: Path, cold: list[RequestOutput], cache_bytes: int = 64 << 20
) -> DiskTier:
    """An engine's life: all prompts, with the right tokens. Returns its tier, closed."""
    engine = make_engine(model, folder, cache_bytes=cache_bytes)
    assert_same(run(engine, PROMPTS), cold)
    engine.close()
    assert engine.tier is not None
    engine.manager.collect()
    assert engine.manager.num_referenced == 0, "a transfer keeps its pins"
    return engine.tier


def test_without_faults(model: PreparedModel, cold: list[RequestOutput], tmp_path: Path) -> None:
    assert lives(model, tmp_path, cold).counters.num_stored_blocks > 8
    second = lives(model, tmp_path, cold).counters
    assert second.num_loaded_blocks > 8
    faults = {k: v for k, v in asdict(second).items() if "stored" not in k and "loaded" not in k}
    assert not any(faults.values()), faults


@pytest.mark.parametrize("count", [1, 10**9], ids=["once", "always"])
@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("site", WRITE_SITES)
def test_a_write_that_fails(
    site: str,
    error: str,
    count: int,
    model: PreparedModel,
    cold: list[RequestOutput],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files = FaultyFiles(site, error, first=2, count=count)
    with monkeypatch.context() as patch:
        install(patch, files)
        tier = lives(model, tmp_path, cold)
    assert files.num_faults and tier.counters.num_io_errors
    # Writes have a second chance; the order of eviction is not worth a tier.
    assert (tier.failure is None) == (count == 1 or site == "touch")
    assert not list(tmp_path.glob("*.part"))
    assert lives(model, tmp_path, cold).counters.num_loaded_blocks > 0, "what was whole is found"


def test_operators_see_that_a_disk_was_given_up(
    model: PreparedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, FaultyFiles("fsync", "EIO", first=2))
    engine = make_engine(model, tmp_path)
    tiers_of = partial(EngineLoop._tiers, SimpleNamespace(_engine=engine))  # type: ignore[arg-type]
    memory, on_disk = tiers_of()
    assert memory.capacity_bytes > 0 and on_disk.capacity_bytes > 0
    run(engine, PROMPTS)
    engine.close()
    _, on_disk = tiers_of()
    assert (on_disk.name, on_disk.capacity_bytes, on_disk.cached_bytes) == ("disk", 0, 0)
    assert on_disk.num_io_errors > 0


@pytest.mark.parametrize("count", [1, 10**9], ids=["once", "always"])
@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("site", READ_SITES)
def test_a_read_that_fails(
    site: str,
    error: str,
    count: int,
    model: PreparedModel,
    cold: list[RequestOutput],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lives(model, tmp_path, cold)
    files = FaultyFiles(site, error, first=1, count=count)
    install(monkeypatch, files)
    tier = lives(model, tmp_path, cold)
    assert files.num_faults and tier.counters.num_io_errors
    assert (tier.failure is None) == (count == 1)


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("site", ["list", "unlink"])
def test_a_folder_that_cannot_be_kept(
    site: str,
    error: str,
    model: PreparedModel,
    cold: list[RequestOutput],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Scanning fails, or evicting does: the tier is off, and the engine is not."""
    lives(model, tmp_path, cold)
    (tmp_path / f"{66 * '0'}.kv.part").write_bytes(b"left by a crash")
    install(monkeypatch, FaultyFiles(site, error))
    tier = lives(model, tmp_path, cold)
    assert tier.failure is not None and tier.counters.num_io_errors == 1


@pytest.mark.parametrize(
    ("site", "fault", "counter"),
    [
        ("pread", "short", "num_loaded_blocks"),  # the system may do that: the rest follows
        ("pread", "end", "num_corrupt_blocks"),
        ("pread", "flip", "num_corrupt_blocks"),
    ],
)
@pytest.mark.parametrize("first", range(3))
def test_a_read_that_lies(
    site: str,
    fault: str,
    counter: str,
    first: int,
    model: PreparedModel,
    cold: list[RequestOutput],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lives(model, tmp_path, cold)
    num_files = len(list(tmp_path.glob("*.kv")))
    files = FaultyFiles(site, fault, first)
    install(monkeypatch, files)
    tier = lives(model, tmp_path, cold)
    assert files.num_faults and getattr(tier.counters, counter)
    assert tier.failure is None
    assert len(list(tmp_path.glob("*.kv"))) == num_files, "bad files are removed, and stored again"


@pytest.mark.parametrize(
    ("site", "fault"), [("pwrite", "short"), ("pwrite", "flip"), ("rename", "truncate")]
)
@pytest.mark.parametrize("first", range(3))
def test_a_write_that_lies(
    site: str,
    fault: str,
    first: int,
    model: PreparedModel,
    cold: list[RequestOutput],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files = FaultyFiles(site, fault, first)
    with monkeypatch.context() as patch:
        install(patch, files)
        lives(model, tmp_path, cold)
    assert files.num_faults
    counters = lives(model, tmp_path, cold).counters
    assert bool(counters.num_corrupt_blocks) == (fault != "short")


FIELDS = ["family", "spec", "block_size", "budgets", "layout", "weights", "isa", "kernels", "libc"]


@pytest.mark.parametrize(
    "field",
    [*FIELDS, "group", "block_hash", "parent", "token_ids", "payload_bytes", "version"],
)
def test_a_whole_file_of_something_else(
    field: str, model: PreparedModel, cold: list[RequestOutput], tmp_path: Path
) -> None:
    """Every file is replaced by a sound one that differs in one field of its header."""
    lives(model, tmp_path, cold)
    for path in tmp_path.glob("*.kv"):
        rewrite(path, field)
    tier = lives(model, tmp_path, cold)
    assert tier.counters.num_loaded_blocks == 0
    if field == "version":
        assert tier.counters.num_corrupt_blocks
    else:
        assert tier.counters.num_mismatched_blocks
    assert lives(model, tmp_path, cold).counters.num_loaded_blocks > 0


def rewrite(path: Path, field: str) -> None:
    buffer = aligned_buffer(path.stat().st_size)
    Files().read(path, buffer)
    header = block_file.read_header(buffer)
    transfer = Transfer(header.group, 0, header.block_hash, header.parent, header.token_ids)
    fingerprint, payload_bytes = header.fingerprint, header.payload_bytes
    assert set(fingerprint) == set(FIELDS)
    if field in fingerprint:
        fingerprint = {**fingerprint, field: fingerprint[field] + "x"}
    elif field == "token_ids":
        transfer = replace(transfer, token_ids=(*header.token_ids[:-1], 41))
    elif field == "group":
        transfer = replace(transfer, group=1)
    elif field == "payload_bytes":
        payload_bytes -= 1
    elif field != "version":
        transfer = replace(transfer, **{field: bytes(32)})
    content = buffer.copy()
    block_file.seal(buffer, fingerprint, transfer, payload_bytes)
    buffer[PAGE:] = content[PAGE:]
    if field == "version":
        buffer[6] += 1
    buffer[8:40] = list(block_file._checksum(buffer))
    Files().write(path, buffer)


def test_a_file_that_is_gone(
    model: PreparedModel, cold: list[RequestOutput], tmp_path: Path
) -> None:
    """Somebody clears the folder while an engine has it."""
    lives(model, tmp_path, cold)
    engine = make_engine(model, tmp_path)
    for path in tmp_path.glob("*.kv"):
        path.unlink()
    assert_same(run(engine, PROMPTS), cold)
    engine.close()
    assert engine.tier is not None and engine.tier.failure is None
    assert engine.tier.counters.num_missing_blocks and not engine.tier.counters.num_loaded_blocks


def test_headers_that_cannot_be_parsed() -> None:
    """For listings, which do not verify."""
    page = aligned_buffer(PAGE)
    for text in [b"", b"[" * 4000, b"{}", b'{"fingerprint": 1}', json.dumps([1]).encode(), b"\xff"]:
        data = block_file.MAGIC + bytes(32) + len(text).to_bytes(4, "little") + text
        page[:] = list(data.ljust(PAGE, b"\0"))
        with pytest.raises(block_file.CorruptError):
            block_file.read_header(page)
