"""The harness of benchmarks/compare.py, with engines that take the time they are told to."""

from __future__ import annotations

import math
from dataclasses import asdict, replace

import numpy as np
import pytest
from random_models import random_spec

from benchmarks import cases
from benchmarks.compare import compare
from tael.evals.limits import Limits
from tael.evals.speed import Speed, TokenCost, Workload, token_cost
from tael.loader.tile_file import TileFile, TileTensor

DECODE = Workload(num_decode_tokens=10)
LIMITS = Limits(2, read_bytes_per_s=30e9, int8_ops_per_s=None, bf16_flops_per_s=None)


class Engine:
    """Takes the given seconds, one after the other, and writes its name to a log."""

    def __init__(self, name: str, seconds: list[float], log: list[str]) -> None:
        self.options = [name]
        self.is_closed = False
        self._seconds, self._log = iter(seconds), log

    def measure(self) -> Speed:
        assert not self.is_closed
        self._log.append(self.options[0])
        return Speed(DECODE, prefill_s=0, decode_s=next(self._seconds), num_decoded_tokens=10)

    def close(self) -> None:
        self.is_closed = True


def test_rounds_alternate_and_the_fastest_settings_go_on() -> None:
    log: list[str] = []
    tael = Engine("tael", [9, 1, 2, 4], log)
    slow, fast = Engine("slow", [8], log), Engine("fast", [7, 3, 2, 2], log)
    result = compare({"tael": [tael], "peer": [slow, fast]}, 3, lambda: LIMITS)
    assert log == ["tael", "slow", "fast", "fast", "tael", "tael", "fast", "fast", "tael"]
    assert result["ratio"] == {"peer": 1.0}  # of 3, 1 and 1/2
    assert result["engines"]["peer"]["options"] == ["fast"]
    assert result["engines"]["peer"]["tried"] == {"slow": 1.25, "fast": 1.43}
    assert result["engines"]["tael"]["tokens_per_s"] == 5.0
    assert result["limits"] == asdict(LIMITS)
    assert tael.is_closed and slow.is_closed and fast.is_closed


def test_cases_of_groups() -> None:
    assert list(cases.named("grid")) == list(cases.GRID)
    assert list(cases.named("batch-4,depths"))[:2] == ["batch-4", "decode"]


def test_a_prompt_is_cut_to_the_context() -> None:
    prompt = Workload(num_prompt_tokens=8192)
    assert cases.fitted(prompt, 32768) == prompt
    assert cases.fitted(prompt, 8192) == Workload(num_prompt_tokens=8191)
    assert cases.fitted(Workload(num_decode_tokens=64, depth=8192), 8192) is None


def test_limit_of_decoding() -> None:
    cost = TokenCost(weight_bytes=1000, kv_bytes=10, layer_ops=3000, head_ops=1000)
    memory_only = Limits(2, read_bytes_per_s=2000, int8_ops_per_s=None, bf16_flops_per_s=None)
    assert cost.decode_limit(memory_only, batch_size=1) == 2000 / 1010
    assert cost.decode_limit(memory_only, batch_size=4) == pytest.approx(4 * 2000 / 1040)
    both = Limits(2, read_bytes_per_s=2000, int8_ops_per_s=8000, bf16_flops_per_s=None)
    assert cost.decode_limit(both, batch_size=1) == 2000 / 1010
    assert cost.decode_limit(both, batch_size=4) == 2  # 4 tokens in 2 s


@pytest.mark.parametrize("tied", [False, True])
def test_cost_of_a_token(tied: bool) -> None:
    spec = replace(random_spec(2, 1, 16, windows=[None, 8]), tie_word_embeddings=tied)
    tensors = {
        name: TileTensor("Q8_0", shape, np.zeros(10, np.uint8))
        for name, shape in spec.parameters().items()
    }
    cost = token_cost(spec, TileFile(tensors, 0, ""), depth=100)
    num_read = len(tensors) if tied else len(tensors) - 1  # of an untied embedding, a row is read
    assert cost.weight_bytes == 10 * num_read
    assert cost.kv_bytes == 2 * 16 * 2 * (100 + 8)
    assert cost.head_ops == 2 * spec.vocab_size * spec.hidden_size
    layer = sum(math.prod(s) for n, s in spec.parameters().items() if "layers.0" in n and s[1:])
    assert cost.layer_ops == 2 * 2 * layer
