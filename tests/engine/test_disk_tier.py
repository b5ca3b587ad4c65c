"""Prefixes that outlive their engine, and requests that wait for them."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from byte_llama import save_byte_llama
from disk_engines import (
    PARAMS,
    FaultyFiles,
    assert_same,
    engine_of,
    install,
    make_engine,
    make_tiered_engine,
    prompts,
    run,
    run_one,
)
from random_models import RandomCheckpoint, random_cpu_backend, random_spec

from tael import LLM, TaelError
from tael.config import BLOCK_SIZE
from tael.engine.engine import Engine, OutputDelta
from tael.llm import RequestOutput, gathered
from tael.loader.prepared import PreparedModel, load_prepared
from tael.memory.tiers import policy
from tael.memory.tiers.disk import DiskTier
from tael.memory.tiers.files import Files
from tael.memory.tiers.folder import clear, sections, verify

PROMPTS = prompts(6)
FILE_BYTES = 3 * 4096
"""Of a block of the tiny model."""


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> PreparedModel:
    path = tmp_path_factory.mktemp("model")
    save_byte_llama(path, head_dim=16)
    return load_prepared(path)


@pytest.fixture(scope="session")
def cold(model: PreparedModel) -> list[RequestOutput]:
    return run(make_engine(model, None), PROMPTS)


class SlowFiles(Files):
    """Reads wait for ``go``."""

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Event()

    def pread(self, fd: int, buffer: memoryview, offset: int) -> int:
        assert self.go.wait(60)
        return super().pread(fd, buffer, offset)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[SlowFiles]:
    files = SlowFiles()
    install(monkeypatch, files)
    yield files
    files.go.set()


def tier_of(engine: Engine) -> DiskTier:
    assert engine.tier is not None
    return engine.tier


def test_another_engine_goes_on(
    model: PreparedModel, cold: list[RequestOutput], tmp_path: Path
) -> None:
    first = make_engine(model, tmp_path)
    assert_same(run(first, PROMPTS), cold)
    first.close()
    second = make_engine(model, tmp_path)
    outputs = run(second, PROMPTS)
    second.close()
    assert_same(outputs, cold)
    whole = [(len(p) - 1) // BLOCK_SIZE * BLOCK_SIZE for p in PROMPTS]
    assert [o.usage.num_cached_tokens for o in outputs] == whole
    # Every second prompt finds the 64 tokens of the one before in memory.
    restored = [n - 64 * (i % 2) for i, n in enumerate(whole)]
    assert [o.usage.num_restored_tokens for o in outputs] == restored
    assert second.manager.num_restored_tokens == sum(restored)
    assert tier_of(second).counters.num_stored_blocks == 0, "all of it is there"


def test_memory_too_small_for_two(
    model: PreparedModel, cold: list[RequestOutput], tmp_path: Path
) -> None:
    """Every request evicts the blocks of the one before, and finds its own on disk."""
    engine = make_engine(model, tmp_path, num_blocks=9)
    assert_same(run(engine, PROMPTS), cold)
    settle(engine)
    outputs = run(engine, PROMPTS)
    assert_same(outputs, cold)
    assert sum(o.usage.num_restored_tokens for o in outputs) > 300
    engine.close()


def test_live_blocks_on_disk_too(
    model: PreparedModel, cold: list[RequestOutput], tmp_path: Path
) -> None:
    """Idle prefixes go from one file to another, and back."""
    first = make_tiered_engine(model, tmp_path, tmp_path / "idle")
    outputs = run(first, PROMPTS)
    first.close()
    second = make_tiered_engine(model, tmp_path, tmp_path / "idle")
    restored = run(second, PROMPTS)
    second.close()
    assert_same(outputs, cold)
    assert_same(restored, cold)
    assert second.manager.num_restored_tokens > 300
    plain = make_engine(model, tmp_path / "idle")
    assert_same(run(plain, PROMPTS[:1]), cold[:1])
    plain.close()
    assert plain.manager.num_restored_tokens == 0, "blocks are laid out otherwise there"


def settle(engine: Engine) -> None:
    """Let stores end."""
    while engine.manager.num_referenced:
        engine.manager.collect()


def test_batches(model: PreparedModel, cold: list[RequestOutput], tmp_path: Path) -> None:
    """All at once, in a pool so tight that loads and stores are cancelled."""
    for _ in range(3):
        engine = make_engine(model, tmp_path, num_blocks=14)
        tokens: dict[str, list[int]] = {str(i): [] for i in range(len(PROMPTS))}
        for i, prompt in enumerate(PROMPTS):
            engine.add_request(str(i), prompt, PARAMS)
        while engine.has_unfinished():
            for delta in engine.step():
                tokens[delta.request_id] += delta.token_ids
            engine.manager.check()
        engine.close()
        assert [tuple(t) for t in tokens.values()] == [o.outputs[0].token_ids for o in cold]


@pytest.mark.parametrize("windows", [[None, 40], [64]])
def test_sliding_windows(windows: list[int | None], model: PreparedModel, tmp_path: Path) -> None:
    """The blocks of a window are kept as far as they are there: enough to go on from the end, and
    from where another request branched off if memory still has them."""
    spec = random_spec(2, 2, 16, windows)
    checkpoint = RandomCheckpoint(spec)

    def make(folder: Path | None) -> Engine:
        backend = random_cpu_backend(spec, checkpoint, 1)
        return engine_of(spec, backend, model.tokenizer, folder, num_blocks=40)

    expected = run(make(None), PROMPTS)
    for restored in (False, True):
        engine = make(tmp_path)
        outputs = run(engine, PROMPTS)
        engine.close()
        assert_same(outputs, expected)
        assert (sum(o.usage.num_restored_tokens for o in outputs) > 400) == restored


def test_others_do_not_wait(
    model: PreparedModel, cold: list[RequestOutput], tmp_path: Path, slow: SlowFiles
) -> None:
    first = make_engine(model, tmp_path)
    run(first, PROMPTS[:1])
    first.close()
    engine = make_engine(model, tmp_path)
    engine.add_request("waits", PROMPTS[0], PARAMS)
    assert engine.step() == [], "nothing to compute yet"
    assert_same([run_while_pending(engine, PROMPTS[2])], cold[2:3])
    engine.add_request("waits too", PROMPTS[0], PARAMS)
    engine.step()
    assert len(engine.scheduler.waiting) == 2, "one load serves both"
    slow.go.set()
    tokens: dict[str, tuple[int, ...]] = {"waits": (), "waits too": ()}
    while engine.has_unfinished():
        for delta in engine.step():
            tokens[delta.request_id] += delta.token_ids
    assert set(tokens.values()) == {cold[0].outputs[0].token_ids}
    assert tier_of(engine).counters.num_loaded_blocks == (len(PROMPTS[0]) - 1) // BLOCK_SIZE
    engine.close()


def run_while_pending(engine: Engine, prompt: list[int]) -> RequestOutput:
    """A request beside another, until it is done."""
    engine.add_request("y", prompt, PARAMS)
    deltas: list[OutputDelta] = []
    while not deltas or deltas[-1].usage is None:
        deltas += [delta for delta in engine.step() if delta.request_id == "y"]
    return gathered(prompt, deltas)


def test_abort_while_blocks_are_on_their_way(
    model: PreparedModel, cold: list[RequestOutput], tmp_path: Path, slow: SlowFiles
) -> None:
    first = make_engine(model, tmp_path)
    run(first, PROMPTS[:1])
    first.close()
    engine = make_engine(model, tmp_path)
    engine.add_request("x", PROMPTS[0], PARAMS)
    engine.step()
    assert engine.abort("x") is not None
    engine.manager.check()
    assert engine.manager.num_referenced > 0, "the load goes on"
    slow.go.set()
    settle(engine)
    assert_same([run_one(engine, PROMPTS[0])], cold[:1])
    engine.close()


def test_a_disk_that_hangs(
    model: PreparedModel,
    cold: list[RequestOutput],
    tmp_path: Path,
    slow: SlowFiles,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The request is computed instead, and the block that arrives late is written nowhere."""
    monkeypatch.setattr(policy, "MIN_PATIENCE_S", 0.0)
    monkeypatch.setattr(policy, "PATIENCE", 0.0)
    first = make_engine(model, tmp_path)
    run(first, PROMPTS[:1])
    first.close()
    engine = make_engine(model, tmp_path)
    engine.add_request("x", PROMPTS[0], PARAMS)
    assert engine.step() == []
    (load,) = tier_of(engine)._loads
    assert_same([run_while_pending(engine, PROMPTS[2])], cold[2:3])
    assert tier_of(engine).counters.num_timeouts == 1
    while engine.has_unfinished():
        engine.step()
    assert engine.manager.num_restored_tokens == 0
    for transfer in load.transfers:  # they are others' now
        engine.kv_store.pools[0][transfer.block] = 7
    before = engine.kv_store.pools[0].copy()
    slow.go.set()
    engine.close()
    assert (engine.kv_store.pools[0] == before).all()


