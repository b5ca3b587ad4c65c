"""Settings of an engine, fixed at start."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

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
class RopeScaling:
    """How to run a model beyond its trained length: see ``tael.models.extension``."""

    kind: str
    """"yarn" or "dynamic"."""
    factor: float | None = None
    """None: as much as the context takes."""

    @classmethod
    def parse(cls, text: str) -> RopeScaling:
        """From "yarn" or "yarn:4", with a factor. Raises TaelError for anything else."""
        match = re.fullmatch(r"(yarn|dynamic)(?::(\d{1,4}(?:\.\d{1,6})?))?", text)
        factor = float(match[2]) if match and match[2] else None
        if match is None or (factor is not None and factor < 1):
            raise TaelError(
                f'"{text}" is no RoPE scaling; write yarn or dynamic, or a factor of at least 1 '
                "with it, such as yarn:4."
            )
        return cls(match[1], factor)


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How a model is run.

    ``memory_bytes`` bounds the whole process: weights, KV cache, workspace and the
    interpreter (None: what the machine can spare). ``max_model_len`` bounds the context in
    tokens (None: what the model was trained for and the memory holds), and ``rope_scaling``
    takes it beyond the trained length. ``speculation`` guesses tokens from the text and
    verifies several at once; it changes no token.
    """

    backend: str = "cpu"
    memory_bytes: int | None = None
    max_model_len: int | None = None
    rope_scaling: RopeScaling | None = None
    num_threads: int | None = None
    speculation: bool = True
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)

    def __post_init__(self) -> None:
        if self.max_model_len is not None and self.max_model_len < 1:
            raise TaelError(f"a context of {self.max_model_len} tokens holds nothing; raise it.")
        if not 0 <= (self.num_threads or 0) <= MAX_THREADS:
            raise TaelError(
                f"cannot compute with {self.num_threads} threads; give 1 to {MAX_THREADS}, or "
                "nothing for one per core."
            )
