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

Damage = Callable[["Damaged", ForwardBatch, range], None]
"""(backend, batch of the haystack, entries of its block table that are its middle half)"""


@dataclass
class Damaged:
    """A backend that damages a haystack's blocks as soon as it has computed them."""

    backend: Backend
    pool: NDArray[np.uint8]
    damage: Damage

    def forward(self, batch: ForwardBatch) -> HeadOutput:
        head = self.backend.forward(batch)
        if len(batch.query_start) == 2 and len(batch.positions) > LENGTH // 2:
            kept = replace(
                head,
                top_token_ids=head.top_token_ids.copy(),
                top_logits=head.top_logits.copy(),
                sum_exp=head.sum_exp.copy(),
                logits=head.logits.copy(),
            )
            num_blocks = int(batch.positions[-1] + 1) // BLOCK_SIZE
            self.damage(self, batch, range(num_blocks // 4, num_blocks * 3 // 4))
            return kept
        return head


def evict(backend: Damaged, batch: ForwardBatch, rows: range) -> None:
    backend.pool[batch.block_tables[0][0, rows]] = 0


def forget_a_scale(backend: Damaged, batch: ForwardBatch, rows: range) -> None:
    """Keys and values are four times what they should be: 2 more in the exponent of a bf16."""
    backend.pool.view(np.uint16)[batch.block_tables[0][0, rows]] += 2 << 7


def rotate_wrongly(backend: Damaged, batch: ForwardBatch, rows: range) -> None:
    """Every other token has the keys of a place some blocks further on: computed there, and
    written to its own block by a block table that says so."""
    table = batch.block_tables[0][0]
    shift = len(rows) // 2
    for row in rows:
        moved = np.concatenate([table[:row], table[:shift], table[row : row + 1]])
        positions = np.arange(row * BLOCK_SIZE + 1, (row + 1) * BLOCK_SIZE, 2, dtype=np.int32)
        n = len(positions)
        backend.backend.forward(
            ForwardBatch(
                token_ids=batch.token_ids[positions - batch.positions[0]],
                positions=positions + shift * BLOCK_SIZE,
                query_start=np.arange(n + 1, dtype=np.int32),
                block_tables=(np.tile(moved, (n, 1)),),
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
        made = make_samples(tokenizer, TASK, LENGTH, num_samples=5, num_questions=4, seed=0)
        self.samples: dict[str, list[Sample]] = {TASK: made}
        self.texts = make_texts(tokenizer, LENGTH, num_texts=1, seed=0)
        self.exact = self.measure(self.engine())

    def engine(self) -> Engine:
        config = EngineConfig(
            max_model_len=LENGTH, scheduler=SchedulerConfig(BLOCK_SIZE // 2, LENGTH)
        )
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