def test_the_folder_stays_within_its_bound(model: PreparedModel, tmp_path: Path) -> None:
    """And keeps what was used last, the beginnings of sequences longest."""
    bound = 14 * FILE_BYTES
    for seed in range(3):
        engine = make_engine(model, tmp_path, cache_bytes=bound)
        for prompt in prompts(4, seed):
            run_one(engine, prompt)
            settle(engine)
            assert sum(f.stat().st_size for f in tmp_path.glob("*.kv")) <= bound
        engine.close()
    assert tier_of(engine).counters.num_evicted_blocks > 0
    engine = make_engine(model, tmp_path, cache_bytes=bound)
    output = run_one(engine, prompts(4, seed)[-1])
    assert output.usage.num_restored_tokens == output.usage.num_cached_tokens > 64
    engine.close()
    # A smaller bound holds from the start, for what was used last, by the times of the files...
    engine = make_engine(model, tmp_path, cache_bytes=2 * FILE_BYTES)
    assert len(list(tmp_path.glob("*.kv"))) == 2
    assert run_one(engine, prompts(4, seed)[-1]).usage.num_restored_tokens == 2 * BLOCK_SIZE
    engine.close()
    # ...and of a sequence that exceeds it, the beginning is kept.
    engine = make_engine(model, tmp_path, cache_bytes=3 * FILE_BYTES)
    long = list(range(40)) * 5
    run_one(engine, long)
    engine.close()
    engine = make_engine(model, tmp_path, cache_bytes=3 * FILE_BYTES)
    assert run_one(engine, long).usage.num_restored_tokens == 3 * BLOCK_SIZE
    engine.close()


