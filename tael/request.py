"""A request, what it asks for, and what it used."""

from __future__ import annotations

import enum
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tael.errors import TaelError


class RequestStatus(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class FinishReason(enum.Enum):
    STOP = "stop"
    """An end-of-sequence token, a stop token or a stop string."""
    LENGTH = "length"
    """max_tokens or the end of the context."""
    ABORT = "abort"
    ERROR = "error"
    """The engine could not go on with this request."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens. Names and meanings follow the OpenAI and Hugging Face APIs.

    ``temperature`` 0 is greedy. ``top_k`` 0 and ``top_p`` 1 are off. ``max_tokens`` None runs
    to the end of the context. ``logprobs`` N returns the chosen token's log-probability and the
    N most likely ones (before temperature and filters); ``prompt_logprobs`` N the same for the
    tokens of the prompt, which is then computed in small chunks, past the prefix cache. ``seed``
    None draws one at random.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    n: int = 1

    def __post_init__(self) -> None:
        checks = {
            "max_tokens must be at least 1": self.max_tokens is None or self.max_tokens >= 1,
            "temperature must be between 0 and 100": 0.0 <= self.temperature <= 100.0,
            "top_k must be 0 (off) or more": self.top_k >= 0,
            "top_p must be above 0 and at most 1": 0.0 < self.top_p <= 1.0,
            "min_p must be between 0 and 1": 0.0 <= self.min_p <= 1.0,
            "repetition_penalty must be above 0": 0.0 < self.repetition_penalty <= 100.0,
            "presence_penalty must be between -2 and 2": -2.0 <= self.presence_penalty <= 2.0,
            "frequency_penalty must be between -2 and 2": -2.0 <= self.frequency_penalty <= 2.0,
            "logprobs must be between 0 and 20": self.logprobs is None or 0 <= self.logprobs <= 20,
            "prompt_logprobs must be between 0 and 20": self.prompt_logprobs is None
            or 0 <= self.prompt_logprobs <= 20,
            "stop must list strings, none empty": not isinstance(self.stop, str)
            and all(isinstance(stop, str) and stop for stop in self.stop),
            "n must be between 1 and 128": 1 <= self.n <= 128,
        }
        for message, holds in checks.items():
            if not holds:
                raise TaelError(f"bad sampling parameter: {message}.")


@dataclass(slots=True)
class Usage:
    """What one request took from the engine. Counts are tokens, sizes bytes, durations seconds.

    Every prompt token is of one class: read from the prefix cache, computed and written to it, or
    fresh. ``num_prompt_tokens`` is their sum.
    """

    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    """Prompt tokens read from the prefix cache instead of computed."""
    num_cache_write_tokens: int = 0
    """Prompt tokens computed whose KV the prefix cache had not and now offers to later requests."""
    num_output_tokens: int = 0
    num_restored_tokens: int = 0
    """Of the cached ones, those that had to be brought back from disk."""
    num_draft_tokens: int = 0
    """Guessed output tokens that the model verified."""
    num_accepted_tokens: int = 0
    """Those that were right. Each saved a step."""
    num_preemptions: int = 0
    kv_bytes: int = 0
    """Largest number of KV bytes that the request referenced."""
    kv_byte_s: float = 0.0
    """Those bytes integrated over the time that the request held them."""
    compute_s: float = 0.0
    """Its share of the time of its steps, by scheduled tokens. Over all requests it adds up to the
    time that the engine computed."""
    queue_s: float = 0.0
    time_to_first_token_s: float = 0.0
    decode_s: float = 0.0
    """From the first output token to the last."""

    @property
    def num_fresh_tokens(self) -> int:
        """Prompt tokens computed for this request alone."""
        return self.num_prompt_tokens - self.num_cached_tokens - self.num_cache_write_tokens

    @property
    def decode_tokens_per_s(self) -> float:
        steps = self.num_output_tokens - 1
        return steps / self.decode_s if steps > 0 and self.decode_s > 0 else 0.0


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one output position, of the model's own distribution."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    """(token id, logprob), most likely first."""


class Request:
    """One sequence on its way through the engine.

    The scheduler moves ``num_computed_tokens`` toward ``num_tokens``; everything else about
    progress is derived from these two.
    """

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        eos_token_ids: frozenset[int] = frozenset(),
        cache_salt: str = "",
        speculation: bool = True,
        is_masked: bool = False,
    ) -> None:
        self.request_id = request_id
        self.params = params
        self.eos_token_ids = eos_token_ids
        self.cache_salt = cache_salt
        """Requests share cached blocks and recent outputs only with requests of the same salt."""
        self.speculation = speculation
        """Whether tokens may be drafted, where the engine does so."""
        self.is_masked = is_masked
        """Whether only some tokens may come next, which takes whole rows of logits to see."""
        self.num_prompt_tokens = len(prompt_token_ids)
        self.token_ids: list[int] = list(prompt_token_ids)
        """Prompt and output."""
        self.num_computed_tokens = 0
        """Tokens at the front of ``token_ids`` whose KV exists."""
        self.block_hashes: list[bytes] = []
        """Identities of the full blocks at the front of ``token_ids``, as far as computed."""
        self.num_offered_blocks = 0
        """Of them, those that were found in the prefix cache or offered to it, ever."""
        self.held_kv_bytes = 0
        """KV bytes that the request holds since..."""
        self.held_since = 0.0
        """...this time of the monotonic clock."""
        self.num_resident_tokens: int | None = None
        """Of its prefix, those in memory when the rest began to come back from disk."""
        self.status = RequestStatus.WAITING
        self.finish_reason: FinishReason | None = None
        self.prompt_logprobs: list[TokenLogprobs] = []
        """Of the tokens after the first, as far as computed, if asked for."""
        self.usage = Usage(num_prompt_tokens=len(prompt_token_ids))
        self.arrival_time = time.monotonic()

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def wants_prompt_logits(self) -> bool:
        """Whether logits at positions of the prompt are still to be looked at."""
        return (
            self.params.prompt_logprobs is not None
            and len(self.prompt_logprobs) < self.num_prompt_tokens - 1
        )

    @property
    def is_finished(self) -> bool:
        return self.status is RequestStatus.FINISHED
