"""Choosing the next token of a request from its logits.

A step tells the most likely tokens of each row and two sums over all of it. That is enough for
greedy choices, for filters that leave few tokens, and for log-probabilities; draws without filters
are left to the backend. Only for the rest are whole rows computed.
"""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tael.backends.base import NUM_CANDIDATES, HeadOutput
from tael.engine.grammar import TokenMask
from tael.request import Request, SamplingParams, TokenLogprobs

Logits = NDArray[np.float32]
TokenIds = NDArray[np.intp]


def needs_full_logits(params: SamplingParams) -> bool:
    """Whether a choice may have to look at a whole row. That follows from ``params`` alone."""
    if changes_logits(params):
        return True
    if params.temperature == 0.0 or not filters(params):
        return False
    return not 0 < params.top_k <= NUM_CANDIDATES


def changes_logits(params: SamplingParams) -> bool:
    """Whether there is a bias or a penalty."""
    return bool(
        params.logit_bias
        or params.repetition_penalty != 1.0
        or params.presence_penalty != 0.0
        or params.frequency_penalty != 0.0
    )


def filters(params: SamplingParams) -> bool:
    """Whether some tokens may not be drawn."""
    return params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0


def scaling_temperature(params: SamplingParams) -> float:
    """What logits are divided by."""
    if params.temperature == 0.0:
        return 1.0
    return max(params.temperature, 1e-20)  # Below, it could overflow; draws are greedy long before.


class Sampler:
    """Chooses the tokens of one request.

    There is one sampler per request and it reads nothing else, so no request can influence
    another. The draw for output position i is a function of (seed, index, i): the same whatever
    the batch was, and after a preemption. ``index`` numbers the completions of one prompt.
    """

    def __init__(self, request: Request, index: int = 0, mask: TokenMask | None = None) -> None:
        self._request = request
        self._mask = mask
        seed = request.params.seed
        seed = secrets.randbits(64) if seed is None else seed % 2**64
        self._key = seed.to_bytes(8, "little") + index.to_bytes(8, "little")
        self._repeats = request.params.repetition_penalty != 1.0
        prompt_ids = request.token_ids[: request.num_prompt_tokens] if self._repeats else []
        self._prompt_ids = np.unique(np.array(prompt_ids, dtype=np.int64))

    def sample(
        self, head: HeadOutput, row: int, accepted: Sequence[int] = ()
    ) -> tuple[int, TokenLogprobs | None]:
        """The next token, given what a step tells of its logits, and the log-probabilities asked
        for. ``accepted`` are tokens that this step has already put after those of the request.

        Raises FloatingPointError if the logits have a NaN or no finite maximum.
        """
        params = self._request.params
        if not math.isfinite(head.sum_exp[row]):
            raise FloatingPointError("the logits are not finite")
        token_id, logit = self._choose(head, row, accepted)
        if self._mask is not None:
            self._mask.accept(token_id)
        if params.logprobs is None:
            return token_id, None
        return token_id, token_logprobs(head, row, token_id, logit, params.logprobs)

    def _choose(self, head: HeadOutput, row: int, accepted: Sequence[int]) -> tuple[int, float]:
        """The next token and its logit."""
        params = self._request.params
        if changes_logits(params) or self._mask is not None:
            token_id = self._choose_of(self.adjust(head.logits[row], accepted), accepted)
        elif params.temperature == 0.0:
            return int(head.top_token_ids[row, 0]), float(head.top_logits[row, 0])
        elif not filters(params):
            return head.draw(row, self._uniform(accepted))
        else:
            weights = top_weights(head.top_logits[row], head.sum_exp_at_temperature[row], params)
            if weights is not None:
                place = draw(weights, self._uniform(accepted))
                return int(head.top_token_ids[row, place]), float(head.top_logits[row, place])
            token_id = self._choose_of(head.logits[row], accepted)
        return token_id, float(head.logits[row, token_id])

    def _choose_of(self, logits: Logits, accepted: Sequence[int]) -> int:
        """The next token, from a whole row."""
        if not np.isfinite(logits.max()):  # max() propagates NaN
            raise FloatingPointError("the logits are not finite")
        if self._request.params.temperature == 0.0:
            return int(logits.argmax())
        ids, weights = candidates(logits, self._request.params)
        return int(ids[draw(weights, self._uniform(accepted))])

    def _uniform(self, accepted: Sequence[int]) -> float:
        """The draw for the next position, of [0, 1 - 2**-52]."""
        # A keyed hash is a random function, and takes a tenth of the time of a generator's set-up.
        position = self._request.num_output_tokens + len(accepted)
        digest = hashlib.blake2b(position.to_bytes(8, "little"), key=self._key, digest_size=8)
        return (int.from_bytes(digest.digest(), "little") >> 12) * 2.0**-52

    def adjust(self, logits: Logits, accepted: Sequence[int] = ()) -> Logits:
        """A copy of ``logits`` [vocab_size] with the bias, the penalties and the mask of the
        request."""
        request, params = self._request, self._request.params
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
        if (
            params.presence_penalty or params.frequency_penalty
        ):  # over the output only, as OpenAI does
            amount = params.presence_penalty + params.frequency_penalty * counts
            adjusted[output] -= amount.astype(np.float32)
        if self._mask is not None:
            adjusted[~self._mask.allowed()] = -np.inf
        return adjusted


