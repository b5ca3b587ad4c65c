"""Tokens per second of an engine, as ``llama-bench`` counts them."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from tael.engine.engine import Engine
from tael.request import SamplingParams


@dataclass(frozen=True, slots=True)
class Speed:
    """One measurement: prompts of random tokens, computed together, then decoded greedily."""

    batch_size: int
    num_prompt_tokens: int
    """Of each prompt."""
    num_decoded_tokens: int
    """Of all sequences, after the last of them had its first token."""
    prefill_s: float
    """Until the last sequence had its first token."""
    decode_s: float

    @property
    def prefill_tokens_per_s(self) -> float:
        return self.batch_size * self.num_prompt_tokens / self.prefill_s

    @property
    def decode_tokens_per_s(self) -> float:
        return self.num_decoded_tokens / self.decode_s


def measure(
    engine: Engine, num_prompt_tokens: int, num_decode_tokens: int, batch_size: int = 1
) -> Speed:
    """Run one measurement on an idle engine: ``num_decode_tokens`` per sequence after its first.
    Nothing comes from the prefix cache or from drafts. Raises TaelError if a prompt does not fit
    the context."""
    rng = np.random.default_rng()
    params = SamplingParams(temperature=0, max_tokens=num_decode_tokens + 1, ignore_eos=True)
    for i in range(batch_size):
        prompt = rng.integers(0, engine.spec.vocab_size, num_prompt_tokens).tolist()
        salt = rng.bytes(16).hex()
        engine.add_request(f"speed {i}", prompt, params, cache_salt=salt, speculation=False)
    start = time.perf_counter()
    started: set[str] = set()
    while len(started) < batch_size:
        started.update(delta.request_id for delta in engine.step())
    first = time.perf_counter()
    num_decoded_tokens = 0
    while engine.has_unfinished():
        num_decoded_tokens += len(engine.step())
    return Speed(
        batch_size=batch_size,
        num_prompt_tokens=num_prompt_tokens,
        num_decoded_tokens=num_decoded_tokens,
        prefill_s=first - start,
        decode_s=time.perf_counter() - first,
    )
