"""Settings of an engine, fixed at start."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from tael.errors import TaelError

BLOCK_SIZE = 32
"""Tokens per KV block. Kernels accumulate attention in chunks of one block."""

MAX_THREADS = 1024
"""More than any machine has cores: a slip of the keyboard."""


MAX_DRAFT_TOKENS = 15
"""Drafted tokens that one request can have verified in a step: 16 with the one before them."""


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Bounds on one step and on the running set."""

    max_num_seqs: int = 32
    max_num_batched_tokens: int = 512

    def __post_init__(self) -> None:
        if self.max_num_seqs < 1 or self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError("need 1 <= max_num_seqs <= max_num_batched_tokens")

    @property
    def max_num_logits(self) -> int:
        """Tokens of a step whose logits may be asked for: one of each sequence, and as many drafted
        ones as that leaves. A batch too large to leave any gains nothing from drafts."""
        return max(self.max_num_seqs, 1 + MAX_DRAFT_TOKENS)


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How a model is run.

    ``memory_bytes`` bounds the whole process: weights, KV cache, workspace and the
    interpreter (None: what the machine can spare). ``max_model_len`` bounds the context in
    tokens (None: what the model was trained for and the memory holds). ``speculation`` guesses
    tokens from the text and verifies several at once; it changes no token. ``cache_dir`` is a
    folder in which finished requests leave their KV blocks for later ones and later processes, at
    most ``cache_bytes`` of them (None: they are kept in memory only).
    """

    backend: str = "cpu"
    memory_bytes: int | None = None
    max_model_len: int | None = None
    num_threads: int | None = None
    speculation: bool = True
    cache_dir: Path | None = None
    cache_bytes: int = 10 << 30
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)

    def __post_init__(self) -> None:
        if self.max_model_len is not None and self.max_model_len < 1:
            raise TaelError(f"a context of {self.max_model_len} tokens holds nothing; raise it.")
        if not 0 <= (self.num_threads or 0) <= MAX_THREADS:
            raise TaelError(
                f"cannot compute with {self.num_threads} threads; give 1 to {MAX_THREADS}, or "
                "nothing for one per core."
            )
