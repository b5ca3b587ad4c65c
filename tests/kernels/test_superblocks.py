"""Sparse reading of contexts with more superblocks than a query looks into."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from random_models import (
    RandomCheckpoint,
    RoundingReference,
    random_cpu_backend,
    random_spec,
    summary_pool,
)

from tael.backends.base import NUM_CANDIDATES, Backend, ForwardBatch
from tael.backends.cpu.backend import CPUBackend
from tael.config import (
    BLOCK_SIZE,
    MIN_BUDGET_BLOCKS,
    MIN_SCORED_SUPERBLOCKS,
    SUPERBLOCK_BLOCKS,
)
from tael.models.spec import ModelSpec, cache_groups

SUPERBLOCK = SUPERBLOCK_BLOCKS * BLOCK_SIZE
PROMPT = (MIN_SCORED_SUPERBLOCKS + 4) * SUPERBLOCK - 40
"""The tokens after it complete a superblock."""
ANSWER = 80
LENGTH = PROMPT + ANSWER
FORK = PROMPT // SUPERBLOCK * SUPERBLOCK + 17 * BLOCK_SIZE
BEHIND = LENGTH % SUPERBLOCK
"""Tokens behind all superblocks."""
NUM_BLOCKS = -(-LENGTH // BLOCK_SIZE)

SPEC = random_spec(2, 2, 16, [None], key_summaries=True)
"""One layer: what is in the KV cache does not depend on what was read before."""
CHECKPOINT = RandomCheckpoint(SPEC)
TOLERANCE = 2e-3  # as in test_model.py


class Sequences:
    """Texts in one pool of a backend."""

    def __init__(self, backend: Backend, spec: ModelSpec, num_blocks: int) -> None:
        self.backend = backend
        (group,) = cache_groups(spec, BLOCK_SIZE)
        self.pool = np.full((num_blocks, group.kv_block_bytes), 0xFF, np.uint8)
        self.summaries = summary_pool(group, num_blocks)
        backend.bind_kv([self.pool], summaries=[self.summaries])
        self.tables: dict[int, NDArray[np.int32]] = {}
        self.lengths: dict[int, int] = {}

    def start(self, text: int, table: NDArray[np.int64]) -> None:
        self.tables[text], self.lengths[text] = table.astype(np.int32), 0

    def prefill(self, text: int) -> None:
        while self.lengths[text] < PROMPT:
            self.step({text: min(2048, PROMPT - self.lengths[text])}, MIN_BUDGET_BLOCKS)

    def step(
        self, num_tokens: dict[int, int], budget: int = 0, restored: tuple[int, ...] = ()
    ) -> dict[int, NDArray[np.float32]]:
        """The logits of the next tokens of some texts, of answers only. Without a ``budget`` it is
        that of the place."""
        places = {t: self.lengths[t] + np.arange(n) for t, n in num_tokens.items()}
        positions = np.concatenate(list(places.values())).astype(np.int32)
        query_start = np.cumsum([0, *num_tokens.values()], dtype=np.int32)
        budgets = (
            np.where(positions % 2, 20, 12) if budget == 0 else np.full_like(positions, budget)
        )
        wanted = np.flatnonzero(positions >= PROMPT).astype(np.int32)
        num_logits = len(wanted)
        logits = self.backend.forward(
            ForwardBatch(
                token_ids=np.concatenate([tokens(t)[at] for t, at in places.items()]),
                positions=positions,
                query_start=query_start,
                block_tables=(np.stack([self.tables[t] for t in num_tokens]),),
                logits_indices=wanted,
                temperatures=np.ones(num_logits, np.float32),
                full_logits=np.ones(num_logits, np.bool_),
                kv_budgets=np.broadcast_to(budgets, positions.shape).astype(np.int32),
                restored_blocks=(list(restored),),
            )
        ).logits.copy()
        for t, n in num_tokens.items():
            self.lengths[t] += n
        return {t: logits[query_start[i] : query_start[i + 1]] for i, t in enumerate(num_tokens)}


def tokens(text: int) -> NDArray[np.int32]:
    """Those with negative numbers begin like text 0."""
    rng = np.random.default_rng(abs(text))
    own = rng.integers(1, SPEC.vocab_size, LENGTH, dtype=np.int32)
    return own if text >= 0 else np.append(tokens(0)[:FORK], own[FORK:])


def scattered(seed: int, num_blocks: int = NUM_BLOCKS) -> NDArray[np.int64]:
    return np.random.default_rng(seed).permutation(num_blocks)


def cpu(num_threads: int = 2, max_model_len: int = LENGTH, spec: ModelSpec = SPEC) -> CPUBackend:
    """For two texts at a time, and so with rows for the superblocks of two."""
    backend = random_cpu_backend(spec, CHECKPOINT, num_threads)
    backend._native.allocate(
        max_tokens=2048,
        max_seqs=2,
        max_logits=2 * ANSWER,
        max_model_len=max_model_len,
        num_candidates=NUM_CANDIDATES,
    )
    return backend


def both() -> Sequences:
    """Two texts, scattered over one pool."""
    sequences = Sequences(cpu(), SPEC, 2 * NUM_BLOCKS)
    places = scattered(5, 2 * NUM_BLOCKS)
    for text in (0, 1):
        sequences.start(text, places[text * NUM_BLOCKS : (text + 1) * NUM_BLOCKS])
        sequences.prefill(text)
    return sequences


def answer(sequences: Sequences, text: int, counts: list[int]) -> NDArray[np.float32]:
    return np.concatenate([sequences.step({text: n})[text] for n in counts])


@pytest.fixture(scope="module")
def alone() -> list[NDArray[np.float32]]:
    """The logits of two texts, each in a pool of its own, in one step on one thread."""
    return [computed(cpu(1), text, [ANSWER]) for text in (0, 1)]


def computed(backend: Backend, text: int, counts: list[int]) -> NDArray[np.float32]:
    sequences = Sequences(backend, SPEC, NUM_BLOCKS)
    sequences.start(text, scattered(text))
    sequences.prefill(text)
    return answer(sequences, text, counts)


class Unread(RoundingReference):
    """Prompts are not read: it would take long, and answers do not depend on it."""

    def _attend_some(self, q, mixer, layer, table, positions, budget):  # type: ignore[no-untyped-def]
        if positions[0] < PROMPT:
            return np.zeros((len(q), mixer.num_heads * mixer.head_dim), np.float32)
        return super()._attend_some(q, mixer, layer, table, positions, budget)


def test_the_best_superblocks_are_the_references(
    alone: list[NDArray[np.float32]], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = computed(Unread(SPEC, CHECKPOINT), 0, [ANSWER])
    assert np.abs(alone[0] - expected).max() < TOLERANCE
    monkeypatch.setattr(
        "tael.backends.reference.block_selection.MIN_SCORED_SUPERBLOCKS", 10 * NUM_BLOCKS
    )
    all_scored = computed(Unread(SPEC, CHECKPOINT), 0, [ANSWER])
    assert np.abs(alone[0] - all_scored).max() > 10 * TOLERANCE, "all blocks were scored"


def test_a_layer_that_reads_less_asks_superblocks_first() -> None:
    """Though there are not enough of them for the budget that it has a share of."""
    (layer,) = SPEC.layers
    half = replace(SPEC, layers=(replace(layer, mixer=replace(layer.mixer, budget_percent=50)),))
    logits = []
    for spec, budget in ((SPEC, 150), (half, 300)):
        sequences = Sequences(cpu(spec=spec), spec, NUM_BLOCKS)
        sequences.start(0, scattered(0))
        sequences.prefill(0)
        logits.append(sequences.step({0: ANSWER}, budget)[0])
    np.testing.assert_array_equal(*logits)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("counts", [[1] * ANSWER, [39, 1, 1, 39], [7] * 11 + [3]])
def test_steps_do_not_matter(counts: list[int]) -> None:
    """Also where one completes a superblock for those after it."""
    actual, expected = computed(cpu(), 1, counts), computed(cpu(1), 1, [ANSWER])
    np.testing.assert_array_equal(actual.view(np.uint32), expected.view(np.uint32))


def test_a_block_is_another_when_it_is_used_again(alone: list[NDArray[np.float32]]) -> None:
    """The second text gets the blocks of the first, in other places."""
    sequences = Sequences(cpu(), SPEC, NUM_BLOCKS)
    for text in (0, 1, 0):
        sequences.start(text, scattered(7 + text))
        sequences.prefill(text)
        np.testing.assert_array_equal(answer(sequences, text, [1] * ANSWER), alone[text])


def test_texts_of_one_step_have_superblocks_of_their_own(
    alone: list[NDArray[np.float32]],
) -> None:
    sequences = both()
    logits: dict[int, list[NDArray[np.float32]]] = {0: [], 1: []}
    for n in (1, 30, 1, ANSWER - 32):
        for text, rows in sequences.step({0: n, 1: n}).items():
            logits[text].append(rows)
    for text, rows in logits.items():
        np.testing.assert_array_equal(np.concatenate(rows), alone[text])


def test_rows_of_ended_texts_are_given_away() -> None:
    """Texts with one beginning have more superblocks in all than there are rows."""
    num_forks, own = 16, NUM_BLOCKS - FORK // BLOCK_SIZE
    sequences = Sequences(cpu(), SPEC, NUM_BLOCKS + num_forks * own)
    sequences.start(0, np.arange(NUM_BLOCKS))
    sequences.prefill(0)
    expected = {}
    for fork in range(-num_forks, 0):
        start = NUM_BLOCKS + (fork + num_forks) * own
        sequences.start(fork, np.append(np.arange(NUM_BLOCKS - own), start + np.arange(own)))
        sequences.lengths[fork] = FORK
        sequences.prefill(fork)
        expected[fork] = answer(sequences, fork, [ANSWER])[-BEHIND:]
    for fork in (*expected, *expected):
        sequences.lengths[fork] = LENGTH - BEHIND
        np.testing.assert_array_equal(answer(sequences, fork, [BEHIND]), expected[fork])


def test_restored_blocks_are_others(alone: list[NDArray[np.float32]]) -> None:
    """Two texts change places in the pool behind the backend's back."""
    sequences = both()
    first = sequences.step({0: 40, 1: 40})
    pool, of_blocks = sequences.pool, sequences.summaries.swapaxes(0, 1)
    zero, one = sequences.tables[0], sequences.tables[1]
    pool[zero], pool[one] = pool[one], pool[zero]
    of_blocks[zero], of_blocks[one] = of_blocks[one], of_blocks[zero]
    sequences.tables = {0: one, 1: zero}
    second = sequences.step({0: 40, 1: 40}, restored=tuple(range(len(pool))))
    for text in (0, 1):
        np.testing.assert_array_equal(np.concatenate([first[text], second[text]]), alone[text])


def test_their_memory_is_what_the_plan_counts() -> None:
    (group,) = cache_groups(SPEC, BLOCK_SIZE)
    for max_model_len in (MIN_SCORED_SUPERBLOCKS * SUPERBLOCK, LENGTH):
        backend = cpu(1, max_model_len)
        Sequences(backend, SPEC, NUM_BLOCKS)
        planned = group.superblock_bytes(NUM_BLOCKS, 2, max_model_len, BLOCK_SIZE)
        assert backend._native.superblock_bytes == planned
        assert (planned > 0) == (max_model_len == LENGTH)
