"""The whole model in numpy: what every kernel and every other backend is tested against."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tael.backends.base import WITH_PREVIOUS, ForwardBatch, HeadOutput, TieredBlocks
from tael.backends.reference.block_selection import (
    CHOOSER_STEP,
    chosen_blocks,
    layer_budgets,
)
from tael.backends.reference.head import head_output
from tael.backends.reference.kv_cache import KVCache
from tael.backends.reference.layers import (
    ACTIVATIONS,
    Float32,
    attention,
    linear,
    rms_norm,
    rotary,
)
from tael.config import BLOCK_SIZE, SchedulerConfig
from tael.errors import TaelError
from tael.loader.checkpoint import Checkpoint
from tael.loader.weights import read_parameter
from tael.models.spec import Attention, CacheGroup, Dense, ModelSpec


class ReferenceBackend:
    """A ``Backend`` for tests: slow, and exempt from the byte budget, as it decodes the weights
    to float32 and keeps float32 KV of its own beside the pools it is given.

    The definition is of values, not of bits: numpy's matrix product rounds differently for
    different numbers of tokens, so equal positions of two batches agree to about 1e-5.
    """

    attend = staticmethod(attention)

    def __init__(self, spec: ModelSpec, checkpoint: Checkpoint) -> None:
        self.spec = spec
        self.parameters = {
            name: read_parameter(checkpoint, spec, name) for name in spec.parameters()
        }
        self.kv_cache: KVCache

    @property
    def weights_bytes(self) -> int:
        return sum(parameter.nbytes for parameter in self.parameters.values())

    @property
    def fingerprint(self) -> dict[str, str]:
        return {}  # numpy rounds as its BLAS pleases

    def reserve(self, scheduler: SchedulerConfig, max_model_len: int) -> int:
        return scheduler.max_num_logits * self.spec.vocab_size * 4  # the logits

    def tier(
        self, group: CacheGroup, num_blocks: int, num_slots: int, folder: Path
    ) -> TieredBlocks:
        raise TaelError("KV on disk takes the cpu backend; leave out --kv-disk.")

    def bind_kv(
        self,
        pools: Sequence[NDArray[np.uint8] | TieredBlocks],
        open_pools: Sequence[NDArray[np.uint8]] = (),
        summaries: Sequence[NDArray[np.uint8]] = (),
    ) -> None:
        self.kv_cache = KVCache(self.spec, [len(p) for p in pools if isinstance(p, np.ndarray)])

    def forward(self, batch: ForwardBatch) -> HeadOutput:
        return head_output(self.logits(batch), batch.temperatures)

    def logits(self, batch: ForwardBatch) -> Float32:
        """[num_logits, vocab_size]"""
        spec, parameters = self.spec, self.parameters
        x = parameters["embed_tokens.weight"][batch.token_ids] * np.float32(spec.embedding_scale)
        norm = partial(rms_norm, eps=spec.norm_eps)
        for i, layer in enumerate(spec.layers):
            p = {
                name: parameters[f"layers.{i}.{name}"]
                for name, _ in layer.parameters(spec.hidden_size)
            }
            y = self._attention(layer.mixer, i, p, norm(x, p["mixer_norm.weight"]), batch)
            x = x + (norm(y, p["mixer_post_norm.weight"]) if layer.post_norms else y)
            y = _dense(layer.ffn, p, norm(x, p["ffn_norm.weight"]))
            x = x + (norm(y, p["ffn_post_norm.weight"]) if layer.post_norms else y)
        x = norm(x[batch.logits_indices], parameters["norm.weight"])
        head = "embed_tokens.weight" if spec.tie_word_embeddings else "lm_head.weight"
        return linear(x, parameters[head])

    def _attention(
        self, mixer: Attention, layer: int, p: dict[str, Float32], x: Float32, batch: ForwardBatch
    ) -> Float32:
        def heads(role: str) -> Float32:
            y = linear(x, p[f"{role}_proj.weight"], p.get(f"{role}_proj.bias"))
            return y.reshape(len(x), -1, mixer.head_dim)

        q, k, v = heads("q"), heads("k"), heads("v")
        if mixer.qk_norm:
            q = rms_norm(q, p["q_norm.weight"], self.spec.norm_eps)
            k = rms_norm(k, p["k_norm.weight"], self.spec.norm_eps)
        q = rotary(q, batch.positions, mixer.rope)
        k = rotary(k, batch.positions, mixer.rope)

        mixed = np.empty((len(x), mixer.num_heads * mixer.head_dim), np.float32)
        for s, end in enumerate(batch.query_start[1:]):
            tokens = np.arange(batch.query_start[s], end)
            table = batch.block_tables[self.kv_cache.group_of_layer[layer]][s]
            self.kv_cache.write(layer, table, batch.positions[tokens], k[tokens], v[tokens])
            blocks = batch.positions[tokens] // BLOCK_SIZE
            choices, budgets = np.arange(len(tokens)), np.zeros(len(tokens), np.int32)
            if batch.kv_budgets is not None and mixer.window is None:
                own_budgets = batch.kv_budgets[tokens]
                chooses = own_budgets != WITH_PREVIOUS
                choices = np.flatnonzero(chooses)[np.cumsum(chooses) - 1]
                budgets = layer_budgets(own_budgets[choices], mixer.budget_percent)
                budgets = np.where(blocks < budgets, 0, budgets)
            for block in np.unique(blocks):
                own = tokens[(blocks == block) & (budgets == 0)]
                if len(own):
                    mixed[own] = self._attend_all(q[own], mixer, layer, table, batch.positions[own])
            for choice in np.unique(choices[budgets > 0]):
                own = tokens[choices == choice]
                mixed[own] = self._attend_some(
                    q[own], mixer, layer, table, batch.positions[own], budgets[choice]
                )
        return linear(mixed, p["o_proj.weight"], p.get("o_proj.bias"))

    def _attend_all(
        self,
        q: Float32,
        mixer: Attention,
        layer: int,
        table: NDArray[np.int32],
        positions: NDArray[np.int32],
    ) -> Float32:
        """Queries [T, H, D] of one block over all that they see."""
        start = 0 if mixer.window is None else max(0, positions[0] - mixer.window + 1)
        seen = np.arange(start, positions[-1] + 1, dtype=np.int32)
        keys, values = self.kv_cache.read(layer, table, seen, positions[0] // BLOCK_SIZE)
        return self.attend(q, keys, values, positions, seen, mixer.scale, mixer.window)

    def _attend_some(
        self,
        q: Float32,
        mixer: Attention,
        layer: int,
        table: NDArray[np.int32],
        positions: NDArray[np.int32],
        budget: int,
    ) -> Float32:
        """Queries [T, H, D] of one block over ``budget`` blocks, which they choose together for
        each KV head."""
        own = positions[0] // BLOCK_SIZE
        summaries = self.kv_cache.summaries(layer, table[:own])
        grouped = q.reshape(len(q), mixer.num_kv_heads, -1, mixer.head_dim).swapaxes(0, 1)
        mixed = []
        for head, queries in enumerate(grouped):
            choosers = queries[::CHOOSER_STEP].reshape(-1, mixer.head_dim)
            scored = self.scored(choosers, mixer.scale)
            blocks = chosen_blocks(scored, summaries.of_head(head), budget)
            seen = (blocks[:, None] * BLOCK_SIZE + np.arange(BLOCK_SIZE)).ravel()
            seen = np.append(seen, np.arange(own * BLOCK_SIZE, positions[-1] + 1)).astype(np.int32)
            keys, values = self.kv_cache.read(layer, table, seen, own)
            # As if the sequence had no other blocks.
            places = np.arange(len(seen), dtype=np.int32)
            mixed.append(
                self.attend(
                    queries,
                    keys[:, head : head + 1],
                    values[:, head : head + 1],
                    places[-1] + positions - positions[-1],
                    places,
                    mixer.scale,
                    None,
                )
            )
        return np.concatenate(mixed, axis=1)

    @staticmethod
    def scored(q: Float32, scale: float) -> Float32:
        """The queries whose scores with the summaries choose the blocks."""
        return np.float32(scale) * q


def _dense(ffn: Dense, p: dict[str, Float32], x: Float32) -> Float32:
    gate = ACTIVATIONS[ffn.activation](linear(x, p["gate_proj.weight"]))
    return linear(gate * linear(x, p["up_proj.weight"]), p["down_proj.weight"])
