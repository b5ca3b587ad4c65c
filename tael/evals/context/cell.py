"""One mode at one length: the answers, the distributions and what they cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import median

import numpy as np

from tael.engine.engine import Engine
from tael.errors import TaelError
from tael.evals.context.divergence import Divergence
from tael.evals.context.prompt import PromptFormat
from tael.evals.context.sample import Question, Sample
from tael.evals.context.tasks import TASKS
from tael.evals.context.teacher import forced_logprobs
from tael.memory.process import peak_rss_bytes
from tael.request import SamplingParams, Usage

NUM_TIMED = 16
"""Tokens that one answer is timed for."""


@dataclass(frozen=True, slots=True)
class Answer:
    """To one question; which, is told by its place."""

    text: str
    score: float


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one request at a time."""

    peak_rss_bytes: int
    """Of the process, when it had answered the questions about the first haystack. Later ones
    leave blocks in the prefix cache, as many as the memory budget allows."""
    kv_bytes: int
    """Of the blocks that the largest prompt and its answer held."""
    time_to_first_token_s: float
    """Of a haystack that is not in the cache: the median."""
    s_per_token: float
    """Of the first answer about the first haystack of each task: the median."""


@dataclass(frozen=True, slots=True)
class Cell:
    """What a mode gives at a length."""

    answers: dict[str, list[list[Answer]]]
    """By task, for each sample those to its questions. Without the tasks that do not count,
    except in the first cell, which tells which do. After a failure all have the score 0."""
    log_likelihoods: dict[str, list[list[float]]]
    """Of the right answers, for the tasks that do not count."""
    cost: Cost | None
    divergence: Divergence | None
    error: str | None = None
    """Why there is nothing: the mode does not serve this length here."""


def answer_all(
    engine: Engine, samples: Mapping[str, Sequence[Sample]]
) -> tuple[dict[str, list[list[Answer]]], Cost | None]:
    """By task, the answers to each sample's questions. The engine must be idle. Raises TaelError
    if a haystack does not fit."""
    prompts = PromptFormat(engine.tokenizer)
    answers: dict[str, list[list[Answer]]] = {task: [] for task in samples}
    waits, decodes, kv_bytes, peak_bytes = [], [], [], 0
    for sample in chain.from_iterable(samples.values()):
        prefix = prompts.prefix(sample.haystack)
        # The haystack alone, so that its KV is as it is whatever is asked later.
        [(_, usage)] = _run(engine, [prefix], [SamplingParams(temperature=0, max_tokens=1)])
        waits.append(usage.time_to_first_token_s)
        asked = [prefix + prompts.suffix(question) for question in sample.questions]
        if sample.index == 0:
            params = SamplingParams(temperature=0, max_tokens=1 + NUM_TIMED, ignore_eos=True)
            [(_, usage)] = _run(engine, asked[:1], [params])
            decodes.append(usage.decode_s / NUM_TIMED)
        results = _run(engine, asked, [_params(question) for question in sample.questions])
        score = TASKS[sample.task].score
        answers[sample.task].append(
            [
                Answer(text, score(question, text))
                for question, (text, _) in zip(sample.questions, results, strict=True)
            ]
        )
        kv_bytes += [usage.kv_bytes for _, usage in results]
        peak_bytes = peak_bytes or peak_rss_bytes()
    if not waits:
        return answers, None
    return answers, Cost(peak_bytes, max(kv_bytes), median(waits), median(decodes))


def answer_log_likelihoods(
    engine: Engine, samples: Mapping[str, Sequence[Sample]]
) -> dict[str, list[list[float]]]:
    """By task, for each sample's questions the mean log-probability of the right answer's tokens:
    what is left to compare where a model cannot answer."""
    prompts = PromptFormat(engine.tokenizer)
    result: dict[str, list[list[float]]] = {task: [] for task in samples}
    for sample in chain.from_iterable(samples.values()):
        prefix = prompts.prefix(sample.haystack)
        _run(engine, [prefix], [SamplingParams(temperature=0, max_tokens=1)])
        means = []
        for question in sample.questions:
            prompt, answer = prefix + prompts.suffix(question), prompts.answer(question)
            rows = forced_logprobs(engine, prompt + answer, len(prompt))
            means.append(float(rows[np.arange(len(answer)), answer].mean()))
        result[sample.task].append(means)
    return result


def _params(question: Question) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=question.max_tokens, stop=("\n\n",))


def _run(
    engine: Engine, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]
) -> list[tuple[str, Usage]]:
    """Text and usage of each. They are computed together, which changes no token."""
    texts = dict.fromkeys(map(str, range(len(prompts))), "")
    usages: dict[str, Usage] = {}
    for key, prompt, prompt_params in zip(texts, prompts, params, strict=True):
        engine.add_request(key, prompt, prompt_params, speculation=False)
    while engine.has_unfinished():
        for delta in engine.step():
            texts[delta.request_id] += delta.text
            if delta.error is not None:
                raise TaelError(f"the model cannot go on: {delta.error}.")
            if delta.usage is not None:
                usages[delta.request_id] = delta.usage
    return [(texts[key], usages[key]) for key in texts]
