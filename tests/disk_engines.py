"""Engines with a disk tier, of a tiny model on the native kernels, and a disk that fails."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from tael.backends.base import Backend
from tael.backends.cpu.backend import CPUBackend
from tael.config import BLOCK_SIZE, EngineConfig, SchedulerConfig
from tael.engine.engine import Engine, OutputDelta, overhead_bytes
from tael.llm import RequestOutput, gathered
from tael.loader.prepared import PreparedModel
from tael.loader.tokenizer import Tokenizer
from tael.memory.tiers import disk
from tael.memory.tiers.files import PAGE, Files
from tael.models.spec import TIERED_SLOT_BYTES, ModelSpec, cache_groups
from tael.request import SamplingParams

PARAMS = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=5)
"""The log-probabilities show every bit of the most likely logits."""


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    """Of 70 to 200 tokens; each two begin with the same 64."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        if i % 2 == 0:
            head = rng.integers(0, 40, 64).tolist()
        rows.append(head + rng.integers(0, 40, int(rng.integers(6, 136))).tolist())
    return rows


def make_engine(
    model: PreparedModel,
    cache_dir: Path | None,
    *,
    num_blocks: int = 64,
    cache_bytes: int = 64 << 20,
    max_num_seqs: int = 4,
) -> Engine:
    backend = CPUBackend(model.spec, model.weights, num_threads=1)
    return engine_of(
        model.spec,
        backend,
        model.tokenizer,
        cache_dir,
        num_blocks=num_blocks,
        cache_bytes=cache_bytes,
        max_num_seqs=max_num_seqs,
    )


def engine_of(
    spec: ModelSpec,
    backend: Backend,
    tokenizer: Tokenizer,
    cache_dir: Path | None,
    *,
    num_blocks: int,
    cache_bytes: int = 64 << 20,
    max_num_seqs: int = 4,
) -> Engine:
    """With ``num_blocks`` in every pool."""
    scheduler = SchedulerConfig(max_num_seqs, 64)
    groups = cache_groups(spec, BLOCK_SIZE)
    taken = backend.weights_bytes + backend.reserve(scheduler, 256) + overhead_bytes(spec, 256)
    if cache_dir is not None:
        taken += disk.overhead_bytes(cache_bytes, groups)
    config = EngineConfig(
        memory_bytes=taken + num_blocks * sum(group.block_bytes for group in groups),
        max_model_len=256,
        scheduler=scheduler,
        cache_dir=cache_dir,
        cache_bytes=cache_bytes,
    )
    return Engine(spec, backend, tokenizer, config, baseline_bytes=0)


def make_tiered_engine(model: PreparedModel, folder: Path, cache_dir: Path | None = None) -> Engine:
    """With 200 blocks in a file and 200 of their 800 KV heads in memory: as few as one thread can
    do with."""
    num_blocks = num_slots = 200
    scheduler = SchedulerConfig(32, 64)
    groups = cache_groups(model.spec, BLOCK_SIZE, tiered=True)
    (group,) = groups
    assert group.num_heads == 4
    backend = CPUBackend(model.spec, model.weights, num_threads=1)
    memory_bytes = (
        backend.weights_bytes
        + backend.reserve(scheduler, 256)
        + overhead_bytes(model.spec, 256)
        + scheduler.max_num_open_blocks * group.open_block_bytes
        + num_blocks * group.memory_block_bytes
        + num_slots * (group.slot_bytes + TIERED_SLOT_BYTES)
    )
    if cache_dir is not None:
        memory_bytes += disk.overhead_bytes(64 << 20, groups)
    config = EngineConfig(
        memory_bytes=memory_bytes,
        max_model_len=256,
        kv_disk_bytes=num_blocks * group.disk_block_bytes,
        kv_disk_dir=folder,
        cache_dir=cache_dir,
        cache_bytes=64 << 20,
        scheduler=scheduler,
    )
    return Engine(model.spec, backend, model.tokenizer, config, baseline_bytes=0)


def run(engine: Engine, prompts: Sequence[list[int]]) -> list[RequestOutput]:
    """One after another. The engine stays open."""
    return [run_one(engine, prompt) for prompt in prompts]


def run_one(engine: Engine, prompt: list[int]) -> RequestOutput:
    engine.add_request("x", prompt, PARAMS)
    deltas: list[OutputDelta] = []
    while engine.has_unfinished():
        deltas += engine.step()
    engine.manager.check()
    return gathered(prompt, deltas)


def assert_same(actual: list[RequestOutput], expected: list[RequestOutput]) -> None:
    """Token by token and bit by bit."""
    for a, e in zip(actual, expected, strict=True):
        assert a.outputs[0].token_ids == e.outputs[0].token_ids
        assert a.outputs[0].logprobs == e.outputs[0].logprobs


class FaultyFiles(Files):
    """Fails at one ``site`` (the name of a method) from its ``first`` call on, ``count`` times."""

    def __init__(self, site: str, fault: str, first: int = 0, count: int = 10**9) -> None:
        super().__init__()
        self.site = site
        self.fault = fault
        self.calls = range(first, first + count)
        self.num_calls = 0
        self.num_faults = 0
        self.random = np.random.default_rng(first)

    def pread(self, fd: int, buffer: memoryview, offset: int) -> int:
        if not self._strikes("pread"):
            return super().pread(fd, buffer, offset)
        if self.fault == "short":
            return super().pread(fd, buffer[: max(PAGE, len(buffer) // 2 // PAGE * PAGE)], offset)
        if self.fault == "end":
            super().pread(fd, buffer[:PAGE], offset)
            return 0
        count = super().pread(fd, buffer, offset)
        self._flip(np.frombuffer(buffer, np.uint8))
        return count

    def pwrite(self, fd: int, buffer: memoryview, offset: int) -> int:
        if not self._strikes("pwrite"):
            return super().pwrite(fd, buffer, offset)
        if self.fault == "short":
            return super().pwrite(fd, buffer[: max(PAGE, len(buffer) // 2 // PAGE * PAGE)], offset)
        self._flip(np.frombuffer(buffer, np.uint8))
        return super().pwrite(fd, buffer, offset)

    def rename(self, source: Path, target: Path) -> None:
        strikes = self._strikes("rename")
        super().rename(source, target)
        if strikes:  # the system lost the end of the file
            os.truncate(target, int(self.random.integers(0, target.stat().st_size)))

    def _strikes(self, site: str) -> bool:
        """Whether the call in progress is to go wrong; raises if it is to fail."""
        if site != self.site:
            return False
        self.num_calls += 1
        if self.num_calls - 1 not in self.calls:
            return False
        self.num_faults += 1
        if code := getattr(errno, self.fault, None):
            raise OSError(code, os.strerror(code))
        return True

    def _flip(self, data: np.ndarray) -> None:
        data[int(self.random.integers(0, len(data)))] ^= 1 << int(self.random.integers(0, 8))


def _failing(site: str) -> Callable[..., object]:
    original = getattr(Files, site)

    def call(self: FaultyFiles, *args: object) -> object:
        self._strikes(site)
        return original(self, *args)

    return call


for _site in ("open", "fsync", "unlink", "touch", "list"):
    setattr(FaultyFiles, _site, _failing(_site))


def install(monkeypatch: pytest.MonkeyPatch, files: Files) -> None:
    """Let tiers that are made from now on use ``files``."""
    monkeypatch.setattr(disk, "Files", lambda: files)
