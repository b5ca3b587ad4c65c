"""The native executor on random models: a step computes what the reference does, the same
bits however the work is shared out, and refuses what is not a step."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from random_models import (
    MAX_MODEL_LEN,
    VOCAB_SIZE,
    RandomCheckpoint,
    RoundingReference,
    compute,
    random_cpu_backend,
    random_spec,
    random_steps,
)

from tael import _native
from tael.backends.base import WITH_PREVIOUS
from tael.config import BLOCK_SIZE, MIN_BUDGET_BLOCKS
from tael.models.spec import ModelSpec

TOLERANCE = 2e-3
"""Of a logit, on one layer: a query that the two round to different sides. Seeing one key too many
or too few changes some by more."""
PARTITION = 512  # kPartitionTokens in csrc/kernels/types.hpp


def random_tokens(seed: int, length: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, VOCAB_SIZE, length, dtype=np.int32)


def largest_error(spec: ModelSpec, length: int, num_threads: int) -> float:
    checkpoint = RandomCheckpoint(spec)
    tokens = [random_tokens(0, length)]
    steps = [{0: length - 1}, {0: 1}]
    expected = compute(spec, RoundingReference(spec, checkpoint), tokens, steps)[0]
    backend = random_cpu_backend(spec, checkpoint, num_threads)
    return float(np.abs(compute(spec, backend, tokens, steps)[0] - expected).max())


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("head_dim", [16, 48, 80, 256])
@pytest.mark.parametrize("heads_per_kv_head", [1, 3, 7, 9, 40])
def test_heads_equal_reference(heads_per_kv_head: int, head_dim: int) -> None:
    spec = random_spec(heads_per_kv_head, 2 if heads_per_kv_head < 40 else 1, head_dim, [20])
    assert largest_error(spec, 70, num_threads=2) < TOLERANCE


@pytest.mark.parametrize("window", [None, 1, 31, 32, 33, 511, 512, 513])
@pytest.mark.parametrize("length", [1, 32, 33, 511, 512, 513, 1024])
def test_edges_equal_reference(length: int, window: int | None) -> None:
    """The last token comes by itself: with two threads its context is cut into partitions."""
    spec = random_spec(2, 1, 16, [window])
    assert largest_error(spec, length + 1, num_threads=2) < TOLERANCE


def test_more_heads_than_rows_of_a_piece_over_partitions() -> None:
    spec = random_spec(40, 1, 16, [None])
    assert largest_error(spec, PARTITION + 20, num_threads=2) < TOLERANCE


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("kv_format", ["q8", "k8v4"])
@pytest.mark.parametrize("head_dim", [16, 48, 64, 256])
def test_compressed_blocks_equal_reference(head_dim: int, kv_format: str) -> None:
    """Over chunks of blocks; the last token sees the block before its own compressed."""
    spec = random_spec(3, 2, head_dim, [None], kv_format)
    assert largest_error(spec, 200, num_threads=2) < TOLERANCE
    assert largest_error(spec, 32, num_threads=2) < TOLERANCE


@pytest.mark.parametrize("window", [1, 31, 33, 200])
@pytest.mark.parametrize("kv_format", ["q8", "k8v4"])
def test_windows_over_compressed_blocks(window: int, kv_format: str) -> None:
    spec = random_spec(2, 1, 16, [window], kv_format)
    assert largest_error(spec, PARTITION + 70, num_threads=2) < TOLERANCE


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("kv_format", ["bf16", "q8"])
@pytest.mark.parametrize(("heads_per_kv_head", "head_dim"), [(1, 16), (3, 48), (7, 64), (9, 256)])
def test_sparse_reading_equals_reference(
    heads_per_kv_head: int, head_dim: int, kv_format: str
) -> None:
    """Budgets from the least to all but one block, in turn: dense and sparse tokens alternate."""
    spec = random_spec(heads_per_kv_head, 2, head_dim, [None], kv_format, key_summaries=True)
    checkpoint = RandomCheckpoint(spec)
    length = 32 * 20 + 7
    budgets = np.array([MIN_BUDGET_BLOCKS, 0, 12, 19, 0, 10], np.int32)[np.arange(length) % 6]
    tokens = [random_tokens(0, length)]
    steps = [{0: 600}, {0: length - 601}, {0: 1}]
    reference = RoundingReference(spec, checkpoint)
    expected = compute(spec, reference, tokens, steps, budgets)[0]
    backend = random_cpu_backend(spec, checkpoint, 2)
    actual = compute(spec, backend, tokens, steps, budgets)[0]
    assert np.abs(actual - expected).max() < TOLERANCE
    dense = compute(spec, backend, tokens, steps)[0]
    assert np.abs(actual - dense)[320:].max() > 10 * TOLERANCE, "the budget changed nothing"
    np.testing.assert_array_equal(actual[: 32 * 9], dense[: 32 * 9])


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("kv_format", ["bf16", "q8"])
@pytest.mark.parametrize(("heads_per_kv_head", "head_dim"), [(1, 48), (7, 64), (18, 32)])
def test_tokens_that_choose_together_equal_reference(
    heads_per_kv_head: int, head_dim: int, kv_format: str
) -> None:
    """Whole blocks, some tokens of a block, and single ones, in turn."""
    spec = random_spec(heads_per_kv_head, 2, head_dim, [None], kv_format, key_summaries=True)
    checkpoint = RandomCheckpoint(spec)
    length = 32 * 22 + 20
    budgets = np.full(length, WITH_PREVIOUS, np.int32)
    budgets[::BLOCK_SIZE] = np.array([14, 0, 20, MIN_BUDGET_BLOCKS])[np.arange(23) % 4]
    budgets[32 * 14 + 5 :: 70], budgets[32 * 14 + 6 :: 70] = 0, 11
    tokens, steps = [random_tokens(0, length)], [{0: 32 * 15}, {0: 32 * 4}, {0: length - 32 * 19}]
    expected = compute(spec, RoundingReference(spec, checkpoint), tokens, steps, budgets)[0]
    backend = random_cpu_backend(spec, checkpoint, 2)
    actual = compute(spec, backend, tokens, steps, budgets)[0]
    assert np.abs(actual - expected).max() < TOLERANCE
    by_themselves = budgets.copy()
    for t in np.flatnonzero(budgets == WITH_PREVIOUS):
        by_themselves[t] = by_themselves[t - 1]
    alone = compute(spec, backend, tokens, steps, by_themselves)[0]
    assert np.abs(actual - alone)[320:].max() > 10 * TOLERANCE, "each has chosen by itself"


def test_tokens_choose_together_within_a_block() -> None:
    spec = random_spec(3, 2, 32, [None], key_summaries=True)
    backend = random_cpu_backend(spec, RandomCheckpoint(spec), 1)
    for steps in ([{0: 40}], [{0: 16}, {0: 24}]):
        budgets = np.full(40, WITH_PREVIOUS, np.int32)
        budgets[0] = 12
        with pytest.raises(IndexError, match="in its block"):
            compute(spec, backend, [random_tokens(0, 40)], steps, budgets)


@pytest.mark.usefixtures("isa")
def test_candidates_of_more_heads_than_a_tile_has_columns() -> None:
    spec = random_spec(18, 1, 32, [None], key_summaries=True)
    checkpoint = RandomCheckpoint(spec)
    length = 32 * 34 + 7
    budgets = np.where(np.arange(length) < length - 40, 0, 11).astype(np.int32)
    tokens, steps = [random_tokens(0, length)], [{0: length - 1}, {0: 1}]
    expected = compute(spec, RoundingReference(spec, checkpoint), tokens, steps, budgets)[0]
    actual = compute(spec, random_cpu_backend(spec, checkpoint, 2), tokens, steps, budgets)[0]
    assert np.abs(actual - expected).max() < TOLERANCE


@pytest.mark.parametrize("percent", [50, 250])
def test_a_layer_reads_its_share_of_a_budget(percent: int) -> None:
    """Not fewer than the least, and all of what its share holds."""
    (layer,) = random_spec(3, 2, 32, [None], key_summaries=True).layers
    mixer = replace(layer.mixer, budget_percent=percent)
    spec = random_spec(3, 2, 32, [None], key_summaries=True)
    own = replace(spec, layers=(replace(layer, mixer=mixer),))
    checkpoint = RandomCheckpoint(spec)
    length = 32 * 24 + 5
    tokens, steps = [random_tokens(0, length)], [{0: 700}, {0: length - 701}, {0: 1}]
    budgets = np.array([MIN_BUDGET_BLOCKS, 0, 22, 10], np.int32)[np.arange(length) % 4]
    of_layer = {50: {10: 9, 22: 11, 9: 9, 0: 0}, 250: {10: 25, 22: 55, 9: 22, 0: 0}}[percent]
    expected = compute(own, RoundingReference(own, checkpoint), tokens, steps, budgets)[0]
    actual = compute(own, random_cpu_backend(own, checkpoint, 2), tokens, steps, budgets)[0]
    assert np.abs(actual - expected).max() < TOLERANCE
    scaled = np.vectorize(of_layer.get)(budgets).astype(np.int32)
    alike = compute(spec, random_cpu_backend(spec, checkpoint, 2), tokens, steps, scaled)[0]
    np.testing.assert_array_equal(actual, alike)


def test_windows_are_read_whole() -> None:
    """A budget is of full attention: here the layers are the reference's, which a first layer that
    left out blocks of its window would not be."""
    spec = random_spec(3, 2, 32, [400, None], key_summaries=True)
    checkpoint = RandomCheckpoint(spec)
    tokens, budgets = [random_tokens(0, 500)], np.full(500, MIN_BUDGET_BLOCKS + 2, np.int32)
    expected = compute(spec, RoundingReference(spec, checkpoint), tokens, [{0: 500}], budgets)[0]
    actual = compute(spec, random_cpu_backend(spec, checkpoint, 2), tokens, [{0: 500}], budgets)[0]
    assert np.quantile(np.abs(actual - expected), 0.99) < TOLERANCE


@pytest.mark.parametrize("kv_format", ["bf16", "q8", "k8v4"])
def test_a_nan_is_not_passed_over(kv_format: str) -> None:
    """A block with a NaN is chosen by every later query, and is read back with it."""
    spec = random_spec(3, 2, 32, [None], kv_format, key_summaries=True)
    checkpoint = RandomCheckpoint(spec)
    checkpoint.rows["embed_tokens.weight"][0] = 0xFF  # token 0 is NaN
    tokens = random_tokens(0, 700)
    tokens[170] = 0
    backend = random_cpu_backend(spec, checkpoint, num_threads=2)
    budgets = np.full(700, MIN_BUDGET_BLOCKS + 1, np.int32)
    logits = compute(spec, backend, [tokens], [{0: 640}, {0: 60}], budgets)[0]
    assert np.isfinite(logits[:128]).all()  # the chunk with the NaN is all that it can spoil
    assert np.isnan(logits[170:]).any(axis=1).all()


def test_a_budget_needs_summaries() -> None:
    spec = random_spec(3, 2, 32, [None])
    backend = random_cpu_backend(spec, RandomCheckpoint(spec), 1)
    for budget in (MIN_BUDGET_BLOCKS, MIN_BUDGET_BLOCKS - 1):
        with pytest.raises(IndexError, match="budget"):
            compute(spec, backend, [random_tokens(0, 9)], [{0: 9}], np.full(9, budget, np.int32))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("kv_format", ["bf16", "k8v4"])
def test_sparse_reading_is_of_the_position_only(kv_format: str) -> None:
    spec = random_spec(3, 2, 32, [None, None], kv_format, key_summaries=True)
    checkpoint = RandomCheckpoint(spec, "Q8_0")
    tokens = [random_tokens(i, n) for i, n in enumerate([700, 33, 420])]
    lengths = [len(sequence) for sequence in tokens]
    budgets = np.where(np.arange(MAX_MODEL_LEN) < 350, 10, 13).astype(np.int32)
    whole = [{s: n} for s, n in enumerate(lengths)]
    expected = compute(spec, random_cpu_backend(spec, checkpoint, 1), tokens, whole, budgets)
    for num_threads in (1, 2, 3):
        backend = random_cpu_backend(spec, checkpoint, num_threads)
        steps = random_steps(num_threads, lengths)
        actual = compute(spec, backend, tokens, steps, budgets)
        for logits, right in zip(actual, expected, strict=True):
            np.testing.assert_array_equal(logits.view(np.uint32), right.view(np.uint32))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize(
    ("format_name", "kv_format"),
    [("F16", "bf16"), ("Q8_0", "bf16"), ("Q8_0", "q8"), ("Q8_0", "k8v4")],
)
def test_the_share_of_the_work_does_not_matter(format_name: str, kv_format: str) -> None:
    """Sequences of mixed lengths: each by itself on one thread, and all in random steps on
    several threads, more than there are cores."""
    spec = random_spec(3, 2, 32, [None, 24, PARTITION + 1], kv_format)
    checkpoint = RandomCheckpoint(spec, format_name)
    tokens = [random_tokens(i, n) for i, n in enumerate([2 * PARTITION + 3, 1, 33, 60, 544])]
    lengths = [len(sequence) for sequence in tokens]
    whole = [{s: n} for s, n in enumerate(lengths)]
    expected = compute(spec, random_cpu_backend(spec, checkpoint, 1), tokens, whole)
    for num_threads in (1, 2, 3, 8):
        backend = random_cpu_backend(spec, checkpoint, num_threads)
        actual = compute(spec, backend, tokens, random_steps(num_threads, lengths))
        for logits, right in zip(actual, expected, strict=True):
            np.testing.assert_array_equal(logits.view(np.uint32), right.view(np.uint32))


@pytest.mark.usefixtures("isa")
def test_a_nan_stays_in_its_sequence() -> None:
    spec = random_spec(3, 2, 32, [None, 24])
    checkpoint = RandomCheckpoint(spec)
    checkpoint.rows["embed_tokens.weight"][0] = 0xFF  # token 0 is NaN
    backend = random_cpu_backend(spec, checkpoint, num_threads=2)
    good, bad = random_tokens(0, 600), random_tokens(1, 100)
    bad[50] = 0
    alone = compute(spec, backend, [good], [{0: 600}])[0]
    steps = [{1: 60, 0: 70}, {0: 400, 1: 40}, {0: 130}]  # good takes the blocks of bad
    actual, broken = compute(spec, backend, [good, bad], steps)
    assert np.isnan(broken[50:]).all()
    np.testing.assert_array_equal(actual, alone)


@pytest.mark.parametrize("isa", _native.supported_isas())
@pytest.mark.parametrize("value", [1e-45, 1e-38, 3e-37, 4e-37, 1e-35])
def test_tiny_activations_lose_no_more_than_themselves(value: float, isa: str) -> None:
    """127 / value is beyond float32 for the first three."""
    raw = np.full((16, 34), 100, np.uint8)
    raw[:, :2] = np.ones((16, 1), np.float16).view(np.uint8)
    tiles = np.empty(_native.tile_bytes("Q8_0", 32), np.uint8)
    _native.repack("Q8_0", raw, 32, tiles)
    x = np.full((1, 32), value, np.float32)
    actual = _native.matmul(_native.Matrix("Q8_0", 16, 32, tiles), x, isa, 1)
    assert (np.abs(actual - 3200 * value) <= 3201 * value).all()


def test_a_batch_that_is_none_is_refused() -> None:
    """The numbers of a batch are checked before anything is read at them."""
    spec = random_spec(1, 1, 16, [None])
    model = random_cpu_backend(spec, RandomCheckpoint(spec), 1)._native
    pool = np.zeros((4, 2 * 32 * 16 * 2), np.uint8)
    model.bind_kv(0, pool)
    positions = np.arange(64, dtype=np.int32)  # those after the batch continue it

    def forward(
        first: int, query_start: list[int], num_logits: int = 1, temperature: float = 1.0
    ) -> None:
        num_seqs = len(query_start) - 1
        tables = np.tile(np.arange(4, dtype=np.int32), (num_seqs, 1))
        starts, last = np.array(query_start, np.int32), np.zeros(num_logits, np.int32)
        model.forward(
            np.zeros(2, np.int32),
            positions[:2] + np.int32(first),
            starts,
            [tables],
            [],
            last,
            np.full(num_logits, temperature, np.float32),
            np.zeros(num_logits, np.bool_),
        )

    forward(0, [0, 2])
    for first, query_start, message in (
        (0, [0, 20, 2], "query_start"),
        (0, [0, 0, 2], "query_start"),
        (0, [0, -1, 2], "query_start"),
        (0, [0, 3], "query_start"),
        (2**31 - 2, [0, 2], "max_model_len"),
        (-1, [0, 2], "max_model_len"),
        (127, [0, 2], "block table"),
    ):
        with pytest.raises(IndexError, match=message):
            forward(first, query_start)
    with pytest.raises(IndexError, match="logits"):
        forward(0, [0, 2], num_logits=3)
    for temperature in (0.0, -1.0, np.nan):
        with pytest.raises(IndexError, match="temperature"):
            forward(0, [0, 2], temperature=temperature)


def test_arrays_that_are_written_are_never_copied() -> None:
    """What the caller reads afterwards would be another array."""
    spec = random_spec(1, 1, 16, [None])
    model = random_cpu_backend(spec, RandomCheckpoint(spec), 1)._native
    with pytest.raises(TypeError):
        model.bind_kv(0, np.zeros((8, 2048), np.uint8)[::2])
    with pytest.raises(TypeError):
        model.bind_kv(0, np.zeros((4, 2048), np.float32))
    with pytest.raises(TypeError):
        _native.repack("F32", np.zeros((16, 128), np.uint8), 32, np.zeros(4096, np.uint8)[::2])


def test_a_model_needs_a_thread() -> None:
    for num_threads in (0, -1):
        with pytest.raises(ValueError, match="thread"):
            _native.Model("portable", num_threads, 32, 16, 1e-5, 1.0)


@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_AS and /proc")
def test_threads_that_cannot_start_raise() -> None:
    import resource

    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (in_use + (64 << 20), hard))  # a few stacks more
    try:
        with pytest.raises(RuntimeError):
            _native.Model("portable", 1000, 32, 16, 1e-5, 1.0)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
