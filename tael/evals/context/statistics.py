"""Means with intervals, from scores that come in haystacks.

Two things are uncertain, and every bound is the wider of two. Questions about one haystack share
its luck, so one bootstrap draws whole haystacks; the deviations of its means are widened by
sqrt(m / (m - 1)), since m haystacks show so much less than there is. It is blind where haystacks
are few or alike: of ten right answers it makes an interval of no width. The other gives every
question a random weight (Bayesian bootstrap, Rubin 1981), after one more was added that was
answered as badly as can be, or for an upper bound as well. With right and wrong answers to one task
that is the exact bound of Clopper and Pearson: 149 questions without a loss show less than 2
points. The one more is of the task with the fewest questions, in which it weighs the most, as in
Fay and Feuer 1997.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Scores: TypeAlias = Mapping[str, Sequence[Sequence[float]]]
"""By task, for each haystack those of its questions."""

NUM_RESAMPLES = 4000


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over tasks, all of the same weight, with bounds that hold at 95%."""

    mean: float
    low: float
    high: float
    """``low`` and ``high``: of the interval that has both."""
    lower_bound: float
    """One-sided."""
    upper_bound: float
    num_questions: int


def accuracy(scores: Scores) -> Estimate:
    """The mean of scores between 0 and 1."""
    return _estimate(scores, 0.0, 1.0)


def retention(exact: Scores, mode: Scores) -> Estimate:
    """What ``mode`` scores more (less: below 0) than ``exact`` on the same questions."""
    differences = {
        task: [
            [m - e for e, m in zip(es, ms, strict=True)]
            for es, ms in zip(exact[task], mode[task], strict=True)
        ]
        for task in exact
    }
    return _estimate(differences, -1.0, 1.0)


def verdict(change: Estimate, margin: float) -> str:
    """ "kept" if the loss is below ``margin`` at 95%; "lost" if there is one at 95%, and it is not
    shown to be below; "open" if there are too few questions to tell."""
    if change.lower_bound > -margin:
        return "kept"
    return "lost" if change.upper_bound < 0 else "open"


def effective_length(estimates: Mapping[int, Estimate], threshold: float) -> int:
    """The longest length whose lower bound reaches ``threshold``, as that of every shorter one
    does; 0 if there is none."""
    longest = 0
    for length, estimate in sorted(estimates.items()):
        if estimate.lower_bound < threshold:
            break
        longest = length
    return longest


def _estimate(scores: Scores, least: float, most: float) -> Estimate:
    rng = np.random.default_rng(0)
    quantiles = [0.025, 0.05, 0.95, 0.975]
    of_haystacks = np.quantile(_means_of_haystacks(scores, rng), quantiles)
    lows = np.quantile(_means_of_questions(scores, least, rng), quantiles[:2])
    highs = np.quantile(_means_of_questions(scores, most, rng), quantiles[2:])
    low, lower_bound = np.maximum(least, np.minimum(of_haystacks[:2], lows))
    upper_bound, high = np.minimum(most, np.maximum(of_haystacks[2:], highs))
    return Estimate(
        mean=float(np.mean([np.mean(np.concatenate(task)) for task in scores.values()])),
        low=float(low),
        high=float(high),
        lower_bound=float(lower_bound),
        upper_bound=float(upper_bound),
        num_questions=_num_questions(scores.values()),
    )


def _means_of_haystacks(scores: Scores, rng: np.random.Generator) -> NDArray[np.float64]:
    """[NUM_RESAMPLES] means with the haystacks of each task drawn with replacement."""
    of_tasks = []
    for haystacks in scores.values():
        m = len(haystacks)
        sums = np.array([sum(haystack) for haystack in haystacks])
        counts = np.array([len(haystack) for haystack in haystacks])
        drawn = rng.integers(0, m, (NUM_RESAMPLES, m))
        means, mean = sums[drawn].sum(1) / counts[drawn].sum(1), sums.sum() / counts.sum()
        of_tasks.append(mean + (means - mean) * np.sqrt(m / max(1, m - 1)))
    return _mean(of_tasks)


def _means_of_questions(
    scores: Scores, added: float, rng: np.random.Generator
) -> NDArray[np.float64]:
    """[NUM_RESAMPLES] means with random weights of the questions and of one more with the score
    ``added``."""
    smallest = min(scores, key=lambda task: _num_questions([scores[task]]))
    of_tasks = []
    for task, haystacks in scores.items():
        values = np.concatenate([*haystacks, [added] if task == smallest else []])
        weights = rng.standard_exponential((NUM_RESAMPLES, len(values)))
        of_tasks.append(weights @ values / weights.sum(1))
    return _mean(of_tasks)


def _mean(of_tasks: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    mean: NDArray[np.float64] = np.mean(of_tasks, axis=0)
    return mean


def _num_questions(tasks: Iterable[Sequence[Sequence[float]]]) -> int:
    return sum(len(haystack) for task in tasks for haystack in task)
