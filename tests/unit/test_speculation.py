"""Speculation changes no token, text, log-probability or reason: engines with and without it, on
a simulated model whose KV cache holds tokens, so that it knows its prefix only from its blocks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tael.backends.base import ForwardBatch, HeadOutput
from tael.backends.reference.head import head_output
from tael.config import BLOCK_SIZE, EngineConfig, SchedulerConfig
from tael.engine.engine import Engine, OutputDelta, overhead_bytes
from tael.engine.sampler import Sampler
from tael.llm import RequestOutput, gathered
from tael.models.rope import Rope
from tael.models.spec import Attention, Dense, LayerSpec, ModelSpec, cache_groups
from tael.request import FinishReason, SamplingParams

MAX_LEN = 160
LETTERS = "abcdefgh"
EOS, POISON = 30, 31
WINDOW = 40


def layer(window: int | None) -> LayerSpec:
    rope = Rope(inv_freq=(1.0,) * 8)
    mixer = Attention(num_heads=1, num_kv_heads=1, head_dim=16, scale=1.0, rope=rope, window=window)
    return LayerSpec(mixer, Dense(intermediate_size=32, activation="silu"))


SPEC = ModelSpec(
    family="simulated",
    vocab_size=32,
    hidden_size=16,
    layers=(layer(None), layer(WINDOW)),
    norm_eps=1e-5,
    max_position_embeddings=MAX_LEN,
    tie_word_embeddings=True,
)


class SimulatedBackend:
    """The logits depend on the last two tokens, as the block tables find them."""

    weights_bytes = 0
    fingerprint: dict[str, str] = {}  # noqa: RUF012

    def reserve(self, scheduler: SchedulerConfig, max_model_len: int) -> int:
        self.scheduler = scheduler
        return 0

    def bind_kv(
        self,
        pools: Sequence[NDArray[np.uint8]],
        open_pools: Sequence[NDArray[np.uint8]],
        summaries: Sequence[NDArray[np.uint8]],
    ) -> None:
        self.blocks = [pool[:, : 4 * BLOCK_SIZE].view(np.int32) for pool in pools]

    def forward(self, batch: ForwardBatch) -> HeadOutput:
        assert len(batch.token_ids) <= self.scheduler.max_num_batched_tokens
        assert len(batch.logits_indices) <= self.scheduler.max_num_logits
        assert batch.positions.max() < MAX_LEN
        seqs = np.repeat(np.arange(len(batch.query_start) - 1), np.diff(batch.query_start))
        blocks, slots = batch.positions // BLOCK_SIZE, batch.positions % BLOCK_SIZE
        for store, table in zip(self.blocks, batch.block_tables, strict=True):
            assert table[seqs, blocks].min() >= 0
            store[table[seqs, blocks], slots] = batch.token_ids
        rows = [self._logits(batch, seqs[i], batch.positions[i]) for i in batch.logits_indices]
        logits = np.array(rows, np.float32).reshape(len(rows), SPEC.vocab_size)
        head = head_output(logits, batch.temperatures)
        return replace(head, logits=np.where(batch.full_logits[:, None], logits, np.nan))

    def _logits(self, batch: ForwardBatch, seq: int, position: int) -> NDArray[np.float32]:
        oldest = np.arange(max(0, position - WINDOW + 1), position + 1)
        full, windowed = (
            store[table[seq, oldest // BLOCK_SIZE], oldest % BLOCK_SIZE]
            for store, table in zip(self.blocks, batch.block_tables, strict=True)
        )
        assert (full == windowed).all(), "the groups disagree about the prefix"
        logits = np.random.default_rng(full[-2:].tolist()).standard_normal(SPEC.vocab_size) * 2
        logits[: len(LETTERS)] += 6
        if full[-1] == POISON:
            logits[0] = np.nan
        return logits.astype(np.float32)


class LetterTokenizer:
    eos_token_ids = frozenset({EOS})

    def decode_stream(self) -> Any:
        letters = dict(enumerate(LETTERS))
        return SimpleNamespace(step=lambda i: letters.get(i, "."), flush=lambda: "")


def make_engine(
    speculation: bool,
    num_blocks: int = 100,
    max_num_seqs: int = 8,
    max_num_batched_tokens: int = 64,
) -> Engine:
    block_bytes = sum(group.block_bytes for group in cache_groups(SPEC, BLOCK_SIZE))
    config = EngineConfig(
        memory_bytes=overhead_bytes(SPEC, SPEC.max_position_embeddings) + num_blocks * block_bytes,
        scheduler=SchedulerConfig(max_num_seqs, max_num_batched_tokens),
        speculation=speculation,
    )
    return Engine(SPEC, SimulatedBackend(), LetterTokenizer(), config, baseline_bytes=0)  # type: ignore[arg-type]


@dataclass
class Task:
    prompt: list[int]
    params: SamplingParams
    salt: str = ""
    start: int = 0
    """Step before which it comes."""


def run(engine: Engine, tasks: Sequence[Task]) -> tuple[list[RequestOutput], int]:
    """The outputs, and the number of steps."""
    deltas: defaultdict[str, list[OutputDelta]] = defaultdict(list)
    num_steps = 0
    while num_steps <= max(task.start for task in tasks) or engine.has_unfinished():
        for i, task in enumerate(tasks):
            if task.start == num_steps:
                engine.add_request(str(i), task.prompt, task.params, cache_salt=task.salt)
        if engine.has_unfinished():
            for delta in engine.step():
                deltas[delta.request_id].append(delta)
        engine.manager.check()
        num_steps += 1
    assert engine.manager.num_referenced == 0
    drafter = engine.scheduler.drafter
    assert drafter is None or not drafter._histories
    return [gathered(t.prompt, deltas[str(i)]) for i, t in enumerate(tasks)], num_steps


tokens = st.integers(0, len(LETTERS) - 1)
params = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, 80) | st.just(80),
    temperature=st.sampled_from([0.0, 0.0, 0.3, 1.0]),
    top_p=st.sampled_from([1.0, 0.9]),
    top_k=st.sampled_from([0, 3]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.2]),
    presence_penalty=st.sampled_from([0.0, 0.0, 0.7]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 0.1, -0.5]),
    logit_bias=st.dictionaries(tokens | st.just(EOS), st.floats(-5, 5), max_size=2),
    seed=st.integers(0, 100),
    logprobs=st.sampled_from([None, 0, 2]),
    stop=st.just([]) | st.lists(st.text(LETTERS, min_size=1, max_size=4), max_size=2),
    stop_token_ids=st.just([]) | st.lists(tokens, max_size=1),
    ignore_eos=st.booleans(),
    n=st.sampled_from([1, 1, 2]),
)
tasks = st.builds(
    Task,
    prompt=st.builds(
        lambda seed, length: Random(seed).choices(range(len(LETTERS)), k=length),
        st.integers(0, 1000),
        st.integers(1, 70),
    ),
    params=params,
    salt=st.sampled_from(["", "", "s"]),
    start=st.just(0) | st.integers(0, 30),
)


@settings(
    max_examples=100,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(
    tasks=st.lists(tasks, min_size=1, max_size=6),
    num_blocks=st.sampled_from([5, 6, 8, 100]),
    max_num_seqs=st.sampled_from([1, 3, 8]),
    max_num_batched_tokens=st.sampled_from([8, 20, 64]),
)
def test_outputs_are_those_without_speculation(
    tasks: list[Task], num_blocks: int, max_num_seqs: int, max_num_batched_tokens: int
) -> None:
    expected, _ = run(make_engine(speculation=False), tasks)
    engine = make_engine(True, num_blocks, max_num_seqs, max_num_batched_tokens)
    actual, _ = run(engine, tasks)
    for with_drafts, without in zip(actual, expected, strict=True):
        assert with_drafts.outputs == without.outputs
        assert with_drafts.usage.num_output_tokens == without.usage.num_output_tokens


LOOP = Task([0, 1], SamplingParams(temperature=0, max_tokens=120, ignore_eos=True))


def test_accepted_drafts_save_steps() -> None:
    """Greedy decoding of so small a model runs into a loop."""
    (output,), num_steps = run(make_engine(speculation=True), [LOOP])
    usage = output.usage
    assert usage.num_output_tokens == 120
    assert num_steps == 120 - usage.num_accepted_tokens < 40
    assert usage.num_accepted_tokens <= usage.num_draft_tokens
    (other,), num_steps = run(make_engine(speculation=False), [LOOP])
    assert num_steps == 120 and other.usage.num_draft_tokens == 0
    assert other.outputs == output.outputs


def test_one_request_may_go_without() -> None:
    engine = make_engine(speculation=True)
    engine.add_request("a", LOOP.prompt, LOOP.params, speculation=False)
    num_steps = 0
    while engine.has_unfinished():
        assert len(engine.step()[0].token_ids) == 1
        num_steps += 1
    assert num_steps == 120


@pytest.mark.parametrize("stop", ["token", "string"])
def test_what_was_drafted_after_the_end_is_dropped(stop: str) -> None:
    (whole,), _ = run(make_engine(speculation=True), [LOOP])
    token_ids = whole.outputs[0].token_ids
    for place in range(10, 100):
        if stop == "token":
            end = token_ids.index(token_ids[place]) + 1
            params = replace(LOOP.params, logprobs=0, stop_token_ids=[token_ids[place]])
        else:
            text = whole.text[:place]  # so long that it ends nowhere else
            end = place
            params = replace(LOOP.params, logprobs=0, stop=[text])
        (cut,), _ = run(make_engine(speculation=True), [Task(LOOP.prompt, params)])
        (completion,) = cut.outputs
        assert completion.token_ids == token_ids[:end]
        assert completion.finish_reason is FinishReason.STOP
        assert [logprobs.token_id for logprobs in completion.logprobs] == list(token_ids[:end])
        assert cut.usage.num_output_tokens == end
        assert cut.usage.num_accepted_tokens <= cut.usage.num_draft_tokens


def test_an_error_behind_right_drafts_comes_when_it_would_have() -> None:
    """The poisoned token is drafted, and right: the row after it fails."""
    prompt = [0, 1, 2, POISON, 0, 1, 2]
    params = SamplingParams(temperature=0, max_tokens=20, logit_bias={POISON: 1000.0})
    results = [run(make_engine(s), [Task(prompt, params)])[0][0] for s in (True, False)]
    assert results[0].outputs == results[1].outputs
    (completion,) = results[0].outputs
    assert completion.finish_reason is FinishReason.ERROR
    assert completion.token_ids == (POISON,)
    assert results[0].usage.num_draft_tokens > 0


@pytest.mark.parametrize("planted", ["draws", "penalties"])
def test_the_comparison_can_fail(planted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ways in which engines forget the tokens accepted in the same step."""
    if planted == "draws":
        sampler = {"temperature": 1.0, "top_k": 2, "seed": 3}
        sample = Sampler.sample

        def broken_sample(
            self: Sampler, head: HeadOutput, row: int, accepted: Sequence[int] = ()
        ) -> Any:
            return sample(self, head, row)

        monkeypatch.setattr(Sampler, "sample", broken_sample)
    else:
        sampler = {"temperature": 0.0, "frequency_penalty": 0.3}
        adjust = Sampler.adjust

        def broken_adjust(self: Sampler, logits: Any, accepted: Sequence[int] = ()) -> Any:
            return adjust(self, logits)

        monkeypatch.setattr(Sampler, "adjust", broken_adjust)
    params = SamplingParams(max_tokens=120, ignore_eos=True, **sampler)
    tasks = [Task([i, 1, 2], params) for i in range(4)]
    expected, _ = run(make_engine(speculation=False), tasks)
    actual, _ = run(make_engine(speculation=True), tasks)
    assert [o.outputs for o in actual] != [o.outputs for o in expected]
