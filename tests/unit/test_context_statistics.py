"""Intervals of the effective-context suite."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tael.evals.context.statistics import (
    Estimate,
    accuracy,
    effective_length,
    retention,
    verdict,
)

SCORE = st.sampled_from([0.0, 0.5, 1.0])
SHAPES = st.dictionaries(
    st.sampled_from("abc"), st.lists(st.integers(1, 4), min_size=1, max_size=4), min_size=1
)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[dict[str, list[list[float]]], dict[str, list[list[float]]]]:
    shapes = draw(SHAPES)
    first, second = (
        {
            task: [draw(st.lists(SCORE, min_size=n, max_size=n)) for n in counts]
            for task, counts in shapes.items()
        }
        for _ in range(2)
    )
    return first, second


@given(pairs())
def test_bounds_are_in_order(pair) -> None:  # type: ignore[no-untyped-def]
    for estimate in (accuracy(pair[0]), retention(*pair)):
        bounds = [estimate.low, estimate.lower_bound, estimate.upper_bound, estimate.high]
        assert bounds == sorted(bounds)
        assert estimate.low - 1e-9 <= estimate.mean <= estimate.high + 1e-9


@given(pairs())
def test_retention_is_the_difference_of_the_accuracies(pair) -> None:  # type: ignore[no-untyped-def]
    exact, mode = pair
    difference = accuracy(mode).mean - accuracy(exact).mean
    assert retention(exact, mode).mean == pytest.approx(difference)
    assert retention(mode, exact).mean == pytest.approx(-difference)


@given(pairs())
def test_a_mode_that_answers_alike_is_never_lost(pair) -> None:  # type: ignore[no-untyped-def]
    exact = pair[0]
    same = retention(exact, exact)
    assert same.mean == 0 and same.lower_bound < 0 < same.upper_bound
    assert verdict(same, 0.02) in ("kept", "open")


def test_tasks_weigh_the_same() -> None:
    assert accuracy({"a": [[1.0]], "b": [[0.0] * 9]}).mean == 0.5


@pytest.mark.parametrize(("n", "kept"), [(140, False), (155, True)])
def test_no_loss_among_few_questions_proves_little(n: int, kept: bool) -> None:
    """149 without a loss show less than 2 points at 95%."""
    scores = {"a": [[1.0] * n]}
    assert accuracy(scores).lower_bound == pytest.approx(0.05 ** (1 / n))
    assert (verdict(retention(scores, scores), 0.02) == "kept") is kept


def test_verdicts() -> None:
    rng = np.random.default_rng(0)
    right = {"a": np.ones((20, 20)).tolist()}
    bad = {"a": (rng.random((20, 20)) > 0.2).astype(float).tolist()}
    one = {"a": [[0.0] + [1.0] * 19, *[[1.0] * 20] * 19]}
    assert verdict(retention(right, bad), 0.02) == "lost"
    assert verdict(retention(right, one), 0.02) == "kept"
    assert verdict(retention(bad, right), 0.02) == "kept"
    few = {"a": [[1.0] * 9]}
    assert verdict(retention(few, {"a": [[0.0] + [1.0] * 8]}), 0.02) == "open"


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    """20 haystacks of 8 questions that share a haystack's luck."""
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(150):
        luck = rng.beta(8, 2, size=(20, 1))  # mean 0.8
        scores = (rng.random((20, 8)) < luck).astype(float)
        estimate = accuracy({"a": scores.tolist()})
        covered += estimate.low <= 0.8 <= estimate.high
    assert 0.88 < covered / 150 < 1.0


def test_more_haystacks_make_narrower_intervals() -> None:
    rng = np.random.default_rng(2)
    scores = (rng.random((80, 4)) < 0.7).astype(float).tolist()
    few, many = accuracy({"a": scores[:10]}), accuracy({"a": scores})
    assert many.high - many.low < few.high - few.low


def test_one_haystack_still_has_an_interval() -> None:
    estimate = accuracy({"a": [[1.0, 0.0, 1.0, 1.0]]})
    assert estimate.low < 0.75 < estimate.high


def of(bound: float) -> Estimate:
    return Estimate(bound, bound, bound, bound, bound, 1)


def test_effective_length_ends_at_the_first_failure() -> None:
    assert effective_length({1024: of(0.9), 2048: of(0.86), 4096: of(0.8)}, 0.85) == 2048
    assert effective_length({1024: of(0.9), 2048: of(0.8), 4096: of(0.9)}, 0.85) == 1024
    assert effective_length({1024: of(0.8)}, 0.85) == 0
