"""The effective-context suite notices a model whose KV cache is damaged behind its back.

The faults are planted between engine and backend, after the haystack was computed and before a
question is asked: what evicting blocks, forgetting a scale, or a wrong rotation of restored keys
would leave behind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from tael.backends.base import Backend, ForwardBatch, HeadOutput
from tael.config import BLOCK_SIZE, EngineConfig, SchedulerConfig
from tael.engine.engine import Engine
from tael.evals.context.cell import Answer, answer_all
from tael.evals.context.divergence import Divergence, divergence, forced_rows, make_texts
from tael.evals.context.sample import Sample
from tael.evals.context.statistics import Estimate, accuracy, retention, verdict
from tael.evals.context.tasks import make_samples
from tael.llm import open_engine

LENGTH = 1024
TASK = "needle_digits"

Damage = Callable[["Damaged", ForwardBatch, NDArray[np.int32]], None]
"""(backend, batch of the haystack, its blocks in the middle half)"""


@dataclass
class Damaged:
    """A backend that damages a haystack's blocks as soon as it has computed them."""

    backend: Backend
    pool: NDArray[np.uint8]
    damage: Damage

    def forward(self, batch: ForwardBatch) -> HeadOutput:
        head = self.backend.forward(batch)
        if batch.positions[0] == 0 and len(batch.positions) > LENGTH // 2:
            kept = replace(
                head,
                top_token_ids=head.top_token_ids.copy(),
                top_logits=head.top_logits.copy(),
                sum_exp=head.sum_exp.copy(),
                logits=head.logits.copy(),
            )
            num_blocks = len(batch.positions) // BLOCK_SIZE
            middle = batch.block_tables[0][0, num_blocks // 4 : num_blocks * 3 // 4]
            self.damage(self, batch, middle)
            return kept
        return head


def evict(backend: Damaged, batch: ForwardBatch, blocks: NDArray[np.int32]) -> None:
    backend.pool[blocks] = 0


def forget_a_scale(backend: Damaged, batch: ForwardBatch, blocks: NDArray[np.int32]) -> None:
    """Keys and values are four times what they should be: 2 more in the exponent of a bf16."""
    backend.pool.view(np.uint16)[blocks] += 2 << 7


def rotate_wrongly(backend: Damaged, batch: ForwardBatch, blocks: NDArray[np.int32]) -> None:
    """Every other token has the keys of a place some blocks further on."""
    first = int(np.flatnonzero(batch.block_tables[0][0] == blocks[0])[0])
    table = batch.block_tables[0][0]
    shift = len(blocks) // 2
    for i, block in enumerate(blocks):
        shifted = np.concatenate([table[: first + i], table[:shift], [block]]).astype(np.int32)
        start = (first + i) * BLOCK_SIZE
        for position in range(start + 1, start + BLOCK_SIZE, 2):
            backend.backend.forward(
                ForwardBatch(
                    token_ids=batch.token_ids[position : position + 1],
                    positions=np.array([position + shift * BLOCK_SIZE], np.int32),
                    query_start=np.array([0, 1], np.int32),
                    block_tables=(shifted[None],),
                    logits_indices=np.array([0], np.int32),
                    temperatures=np.ones(1, np.float32),
                    full_logits=np.zeros(1, np.bool_),
                )
            )


@dataclass
class Outcome:
    answers: dict[str, list[list[Answer]]]
    rows: list[NDArray[np.float32]]

    @property
    def scores(self) -> dict[str, list[list[float]]]:
        return {TASK: [[answer.score for answer in sample] for sample in self.answers[TASK]]}


class Suite:
    """What ``tael bench context`` does, in this process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        tokenizer = self.engine().tokenizer
        made = make_samples(tokenizer, TASK, LENGTH, num_samples=6, num_questions=4, seed=0)
        self.samples: dict[str, list[Sample]] = {TASK: made}
        self.texts = make_texts(tokenizer, LENGTH, num_texts=1, seed=0)
        self.exact = self.measure(self.engine())

    def engine(self) -> Engine:
        config = EngineConfig(max_model_len=LENGTH, scheduler=SchedulerConfig(8, LENGTH))
        return open_engine(str(self.path), config)

    def measure(self, engine: Engine) -> Outcome:
        answers, _ = answer_all(engine, self.samples)
        return Outcome(answers, list(forced_rows(engine, self.texts)))

    def compare(self, mode: Outcome) -> tuple[Estimate, Divergence]:
        return (
            retention(self.exact.scores, mode.scores),
            divergence(self.exact.rows, mode.rows, self.texts),
        )


@pytest.fixture(scope="module")
def suite(model_path: Callable[[str], Path]) -> Suite:
    return Suite(model_path("smollm2:135m"))


def test_the_model_passes_the_task(suite: Suite) -> None:
    assert accuracy(suite.exact.scores).mean >= 0.7


def test_an_intact_engine_answers_alike(suite: Suite) -> None:
    kept, difference = suite.compare(suite.measure(suite.engine()))
    assert kept.mean == 0 and verdict(kept, 0.02) != "lost"
    assert abs(difference.mean_kld) < 1e-6 and difference.same_top == 1.0


@pytest.mark.parametrize("damage", [evict, forget_a_scale, rotate_wrongly])
def test_a_damaged_cache_is_flagged(damage: Damage, suite: Suite) -> None:
    engine = suite.engine()
    engine.backend = Damaged(engine.backend, engine.kv_store.pools[0], damage)  # type: ignore[assignment]
    kept, difference = suite.compare(suite.measure(engine))
    print(damage.__name__, kept, difference)
    assert verdict(kept, 0.02) == "lost"
    assert difference.mean_kld > 0.01