def candidates(logits: Logits, params: SamplingParams) -> tuple[TokenIds, Logits]:
    """Tokens that may be drawn, in order of id, and their weights (the largest of all is 1).

    As in Hugging Face's warpers, each filter takes the distribution that the one before it
    left, renormalised: temperature, then top_k, then top_p, then min_p. Of tokens that are
    equally likely at a filter's edge, those with the lowest ids stay.
    """
    logits = (logits - logits.max()) / np.float32(scaling_temperature(params))
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


def top_weights(
    top_logits: Logits, sum_exp_at_temperature: float, params: SamplingParams
) -> Logits | None:
    """As ``candidates``, from the largest logits in descending order: the weights of the first of
    them, which are what the filters leave. None if others may be left as well."""
    if params.top_k > NUM_CANDIDATES:
        return None
    weights = np.exp((top_logits - top_logits[0]) / np.float32(scaling_temperature(params)))
    if params.top_k:
        weights = weights[: params.top_k]
        total, num_left = weights.sum(dtype=np.float64), len(weights)
    else:
        total, num_left = sum_exp_at_temperature, len(weights) + 1
    if params.top_p < 1.0:
        sums = weights.cumsum(dtype=np.float64)
        num_left = min(num_left, int(sums.searchsorted(params.top_p * total)) + 1)
    if weights[-1] < params.min_p:
        num_left = min(num_left, int((weights >= params.min_p).sum()))
    return weights[:num_left] if num_left <= len(weights) else None


def draw(weights: Logits, uniform: float) -> int:
    """The index at quantile ``uniform`` of [0, 1 - 2**-52]. Never one of weight zero."""
    if len(weights) <= 512:
        sums = weights.cumsum(dtype=np.float64)
        return int(sums.searchsorted(uniform * sums[-1], side="right"))
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


def token_logprobs(
    head: HeadOutput, row: int, token_id: int, logit: float, num_top: int
) -> TokenLogprobs:
    """Log-probabilities of ``token_id``, whose logit is given, and of the ``num_top`` most likely
    tokens."""
    log_sum_exp = float(head.top_logits[row, 0]) + math.log(head.sum_exp[row])
    ids, logits = head.top_token_ids[row, :num_top], head.top_logits[row, :num_top]
    top = zip(ids.tolist(), logits.tolist(), strict=True)
    return TokenLogprobs(
        token_id=token_id,
        logprob=logit - log_sum_exp,
        top=tuple((i, other - log_sum_exp) for i, other in top),
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
