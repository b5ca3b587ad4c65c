"""A schedule as the arrays that a backend computes."""

from __future__ import annotations

from itertools import chain

import numpy as np
from numpy.typing import NDArray

from tael.backends.base import ForwardBatch
from tael.cache.manager import RELEASED, CacheManager
from tael.config import BLOCK_SIZE, EngineConfig
from tael.engine.sampler import needs_full_logits, scaling_temperature
from tael.engine.scheduler import ScheduledRequest


def build_batch(
    scheduled: list[ScheduledRequest], manager: CacheManager, config: EngineConfig
) -> ForwardBatch:
    """The tokens that ``scheduled`` names, with the block tables that ``manager`` gives them.
    Each entry that samples has one row of the logits, and one more for every drafted token."""
    counts = [entry.num_scheduled_tokens for entry in scheduled]
    query_start = np.zeros(len(scheduled) + 1, np.int32)
    np.cumsum(counts, out=query_start[1:])
    token_ids: list[int] = []
    positions = np.arange(query_start[-1], dtype=np.int32)
    for entry, start in zip(scheduled, query_start.tolist(), strict=False):
        first, count = entry.request.num_computed_tokens, entry.num_scheduled_tokens
        token_ids += entry.request.token_ids[first : first + count]
        token_ids += entry.draft_token_ids
        positions[start : start + count] += first - start
    tables = [manager.block_tables(entry.request) for entry in scheduled]
    ends = zip(scheduled, query_start[1:].tolist(), strict=True)
    sampled = [range(end - entry.num_logits, end) for entry, end in ends]
    num_rows = [entry.num_logits for entry in scheduled]
    requests = [entry.request for entry in scheduled]
    full_logits = [
        entry.num_prompt_logits > 0
        or entry.request.is_masked
        or needs_full_logits(entry.request.params)
        for entry in scheduled
    ]
    return ForwardBatch(
        token_ids=np.array(token_ids, dtype=np.int32),
        positions=positions,
        query_start=query_start,
        block_tables=tuple(_padded(group) for group in zip(*tables, strict=True)),
        open_tables=_open_tables(scheduled, manager),
        logits_indices=np.array(list(chain.from_iterable(sampled)), dtype=np.int32),
        temperatures=np.array(
            [scaling_temperature(request.params) for request in requests], np.float32
        ).repeat(num_rows),
        full_logits=np.array(full_logits, np.bool_).repeat(num_rows),
        kv_budgets=_kv_budgets(scheduled, counts, positions, config)
        if config.reads_sparsely
        else None,
        restored_blocks=manager.take_restored(),
    )


def _open_tables(
    scheduled: list[ScheduledRequest], manager: CacheManager
) -> tuple[NDArray[np.int32], ...]:
    if not any(group.open_block_bytes for group in manager.groups):
        return ()
    tables = [manager.open_tables(entry.request) for entry in scheduled]
    return tuple(_padded(group) for group in zip(*tables, strict=True))


def _kv_budgets(
    scheduled: list[ScheduledRequest],
    counts: list[int],
    positions: NDArray[np.int32],
    config: EngineConfig,
) -> NDArray[np.int32]:
    """[num_tokens] blocks. Whether a token is of the prompt follows from its position, so what it
    computes does too, also after a preemption."""
    ends = np.repeat([entry.request.num_prompt_tokens for entry in scheduled], counts)
    of_prompt, of_answer = (
        (budget or 0) // BLOCK_SIZE for budget in (config.prefill_budget, config.kv_budget)
    )
    return np.where(positions < ends, of_prompt, of_answer).astype(np.int32)


def _padded(rows: tuple[list[int], ...]) -> NDArray[np.int32]:
    table = np.full((len(rows), max(map(len, rows))), RELEASED, np.int32)
    for i, row in enumerate(rows):
        table[i, : len(row)] = row
    return table
