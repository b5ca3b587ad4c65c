"""Tokens per second of an engine, as ``llama-bench`` counts them."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from tael.engine.engine import Engine
from tael.errors import TaelError
from tael.evals.limits import Limits
from tael.loader.tile_file import TileFile
from tael.models.spec import ModelSpec
from tael.request import SamplingParams


@dataclass(frozen=True, slots=True)
class Workload:
    """``batch_size`` sequences of ``depth`` tokens, of which the cache has the keys and values.
    Each is given ``num_prompt_tokens`` random tokens more, and then decodes greedily."""

    num_prompt_tokens: int = 0
    num_decode_tokens: int = 0
    depth: int = 0
    batch_size: int = 1

    @property
    def num_tokens(self) -> int:
        """Computed by all sequences together."""
        return self.batch_size * (self.num_prompt_tokens + self.num_decode_tokens)


@dataclass(frozen=True, slots=True)
class Speed:
    """One run of a workload."""

    workload: Workload
    prefill_s: float
    """Until the last sequence had its first token; 0 if the workload has no prompt."""
    decode_s: float
    num_decoded_tokens: int
    """Within ``decode_s``. Fewer than the workload's if the first sequences decode while the
    last are in their prompts."""

    @property
    def prefill_tokens_per_s(self) -> float:
        return self.workload.batch_size * self.workload.num_prompt_tokens / self.prefill_s

    @property
    def decode_tokens_per_s(self) -> float:
        return self.num_decoded_tokens / self.decode_s

    @property
    def tokens_per_s(self) -> float:
        """All tokens of the workload over all of its time."""
        return self.workload.num_tokens / (self.prefill_s + self.decode_s)


def measure(engine: Engine, workload: Workload) -> Speed:
    """Run a workload on an idle engine. What lies before ``depth`` is computed first, unless the
    prefix cache has it from an earlier run; nothing else comes from there, or from drafts. Raises
    TaelError if the sequences do not fit the context, or not into one step.

    A prefix hit ends with a block and leaves at least one token to compute, so that up to a
    block of the depth is computed again. That is timed only if there is a prompt.
    """
    fresh = max(workload.num_prompt_tokens, 0 if workload.depth else 1)
    num_tokens = workload.depth + fresh + workload.num_decode_tokens + 1
    if num_tokens > engine.max_model_len:
        raise TaelError(
            f"{num_tokens} tokens a sequence do not fit the context of {engine.max_model_len}; "
            "measure fewer, or raise the memory budget."
        )
    if workload.batch_size > engine.scheduler.config.max_num_seqs:
        raise TaelError(
            f"a batch of {workload.batch_size} does not run at once; the engine takes "
            f"{engine.scheduler.config.max_num_seqs}."
        )
    random = np.random.default_rng()
    prefixes = list(_prefixes(engine.spec.vocab_size, workload))
    if workload.depth:
        _add(engine, prefixes, num_output_tokens=1)
        while engine.has_unfinished():
            engine.step()
    prompts = [
        prefix + random.integers(0, engine.spec.vocab_size, fresh).tolist() for prefix in prefixes
    ]
    _add(engine, prompts, num_output_tokens=workload.num_decode_tokens + 1)
    start = time.perf_counter()
    started: set[str] = set()
    while len(started) < workload.batch_size:
        started.update(delta.request_id for delta in engine.step())
    first = time.perf_counter()
    num_decoded_tokens = 0
    while engine.has_unfinished():
        num_decoded_tokens += len(engine.step())
    return Speed(
        workload=workload,
        prefill_s=first - start if workload.num_prompt_tokens else 0.0,
        decode_s=time.perf_counter() - first if workload.num_decode_tokens else 0.0,
        num_decoded_tokens=num_decoded_tokens,
    )


def median_speed(engine: Engine, workload: Workload, num_runs: int) -> Speed:
    """Medians of several runs, each of its own quantity."""
    speeds = [measure(engine, workload) for _ in range(num_runs)]
    return Speed(
        workload=workload,
        prefill_s=median(speed.prefill_s for speed in speeds),
        decode_s=median(speed.decode_s for speed in speeds),
        num_decoded_tokens=speeds[0].num_decoded_tokens,
    )


@dataclass(frozen=True, slots=True)
class TokenCost:
    """What the machine must do for one token of a sequence at some depth."""

    weight_bytes: int
    """Read once for each step, however many sequences it has."""
    kv_bytes: int
    """Read for each sequence."""
    layer_ops: int
    """Of the layers' matrices; a multiply-add is two. Attention comes on top."""
    head_ops: int
    """Of the output matrix, which only the last token of a prompt needs."""

    def decode_limit(self, limits: Limits, batch_size: int) -> float:
        """Tokens per second that a batch cannot exceed: its steps take at least as long as the
        machine needs to read their bytes, or for the arithmetic of their matrices."""
        step_bytes = self.weight_bytes + batch_size * self.kv_bytes
        step_s = step_bytes / limits.read_bytes_per_s
        if limits.int8_ops_per_s:
            step_ops = batch_size * (self.layer_ops + self.head_ops)
            step_s = max(step_s, step_ops / limits.int8_ops_per_s)
        return batch_size / step_s


def token_cost(spec: ModelSpec, weights: TileFile, depth: int) -> TokenCost:
    """Of an embedding that is no output matrix too, a token reads one row: that is left out."""
    head = "embed_tokens.weight" if spec.tie_word_embeddings else "lm_head.weight"
    read = {
        name: tensor
        for name, tensor in weights.tensors.items()
        if name in (head, "norm.weight") or name.startswith("layers.")
    }
    ops = {name: 2 * math.prod(t.shape) for name, t in read.items() if len(t.shape) == 2}
    caches = [layer.mixer.cache_spec for layer in spec.layers]
    return TokenCost(
        weight_bytes=sum(tensor.data.nbytes for tensor in read.values()),
        kv_bytes=sum(c.bytes_per_token * min(depth, c.window or depth) for c in caches),
        layer_ops=sum(ops.values()) - ops[head],
        head_ops=ops[head],
    )


def _prefixes(vocab_size: int, workload: Workload) -> Iterator[list[int]]:
    """The same in every run, so that the prefix cache keeps them."""
    for i in range(workload.batch_size):
        yield np.random.default_rng(i).integers(0, vocab_size, workload.depth).tolist()


def _add(engine: Engine, prompts: Sequence[Sequence[int]], num_output_tokens: int) -> None:
    params = SamplingParams(temperature=0, max_tokens=num_output_tokens, ignore_eos=True)
    for i, prompt in enumerate(prompts):
        engine.add_request(f"speed {i}", prompt, params, cache_salt="speed", speculation=False)
