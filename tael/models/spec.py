"""A model as data: what every backend, the allocator and the planner read.

A family (``tael.models.families``) turns a Hugging Face ``config.json`` or GGUF metadata into
a ``ModelSpec``. Nothing below holds weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from tael.config import (
    BLOCK_SIZE,
    MIN_SCORED_SUPERBLOCKS,
    SLOT_ALIGNMENT,
    SUPERBLOCK_BLOCKS,
)
from tael.errors import TaelError

SUPERBLOCK_ROW_BYTES = 32
"""For which superblock a row is of."""
TIERED_HEAD_BYTES = 8
"""For where a KV head of a tiered block is, and what its bytes must be."""
TIERED_SLOT_BYTES = 16
"""For what is in a slot."""
TIERED_BLOCK_BYTES = 300
"""For the Python objects of a block: there are many more of them than memory alone could hold."""


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding over the first ``2 * len(inv_freq)`` channels of a head.

    Channel i is paired with channel i + len(inv_freq) (Hugging Face's "rotate half"). The angle
    of pair i at position p is ``p * inv_freq[i]``; cos and sin are multiplied by
    ``attention_factor`` (YaRN, arXiv:2309.00071, section 3.4).
    """

    inv_freq: tuple[float, ...]
    attention_factor: float = 1.0


@dataclass(frozen=True, slots=True)
class CacheSpec:
    """What one layer keeps per sequence."""

    bytes_per_token: int
    """Of complete blocks, scales and summaries included."""
    open_bytes_per_token: int
    """Of the block that is being filled."""
    window: int | None
    """A query sees itself and the ``window - 1`` positions before it; None: all of them."""
    num_kv_heads: int
    summary_bytes_per_token: int
    """Of ``bytes_per_token``, what is not KV but says what is in it."""

    @property
    def kv_bytes_per_token(self) -> int:
        return self.bytes_per_token - self.summary_bytes_per_token


@dataclass(frozen=True, slots=True)
class Attention:
    """Multi-head attention with grouped queries, full or over a sliding window."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: Rope
    scale: float
    """Scores are ``scale * q . k``."""
    window: int | None = None
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False
    """RMSNorm over each head of q and k, before the rotary embedding."""
    kv_format: str = "bf16"
    """One of ``tael.config.KV_FORMATS``."""
    key_summaries: bool = False
    """Complete blocks keep the least and the largest key of every channel, and each key in two bits
    a channel, for sparse reading."""
    budget_percent: int = 100
    """Of a KV budget, what this layer reads."""

    @property
    def cache_spec(self) -> CacheSpec:
        d = self.head_dim
        bf16 = 2 * d + 2 * d
        key_q8 = d + 2 * d // BLOCK_SIZE
        head_bytes = {"bf16": bf16, "q8": key_q8 + d + 2, "k8v4": key_q8 + d // 2 + 4}
        summary = (4 + BLOCK_SIZE // 4) * d // BLOCK_SIZE if self.key_summaries else 0
        return CacheSpec(
            bytes_per_token=self.num_kv_heads * (head_bytes[self.kv_format] + summary),
            open_bytes_per_token=self.num_kv_heads * bf16,
            window=self.window,
            num_kv_heads=self.num_kv_heads,
            summary_bytes_per_token=self.num_kv_heads * summary,
        )

    def parameters(self, hidden_size: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        yield "q_proj.weight", (q, hidden_size)
        yield "k_proj.weight", (kv, hidden_size)
        yield "v_proj.weight", (kv, hidden_size)
        yield "o_proj.weight", (hidden_size, q)
        if self.qkv_bias:
            yield "q_proj.bias", (q,)
            yield "k_proj.bias", (kv,)
            yield "v_proj.bias", (kv,)
        if self.output_bias:
            yield "o_proj.bias", (hidden_size,)
        if self.qk_norm:
            yield "q_norm.weight", (self.head_dim,)
            yield "k_norm.weight", (self.head_dim,)


@dataclass(frozen=True, slots=True)
class Dense:
    """Gated feed-forward: ``down(activation(gate(x)) * up(x))``."""

    intermediate_size: int
    activation: str
    """"silu" or "gelu_tanh"."""

    def parameters(self, hidden_size: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield "gate_proj.weight", (self.intermediate_size, hidden_size)
        yield "up_proj.weight", (self.intermediate_size, hidden_size)
        yield "down_proj.weight", (hidden_size, self.intermediate_size)


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """``x += post(mixer(norm(x)))``, then ``x += post(ffn(norm(x)))``.

    ``post_norms`` says whether the two outer norms ("post") exist (Gemma 2 and 3).
    """

    mixer: Attention
    ffn: Dense
    post_norms: bool = False

    def parameters(self, hidden_size: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield "mixer_norm.weight", (hidden_size,)
        yield from self.mixer.parameters(hidden_size)
        yield "ffn_norm.weight", (hidden_size,)
        yield from self.ffn.parameters(hidden_size)
        if self.post_norms:
            yield "mixer_post_norm.weight", (hidden_size,)
            yield "ffn_post_norm.weight", (hidden_size,)


@dataclass(frozen=True, slots=True)
class ParameterSource:
    """Where a parameter lies in a checkpoint, and how it is stored differently there."""

    name: str
    interleaved_heads: int = 0
    """Rows of each of this many heads are stored with rotary pairs adjacent (GGUF's "llama"
    architecture) and are put into rotate-half order on reading. 0: they already are."""
    offset: float = 0.0
    """Added on reading (Hugging Face's Gemma stores norm weights minus one)."""


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Everything about a model but its weights."""

    family: str
    vocab_size: int
    hidden_size: int
    layers: tuple[LayerSpec, ...]
    norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    embedding_scale: float = 1.0
    sources: tuple[tuple[str, ParameterSource], ...] = ()
    """(parameter name, source), in the order of ``parameters()``."""

    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every parameter: ``embed_tokens.weight``,
        ``layers.0.q_proj.weight``, ..., ``norm.weight`` and, unless tied, ``lm_head.weight``."""
        shapes: dict[str, tuple[int, ...]] = {
            "embed_tokens.weight": (self.vocab_size, self.hidden_size)
        }
        for i, layer in enumerate(self.layers):
            for name, shape in layer.parameters(self.hidden_size):
                shapes[f"layers.{i}.{name}"] = shape
        shapes["norm.weight"] = (self.hidden_size,)
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, self.hidden_size)
        return shapes


