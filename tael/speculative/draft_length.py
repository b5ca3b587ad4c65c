"""How many tokens to draft: the one place where speculation is weighed against its cost."""

from __future__ import annotations

from collections.abc import Sequence

TOKEN_COST = 0.15
"""Time that one more token adds to a step, in steps of a single token. Steps of 1 to 16 tokens lie
near this line for every model of the catalogue; benchmarks/speculation.py measures them."""


def draft_lengths(
    acceptance: Sequence[float], limits: Sequence[int], num_tokens: int, max_num_drafts: int
) -> list[int]:
    """The number of tokens to draft for each of several sequences of one step.

    The i-th drafted token of a sequence is accepted with probability ``acceptance ** i``, and
    each makes the step longer by ``TOKEN_COST``. So tokens are added, the likeliest first, as
    long as the expected tokens per unit of time rise. The step has ``num_tokens`` without
    drafts, all of which count as progress: beside a long prompt or many sequences a token takes
    nearly its full share of the time, and only near certainties are drafted.

    ``limits`` bound each sequence and ``max_num_drafts`` all of them.
    """
    lengths = [0] * len(limits)
    gains = [a if limit > 0 else 0.0 for a, limit in zip(acceptance, limits, strict=True)]
    progress, time = float(num_tokens), 1.0 + TOKEN_COST * (num_tokens - 1)
    for _ in range(max_num_drafts):
        best = max(range(len(gains)), key=gains.__getitem__)
        if gains[best] * time <= TOKEN_COST * progress:
            break
        progress += gains[best]
        time += TOKEN_COST
        lengths[best] += 1
        gains[best] = gains[best] * acceptance[best] if lengths[best] < limits[best] else 0.0
    return lengths
