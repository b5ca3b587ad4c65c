"""Means with intervals, from scores that come in haystacks.

Questions about one haystack share its luck, so the bootstrap draws whole haystacks. It is blind
where nothing varies: of ten right answers it makes an interval of no width. There the bound is the
exact one for a share of which no exception was seen in n trials (for 95%, about 3/n).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


def verdict(retention: Estimate, margin: float) -> str:
    """ "kept" if the loss is below ``margin`` at 95%; "lost" if there is one at 95%, and it is not
    shown to be below; "open" if there are too few questions to tell."""
    if retention.lower_bound > -margin:
        return "kept"
    return "lost" if retention.upper_bound < 0 else "open"


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
    resampled = np.mean([_resampled_means(task, rng) for task in scores.values()], axis=0)
    low, lower_bound, upper_bound, high = np.quantile(resampled, [0.025, 0.05, 0.95, 0.975])
    mean = float(np.mean([np.mean(np.concatenate(task)) for task in scores.values()]))
    values = np.concatenate([np.concatenate(task) for task in scores.values()])
    if np.ptp(values) == 0.0:
        both, one = (1.0 - alpha ** (1.0 / len(values)) for alpha in (0.025, 0.05))
        low, high = max(least, mean - both), min(most, mean + both)
        lower_bound, upper_bound = max(least, mean - one), min(most, mean + one)
    return Estimate(
        mean, float(low), float(high), float(lower_bound), float(upper_bound), len(values)
    )


def _resampled_means(
    haystacks: Sequence[Sequence[float]], rng: np.random.Generator
) -> NDArray[np.float64]:
    """[NUM_RESAMPLES] means over the questions of haystacks drawn with replacement; of one
    haystack, over questions drawn so."""
    clusters = haystacks if len(haystacks) > 1 else [[score] for score in haystacks[0]]
    sums = np.array([sum(scores) for scores in clusters])
    counts = np.array([len(scores) for scores in clusters])
    drawn = rng.integers(0, len(clusters), (NUM_RESAMPLES, len(clusters)))
    means: NDArray[np.float64] = sums[drawn].sum(1) / counts[drawn].sum(1)
    return means