@dataclass(frozen=True, slots=True)
class ContextExtension:
    """How the models of a family are run beyond the length they were trained for.

    It holds for models whose RoPE is plain and of base ``rope_theta`` in every layer, and whose
    ``max_position_embeddings`` is one of ``native_lengths``.
    """

    scalings: tuple[str, ...]
    """Kinds of ``RopeScaling``."""
    rope_theta: float
    native_lengths: tuple[int, ...]
    original_length: int
    """Tokens that factors are relative to: the length of the training."""
    max_length: int
    """Tokens up to which the authors describe it."""


@dataclass(frozen=True, slots=True)
class CacheGroup:
    """Layers that see the same positions: they share a pool of blocks and a block table.

    A block holds ``block_size`` tokens of every layer of the group.
    """

    layers: tuple[int, ...]
    window: int | None
    block_bytes: int
    """Of a complete block, its key summaries included."""
    open_block_bytes: int = 0
    """Of a block that is being filled, which moves when it is complete. 0: blocks have their last
    form from the start."""
    num_heads: int = 0
    """KV heads of all layers, and..."""
    head_bytes: int = 0
    """...the most bytes that one takes of a complete block, and..."""
    head_summary_bytes: int = 0
    """...besides those the most that its summary takes."""
    is_tiered: bool = False
    """Complete blocks are in a file, and in memory as far as there is room."""

    @property
    def payload_bytes(self) -> int:
        """Of all that is kept of a complete block, as it is copied."""
        return self.disk_block_bytes + self.summary_bytes if self.is_tiered else self.block_bytes

    @property
    def kv_block_bytes(self) -> int:
        """Of the KV of a complete block, and..."""
        return self.block_bytes - self.summary_bytes

    @property
    def summary_bytes(self) -> int:
        """...of its key summaries, which lie elsewhere."""
        return self.num_heads * self.head_summary_bytes

    @property
    def slot_bytes(self) -> int:
        """Room of one KV head of a tiered block, in memory and on disk."""
        return -(-self.head_bytes // SLOT_ALIGNMENT) * SLOT_ALIGNMENT

    @property
    def disk_block_bytes(self) -> int:
        """Of a tiered block in the file, and..."""
        return self.num_heads * self.slot_bytes

    @property
    def memory_block_bytes(self) -> int:
        """...of every tiered block in memory, whether its KV is there or not."""
        return TIERED_BLOCK_BYTES + self.summary_bytes + self.num_heads * TIERED_HEAD_BYTES

    def superblock_bytes(
        self, num_blocks: int, max_num_seqs: int, max_model_len: int, block_size: int
    ) -> int:
        """Of the bounds of superblocks, for a pool of ``num_blocks`` (csrc/model/superblocks.hpp),
        which have no codes."""
        most = max_model_len // block_size // SUPERBLOCK_BLOCKS
        if self.head_summary_bytes == 0 or most <= MIN_SCORED_SUPERBLOCKS:
            return 0
        num_rows = num_blocks // SUPERBLOCK_BLOCKS + max_num_seqs
        row_bytes = self.summary_bytes // 3 + SUPERBLOCK_ROW_BYTES
        return num_rows * row_bytes + 4 * (num_blocks + max_num_seqs * most)

    def first_block(self, position: int, block_size: int) -> int:
        """The first entry of a block table that a query at ``position`` looks at."""
        if self.window is None:
            return 0
        return max(0, position - self.window + 1) // block_size

    def num_blocks(self, num_tokens: int, num_new_tokens: int, block_size: int) -> int:
        """Blocks that a request holds at most on its way to ``num_tokens``, computed at most
        ``num_new_tokens`` a step."""
        end = -(-num_tokens // block_size)
        if self.window is None:
            return end
        # The queries of a step see num_new_tokens + window - 1 consecutive positions.
        return min(end, (num_new_tokens + self.window + block_size - 3) // block_size + 1)


def cache_groups(
    spec: ModelSpec, block_size: int, *, tiered: bool = False
) -> tuple[CacheGroup, ...]:
    """The layer groups of a model, full attention first, then windows from wide to narrow. Blocks
    of full attention that are ``tiered`` move when they are complete, whatever their format."""
    by_window: dict[int | None, list[int]] = {}
    for i, layer in enumerate(spec.layers):
        by_window.setdefault(layer.mixer.cache_spec.window, []).append(i)
    windows = sorted(by_window, key=lambda w: -1 if w is None else 1 / w)
    return tuple(_cache_group(spec, tuple(by_window[w]), w, block_size, tiered) for w in windows)


def with_kv_format(spec: ModelSpec, kv_format: str, key_summaries: bool = False) -> ModelSpec:
    """The model with the KV of every layer in one of ``tael.config.KV_FORMATS``, and summaries in
    those of full attention if asked for."""
    layers = []
    for layer in spec.layers:
        summaries = key_summaries and layer.mixer.window is None
        mixer = replace(layer.mixer, kv_format=kv_format, key_summaries=summaries)
        layers.append(replace(layer, mixer=mixer))
    return replace(spec, layers=tuple(layers))


FOCUS_PERCENT = 250
"""Of a KV budget, what a layer reads that the others are to leave more to."""


def with_kv_focus(spec: ModelSpec, focus: Sequence[int]) -> ModelSpec:
    """The model with ``FOCUS_PERCENT`` of KV budgets in the layers ``focus``, and in the others of
    full attention so much less that together they read no more. Raises TaelError if there are no
    such layers or they would leave too little."""
    if not focus:
        return spec
    full = [i for i, layer in enumerate(spec.layers) if layer.mixer.window is None]
    others = [i for i in full if i not in focus]
    if unknown := set(focus) - set(full):
        raise TaelError(
            f"layer {min(unknown)} cannot read more of the context: it is none of this model, or "
            "one with a window; leave it out."
        )
    num_focused = len(full) - len(others)
    left = 100 * len(full) - FOCUS_PERCENT * num_focused
    if left < 50 * len(others):
        raise TaelError(
            f"{num_focused} layers that read more leave the others less than half of the KV "
            "budget; name fewer."
        )
    percents = dict.fromkeys(focus, FOCUS_PERCENT) | dict.fromkeys(others, left // len(others))
    layers = [
        replace(layer, mixer=replace(layer.mixer, budget_percent=percents.get(i, 100)))
        for i, layer in enumerate(spec.layers)
    ]
    return replace(spec, layers=tuple(layers))


def _cache_group(
    spec: ModelSpec, layers: tuple[int, ...], window: int | None, block_size: int, tiered: bool
) -> CacheGroup:
    caches = [spec.layers[i].mixer.cache_spec for i in layers]
    compressed = any(spec.layers[i].mixer.kv_format != "bf16" for i in layers)
    moves = compressed or (tiered and window is None)
    summary_bytes = [block_size * c.summary_bytes_per_token // c.num_kv_heads for c in caches]
    num_heads = sum(cache.num_kv_heads for cache in caches)
    kv_bytes = sum(cache.kv_bytes_per_token for cache in caches)
    return CacheGroup(
        layers=layers,
        window=window,
        block_bytes=block_size * kv_bytes + num_heads * max(summary_bytes),
        open_block_bytes=block_size * sum(cache.open_bytes_per_token for cache in caches)
        if moves
        else 0,
        num_heads=num_heads,
        head_bytes=max(block_size * c.kv_bytes_per_token // c.num_kv_heads for c in caches),
        head_summary_bytes=max(summary_bytes),
        is_tiered=tiered and window is None,
    )
