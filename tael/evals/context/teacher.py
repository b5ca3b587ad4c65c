"""What a model predicts at every place of a text that it is made to say.

The text's front is a prompt; the rest is decoded, one token a step, as any answer is: so it is read
by the same kernels, and sparsely if answers are. Between engine and backend stands one that
puts the text's next token in the place of the most likely one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tael.backends.base import Backend, ForwardBatch, HeadOutput, TieredBlocks
from tael.config import SchedulerConfig
from tael.engine.engine import Engine
from tael.errors import TaelError
from tael.models.spec import CacheGroup
from tael.request import SamplingParams


def forced_logprobs(
    engine: Engine, token_ids: Sequence[int], num_prompt_tokens: int
) -> NDArray[np.float32]:
    """[len(token_ids) - num_prompt_tokens, vocab_size] log-probabilities that the model gives the
    tokens after the prompt, each after those before it. The engine must be idle. Raises TaelError
    if the text does not fit the context."""
    num_forced = len(token_ids) - num_prompt_tokens
    params = SamplingParams(temperature=0, max_tokens=num_forced, ignore_eos=True)
    engine.add_request("forced", token_ids[:num_prompt_tokens], params, speculation=False)
    backend = engine.backend
    teacher = _Teacher(backend, token_ids)
    engine.backend = teacher
    try:
        while engine.has_unfinished():
            for delta in engine.step():
                if delta.error is not None:
                    raise TaelError(f"the model cannot go on: {delta.error}.")
    finally:
        engine.backend = backend
        engine.abort("forced")
    return np.stack(teacher.logprobs)


class _Teacher:
    """A backend for one sequence, ``token_ids``."""

    def __init__(self, backend: Backend, token_ids: Sequence[int]) -> None:
        self._backend = backend
        self._token_ids = np.array(token_ids)
        self.logprobs: list[NDArray[np.float32]] = []

    @property
    def weights_bytes(self) -> int:
        return self._backend.weights_bytes

    @property
    def fingerprint(self) -> dict[str, str]:
        return self._backend.fingerprint

    def reserve(self, scheduler: SchedulerConfig, max_model_len: int) -> int:
        return self._backend.reserve(scheduler, max_model_len)

    def tier(
        self, group: CacheGroup, num_blocks: int, num_slots: int, folder: Path
    ) -> TieredBlocks:
        return self._backend.tier(group, num_blocks, num_slots, folder)

    def bind_kv(
        self,
        pools: Sequence[NDArray[np.uint8] | TieredBlocks],
        open_pools: Sequence[NDArray[np.uint8]] = (),
        summaries: Sequence[NDArray[np.uint8]] = (),
    ) -> None:
        self._backend.bind_kv(pools, open_pools, summaries)

    def forward(self, batch: ForwardBatch) -> HeadOutput:
        head = self._backend.forward(replace(batch, full_logits=np.ones_like(batch.full_logits)))
        self.logprobs += [_log_softmax(row) for row in head.logits[: len(batch.logits_indices)]]
        chosen = head.top_token_ids.copy()
        chosen[:, 0] = self._token_ids[batch.positions[batch.logits_indices] + 1]
        return replace(head, top_token_ids=chosen)


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    shifted = logits - logits.max()
    log_sum = float(np.log(np.exp(shifted, dtype=np.float64).sum()))
    logprobs: NDArray[np.float32] = shifted - np.float32(log_sum)
    return logprobs
