"""What a step tells of its logits: the same as numpy finds in them, to the bit the same however the
work was shared out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from random_models import RandomCheckpoint, random_cpu_backend, random_spec

from tael.backends.base import ForwardBatch, HeadOutput
from tael.backends.cpu.backend import CPUBackend
from tael.backends.reference.head import head_output
from tael.config import BLOCK_SIZE
from tael.models.spec import ModelSpec, cache_groups
from tael.quant.dequantize import dequantize

HIDDEN_SIZE = 64
UNIFORMS = (0.0, 0.01, 0.3, 0.5, 0.77, 0.999, 1 - 2.0**-52)


def backend_with_logits(logits: NDArray[np.float32], num_threads: int) -> CPUBackend:
    """Token r is followed by row r of ``logits`` [num_rows <= 64, vocab_size]: it is embedded as
    unit vector r, which attention and feed-forward leave alone, and that the norm makes 8 times
    as long."""
    spec = replace(random_spec(1, 1, 32, [None]), vocab_size=logits.shape[1], norm_eps=0.0)
    checkpoint = RandomCheckpoint(spec)
    weights = np.zeros((logits.shape[1], HIDDEN_SIZE), np.float32)
    # Infinite ones would make the other rows NaN; the lowest overflows when multiplied.
    weights[:, : len(logits)] = np.maximum(logits.T / 8, np.finfo(np.float32).min)
    checkpoint.rows["lm_head.weight"] = weights.view(np.uint8)
    checkpoint.rows["norm.weight"] = np.ones((1, HIDDEN_SIZE), np.float32).view(np.uint8)
    units = np.eye(logits.shape[1], HIDDEN_SIZE, dtype=np.float32)
    checkpoint.rows["embed_tokens.weight"] = units.view(np.uint8)
    for name, raw in checkpoint.rows.items():
        if name.startswith("layers.") and "norm" not in name:
            raw[:] = 0
    return bound(spec, checkpoint, num_threads)


def bound(spec: ModelSpec, checkpoint: RandomCheckpoint, num_threads: int) -> CPUBackend:
    """Ready for one sequence of 64 tokens."""
    backend = random_cpu_backend(spec, checkpoint, num_threads)
    (group,) = cache_groups(spec, BLOCK_SIZE)
    backend.bind_kv([np.zeros((64 // BLOCK_SIZE, group.block_bytes), np.uint8)])
    return backend


def forward(
    backend: CPUBackend,
    tokens: NDArray[np.int32],
    temperatures: NDArray[np.float32],
    full_logits: bool = True,
) -> HeadOutput:
    """One sequence, and what is known after each of its tokens. Arrays are views."""
    n = len(tokens)
    return backend.forward(
        ForwardBatch(
            token_ids=tokens,
            positions=np.arange(n, dtype=np.int32),
            query_start=np.array([0, n], np.int32),
            block_tables=(np.arange(-(-n // BLOCK_SIZE), dtype=np.int32)[None],),
            logits_indices=np.arange(n, dtype=np.int32),
            temperatures=temperatures,
            full_logits=np.full(n, full_logits),
        )
    )


def assert_equals_numpy(head: HeadOutput, temperatures: NDArray[np.float32]) -> None:
    expected = head_output(head.logits, temperatures)
    np.testing.assert_array_equal(head.top_token_ids, expected.top_token_ids)
    np.testing.assert_array_equal(head.top_logits, expected.top_logits)
    for name in ("sum_exp", "sum_exp_at_temperature"):
        np.testing.assert_allclose(getattr(head, name), getattr(expected, name), rtol=2e-6)
    for row, temperature in enumerate(temperatures):
        logits = head.logits[row].astype(np.float64)
        sums = np.exp((logits - logits.max()) / temperature).cumsum()
        sums /= sums[-1]
        for uniform in UNIFORMS:
            token_id, logit = head.draw(row, uniform)
            assert logit == head.logits[row, token_id] > -np.inf
            assert (sums[token_id - 1] if token_id else 0.0) - 1e-6 <= uniform
            assert uniform <= sums[token_id] + 1e-6


def some_logits(kind: str, num_rows: int, vocab_size: int) -> NDArray[np.float32]:
    rng = np.random.default_rng(vocab_size + num_rows)
    logits = (4 * rng.standard_normal((num_rows, vocab_size))).astype(np.float32)
    if kind == "ties":
        logits = np.round(logits)
    elif kind == "all equal":
        logits[:] = 1.5
    elif kind == "ascending":
        logits = np.sort(logits)
    elif kind == "impossible":
        logits[rng.random(logits.shape) < 0.97] = -np.inf
        logits[:, vocab_size // 2] = 0
    return logits


def some_temperatures(num_rows: int) -> NDArray[np.float32]:
    return np.resize(np.array([0.7, 1.0, 0.05, 3.0, 1e-20], np.float32), num_rows)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("kind", ["random", "ties", "all equal", "ascending", "impossible"])
@pytest.mark.parametrize(("num_rows", "vocab_size"), [(1, 65), (5, 7), (3, 1000), (64, 4003)])
def test_equals_numpy(kind: str, num_rows: int, vocab_size: int) -> None:
    logits = some_logits(kind, num_rows, vocab_size)
    backend = backend_with_logits(logits, num_threads=2)
    tokens = np.arange(num_rows, dtype=np.int32) % vocab_size
    head = forward(backend, tokens, some_temperatures(num_rows))
    np.testing.assert_array_equal(head.logits, logits[tokens])
    assert_equals_numpy(head, some_temperatures(num_rows))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("format_name", ["F16", "Q8_0", "Q4_1"])
def test_equals_numpy_in_every_kind_of_format(format_name: str) -> None:
    spec = replace(random_spec(1, 1, 32, [None]), vocab_size=1003)
    backend = bound(spec, RandomCheckpoint(spec, format_name), num_threads=2)
    for num_rows in (1, 2, 7, 64):
        tokens = np.arange(num_rows, dtype=np.int32)
        assert_equals_numpy(
            forward(backend, tokens, some_temperatures(num_rows)), some_temperatures(num_rows)
        )


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("format_name", ["F32", "Q8_0"])
def test_the_share_of_the_work_does_not_matter(format_name: str) -> None:
    """All rows of a step on several threads, and each by itself on one: the same bits, drawn
    tokens included, whether or not whole rows are asked for."""
    spec = replace(random_spec(1, 1, 32, [None]), vocab_size=2500)
    checkpoint = RandomCheckpoint(spec, format_name)
    weights = checkpoint.rows["lm_head.weight"]
    weights[1000:2000] = weights[:1000]  # ties, across threads
    tokens, temperatures = np.arange(40, dtype=np.int32), some_temperatures(40)

    def told(backend: CPUBackend, last: slice, full_logits: bool) -> list[bytes]:
        """Of rows ``last`` of the step of all tokens up to there."""
        head = forward(backend, tokens[: last.stop], temperatures[: last.stop], full_logits)
        return [
            b"".join(
                (
                    head.top_token_ids[row].tobytes(),
                    head.top_logits[row].tobytes(),
                    head.sum_exp[row].tobytes(),
                    head.sum_exp_at_temperature[row].tobytes(),
                    repr([head.draw(row, uniform) for uniform in UNIFORMS]).encode(),
                )
            )
            for row in range(last.start, last.stop)
        ]

    alone = bound(spec, checkpoint, num_threads=1)
    expected = [told(alone, slice(row, row + 1), True)[0] for row in range(40)]
    for num_threads in (1, 2, 3, 8):
        backend = bound(spec, checkpoint, num_threads)
        for full_logits in (True, False):
            assert told(backend, slice(0, 40), full_logits) == expected
            assert told(backend, slice(0, 3), full_logits) == expected[:3]


@pytest.mark.usefixtures("isa")
def test_rounding_hardly_shows_in_what_is_likely() -> None:
    """Of a row in two int8 terms the second is left out for unlikely tokens only."""
    num_likely = 16  # half of kRefinedTokens in csrc/model/lm_head.hpp: the last ones change places
    spec = replace(random_spec(1, 1, 32, [None]), vocab_size=40000)
    checkpoint = RandomCheckpoint(spec, "Q8_0")
    for name, raw in checkpoint.rows.items():
        if name.startswith("layers.") and "norm" not in name:
            raw[:] = 0
    tokens = np.arange(10, dtype=np.int32)
    hidden, weights = (
        dequantize("Q8_0", checkpoint.rows[name], HIDDEN_SIZE).astype(np.float64)
        for name in ("embed_tokens.weight", "lm_head.weight")
    )
    hidden = hidden[tokens] / np.sqrt((hidden[tokens] ** 2).mean(1, keepdims=True) + spec.norm_eps)
    exact = hidden * checkpoint.rows["norm.weight"].view(np.float32) @ weights.T
    head = forward(bound(spec, checkpoint, num_threads=2), tokens, some_temperatures(10))
    errors = np.abs(head.logits - exact)
    likely = np.take_along_axis(errors, head.top_token_ids[:, :num_likely], 1)
    assert 20 * likely.max() < np.median(errors)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("place", [0, 500, 1002, slice(None)])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_shows_in_the_sums(bad: float, place: int | slice) -> None:
    """But for some impossible tokens, which are no error."""
    logits = some_logits("random", 1, 1003)
    logits[0, place] = bad
    head = forward(backend_with_logits(logits, 2), np.zeros(1, np.int32), np.full(1, 0.5, "f"))
    is_error = bad != -np.inf or place == slice(None)
    assert np.isnan([head.sum_exp[0], head.sum_exp_at_temperature[0]]).tolist() == [is_error] * 2


def test_draws_outside_the_step_are_refused() -> None:
    backend = backend_with_logits(some_logits("random", 2, 100), num_threads=1)
    head = forward(backend, np.zeros(2, np.int32), np.ones(2, np.float32))
    for row, uniform in ((-1, 0.5), (2, 0.5), (0, -0.1), (0, 1.0), (0, np.nan)):
        with pytest.raises(IndexError):
            head.draw(row, uniform)
