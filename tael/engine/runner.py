"""One step: from a schedule to the next tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tael.backends.base import Backend, HeadOutput
from tael.cache.manager import CacheManager
from tael.config import EngineConfig
from tael.engine.batch import build_batch
from tael.engine.sampler import token_logprobs
from tael.engine.scheduler import Schedule, ScheduledRequest
from tael.request import TokenLogprobs


@dataclass(slots=True)
class StepResult:
    """By request id."""

    token_ids: dict[str, list[int]] = field(default_factory=dict)
    """The drafted tokens that were right, and the one after them."""
    logprobs: dict[str, list[TokenLogprobs]] = field(default_factory=dict)
    prompt_logprobs: dict[str, list[TokenLogprobs]] = field(default_factory=dict)
    """Of the tokens of the prompt after the scheduled ones, for requests that want them."""
    errors: dict[str, Exception] = field(default_factory=dict)
    """Why a request has no token."""

    def fail(self, request_id: str, error: Exception) -> None:
        """Nothing of the step holds for a request."""
        for results in (self.token_ids, self.logprobs, self.prompt_logprobs):
            results.pop(request_id, None)
        self.errors[request_id] = error


Sample = Callable[[str, HeadOutput, int, Sequence[int]], tuple[int, TokenLogprobs | None]]


def run_step(
    schedule: Schedule,
    manager: CacheManager,
    backend: Backend,
    config: EngineConfig,
    sample: Sample,
) -> StepResult:
    """Compute a schedule and call ``sample(request_id, head, row, accepted)`` for each request that
    samples; again for the next row, with the tokens so far as ``accepted``, as long as the token
    is the drafted one. That choice does not depend on what was drafted, so neither does the
    output. An exception of ``sample`` is that request's alone; one of the backend concerns all
    and is raised."""
    head = backend.forward(build_batch(schedule.scheduled, manager, config))
    result = StepResult()
    row = 0
    for entry in schedule.scheduled:
        if entry.num_prompt_logits > 0:
            result.prompt_logprobs[entry.request.request_id] = _score(head, row, entry)
        if entry.samples:
            _verify(head, row + entry.num_prompt_logits, entry, sample, result)
        row += entry.num_logits
    return result


def _score(head: HeadOutput, row: int, entry: ScheduledRequest) -> list[TokenLogprobs]:
    """The log-probabilities of prompt tokens, from the rows of the tokens before them."""
    request = entry.request
    num_top = request.params.prompt_logprobs or 0
    first = request.num_computed_tokens + 1
    token_ids = request.token_ids[first : first + entry.num_prompt_logits]
    return [
        token_logprobs(head, row + i, token_id, float(head.logits[row + i, token_id]), num_top)
        for i, token_id in enumerate(token_ids)
    ]


def _verify(
    head: HeadOutput, row: int, entry: ScheduledRequest, sample: Sample, result: StepResult
) -> None:
    """Sample the rows of one request, of which ``row`` is the first."""
    request_id = entry.request.request_id
    token_ids: list[int] = []
    all_logprobs: list[TokenLogprobs] = []
    for i, drafted in enumerate((*entry.draft_token_ids, None)):
        try:
            token_id, logprobs = sample(request_id, head, row + i, token_ids)
        except Exception as error:
            if not token_ids:
                result.errors[request_id] = error
                return
            break  # the same row comes first in the next step, and its error with it
        token_ids.append(token_id)
        if logprobs is not None:
            all_logprobs.append(logprobs)
        if token_id != drafted:
            break
    result.token_ids[request_id] = token_ids
    result.logprobs[request_id] = all_logprobs
