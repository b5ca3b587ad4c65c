"""Choosing the next token of a request from its logits."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tael.request import Request, SamplingParams, TokenLogprobs

Logits = NDArray[np.float32]
TokenIds = NDArray[np.intp]


class Sampler:
    """Chooses the tokens of one request.

    There is one sampler per request and it reads nothing else, so no request can influence
    another. The draw for output position i is a function of (seed, index, i): the same whatever
    the batch was, and after a preemption. ``index`` numbers the completions of one prompt.
    """

    def __init__(self, request: Request, index: int = 0) -> None:
        self._request = request
        seed = request.params.seed
        seed = secrets.randbits(64) if seed is None else seed % 2**64
        self._key = np.array([seed, index], dtype=np.uint64)
        self._repeats = request.params.repetition_penalty != 1.0
        prompt_ids = request.token_ids[: request.num_prompt_tokens] if self._repeats else []
        self._prompt_ids = np.unique(np.array(prompt_ids, dtype=np.int64))

    def sample(
        self, logits: Logits, accepted: Sequence[int] = ()
    ) -> tuple[int, TokenLogprobs | None]:
        """The next token, given ``logits`` [vocab_size], and the log-probabilities asked for.
        ``accepted`` are tokens that this step has already put after those of the request.

        Raises FloatingPointError if the logits have a NaN or no finite maximum.
        """
        request, params = self._request, self._request.params
        adjusted = self.adjust(logits, accepted)
        if not np.isfinite(adjusted.max()):  # max() propagates NaN
            raise FloatingPointError("the logits are not finite")
        if params.temperature == 0.0:
            token_id = int(adjusted.argmax())
        else:
            ids, weights = candidates(adjusted, params)
            position = request.num_output_tokens + len(accepted)
            bits = np.random.Philox(key=self._key, counter=position).random_raw()
            token_id = int(ids[draw(weights, (int(bits) >> 12) * 2.0**-52)])
        if params.logprobs is None:
            return token_id, None
        return token_id, token_logprobs(logits, token_id, params.logprobs)

    def adjust(self, logits: Logits, accepted: Sequence[int] = ()) -> Logits:
        """Logits after the bias and penalties that the request asks for: a copy if any."""
        request, params = self._request, self._request.params
        appears = params.presence_penalty != 0.0 or params.frequency_penalty != 0.0
        if not (params.logit_bias or self._repeats or appears):
            return logits
        adjusted = logits.copy()
        for token_id, bias in params.logit_bias.items():
            adjusted[token_id] += bias
        output, counts = np.unique(
            np.array([*request.output_token_ids, *accepted], dtype=np.int64), return_counts=True
        )
        if self._repeats:  # over prompt and output, as Hugging Face does
            seen = np.union1d(self._prompt_ids, output)
            score = adjusted[seen]
            penalty = np.float32(params.repetition_penalty)
            adjusted[seen] = np.where(score < 0, score * penalty, score / penalty)
        if appears:  # over the output only, as OpenAI does
            amount = params.presence_penalty + params.frequency_penalty * counts
            adjusted[output] -= amount.astype(np.float32)
        return adjusted


def candidates(logits: Logits, params: SamplingParams) -> tuple[TokenIds, Logits]:
    """Tokens that may be drawn, in order of id, and their weights (the largest of all is 1).

    As in Hugging Face's warpers, each filter takes the distribution that the one before it
    left, renormalised: temperature, then top_k, then top_p, then min_p. Of tokens that are
    equally likely at a filter's edge, those with the lowest ids stay.
    """
    # Below this a division could overflow; draws are greedy long before.
    logits = (logits - logits.max()) / np.float32(max(params.temperature, 1e-20))
    ids = np.arange(len(logits))
    if 0 < params.top_k < len(ids):
        ids = _largest(logits, params.top_k)
        logits = logits[ids]
    weights = np.exp(logits)
    if params.top_p < 1.0:
        nucleus = _nucleus(logits, weights, params.top_p)
        ids, weights = ids[nucleus], weights[nucleus]
    if params.min_p > 0.0:
        likely = weights >= params.min_p
        ids, weights = ids[likely], weights[likely]
    return ids, weights


def draw(weights: Logits, uniform: float) -> int:
    """The index at quantile ``uniform`` of [0, 1 - 2**-52]. Never one of weight zero."""
    # In two levels, because running sums of a whole vocabulary cost more than its exponentials.
    starts = np.arange(0, len(weights), 512)
    sums = np.add.reduceat(weights, starts, dtype=np.float64).cumsum()
    target = uniform * sums[-1]
    part = int(np.searchsorted(sums, target, side="right"))
    inside = weights[starts[part] : starts[part] + 512]
    rest = target - (sums[part - 1] if part else 0.0)
    index = int(np.searchsorted(inside.cumsum(dtype=np.float64), rest, side="right"))
    # The sums of the two levels are rounded differently: stay within this part.
    return int(starts[part]) + min(index, int(np.flatnonzero(inside)[-1]))


def token_logprobs(logits: Logits, token_id: int, num_top: int) -> TokenLogprobs:
    """Log-probabilities of ``token_id`` and of the ``num_top`` most likely tokens."""
    maximum = logits.max()
    shift = float(maximum) + float(np.log(np.exp(logits - maximum).sum(dtype=np.float64)))
    top = _largest(logits, min(num_top, len(logits)))
    top = top[np.argsort(-logits[top], kind="stable")]
    return TokenLogprobs(
        token_id=token_id,
        logprob=float(logits[token_id]) - shift,
        top=tuple((int(i), float(logits[i]) - shift) for i in top),
    )


def _nucleus(logits: Logits, weights: Logits, top_p: float) -> TokenIds:
    """Indices, ascending, of the fewest most likely tokens that hold ``top_p`` of the weight.

    ``logits`` are at most 0. Weight is added up per level of 1/64 nat; only the tokens of the
    level in which the sum passes ``top_p`` are sorted.
    """
    target = top_p * weights.sum(dtype=np.float64)
    # Tokens that have less than this hold, all together, less than what may be left out.
    heavy = np.flatnonzero(weights * len(weights) >= weights.sum(dtype=np.float64) - target)
    logits, weights = logits[heavy], weights[heavy]
    level = np.minimum(logits * np.float32(-64), np.float32(4095)).astype(np.intp)
    sums = np.bincount(level, weights).cumsum()
    last = min(int(np.searchsorted(sums, target)), len(sums) - 1)
    edge = np.flatnonzero(level == last)
    edge = edge[np.argsort(-logits[edge], kind="stable")]
    above = sums[last - 1] if last else 0.0
    num_edge = np.searchsorted(above + weights[edge].cumsum(dtype=np.float64), target) + 1
    keep = level < last
    keep[edge[:num_edge]] = True
    nucleus: TokenIds = heavy[keep]
    return nucleus


def _largest(values: Logits, count: int) -> TokenIds:
    """Indices, ascending, of the ``count`` largest values; of equal ones the first."""
    if count == 0:
        return np.arange(0)
    # The count-th largest of the maxima of disjoint sets is at most the count-th largest value.
    # Dropping what lies below it takes one comparison; to partition everything takes ten times
    # as long.
    floor = -np.inf
    num_sets = len(values) // 64
    if count <= num_sets:
        maxima = values[: num_sets * 64].reshape(64, num_sets).max(axis=0)
        floor = np.partition(maxima, -count)[-count]
    indices = np.flatnonzero(values >= floor)
    values = values[indices]
    edge = np.partition(values, -count)[-count]
    keep = values > edge
    ties = np.flatnonzero(values == edge)
    keep[ties[: count - int(keep.sum())]] = True
    largest: TokenIds = indices[keep]
    return largest
