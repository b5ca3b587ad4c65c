"""A file of live KV that goes wrong ends the requests that read it, and nothing else."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from byte_llama import save_byte_llama
from disk_engines import PARAMS, assert_same, make_tiered_engine, run

from tael.backends.cpu.tiered_blocks import CPUTieredBlocks
from tael.engine.engine import Engine, OutputDelta
from tael.llm import gathered
from tael.loader.prepared import PreparedModel, load_prepared
from tael.request import FinishReason, Request


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PreparedModel:
    path = tmp_path_factory.mktemp("model")
    save_byte_llama(path, head_dim=16)
    return load_prepared(path)


@pytest.fixture
def engine(model: PreparedModel, tmp_path: Path) -> Engine:
    return make_tiered_engine(model, tmp_path)


def file_of(engine: Engine) -> int:
    """The engine's own descriptor. Writes by another one would be of the page cache: where they met
    a direct write that is still under way, the kernel would report EIO to whoever syncs the file
    (dio_warn_stale_pagecache)."""
    assert isinstance(engine.kv_store.tiered, CPUTieredBlocks)
    return engine.kv_store.tiered._fd


def flip(fd: int) -> None:
    """A bit of every 100 bytes."""
    data = pages(os.fstat(fd).st_size)
    os.preadv(fd, [data], 0)
    np.frombuffer(data, np.uint8)[::100] ^= 1
    os.pwrite(fd, data, 0)


def cut(fd: int) -> None:
    os.ftruncate(fd, 1000)


def clear(fd: int) -> None:
    os.pwrite(fd, pages(os.fstat(fd).st_size), 0)


def pages(num_bytes: int) -> mmap.mmap:
    """Zeros where direct I/O takes them from."""
    return mmap.mmap(-1, num_bytes)


@pytest.mark.parametrize("damage", [flip, cut, clear])
def test_lost_kv(damage: Callable[[int], None], engine: Engine) -> None:
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 40, 200).tolist() for _ in range(30)]
    expected = run(engine, prompts)
    damage(file_of(engine))
    num_errors = 0
    for prompt, output in zip(prompts, expected, strict=True):
        for _ in range(3):  # its blocks are lost one after the other
            engine.add_request("x", prompt, PARAMS)
            deltas: list[OutputDelta] = []
            while engine.has_unfinished():
                deltas += engine.step()
            engine.manager.check()
            answer = gathered(prompt, deltas)
            if answer.outputs[0].finish_reason is not FinishReason.ERROR:
                break
            num_errors += 1
            assert "could not be read back" in (answer.outputs[0].error or "")
        assert_same([answer], [output])
    assert num_errors > 0
    assert engine.kv_store.tiered is not None
    assert engine.kv_store.tiered.counters["num_errors"] > 0


def test_a_loss_concerns_those_who_hold_it(engine: Engine) -> None:
    """Of two requests in a step, one reads what was lost; a third finds nothing of it."""
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, 40, 200).tolist() for _ in range(30)]
    expected = run(engine, prompts)
    first = engine.manager.pools[0].lookup(engine.manager._chain(_request(prompts[0]), 1)[1])
    assert first is not None
    size = engine.manager.groups[0].disk_block_bytes
    os.pwrite(file_of(engine), pages(size), first * size)
    engine.add_request("lost", prompts[0], PARAMS)
    engine.add_request("whole", prompts[1], PARAMS)
    deltas: dict[str, list[OutputDelta]] = {"lost": [], "whole": []}
    while engine.has_unfinished():
        for delta in engine.step():
            deltas[delta.request_id].append(delta)
    engine.manager.check()
    assert gathered(prompts[0], deltas["lost"]).outputs[0].finish_reason is FinishReason.ERROR
    assert_same([gathered(prompts[1], deltas["whole"])], expected[1:2])
    assert_same(run(engine, prompts[:1]), expected[:1])


def _request(prompt: list[int]) -> Request:
    return Request("y", prompt, PARAMS, eos_token_ids=frozenset())
