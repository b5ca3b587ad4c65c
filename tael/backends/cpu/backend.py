"""Binds a prepared model to the native executor."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tael import _native
from tael.backends.base import NUM_CANDIDATES, ForwardBatch, HeadOutput, TieredBlocks
from tael.backends.cpu.tiered_blocks import CPUTieredBlocks
from tael.config import (
    BLOCK_SIZE,
    MIN_BUDGET_BLOCKS,
    MIN_SCORED_SUPERBLOCKS,
    SUPERBLOCK_BLOCKS,
    SchedulerConfig,
)
from tael.errors import TaelError
from tael.loader.tile_file import TileFile
from tael.models.spec import Attention, CacheGroup, LayerSpec, ModelSpec, Rope, cache_groups

if (
    _native.BLOCK_TOKENS,
    _native.MIN_BUDGET_BLOCKS,
    _native.SUPERBLOCK_BLOCKS,
    _native.MIN_SCORED_SUPERBLOCKS,
) != (BLOCK_SIZE, MIN_BUDGET_BLOCKS, SUPERBLOCK_BLOCKS, MIN_SCORED_SUPERBLOCKS):
    raise ImportError("tael._native was built for other block sizes; build it again.")


class CPUBackend:
    """A ``Backend`` of native kernels. One call computes a step on all threads."""

    def __init__(self, spec: ModelSpec, weights: TileFile, num_threads: int | None = None) -> None:
        self._weights = weights
        self._process = os.getpid()
        self._ropes: dict[Rope, int] = {}
        self._isa = chosen_isa()
        self._num_threads = num_threads or available_cores()
        self._native = _native.Model(
            self._isa,
            self._num_threads,
            hidden_size=spec.hidden_size,
            vocab_size=spec.vocab_size,
            norm_eps=spec.norm_eps,
            embedding_scale=spec.embedding_scale,
        )
        embedding = self._matrix("embed_tokens.weight")
        lm_head = embedding if spec.tie_word_embeddings else self._matrix("lm_head.weight")
        self._native.set_ends(embedding, lm_head, self._vector("norm.weight"))
        places: dict[int, dict[str, int]] = {}
        for g, group in enumerate(cache_groups(spec, BLOCK_SIZE)):
            offset = open_offset = first_head = 0
            for i in group.layers:
                places[i] = {
                    "cache_group": g,
                    "layer_offset": offset,
                    "open_layer_offset": open_offset,
                    "first_head": first_head,
                }
                cache = spec.layers[i].mixer.cache_spec
                offset += BLOCK_SIZE * cache.kv_bytes_per_token
                open_offset += BLOCK_SIZE * cache.open_bytes_per_token
                first_head += cache.num_kv_heads
        for i, layer in enumerate(spec.layers):
            self._add_layer(f"layers.{i}.", layer, places[i])

    @property
    def weights_bytes(self) -> int:
        return self._weights.num_bytes

    @property
    def fingerprint(self) -> dict[str, str]:
        kernels = Path(_native.__file__).read_bytes()
        return {
            "weights": self._weights.digest,
            "isa": self._isa,
            "kernels": hashlib.sha256(kernels).hexdigest(),
            "libc": " ".join(platform.libc_ver()),  # its cosf rotates the keys
        }

    def reserve(self, scheduler: SchedulerConfig, max_model_len: int) -> int:
        self._native.allocate(
            max_tokens=scheduler.max_num_batched_tokens,
            max_seqs=scheduler.max_num_seqs,
            max_logits=scheduler.max_num_logits,
            max_model_len=max_model_len,
            num_candidates=NUM_CANDIDATES,
        )
        return self._native.workspace_bytes

    def tier(
        self, group: CacheGroup, num_blocks: int, num_slots: int, folder: Path
    ) -> CPUTieredBlocks:
        return CPUTieredBlocks(group, num_blocks, num_slots, folder, self._num_threads)

    def bind_kv(
        self,
        pools: Sequence[NDArray[np.uint8] | TieredBlocks],
        open_pools: Sequence[NDArray[np.uint8]] = (),
        summaries: Sequence[NDArray[np.uint8]] = (),
    ) -> None:
        for group, pool in enumerate(pools):
            rows = None
            if summaries and summaries[group].size:
                rows = summaries[group].reshape(len(summaries[group]), -1)
            if isinstance(pool, CPUTieredBlocks):
                self._native.bind_tiered_kv(group, pool.native, open_pools[group], rows)
            else:
                assert isinstance(pool, np.ndarray)
                open_pool = open_pools[group] if open_pools else None
                self._native.bind_kv(group, pool, open_pool, rows)

    def forward(self, batch: ForwardBatch) -> HeadOutput:
        if os.getpid() != self._process:  # it would wait for them forever
            raise TaelError(
                "the threads of a model do not follow a fork; load the model in the new process."
            )
        output = self._native.forward(
            batch.token_ids,
            batch.positions,
            batch.query_start,
            list(batch.block_tables),
            list(batch.open_tables),
            batch.logits_indices,
            batch.temperatures,
            batch.full_logits,
            batch.kv_budgets,
            batch.restored_blocks,
        )
        return HeadOutput(*output, draw=self._native.draw)

    def _add_layer(self, prefix: str, layer: LayerSpec, place: dict[str, int]) -> None:
        mixer, ffn = layer.mixer, layer.ffn
        if mixer.head_dim % 16 or mixer.head_dim > _native.MAX_HEAD_DIM:
            raise TaelError(
                f"attention heads of {mixer.head_dim} channels are not supported by the cpu "
                f"backend, which needs a multiple of 16 up to {_native.MAX_HEAD_DIM}."
            )
        self._native.add_layer(
            attention={
                "num_heads": mixer.num_heads,
                "num_kv_heads": mixer.num_kv_heads,
                "head_dim": mixer.head_dim,
                "scale": mixer.scale,
                "window": mixer.window,
                "rope": self._rope(mixer),
                "kv_format": mixer.kv_format,
                "key_summaries": mixer.key_summaries,
                "budget_percent": mixer.budget_percent,
                **place,
                **{role: self._matrix(f"{prefix}{role}_proj.weight") for role in "qkvo"},
                **{f"{role}_bias": self._vector(f"{prefix}{role}_proj.bias") for role in "qkvo"},
                **{f"{role}_norm": self._vector(f"{prefix}{role}_norm.weight") for role in "qk"},
            },
            ffn={
                "activation": ffn.activation,
                **{
                    role: self._matrix(f"{prefix}{role}_proj.weight")
                    for role in ("gate", "up", "down")
                },
            },
            norms={
                role: self._vector(f"{prefix}{role}_norm.weight")
                for role in ("mixer", "mixer_post", "ffn", "ffn_post")
            },
        )

    def _rope(self, mixer: Attention) -> int:
        """Index of the rotary table; layers of equal settings share one."""
        if mixer.rope not in self._ropes:
            self._ropes[mixer.rope] = self._native.add_rope(
                list(mixer.rope.inv_freq), mixer.rope.attention_factor
            )
        return self._ropes[mixer.rope]

    def _matrix(self, name: str) -> _native.Matrix:
        tensor = self._weights.tensors[name]
        rows, columns = tensor.shape
        return _native.Matrix(tensor.format, rows, columns, tensor.data)

    def _vector(self, name: str) -> NDArray[np.float32] | None:
        tensor = self._weights.tensors.get(name)
        return tensor.data.view(np.float32) if tensor else None


def chosen_isa() -> str:
    """The best instruction set of this CPU, or the one that TAEL_ISA names."""
    supported = _native.supported_isas()
    isa = os.environ.get("TAEL_ISA", supported[0])
    if isa not in supported:
        raise TaelError(
            f"TAEL_ISA={isa} is not available here; this machine runs {', '.join(supported)}."
        )
    return isa


def available_cores() -> int:
    """Cores that this process may use: a container may have fewer than the machine, by affinity
    or by a quota of its control group (version 2)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.exists():
        limit, period = quota.read_text().split()
        if limit != "max":
            cores = min(cores or 1, round(int(limit) / int(period)))
    return max(1, cores or 1)
