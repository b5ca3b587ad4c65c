"""One step: from a schedule to the next tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from tael.backends.base import Backend
from tael.cache.manager import CacheManager
from tael.engine.batch import build_batch
from tael.engine.sampler import Logits
from tael.engine.scheduler import Schedule
from tael.request import TokenLogprobs


@dataclass(slots=True)
class StepResult:
    """By request id, for the requests of the step that sample."""

    token_ids: dict[str, int] = field(default_factory=dict)
    logprobs: dict[str, TokenLogprobs | None] = field(default_factory=dict)
    errors: dict[str, Exception] = field(default_factory=dict)
    """Why a request has no token."""


def run_step(
    schedule: Schedule,
    manager: CacheManager,
    backend: Backend,
    sample: Callable[[str, Logits], tuple[int, TokenLogprobs | None]],
) -> StepResult:
    """Compute a schedule and call ``sample(request_id, logits)`` for each request that samples.
    An exception of ``sample`` is that request's alone; one of the backend concerns all and is
    raised."""
    logits = backend.forward(build_batch(schedule.scheduled, manager))
    sampling = (entry.request.request_id for entry in schedule.scheduled if entry.samples)
    result = StepResult()
    for row, request_id in zip(logits, sampling, strict=True):
        try:
            token_id, logprobs = sample(request_id, row)
        except Exception as error:
            result.errors[request_id] = error
        else:
            result.token_ids[request_id] = token_id
            result.logprobs[request_id] = logprobs
    return result
