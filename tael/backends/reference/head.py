"""What a step tells of its logits, in numpy."""

from __future__ import annotations

from functools import partial

import numpy as np
from numpy.typing import NDArray

from tael.backends.base import NUM_CANDIDATES, HeadOutput
from tael.backends.reference.layers import Float32


def head_output(logits: Float32, temperatures: Float32) -> HeadOutput:
    """That of ``logits`` [num_logits, vocab_size]."""
    order = np.argsort(-logits, axis=-1, kind="stable")[:, :NUM_CANDIDATES]
    weights = _weights(logits, temperatures)
    return HeadOutput(
        top_token_ids=order.astype(np.int32),
        top_logits=np.take_along_axis(logits, order, -1),
        sum_exp=_weights(logits, np.ones_like(temperatures)).sum(-1),
        sum_exp_at_temperature=weights.sum(-1),
        logits=logits,
        draw=partial(_draw, logits, weights),
    )


def _weights(logits: Float32, temperatures: Float32) -> NDArray[np.float64]:
    with np.errstate(invalid="ignore", over="ignore"):  # of a row that is not finite
        below = logits.astype(np.float64) - logits.max(-1, keepdims=True)
        weights: NDArray[np.float64] = np.exp(below / temperatures[:, None])
    return weights


def _draw(
    logits: Float32, weights: NDArray[np.float64], row: int, uniform: float
) -> tuple[int, float]:
    sums = weights[row].cumsum()
    token_id = int(np.searchsorted(sums, uniform * sums[-1], side="right"))
    return token_id, float(logits[row, token_id])
