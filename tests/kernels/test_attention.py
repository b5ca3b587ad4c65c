"""Attention of every instruction set at its edges; ``test_model.py`` has heads and threads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tiny_models import SIZES, cpu_backend, divergence, random_model, run
from transformers import LlamaConfig, MistralConfig, PretrainedConfig

from tael.backends.base import ForwardBatch
from tael.backends.cpu.backend import CPUBackend
from tael.backends.reference import ReferenceBackend
from tael.config import BLOCK_SIZE
from tael.loader.safetensors import SafetensorsCheckpoint
from tael.models.registry import read_spec
from tael.models.spec import ModelSpec, cache_groups

SMALL: dict[str, Any] = {
    **SIZES,
    "head_dim": 32,  # which fills the tiles of AMX; ``test_model.py`` has heads that do not
    "max_position_embeddings": 2048,
    "num_hidden_layers": 1,
}
MAX_DIVERGENCE = 2e-4
"""Nats per token (mean): what bf16 KV costs these models, with room."""


def make(config: PretrainedConfig, folder: Path) -> tuple[ModelSpec, SafetensorsCheckpoint]:
    random_model(config).save_pretrained(folder)
    checkpoint = SafetensorsCheckpoint(folder)
    return read_spec(checkpoint), checkpoint


def tokens(spec: ModelSpec, num_tokens: int, seed: int = 3) -> NDArray[np.int32]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, spec.vocab_size, num_tokens, dtype=np.int32)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("num_tokens", [511, 512, 513, 1025])
def test_partitions(num_tokens: int, tmp_path: Path) -> None:
    """Around multiples of 512 positions: right, and the same whole, in chunks and token by token
    at the end, where few queries are cut into partitions for the threads."""
    spec, checkpoint = make(LlamaConfig(**SMALL), tmp_path)
    ids = tokens(spec, num_tokens)
    cpu = cpu_backend(spec, checkpoint, tmp_path, max_tokens=1100)
    whole = run(spec, cpu, [ids], [[num_tokens]])[0]
    chunks = [200, num_tokens - 200 - 8, *[1] * 8]
    np.testing.assert_array_equal(run(spec, cpu, [ids], [chunks])[0], whole)
    expected = run(spec, ReferenceBackend(spec, checkpoint), [ids], [[num_tokens]])[0]
    assert divergence(expected, whole).mean() < MAX_DIVERGENCE


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("window", [1, 5, 33, 512, 600])
def test_windows(window: int, tmp_path: Path) -> None:
    """Smaller than a block, across blocks and across partitions."""
    spec, checkpoint = make(MistralConfig(**SMALL, sliding_window=window), tmp_path)
    ids = tokens(spec, 660)
    cpu = cpu_backend(spec, checkpoint, tmp_path, max_tokens=660)
    whole = run(spec, cpu, [ids], [[660]])[0]
    np.testing.assert_array_equal(run(spec, cpu, [ids], [[100, 550, *[1] * 10]])[0], whole)
    expected = run(spec, ReferenceBackend(spec, checkpoint), [ids], [[660]])[0]
    assert divergence(expected, whole).mean() < MAX_DIVERGENCE


@pytest.mark.usefixtures("isa")
def test_stale_blocks_leak_nothing(tmp_path: Path) -> None:
    """What earlier requests left in a block, NaN included, does not reach those after them."""
    spec, checkpoint = make(LlamaConfig(**SMALL), tmp_path)
    ids = tokens(spec, 45)
    cpu = cpu_backend(spec, checkpoint, tmp_path)
    (group,) = cache_groups(spec, BLOCK_SIZE)
    outputs = []
    for byte in (0x00, 0xFF):  # bf16 0xFFFF is a NaN
        cpu.bind_kv([np.full((2, group.block_bytes), byte, np.uint8)])
        outputs.append([forward(cpu, ids[:44], 0).copy(), forward(cpu, ids[44:], 44).copy()])
    for clean, stale in zip(*outputs, strict=True):
        assert np.isfinite(stale).all()
        np.testing.assert_array_equal(clean, stale)


def test_batches_out_of_bounds_are_refused(tmp_path: Path) -> None:
    """A wrong batch raises instead of reading memory that is not there."""
    spec, checkpoint = make(LlamaConfig(**SMALL), tmp_path)
    cpu = cpu_backend(spec, checkpoint, tmp_path)
    (group,) = cache_groups(spec, BLOCK_SIZE)
    cpu.bind_kv([np.zeros((2, group.block_bytes), np.uint8)])
    ids = tokens(spec, 40)
    for wrong in (
        {"block_table": [0, 2]},
        {"block_table": [0, -1]},
        {"block_table": [0]},
        {"token_ids": np.full(40, spec.vocab_size, np.int32)},
        {"start": 5000},
        {"logits_index": 40},
    ):
        arguments: dict[str, Any] = {"token_ids": ids, "start": 0, **wrong}
        with pytest.raises(IndexError):
            forward(cpu, **arguments)


def forward(
    backend: CPUBackend,
    token_ids: NDArray[np.int32],
    start: int,
    block_table: list[int] | None = None,
    logits_index: int | None = None,
) -> NDArray[np.float32]:
    """One sequence of two blocks; logits of the last token."""
    n = len(token_ids)
    last = n - 1 if logits_index is None else logits_index
    return backend.forward(
        ForwardBatch(
            token_ids=token_ids,
            positions=np.arange(start, start + n, dtype=np.int32),
            query_start=np.array([0, n], np.int32),
            block_tables=(np.array([block_table or [1, 0]], np.int32),),
            logits_indices=np.array([last], np.int32),
            temperatures=np.ones(1, np.float32),
            full_logits=np.ones(1, np.bool_),
        )
    ).logits
