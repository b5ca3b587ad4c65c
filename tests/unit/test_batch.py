"""What the tokens of a schedule are asked to read."""

from __future__ import annotations

import pytest

from tael.backends.base import WITH_PREVIOUS
from tael.cache.manager import CacheManager
from tael.config import (
    BLOCK_SIZE,
    CHOICE_TOKENS,
    NUM_QUESTION_TOKENS,
    EngineConfig,
    SchedulerConfig,
)
from tael.engine.batch import build_batch
from tael.engine.scheduler import Scheduler
from tael.errors import TaelError
from tael.models.spec import CacheGroup
from tael.request import Request, SamplingParams

OF_PROMPT, OF_ANSWER = 20, 10
"""Budgets, in blocks."""
NUM_PROMPT_TOKENS = 10 * BLOCK_SIZE + 5
ENDS = NUM_PROMPT_TOKENS - NUM_QUESTION_TOKENS
"""Where the prompt's budget does: within four tokens."""
GROUP = CacheGroup(layers=(0,), window=None, block_bytes=100)
TOGETHER = [OF_PROMPT, *[WITH_PREVIOUS] * (CHOICE_TOKENS - 1)]


def budgets(
    config: EngineConfig, params: SamplingParams, max_num_batched_tokens: int, num_tokens: int
) -> list[int] | None:
    """Those of the first ``num_tokens`` of a prompt and its answer; None if there are none."""
    manager = CacheManager((GROUP,), (32,), BLOCK_SIZE, b"model")
    scheduler = Scheduler(SchedulerConfig(1, max_num_batched_tokens), manager, 1024)
    scheduler.add(Request("a", list(range(NUM_PROMPT_TOKENS)), params))
    all_budgets: list[int] = []
    while len(all_budgets) < num_tokens:
        schedule = scheduler.schedule()
        batch = build_batch(schedule.scheduled, manager, config)
        if batch.kv_budgets is None:
            return None
        all_budgets += batch.kv_budgets.tolist()
        scheduler.update(schedule, {"a": [1]})
    return all_budgets


@pytest.mark.parametrize("max_num_batched_tokens", [1024, 50, CHOICE_TOKENS])
def test_a_prompt_chooses_by_fours_and_an_answer_by_token(max_num_batched_tokens: int) -> None:
    config = EngineConfig(prefill_budget=OF_PROMPT * BLOCK_SIZE, kv_budget=OF_ANSWER * BLOCK_SIZE)
    actual = budgets(config, SamplingParams(), max_num_batched_tokens, NUM_PROMPT_TOKENS + 3)
    assert actual == (TOGETHER * 100)[:ENDS] + [0] * NUM_QUESTION_TOKENS + [OF_ANSWER] * 3


def test_one_budget_leaves_the_other_alone() -> None:
    of_prompt = EngineConfig(prefill_budget=OF_PROMPT * BLOCK_SIZE)
    of_answer = EngineConfig(kv_budget=OF_ANSWER * BLOCK_SIZE)
    num_tokens = NUM_PROMPT_TOKENS + 1
    assert budgets(of_prompt, SamplingParams(), 64, num_tokens) == (
        (TOGETHER * 100)[:ENDS] + [0] * (NUM_QUESTION_TOKENS + 1)
    )
    assert budgets(of_answer, SamplingParams(), 64, num_tokens) == (
        [0] * NUM_PROMPT_TOKENS + [OF_ANSWER]
    )
    assert budgets(EngineConfig(), SamplingParams(), 64, num_tokens) is None


def test_tokens_whose_logits_are_wanted_choose_by_themselves() -> None:
    """A step cuts them anywhere."""
    config = EngineConfig(prefill_budget=OF_PROMPT * BLOCK_SIZE)
    actual = budgets(config, SamplingParams(prompt_logprobs=0), 1024, NUM_PROMPT_TOKENS)
    assert actual == [OF_PROMPT] * ENDS + [0] * NUM_QUESTION_TOKENS


def test_a_step_has_room_for_a_choice() -> None:
    budget = OF_PROMPT * BLOCK_SIZE
    EngineConfig(prefill_budget=budget, scheduler=SchedulerConfig(8, CHOICE_TOKENS + 7))
    with pytest.raises(TaelError, match="max_num_seqs \\+ 3 "):
        EngineConfig(prefill_budget=budget, scheduler=SchedulerConfig(8, CHOICE_TOKENS + 6))
