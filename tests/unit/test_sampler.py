"""The sampler against a full sort in float64, transformers' warpers, and chi-square."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tael.backends.base import NUM_CANDIDATES, HeadOutput
from tael.backends.reference.head import head_output
from tael.engine.sampler import (
    Sampler,
    candidates,
    draw,
    needs_full_logits,
    scaling_temperature,
    token_logprobs,
    top_weights,
)
from tael.request import Request, SamplingParams

Float64 = NDArray[np.float64]


def random_logits(seed: int, vocab_size: int, scale: float, coarse: bool = False) -> NDArray:
    logits = np.random.default_rng(seed).standard_normal(vocab_size) * scale
    return (np.round(logits) if coarse else logits).astype(np.float32)  # coarse: many ties


def reference_order(logits: NDArray[np.float32], temperature: float) -> tuple[list[int], Float64]:
    scaled = (logits - logits.max()) / np.float32(temperature)
    order = sorted(range(len(scaled)), key=lambda i: (-scaled[i], i))
    return order, np.exp(scaled.astype(np.float64))


def reference_candidates(logits: NDArray[np.float32], params: SamplingParams) -> list[int]:
    """The definition: sort everything, filter one after another."""
    order, weights = reference_order(logits, params.temperature)
    if params.top_k:
        order = order[: params.top_k]
    if params.top_p < 1.0:
        total, above, kept = sum(weights[order]), 0.0, []
        for i in order:
            if above >= params.top_p * total:
                break
            kept.append(i)
            above += weights[i]
        order = kept
    order = [i for i in order if weights[i] >= params.min_p * weights.max()]
    return sorted(order)


def head_of(logits: NDArray[np.float32], params: SamplingParams) -> HeadOutput:
    """With one row, that can be seen only if it was asked for."""
    head = head_output(logits[None], np.array([scaling_temperature(params)], np.float32))
    return head if needs_full_logits(params) else replace(head, logits=logits[None, :0])


def sample_once(
    logits: NDArray[np.float32],
    params: SamplingParams,
    prompt: tuple[int, ...] = (1,),
    output: tuple[int, ...] = (),
    index: int = 0,
) -> int:
    request = Request("r", prompt, params)
    request.token_ids.extend(output)
    return Sampler(request, index).sample(head_of(logits, params), 0)[0]


@settings(max_examples=300)
@given(
    seed=st.integers(0, 2**32),
    vocab_size=st.integers(1, 700),
    scale=st.sampled_from([0.0, 0.01, 1.0, 5.0, 40.0]),
    coarse=st.booleans(),
    temperature=st.floats(0.05, 5.0),
    top_k=st.integers(0, 800),
    top_p=st.floats(0.01, 1.0),
    min_p=st.sampled_from([0.0, 0.013, 0.1, 0.93]),
)
def test_candidates_equal_those_of_a_full_sort(
    seed: int,
    vocab_size: int,
    scale: float,
    coarse: bool,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
) -> None:
    logits = random_logits(seed, vocab_size, scale, coarse)
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    ids, weights = candidates(logits, params)
    assert (np.diff(ids) > 0).all()
    _, exact = reference_order(logits, temperature)
    np.testing.assert_allclose(weights, exact[ids], rtol=1e-6, atol=1e-37)
    expected = reference_candidates(logits, params)
    if list(ids) != expected:  # float32 weights may move an edge, by their rounding only
        for nudge in (-1e-6, 1e-6):
            nudged = replace(params, top_p=min(1.0, top_p * (1 + nudge)), min_p=min_p * (1 + nudge))
            if list(ids) == reference_candidates(logits, nudged):
                return
        raise AssertionError((list(ids), expected))


@settings(max_examples=300)
@given(
    seed=st.integers(0, 2**32),
    vocab_size=st.sampled_from([1, 40, 64, 65, 2000]),
    scale=st.sampled_from([0.0, 0.01, 1.0, 5.0, 40.0]),
    coarse=st.booleans(),
    temperature=st.floats(0.05, 5.0),
    top_k=st.sampled_from([0, 0, 1, 3, 40, 63, 64, 65, 100]),
    top_p=st.just(1.0) | st.floats(0.01, 1.0),
    min_p=st.sampled_from([0.0, 0.0, 0.013, 0.1, 0.93]),
)
def test_the_most_likely_tokens_tell_what_filters_leave(
    seed: int,
    vocab_size: int,
    scale: float,
    coarse: bool,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
) -> None:
    logits = random_logits(seed, vocab_size, scale, coarse)
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    head = head_output(logits[None], np.array([temperature], np.float32))
    weights = top_weights(head.top_logits[0], head.sum_exp_at_temperature[0], params)
    order, exact = reference_order(logits, temperature)
    if weights is None:  # only if more than the candidates may be left, give or take an edge
        nudged = replace(params, top_p=min(1.0, top_p * (1 + 1e-6)), min_p=min_p * (1 - 1e-6))
        left = len(reference_candidates(logits, nudged))
        assert left >= min(NUM_CANDIDATES, vocab_size) or top_k > NUM_CANDIDATES
        assert needs_full_logits(params) or not (top_k or top_p < 1 or min_p)
        return
    np.testing.assert_allclose(weights, exact[order[: len(weights)]], rtol=1e-6, atol=1e-37)
    for nudge in (0.0, -1e-6, 1e-6):
        nudged = replace(params, top_p=min(1.0, top_p * (1 + nudge)), min_p=min_p * (1 + nudge))
        if sorted(order[: len(weights)]) == reference_candidates(logits, nudged):
            return
    raise AssertionError((len(weights), reference_candidates(logits, params)))


@settings(max_examples=100)
@given(
    seed=st.integers(0, 2**32),
    temperature=st.floats(0.1, 3.0),
    top_k=st.one_of(st.just(0), st.integers(1, 500)),
    top_p=st.one_of(st.just(1.0), st.floats(0.05, 0.99)),
    min_p=st.one_of(st.just(0.0), st.floats(0.001, 0.5)),
    penalty=st.floats(0.5, 2.0),
)
def test_distribution_equals_that_of_transformers(
    seed: int, temperature: float, top_k: int, top_p: float, min_p: float, penalty: float
) -> None:
    logits = random_logits(seed, 400, 3.0)
    rng = np.random.default_rng(seed)
    prompt, output = rng.integers(0, 400, 20).tolist(), rng.integers(0, 400, 10).tolist()
    params = SamplingParams(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=penalty,
    )
    warpers = LogitsProcessorList(
        [RepetitionPenaltyLogitsProcessor(penalty), TemperatureLogitsWarper(temperature)]
    )
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p:
        warpers.append(MinPLogitsWarper(min_p))
    scores = warpers(torch.tensor([prompt + output]), torch.from_numpy(logits)[None].clone())
    expected = torch.softmax(scores[0].double(), dim=-1).numpy()

    request = Request("r", prompt, params)
    request.token_ids.extend(output)
    ids, weights = candidates(Sampler(request).adjust(logits), params)
    actual = np.zeros(400)
    actual[ids] = weights / weights.sum(dtype=np.float64)
    differing = np.flatnonzero((actual > 1e-30) != (expected > 1e-30))
    assert len(differing) <= 1  # transformers adds top_p up in float32: one token at the edge
    if not len(differing):
        # Both round scores to float32 twice, by penalty and temperature: by 2**-24 of the largest.
        rounding = 2.0**-22 * float(scores[scores.isfinite()].abs().max())
        np.testing.assert_allclose(actual, expected, rtol=rounding, atol=2e-6)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.3),
        SamplingParams(temperature=0.7, top_k=12),
        SamplingParams(temperature=1.3, top_k=200),
        SamplingParams(top_p=0.8, min_p=0.05),
        SamplingParams(temperature=1.5, top_p=0.95),
        SamplingParams(logit_bias={5: 1.0}),
    ],
)
def test_draws_follow_the_distribution(params: SamplingParams) -> None:
    logits = random_logits(7, 1200, 1.0)
    logits[:40] += 5.0
    biased = logits.copy()
    biased[list(params.logit_bias)] += list(params.logit_bias.values())
    ids, weights = candidates(biased, params)
    probabilities = weights / weights.sum(dtype=np.float64)
    num_draws = 4000
    request = Request("r", (1,), replace(params, seed=3))
    sampler, counts = Sampler(request), np.zeros(1200)
    head = head_of(logits, params)
    for _ in range(num_draws):
        token_id, _ = sampler.sample(head, 0)
        counts[token_id] += 1
        request.token_ids.append(token_id)
    assert counts.sum() == counts[ids].sum()
    # Cells of at least 5 expected draws; the rest in one.
    expected, observed = probabilities * num_draws, counts[ids]
    rare = expected < 5
    expected = np.append(expected[~rare], expected[rare].sum() + 1e-9)
    observed = np.append(observed[~rare], observed[rare].sum())
    statistic, freedom = ((observed - expected) ** 2 / expected).sum(), len(expected) - 1
    # Wilson-Hilferty: the cube root is nearly normal; 4 standard deviations.
    deviation = (statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))
    assert deviation / math.sqrt(2 / (9 * freedom)) < 4


@settings(max_examples=200)
@given(
    seed=st.integers(0, 2**32),
    size=st.integers(1, 2000),
    density=st.sampled_from([0.0, 0.001, 0.3]),
    uniform=st.one_of(st.just(0.0), st.just(1 - 2.0**-52), st.floats(0, 1 - 2.0**-52)),
)
def test_draw_inverts_the_cumulative_weights(
    seed: int, size: int, density: float, uniform: float
) -> None:
    rng = np.random.default_rng(seed)
    weights = (rng.random(size) * (rng.random(size) < density)).astype(np.float32)
    weights[rng.integers(size)] = 1.0
    index = draw(weights, uniform)
    assert weights[index] > 0
    sums = weights.cumsum(dtype=np.float64) / weights.sum(dtype=np.float64)
    assert (sums[index - 1] if index else 0.0) - 1e-12 <= uniform <= sums[index] + 1e-12


def test_greedy_takes_the_lowest_of_equal_ids() -> None:
    logits = np.array([0, 2, 1, 2], np.float32)
    assert sample_once(logits, SamplingParams(temperature=0)) == 1


def test_ties_at_an_edge_go_to_the_lowest_ids() -> None:
    logits = np.zeros(300, np.float32)
    logits[250] = 1
    ids, _ = candidates(logits, SamplingParams(top_k=4))
    assert list(ids) == [0, 1, 2, 250]
    ids, _ = candidates(np.zeros(10, np.float32), SamplingParams(top_p=0.35))
    assert list(ids) == [0, 1, 2, 3]


def test_seed_and_position_alone_decide_the_draw() -> None:
    logits = random_logits(1, 1000, 0.5)
    params = SamplingParams(seed=11)
    tokens = [sample_once(logits, params, output=(5,) * i) for i in range(20)]
    assert tokens == [sample_once(logits, params, output=(9,) * i) for i in range(20)]
    assert len(set(tokens)) > 10
    assert tokens != [sample_once(logits, params, output=(5,) * i, index=1) for i in range(20)]
    other = SamplingParams(seed=12)
    assert tokens != [sample_once(logits, other, output=(5,) * i) for i in range(20)]
    assert sample_once(logits, SamplingParams(seed=-1)) >= 0
    free = [sample_once(logits, SamplingParams()) for _ in range(20)]
    assert len(set(free)) > 10


def test_penalties_and_bias() -> None:
    logits = np.array([1.0, 1.1, -1.0, 1.05], np.float32)

    def greedy(prompt: tuple[int, ...], output: tuple[int, ...], **kwargs: object) -> int:
        params = SamplingParams(temperature=0, **kwargs)  # type: ignore[arg-type]
        return sample_once(logits, params, prompt, output)

    assert greedy((0,), (), logit_bias={2: 50.0}) == 2
    assert greedy((1,), (), repetition_penalty=1.2) == 3
    assert greedy((1,), (3,), repetition_penalty=1.2) == 0
    # Presence and frequency count the output only.
    assert greedy((1,), (), presence_penalty=2.0) == 1
    assert greedy((0,), (1,), presence_penalty=2.0) == 3
    assert greedy((0,), (1, 3, 3), frequency_penalty=0.06) == 1
    assert greedy((0,), (1, 1, 3), frequency_penalty=0.06) == 0
    assert logits[1] == np.float32(1.1)  # the caller's logits are left alone


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0),
        SamplingParams(temperature=3.0),
        SamplingParams(temperature=2.0, top_k=30),
        SamplingParams(temperature=8.0, top_p=0.95),
        SamplingParams(temperature=2.0, top_k=3, logit_bias={8: 100.0}),
    ],
)
def test_logprobs_are_of_the_unpenalised_distribution(params: SamplingParams) -> None:
    logits = random_logits(3, 500, 2.0)
    exact = logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum())
    best = sorted(range(500), key=lambda i: -exact[i])[:5]
    request = Request("r", (1,), replace(params, logprobs=5, seed=0))
    for _ in range(20):
        token_id, logprobs = Sampler(request).sample(head_of(logits, params), 0)
        assert logprobs is not None and token_id == logprobs.token_id
        assert logprobs.logprob == pytest.approx(exact[token_id], abs=1e-5)
        assert [i for i, _ in logprobs.top] == best
        np.testing.assert_allclose([p for _, p in logprobs.top], exact[best], atol=1e-5)
        request.token_ids.append(token_id)


def test_any_number_of_logprobs() -> None:
    head = head_output(random_logits(3, 20, 2.0)[None], np.ones(1, np.float32))
    everything = token_logprobs(head, 0, 0, 1.0, 20)
    assert sum(math.exp(p) for _, p in everything.top) == pytest.approx(1, abs=1e-6)
    assert token_logprobs(head, 0, 0, 1.0, 0).top == ()


@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e-6])
def test_lowest_temperatures_are_greedy(temperature: float) -> None:
    logits = np.array([-30.0, 40.0, 39.9], np.float32)
    assert sample_once(logits, SamplingParams(temperature=temperature)) == 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    "logit_bias", [{1: np.nan}, {1: np.inf}, dict.fromkeys(range(3), -np.inf)], ids=str
)
def test_bias_that_leaves_no_finite_logit_raises(
    temperature: float, logit_bias: dict[int, float]
) -> None:
    with pytest.raises(FloatingPointError):
        sample_once(
            np.zeros(3, np.float32), SamplingParams(temperature=temperature, logit_bias=logit_bias)
        )


@pytest.mark.parametrize("temperature", [1e-6, 1e-3, 100.0])
def test_extreme_logits_are_safe(temperature: float) -> None:
    logits = np.array([-1e30, 1e30, 88.0, -np.inf], np.float32)
    assert sample_once(logits, SamplingParams(temperature=temperature)) == 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_raise(temperature: float, bad: float) -> None:
    logits = np.array([0.0, bad, 1.0], np.float32)
    with pytest.raises(FloatingPointError):
        sample_once(logits, SamplingParams(temperature=temperature))
