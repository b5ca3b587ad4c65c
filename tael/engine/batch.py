"""A schedule as the arrays that a backend computes."""

from __future__ import annotations

import sys

import numpy as np
from numpy.typing import NDArray

from tael.backends.base import WITH_PREVIOUS, ForwardBatch
from tael.cache.manager import RELEASED, CacheManager, Table
from tael.config import BLOCK_SIZE, CHOICE_TOKENS, NUM_QUESTION_TOKENS, EngineConfig
from tael.engine.sampler import needs_full_logits, scaling_temperature
from tael.engine.scheduler import ScheduledRequest


def build_batch(
    scheduled: list[ScheduledRequest], manager: CacheManager, config: EngineConfig
) -> ForwardBatch:
    """The tokens that ``scheduled`` names, with the block tables that ``manager`` gives them.
    Each entry that samples has one row of the logits, and one more for every drafted token."""
    token_ids: list[int] = []
    positions: list[int] = []
    query_start = [0]
    logits_indices: list[int] = []
    temperatures: list[float] = []
    full_logits: list[bool] = []
    for entry in scheduled:
        request, num_rows = entry.request, entry.num_logits
        first = request.num_computed_tokens
        end = first + entry.num_scheduled_tokens
        token_ids += request.token_ids[first:end]
        token_ids += entry.draft_token_ids
        positions += range(first, end)
        query_start.append(len(positions))
        logits_indices += range(len(positions) - num_rows, len(positions))
        temperatures += [scaling_temperature(request.params)] * num_rows
        needs_all = entry.num_prompt_logits > 0 or request.is_masked
        full_logits += [needs_all or needs_full_logits(request.params)] * num_rows
    tables = [manager.block_tables(entry.request) for entry in scheduled]
    return ForwardBatch(
        token_ids=np.array(token_ids, np.int32),
        positions=np.array(positions, np.int32),
        query_start=np.array(query_start, np.int32),
        block_tables=tuple(_padded(group) for group in zip(*tables, strict=True)),
        open_tables=_open_tables(scheduled, manager),
        logits_indices=np.array(logits_indices, np.int32),
        temperatures=np.array(temperatures, np.float32),
        full_logits=np.array(full_logits, np.bool_),
        kv_budgets=_kv_budgets(scheduled, config) if config.reads_sparsely else None,
        restored_blocks=manager.take_restored(),
    )


def _open_tables(
    scheduled: list[ScheduledRequest], manager: CacheManager
) -> tuple[NDArray[np.int32], ...]:
    if not any(group.open_block_bytes for group in manager.groups):
        return ()
    tables = [manager.open_tables(entry.request) for entry in scheduled]
    return tuple(_padded(group) for group in zip(*tables, strict=True))


def _kv_budgets(scheduled: list[ScheduledRequest], config: EngineConfig) -> NDArray[np.int32]:
    """[num_tokens]. They follow from a token's position and the length of the prompt, so what it
    computes does too, also after a preemption.

    ``CHOICE_TOKENS`` of a prompt choose together what they read, which no step cuts. Where
    log-probabilities of a prompt are wanted one may, and each token chooses by itself.
    """
    of_prompt, of_answer = (
        (budget or 0) // BLOCK_SIZE for budget in (config.prefill_budget, config.kv_budget)
    )
    budgets: list[int] = []
    for entry in scheduled:
        num_prompt_tokens = entry.request.num_prompt_tokens
        first = entry.request.num_computed_tokens
        counts = np.diff(
            np.clip(
                [0, num_prompt_tokens - NUM_QUESTION_TOKENS, num_prompt_tokens, sys.maxsize],
                first,
                first + entry.num_scheduled_tokens,
            )
        )
        of_tokens = np.repeat([of_prompt, 0, of_answer], counts)
        if of_prompt > 0 and not entry.request.wants_prompt_logits:
            is_first = (first + np.arange(counts[0])) % CHOICE_TOKENS == 0
            of_tokens[: counts[0]][~is_first] = WITH_PREVIOUS
        budgets += of_tokens.tolist()
    return np.array(budgets, np.int32)


def _padded(rows: tuple[Table, ...]) -> NDArray[np.int32]:
    table = np.full((len(rows), max(map(len, rows))), RELEASED, np.int32)
    for i, row in enumerate(rows):
        table[i, : len(row)] = row
    return table
