"""Models of any shape with random weights, made in memory without torch, and a driver that
computes sequences in any order of steps over KV pools full of NaN."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from random_weights import random_rows

from tael.backends.base import Backend, ForwardBatch
from tael.backends.cpu.backend import CPUBackend
from tael.backends.reference import ReferenceBackend
from tael.backends.reference.kv_cache import KVCache
from tael.backends.reference.kv_format import bf16
from tael.config import BLOCK_SIZE, SchedulerConfig
from tael.loader.checkpoint import TensorInfo
from tael.loader.tile_file import TileFile, TileTensor
from tael.models.spec import (
    Attention,
    CacheGroup,
    Dense,
    LayerSpec,
    ModelSpec,
    ParameterSource,
    Rope,
    cache_groups,
)
from tael.quant.repack import repack

Step = dict[int, int]
"""Sequence -> how many of its tokens to compute."""

VOCAB_SIZE = 48
MAX_MODEL_LEN = 1100
CHUNK = 128  # kChunkTokens in csrc/kernels/attention/attention.hpp
_HIDDEN_SIZE = 64
_NAN_BYTE = 0xFF  # 0xffff is a NaN in bf16


def random_spec(
    heads_per_kv_head: int,
    num_kv_heads: int,
    head_dim: int,
    windows: list[int | None],
    kv_format: str = "bf16",
    key_summaries: bool = False,
) -> ModelSpec:
    """One layer per window. Scores are large enough that some positions dominate."""
    half = head_dim // 2
    rope = Rope(tuple(10000.0 ** (-i / half) for i in range(half)))
    layers = tuple(
        LayerSpec(
            Attention(
                num_heads=heads_per_kv_head * num_kv_heads,
                num_kv_heads=num_kv_heads,
                head_dim=head_dim,
                rope=rope,
                scale=2 * head_dim**-0.5,
                window=window,
                kv_format=kv_format,
                key_summaries=key_summaries and window is None,
            ),
            Dense(96, "silu"),
        )
        for window in windows
    )
    spec = ModelSpec(
        family="random",
        vocab_size=VOCAB_SIZE,
        hidden_size=_HIDDEN_SIZE,
        layers=layers,
        norm_eps=1e-5,
        max_position_embeddings=MAX_MODEL_LEN,
        tie_word_embeddings=False,
    )
    return replace(spec, sources=tuple((name, ParameterSource(name)) for name in spec.parameters()))


class RandomCheckpoint:
    """A ``Checkpoint`` whose matrices are of one format."""

    format = "hf"
    files: tuple[Path, ...] = ()
    metadata: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, spec: ModelSpec, format_name: str = "F32") -> None:
        self.tensors: dict[str, TensorInfo] = {}
        self.rows: dict[str, NDArray[np.uint8]] = {}
        for seed, (name, shape) in enumerate(spec.parameters().items()):
            if len(shape) == 1:
                weights = 1 + 0.3 * np.random.default_rng(seed).standard_normal(shape)
                self.rows[name] = weights.astype(np.float32).view(np.uint8)[None]
                self.tensors[name] = TensorInfo(name, "F32", shape)
            else:
                std = 1.0 if name.startswith("embed") else shape[1] ** -0.5
                self.rows[name] = random_rows(format_name, *shape, seed=seed, std=std)
                self.tensors[name] = TensorInfo(name, format_name, shape)

    def read_rows(self, name: str, start: int, count: int) -> NDArray[np.uint8]:
        return self.rows[name][start : start + count]


def random_cpu_backend(
    spec: ModelSpec, checkpoint: RandomCheckpoint, num_threads: int
) -> CPUBackend:
    """Ready for steps of 2048 tokens that want the logits of all of them."""
    tensors = {
        name: TileTensor("vector", shape, checkpoint.rows[name][0])
        if len(shape) == 1
        else TileTensor(
            checkpoint.tensors[name].type,
            shape,
            repack(checkpoint.tensors[name].type, checkpoint.rows[name], shape[1]),
        )
        for name, shape in spec.parameters().items()
    }
    backend = CPUBackend(spec, TileFile(tensors, 0, ""), num_threads)
    backend.reserve(SchedulerConfig(2048, 2048), MAX_MODEL_LEN)
    return backend


class RoundingReference(ReferenceBackend):
    """With the roundings of the kernels: keys, values, queries and weights in bf16, the weights
    relative to the largest score so far, over chunks of 128 positions."""

    def bind_kv(self, pools: Any, open_pools: Any = (), summaries: Any = ()) -> None:
        self.kv_cache = _RoundingKVCache(self.spec, [len(pool) for pool in pools])

    @staticmethod
    def scored(q: Any, scale: float) -> Any:
        return bf16(np.float32(scale * np.log2(np.e)) * q)

    def attend(
        self,
        q: Any,
        k: Any,
        v: Any,
        query_positions: NDArray[np.int32],
        key_positions: NDArray[np.int32],
        scale: float,
        window: int | None,
    ) -> NDArray[np.float32]:
        num_tokens, num_heads, _ = q.shape
        repeats = num_heads // k.shape[1]
        keys, values = (np.repeat(x, repeats, axis=1).transpose(1, 0, 2) for x in (k, v))
        queries = bf16(np.float32(scale * np.log2(np.e)) * q).transpose(1, 0, 2)  # [H, T, D]
        distance = query_positions[:, None] - key_positions
        visible = (distance >= 0) & (distance < (window or np.iinfo(np.int32).max))
        maximum = np.full((num_heads, num_tokens, 1), -np.inf, np.float32)
        total = np.zeros((num_heads, num_tokens, 1), np.float32)
        mixed = np.zeros(queries.shape, np.float32)
        for chunk in np.unique(key_positions // CHUNK):
            part = key_positions // CHUNK == chunk
            scores = queries @ keys[:, part].swapaxes(1, 2)
            scores = np.where(visible[:, part], scores, np.float32(-np.inf))
            new = np.maximum(maximum, scores.max(axis=-1, keepdims=True))
            finite = np.where(np.isfinite(new), new, np.float32(0))
            weights = np.exp2(scores - finite)
            rescale = np.exp2(np.where(np.isfinite(maximum), maximum, finite - 200) - finite)
            mixed = mixed * rescale + bf16(weights) @ values[:, part]
            total = total * rescale + weights.sum(axis=-1, keepdims=True)
            maximum = new
        return (mixed / total).transpose(1, 0, 2).reshape(num_tokens, -1)


class _RoundingKVCache(KVCache):
    def write(self, layer: int, table: Any, positions: Any, k: Any, v: Any) -> None:
        super().write(layer, table, positions, bf16(k), bf16(v))

    def _read_back(self, layer: int, block: Any) -> Any:
        return bf16(super()._read_back(layer, block))


def compute(
    spec: ModelSpec,
    backend: Backend,
    sequences: list[NDArray[np.int32]],
    steps: list[Step],
    kv_budgets: NDArray[np.int32] | None = None,
) -> list[NDArray[np.float32]]:
    """The logits of every token of each sequence. Blocks are handed out at random, filled with
    NaN, and taken back once behind the window or when the sequence ends. ``kv_budgets`` are by
    position."""
    groups = cache_groups(spec, BLOCK_SIZE)
    num_blocks = sum(-(-len(tokens) // BLOCK_SIZE) for tokens in sequences)
    width = -(-MAX_MODEL_LEN // BLOCK_SIZE)
    blocks = [
        Blocks(num_blocks, g.kv_block_bytes, len(sequences), width, summary_pool(g, num_blocks))
        for g in groups
    ]
    open_blocks = [Blocks(num_blocks, g.open_block_bytes, len(sequences), width) for g in groups]
    backend.bind_kv(
        [b.pool for b in blocks], [b.pool for b in open_blocks], [b.summaries for b in blocks]
    )
    done = [0] * len(sequences)
    outputs: list[list[NDArray[np.float32]]] = [[] for _ in sequences]

    for step in steps:
        spans = {s: np.arange(done[s], done[s] + n, dtype=np.int32) for s, n in step.items()}
        for g, group in enumerate(groups):
            for s, span in spans.items():
                blocks[g].release(s, group.first_block(int(span[0]), BLOCK_SIZE))
                open_blocks[g].release(s, int(span[0]) // BLOCK_SIZE)
                for b in np.unique(span // BLOCK_SIZE):
                    blocks[g].take(s, b)
                    open_blocks[g].take(s, b)
        query_start = np.cumsum([0, *step.values()], dtype=np.int32)
        firsts = {s: int(span[0]) // BLOCK_SIZE for s, span in spans.items()}
        logits = backend.forward(
            ForwardBatch(
                token_ids=np.concatenate([sequences[s][span] for s, span in spans.items()]),
                positions=np.concatenate(list(spans.values())),
                query_start=query_start,
                block_tables=tuple(b.tables[list(step)] for b in blocks),
                open_tables=tuple(
                    np.stack([np.roll(b.tables[s], -first) for s, first in firsts.items()])
                    for b in open_blocks
                ),
                logits_indices=np.arange(query_start[-1], dtype=np.int32),
                temperatures=np.ones(query_start[-1], np.float32),
                full_logits=np.ones(query_start[-1], np.bool_),
                kv_budgets=None
                if kv_budgets is None
                else kv_budgets[np.concatenate(list(spans.values()))],
            )
        ).logits
        for i, (s, n) in enumerate(step.items()):
            outputs[s].append(logits[query_start[i] : query_start[i + 1]].copy())
            done[s] += n
            if done[s] == len(sequences[s]):
                for b in (*blocks, *open_blocks):
                    b.release(s, width)
    return [np.concatenate(output) for output in outputs]


def summary_pool(group: CacheGroup, num_blocks: int) -> NDArray[np.uint8]:
    """Full of NaN."""
    shape = (group.num_heads, num_blocks, group.head_summary_bytes)
    return np.full(shape, _NAN_BYTE, np.uint8)


class Blocks:
    """A pool whose free blocks are full of NaN, and who has which."""

    def __init__(
        self,
        num_blocks: int,
        block_bytes: int,
        num_seqs: int,
        width: int,
        summaries: NDArray[np.uint8] | None = None,
    ) -> None:
        self.pool = np.full((num_blocks if block_bytes else 0, block_bytes), _NAN_BYTE, np.uint8)
        self.summaries = np.zeros((0, num_blocks, 0), np.uint8) if summaries is None else summaries
        self.tables = np.full((num_seqs, width), -1, np.int32)
        self._free: list[int] = np.random.default_rng(0).permutation(len(self.pool)).tolist()

    def take(self, seq: int, index: int) -> None:
        if len(self.pool) and self.tables[seq, index] < 0:
            self.tables[seq, index] = self._free.pop()

    def release(self, seq: int, end: int) -> None:
        """What ``seq`` has before ``end``."""
        for block in self.tables[seq, :end][self.tables[seq, :end] >= 0].tolist():
            self.pool[block] = _NAN_BYTE
            self.summaries[:, block] = _NAN_BYTE
            self._free.insert(0, block)
        self.tables[seq, :end] = -1


def random_steps(seed: int, lengths: list[int]) -> list[Step]:
    """Some of the unfinished sequences each, by single tokens, pieces or all that is left."""
    rng = np.random.default_rng(seed)
    left = dict(enumerate(lengths))
    steps = []
    while left:
        chosen = rng.permutation(list(left))[: rng.integers(1, len(left) + 1)].tolist()
        sizes = {
            s: [1, int(rng.integers(1, 40)), left[s] // 2 + 1][rng.integers(3)] for s in chosen
        }
        step = {s: min(n, left[s]) for s, n in sizes.items()}
        steps.append(step)
        left = {s: n - step.get(s, 0) for s, n in left.items() if n > step.get(s, 0)}
    return steps
