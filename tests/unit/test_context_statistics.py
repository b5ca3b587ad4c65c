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
    assert accuracy(scores).lower_bound == pytest.approx(0.05 ** (1 / n), abs=1e-3)
    assert (verdict(retention(scores, scores), 0.02) == "kept") is kept


@pytest.mark.parametrize(("num_worse", "exact_bound"), [(1, 0.0312), (4, 0.0600), (15, 0.1490)])
def test_bounds_of_right_and_wrong_answers_are_the_exact_ones(
    num_worse: int, exact_bound: float
) -> None:
    """The bounds of Clopper and Pearson for 150 questions, one-sided, at 95%."""
    right = {"a": [[1.0] * 150]}
    some_wrong = {"a": [[0.0] * num_worse + [1.0] * (150 - num_worse)]}
    assert retention(right, some_wrong).lower_bound == pytest.approx(-exact_bound, abs=1.5e-3)


@given(pairs(), st.data())
def test_a_worse_answer_never_gives_a_better_bound(pair, data) -> None:  # type: ignore[no-untyped-def]
    exact, mode = ({task: values[:1] for task, values in of.items()} for of in pair)
    worse = {task: [list(values[0])] for task, values in mode.items()}
    [values] = worse[data.draw(st.sampled_from(sorted(worse)))]
    values[data.draw(st.integers(0, len(values) - 1))] -= 0.5
    assert retention(exact, worse).lower_bound <= retention(exact, mode).lower_bound


def test_two_haystacks_that_lose_alike_prove_little() -> None:
    """2 of 100 questions: up to 6.2 points."""
    right = {"a": [[1.0] * 50] * 2}
    assert retention(right, {"a": [[0.0] + [1.0] * 49] * 2}).lower_bound < -0.055


def test_a_task_of_few_questions_weighs_as_the_others() -> None:
    scores = {"a": [[1.0] * 192], "b": [[1.0] * 8]}
    exact_bound = (1 - 0.05 ** (1 / 8)) / 2  # of b alone: 8 questions without a loss
    assert retention(scores, scores).lower_bound <= -0.95 * exact_bound


def test_gains_among_few_questions_prove_no_more() -> None:
    exact = {"a": [[0.0, 1.0, 1.0], [1.0, 1.0, 1.0]]}
    mode = {"a": [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]}
    assert verdict(retention(exact, mode), 0.02) == "open"


def test_verdicts() -> None:
    rng = np.random.default_rng(0)
    right = {"a": np.ones((20, 20)).tolist()}
    bad = {"a": (rng.random((20, 20)) > 0.2).astype(float).tolist()}
    one = {"a": [[0.0] + [1.0] * 19, *[[1.0] * 20] * 19]}
    assert verdict(retention(right, bad), 0.02) == "lost"
    assert verdict(retention(right, one), 0.02) == "kept"
    assert verdict(retention(bad, right), 0.02) == "kept"  # 400 questions, no loss
    few = {"a": [[1.0] * 9]}
    assert verdict(retention(few, {"a": [[0.0] + [1.0] * 8]}), 0.02) == "open"


@pytest.mark.parametrize(("num_haystacks", "least"), [(4, 0.84), (20, 0.9)])
def test_intervals_cover_the_truth_about_as_often_as_they_say(
    num_haystacks: int, least: float
) -> None:
    """Haystacks of 8 questions that share its luck."""
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(150):
        luck = rng.beta(8, 2, size=(num_haystacks, 1))  # mean 0.8
        scores = (rng.random((num_haystacks, 8)) < luck).astype(float)
        estimate = accuracy({"a": scores.tolist()})
        covered += estimate.low <= 0.8 <= estimate.high
    assert least < covered / 150 < 1.0


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
