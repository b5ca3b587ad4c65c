"""Settings of an engine, fixed at start."""

from __future__ import annotations

from dataclasses import dataclass, field

BLOCK_SIZE = 32
"""Tokens per KV block. Kernels accumulate attention in chunks of one block."""


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Bounds on one step and on the running set."""

    max_num_seqs: int = 32
    max_num_batched_tokens: int = 512

    def __post_init__(self) -> None:
        if self.max_num_seqs < 1 or self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError("need 1 <= max_num_seqs <= max_num_batched_tokens")


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How a model is run.

    ``memory_bytes`` bounds the whole process: weights, KV cache, workspace and the
    interpreter (None: what the machine can spare). ``max_model_len`` bounds the context in
    tokens (None: what the model was trained for and the memory holds).
    """

    backend: str = "cpu"
    memory_bytes: int | None = None
    max_model_len: int | None = None
    num_threads: int | None = None
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