def test_tenants_do_not_share(model: PreparedModel, tmp_path: Path) -> None:
    engine = make_engine(model, tmp_path)
    run_one(engine, PROMPTS[0])
    engine.close()
    engine = make_engine(model, tmp_path)
    engine.add_request("x", PROMPTS[0], PARAMS, cache_salt="another")
    while engine.has_unfinished():
        for delta in engine.step():
            usage = delta.usage
    engine.close()
    assert usage is not None and usage.num_cached_tokens == 0


def test_computing_is_chosen_where_it_is_faster(
    model: PreparedModel, cold: list[RequestOutput], tmp_path: Path
) -> None:
    engine = make_engine(model, tmp_path)
    run(engine, PROMPTS)
    engine.close()
    engine = make_engine(model, tmp_path)
    tier_of(engine).policy.bytes_per_s = 1.0
    outputs = run(engine, PROMPTS[:1])
    assert_same(outputs, cold[:1])
    assert outputs[0].usage.num_restored_tokens == 0
    engine.close()


def test_folders_that_cannot_be_used(
    model: PreparedModel, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    engine = make_engine(model, tmp_path)
    with pytest.raises(TaelError, match="in use by another process"):
        make_engine(model, tmp_path)
    engine.close()
    make_engine(model, tmp_path).close()
    (tmp_path / "file").touch()
    with pytest.raises(TaelError, match="choose another folder"):
        make_engine(model, tmp_path / "file")
    folder = tmp_path_factory.mktemp("reference")
    save_byte_llama(folder)
    with pytest.raises(TaelError, match="cpu backend only"):
        LLM(str(folder), backend="reference", kv_cache_dir=tmp_path)


def test_files_are_private_and_others_are_left_alone(model: PreparedModel, tmp_path: Path) -> None:
    folder = tmp_path / "kv"
    engine = make_engine(model, folder)
    run(engine, PROMPTS)
    del engine  # dropped without close(): what is being stored is finished
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {f.stat().st_mode & 0o777 for f in folder.iterdir()} == {0o600}
    (folder / "notes.txt").write_text("mine")
    (folder / "movie.part").write_text("mine, too")
    killed = folder / f"{'0' * 66}.kv.part"
    killed.write_text("of a process that was killed")
    make_engine(model, folder)
    assert not killed.exists() and (folder / "movie.part").exists()
    killed.write_text("again")
    (folder / f"{'f' * 66}.kv").touch()
    (section,) = sections(folder)
    assert section.fingerprint["weights"] == model.weights.digest
    assert section.num_bytes == sum(f.stat().st_size for f in folder.glob("*.kv"))
    assert section.num_tokens == section.num_blocks * BLOCK_SIZE > 300
    bad, cut = sorted(folder.glob("*.kv"))[:2]
    bad.write_bytes(bad.read_bytes()[:-1] + b"x")
    os.truncate(cut, 5000)
    reasons: dict[Path, str] = {}
    assert verify(folder, reasons.__setitem__) == (section.num_blocks - 2, 3)
    assert "checksum" in reasons[bad] and "cut off" in reasons[cut]
    assert clear(folder)[0] == section.num_blocks - 2 + 1
    assert sorted(f.name for f in folder.iterdir()) == ["lock", "movie.part", "notes.txt"]


def test_what_cannot_be_read_is_not_removed(
    model: PreparedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(make_engine(model, tmp_path), PROMPTS)
    num_blocks = len(list(tmp_path.glob("*.kv")))
    monkeypatch.setattr("tael.memory.tiers.folder.Files", lambda: FaultyFiles("open", "EMFILE"))
    reasons: dict[Path, str] = {}
    assert verify(tmp_path, reasons.__setitem__) == (0, num_blocks)
    assert all("cannot be read" in reason for reason in reasons.values())
    assert len(list(tmp_path.glob("*.kv"))) == num_blocks > 0


def test_others_cannot_plant_blocks_or_links(model: PreparedModel, tmp_path: Path) -> None:
    folder, target = tmp_path / "kv", tmp_path / "mine"
    target.write_text("mine")
    run(make_engine(model, folder), PROMPTS)
    names = [path.name for path in folder.glob("*.kv")]
    clear(folder)
    for name in names:
        (folder / f"{name}.part").symlink_to(target)
    run(make_engine(model, folder), PROMPTS)
    assert target.read_text() == "mine"
    folder.chmod(0o777)
    with pytest.raises(TaelError, match="everybody can write"):
        make_engine(model, folder)


def test_without_direct_io(
    model: PreparedModel,
    cold: list[RequestOutput],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on file systems that refuse it."""
    for _ in range(2):
        files = FaultyFiles("open", "EINVAL", count=1)
        install(monkeypatch, files)
        engine = make_engine(model, tmp_path)
        assert_same(run(engine, PROMPTS), cold)
        engine.close()
        assert files.num_faults and tier_of(engine).counters.num_io_errors == 0
    assert tier_of(engine).counters.num_loaded_blocks > 0
