"""A position's logits depend on its sequence only: not on what else is in the batch, on how the
prompt was cut, on what came from the prefix cache, or on preemption. Bit by bit, with a real
model on hundreds of prompts."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tael.backends.base import HeadOutput
from tael.backends.cpu.backend import CPUBackend
from tael.config import (
    BLOCK_SIZE,
    MIN_BUDGET_BLOCKS,
    NUM_QUESTION_TOKENS,
    EngineConfig,
    SchedulerConfig,
)
from tael.engine.engine import Engine, overhead_bytes
from tael.loader.prepared import PreparedModel, load_prepared
from tael.models.spec import TIERED_SLOT_BYTES, cache_groups, with_kv_focus, with_kv_format
from tael.request import SamplingParams, TokenLogprobs, Usage

NUM_PROMPTS = 200
MAX_MODEL_LEN = 640
SPARSE = {"kv_format": "k8v4", "kv_budget": 384, "prefill_budget": 320, "kv_focus": (3, 20)}
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


@dataclass
class Result:
    token_ids: tuple[int, ...]
    digests: tuple[str, ...]
    """Of what is known of the logits of every sampled position."""
    usage: Usage


@pytest.fixture(scope="module")
def model(model_path: Callable[[str], Path]) -> PreparedModel:
    return load_prepared(model_path("smollm2:135m"))


@pytest.fixture(scope="module")
def prompts(model: PreparedModel) -> list[list[int]]:
    """Prose and code cut at random, from 1 token to several blocks, and two beyond a partition
    of the attention kernels (512 positions)."""
    text = Path(hashlib.__file__).read_text() + Path(pytest.__file__).read_text()
    ids = model.tokenizer.encode(text, add_special_tokens=False)
    rng = np.random.default_rng(0)
    lengths = [*rng.integers(1, 100, NUM_PROMPTS - 2).tolist(), 530, 600]
    starts = rng.integers(0, len(ids) - 600, NUM_PROMPTS).tolist()
    return [ids[start : start + n] for start, n in zip(starts, lengths, strict=True)]


@pytest.fixture(scope="module")
def alone(model: PreparedModel, prompts: list[list[int]]) -> list[Result]:
    """Each prompt by itself, whole."""
    engine = make_engine(model, max_num_seqs=1, max_num_batched_tokens=MAX_MODEL_LEN)
    return run(engine, prompts)


def test_batches(model: PreparedModel, prompts: list[list[int]], alone: list[Result]) -> None:
    """Batches of 2 to 16 that change from step to step."""
    for num_seqs, some in ((2, slice(0, 60)), (5, slice(60, 120)), (16, slice(None))):
        engine = make_engine(model, max_num_seqs=num_seqs, max_num_batched_tokens=256)
        assert_equal(run(engine, prompts[some]), alone[some])


@pytest.mark.parametrize(("chunk", "every"), [(1, 8), (7, 3), (32, 3), (100, 1)])
def test_chunks(
    chunk: int, every: int, model: PreparedModel, prompts: list[list[int]], alone: list[Result]
) -> None:
    engine = make_engine(model, max_num_seqs=1, max_num_batched_tokens=chunk)
    assert_equal(run(engine, prompts[::every]), alone[::every])


def test_prefix_hits(model: PreparedModel, prompts: list[list[int]], alone: list[Result]) -> None:
    engine = make_engine(model, max_num_seqs=4, max_num_batched_tokens=256)
    num_hits = 0
    for start in range(0, NUM_PROMPTS, 10):  # so few that none is evicted
        some = slice(start, start + 10)
        salts = [str(start + i) for i in range(10)]  # else the prompts hit one another
        cold = run(engine, prompts[some], salts=salts)
        assert all(result.usage.num_cached_tokens == 0 for result in cold)
        warm = run(engine, prompts[some], salts=salts)
        num_hits += sum(result.usage.num_cached_tokens > 0 for result in warm)
        assert_equal(cold, alone[some])
        assert_equal(warm, alone[some])
    assert num_hits > NUM_PROMPTS // 2


def test_preemption(model: PreparedModel, prompts: list[list[int]]) -> None:
    """A pool so small that running requests push one another out."""
    long_answers = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True)
    some = prompts[:40]
    calm = make_engine(model, max_num_seqs=8, max_num_batched_tokens=256)
    tight = make_engine(
        model,
        max_num_seqs=16,
        max_num_batched_tokens=64,
        kv_blocks=MAX_MODEL_LEN // BLOCK_SIZE + 1,
    )
    results = run(tight, some, long_answers)
    assert sum(result.usage.num_preemptions for result in results) > 10
    assert_equal(results, run(calm, some, long_answers))


def test_threads(model: PreparedModel, prompts: list[list[int]], alone: list[Result]) -> None:
    """One thread does not cut attention into partitions; the result is the same."""
    engine = make_engine(model, max_num_seqs=1, max_num_batched_tokens=512, num_threads=1)
    assert_equal(run(engine, prompts[-12:]), alone[-12:])


@pytest.mark.parametrize("settings", [{"kv_format": "q8"}, SPARSE], ids=["q8", "k8v4, sparse"])
def test_compressed_and_sparse(
    settings: dict[str, Any],
    model: PreparedModel,
    prompts: list[list[int]],
    alone: list[Result],
) -> None:
    """What is seen of a block does not depend on whether it was completed in the same step."""
    some = slice(0, None, 9)
    whole = make_engine(
        model, max_num_seqs=1, max_num_batched_tokens=MAX_MODEL_LEN, settings=settings
    )
    expected = run(whole, prompts[some])
    assert [result.digests for result in expected] != [r.digests for r in alone[some]]
    pieces = make_engine(model, max_num_seqs=8, max_num_batched_tokens=50, settings=settings)
    assert_equal(run(pieces, prompts[some]), expected)
    again = run(pieces, prompts[some])
    assert sum(result.usage.num_cached_tokens for result in again) > 0
    assert_equal(again, expected)


def test_end_of_prompt(model: PreparedModel, prompts: list[list[int]]) -> None:
    """What the budget does not cut is read whole, and so is what the last tokens read."""
    budget = MIN_BUDGET_BLOCKS * BLOCK_SIZE
    settings = {"prefill_budget": budget}
    engine = make_engine(model, max_num_seqs=1, max_num_batched_tokens=100, settings=settings)
    *_, prompt = prompts
    whole = prompt[: budget + NUM_QUESTION_TOKENS]
    cut = prompt[: budget + NUM_QUESTION_TOKENS + BLOCK_SIZE]
    exact = make_engine(model, max_num_seqs=1, max_num_batched_tokens=100)
    assert_equal(run(engine, [whole], salts=["0"]), run(exact, [whole], salts=["0"]))
    [expected] = run(exact, [cut], salts=["1"])
    [result] = run(engine, [cut], salts=["1"])
    assert result.digests != expected.digests


@pytest.mark.parametrize(
    "settings",
    [{}, {"kv_format": "q8"}, SPARSE],
    ids=["bf16", "q8", "k8v4, sparse"],
)
def test_tiered(
    settings: dict[str, Any], model: PreparedModel, prompts: list[list[int]], tmp_path: Path
) -> None:
    """Nor on where the KV is: most of it on disk, and what is read in memory for that moment."""
    some = [*prompts[:-2:9], *prompts[-2:]]
    expected = run(
        make_engine(model, max_num_seqs=8, max_num_batched_tokens=96, settings=settings), some
    )
    for num_threads in (1, 2):
        engine = make_engine(
            model,
            max_num_seqs=8,
            max_num_batched_tokens=50,
            num_threads=num_threads,
            kv_blocks=200,
            settings={**settings, "kv_disk_dir": tmp_path},
            num_slots=300,
        )
        assert_equal(run(engine, some), expected)
        again = run(engine, some)
        assert sum(result.usage.num_cached_tokens for result in again) > 0
        assert_equal(again, expected)
        assert engine.kv_store.tiered is not None
        counters = engine.kv_store.tiered.counters
        assert counters["num_stores"] > 0 and counters["num_loads"] > 300
        assert counters["num_errors"] == 0
        assert (counters["num_prefetches"] > 0) == ("kv_budget" in settings)


@pytest.mark.usefixtures("isa")
def test_instruction_sets(model: PreparedModel, prompts: list[list[int]]) -> None:
    """The same holds for the kernels of every instruction set."""
    few = [prompt[:40] for prompt in prompts[:6]]
    expected = run(make_engine(model, max_num_seqs=1, max_num_batched_tokens=64), few)
    assert_equal(run(make_engine(model, max_num_seqs=6, max_num_batched_tokens=9), few), expected)


def make_engine(
    model: PreparedModel,
    *,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    num_threads: int = 2,
    kv_blocks: int = 2000,
    settings: dict[str, Any] | None = None,
    num_slots: int | None = None,
) -> Engine:
    """With a KV pool of ``kv_blocks`` and ``settings`` of ``EngineConfig``; on disk, if there are
    ``num_slots``, at least so many."""
    config = EngineConfig(
        max_model_len=MAX_MODEL_LEN,
        scheduler=SchedulerConfig(max_num_seqs, max_num_batched_tokens),
        **settings or {},
    )
    spec = with_kv_format(model.spec, config.kv_format, config.reads_sparsely)
    spec = with_kv_focus(spec, config.kv_focus)
    backend = CPUBackend(spec, model.weights, num_threads)
    (group,) = cache_groups(spec, BLOCK_SIZE, tiered=num_slots is not None)
    kv_bytes = kv_blocks * group.block_bytes
    if num_slots is not None:
        config = replace(config, kv_disk_bytes=kv_blocks * group.disk_block_bytes)
        fixed_bytes = kv_blocks * group.memory_block_bytes
        slots_bytes = num_slots * (group.slot_bytes + TIERED_SLOT_BYTES)
        kv_bytes = fixed_bytes + max(-(-fixed_bytes // 2), slots_bytes)  # as plan_tiered_pools
    memory_bytes = (
        backend.weights_bytes
        + backend.reserve(config.scheduler, MAX_MODEL_LEN)
        + overhead_bytes(spec, MAX_MODEL_LEN)
        + kv_bytes
        + config.scheduler.max_num_open_blocks * group.open_block_bytes
    )
    config = replace(config, memory_bytes=memory_bytes)
    return Engine(spec, backend, model.tokenizer, config, baseline_bytes=0)


def run(
    engine: Engine,
    prompts: Sequence[list[int]],
    params: SamplingParams = GREEDY,
    salts: Sequence[str] | None = None,
) -> list[Result]:
    """All prompts at once, as far as the engine admits them."""
    digests: dict[str, list[str]] = {}
    sample = engine._sample

    def recording(
        request_id: str, head: HeadOutput, row: int, accepted: Sequence[int]
    ) -> tuple[int, TokenLogprobs | None]:
        arrays = (head.logits, head.top_token_ids, head.sum_exp, head.sum_exp_at_temperature)
        drawn = [head.draw(row, uniform) for uniform in (0.1, 0.99)]
        digest = hashlib.blake2b(repr(drawn).encode())
        for array in arrays:
            digest.update(np.ascontiguousarray(array[row]).data)
        digests.setdefault(request_id.split("/")[0], []).append(digest.hexdigest())
        return sample(request_id, head, row, accepted)

    forward = engine.backend.forward
    engine.backend.forward = lambda batch: forward(  # type: ignore[method-assign]
        replace(
            batch,
            full_logits=np.ones_like(batch.full_logits),
            temperatures=np.full_like(batch.temperatures, 0.7),
        )
    )
    engine._sample = recording  # type: ignore[method-assign]
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), prompt, params, cache_salt=salts[i] if salts else str(i))
    token_ids: dict[str, list[int]] = {}
    usages: dict[str, Usage] = {}
    while engine.has_unfinished():
        for delta in engine.step():
            token_ids.setdefault(delta.request_id, []).extend(delta.token_ids)
            if delta.usage is not None:
                usages[delta.request_id] = delta.usage
    engine._sample = sample  # type: ignore[method-assign]
    engine.backend.forward = forward  # type: ignore[method-assign]
    engine.manager.check()
    return [
        Result(tuple(token_ids[i]), tuple(digests[i]), usages[i])
        for i in map(str, range(len(prompts)))
    ]


def assert_equal(actual: list[Result], expected: list[Result]) -> None:
    different = [
        i
        for i, (a, e) in enumerate(zip(actual, expected, strict=True))
        if a.token_ids != e.token_ids or a.digests != e.digests
    ]
    assert not different, f"prompts {different} differ"
