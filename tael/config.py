"""Settings of an engine, fixed at start."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from tael.errors import TaelError

BLOCK_SIZE = 32
"""Tokens per KV block."""

NUM_SINK_BLOCKS, NUM_RECENT_BLOCKS = 4, 4
"""Complete blocks that a query reads whatever its budget: the first and the last."""

NUM_QUESTION_TOKENS = 128
"""At the end of a prompt, which read all of the context whatever the budget. What is asked for is
found by the question's tokens, and at 32K Qwen2.5 1.5B lost half of its answers when these read
4,096 tokens (docs/long-context.md)."""

CHOICE_TOKENS = 4
"""Tokens of a prompt, from a multiple of it on, that choose together what they read. Behind 8,128
tokens that read 1,024 each, predictions of Qwen2.5-Coder 0.5B were 0.012 nats from the exact ones
where each token chose by itself, 0.016 with two of four, 0.019 with four of eight, 0.031 with eight
of 32; and a prompt of 32,000 that reads 4,096 took 126, 96, 93 and 82 s (AVX-512)."""

MIN_BUDGET_BLOCKS = NUM_SINK_BLOCKS + NUM_RECENT_BLOCKS + 1
"""With the one that the query is in."""

SUPERBLOCK_BLOCKS = 32
"""Complete blocks in a row that have a key summary together."""

MIN_SCORED_SUPERBLOCKS = 32
"""A query looks at the blocks of so many superblocks at least: up to 32,768 tokens at all."""

SLOT_ALIGNMENT = 512
"""What moves between memory and disk is a multiple of so many bytes: direct I/O asks for it."""

MAX_THREADS = 1024
"""More than any machine has cores: a slip of the keyboard."""


KV_FORMATS = ("bf16", "q8", "k8v4")
"""How complete KV blocks hold keys and values: as computed; in 8 bits; keys in 8 bits and values in
4. Keys have a scale per channel of the block, values one per token (csrc/kernels/types.hpp)."""

MODES = ("exact", "balanced", "frugal")

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
    def prompt_alignment(self) -> int:
        """Prompts are cut at multiples of so many positions: CHOICE_TOKENS, if a step always has
        room for these beside a token of every other sequence."""
        room = self.max_num_batched_tokens - (self.max_num_seqs - 1)
        return CHOICE_TOKENS if room >= CHOICE_TOKENS else 1

    @property
    def max_num_logits(self) -> int:
        """Tokens of a step whose logits may be asked for: one of each sequence, and as many drafted
        ones as that leaves. A batch too large to leave any gains nothing from drafts."""
        return max(self.max_num_seqs, 1 + MAX_DRAFT_TOKENS)

    @property
    def max_num_open_blocks(self) -> int:
        """KV blocks that the tokens of a step lie in, of all sequences, and those that the other
        running ones have begun: n consecutive tokens lie in at most (n + 62) // 32."""
        return self.max_num_batched_tokens // BLOCK_SIZE + 2 * self.max_num_seqs


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
    verifies several at once; it changes no token. ``kv_format`` is how complete KV blocks are held
    (one of KV_FORMATS). ``kv_budget`` and ``prefill_budget`` bound the tokens of context whose KV
    each query of the answer and of the prompt reads per KV head under full attention (None: all),
    but for the last ``NUM_QUESTION_TOKENS`` of the prompt, which read all; the layers ``kv_focus``
    read more of them, and the others so much less (``with_kv_focus``). ``mode`` chooses the KV
    format and the budgets by what they were measured to lose (``tael.loader.modes``; "exact":
    nothing is chosen). ``kv_disk_bytes`` lets the KV of full attention be larger than the memory:
    all complete blocks are then in a file of at most that size, in ``kv_disk_dir`` (None: Tael's
    cache folder). ``cache_dir`` is a folder in which
    finished requests leave their KV blocks for later ones and later processes, at most
    ``cache_bytes`` of them (None: they are kept in memory only).
    """

    backend: str = "cpu"
    memory_bytes: int | None = None
    max_model_len: int | None = None
    rope_scaling: RopeScaling | None = None
    num_threads: int | None = None
    speculation: bool = True
    kv_format: str = "bf16"
    kv_budget: int | None = None
    prefill_budget: int | None = None
    kv_focus: tuple[int, ...] = ()
    mode: str = "exact"
    kv_disk_bytes: int | None = None
    kv_disk_dir: Path | None = None
    cache_dir: Path | None = None
    cache_bytes: int = 10 << 30
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)

    @property
    def reads_sparsely(self) -> bool:
        return self.kv_budget is not None or self.prefill_budget is not None

    def __post_init__(self) -> None:
        if self.max_model_len is not None and self.max_model_len < 1:
            raise TaelError(f"a context of {self.max_model_len} tokens holds nothing; raise it.")
        if self.kv_format not in KV_FORMATS:
            raise TaelError(
                f"there is no KV format {self.kv_format!r}; choose {' or '.join(KV_FORMATS)}."
            )
        if self.mode not in MODES:
            raise TaelError(f"there is no mode {self.mode!r}; choose {' or '.join(MODES)}.")
        if self.mode != "exact" and (self.reads_sparsely or self.kv_format != "bf16"):
            raise TaelError(
                f"mode {self.mode} chooses the KV format and the budgets; leave out either."
            )
        for budget in (self.kv_budget, self.prefill_budget):
            if budget is not None and budget < MIN_BUDGET_BLOCKS * BLOCK_SIZE:
                raise TaelError(
                    f"a KV budget of {budget} tokens does not hold the first and the last blocks; "
                    f"give at least {MIN_BUDGET_BLOCKS * BLOCK_SIZE}."
                )
        if self.prefill_budget is not None and self.scheduler.prompt_alignment == 1:
            raise TaelError(
                f"{CHOICE_TOKENS} tokens of a prompt choose together what they read; let a step "
                f"compute at least max_num_seqs + {CHOICE_TOKENS - 1} (max_num_batched_tokens)."
            )
        if self.kv_focus and not self.reads_sparsely:
            raise TaelError("all layers read all of the context; give a KV budget to share out.")
        if not 0 <= (self.num_threads or 0) <= MAX_THREADS:
            raise TaelError(
                f"cannot compute with {self.num_threads} threads; give 1 to {MAX_THREADS}, or "
                "nothing for one per core."
            )
