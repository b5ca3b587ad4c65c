"""The Python API and the engine, with the reference backend on a tiny random model."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from byte_llama import GREEDY, MAX_LEN, PROMPTS, assert_idle
from numpy.typing import NDArray
from transformers import LlamaForCausalLM

from tael import LLM, SamplingParams, TaelError
from tael.backends.base import ForwardBatch
from tael.backends.reference import ReferenceBackend
from tael.config import BLOCK_SIZE, EngineConfig, SchedulerConfig
from tael.engine.engine import Engine, OutputDelta, overhead_bytes
from tael.evals.speed import Workload, measure
from tael.llm import MAX_TOKEN_CHARACTERS, RequestOutput, gathered
from tael.loader.safetensors import SafetensorsCheckpoint
from tael.loader.tokenizer import Tokenizer
from tael.models.extension import EXTENSIONS
from tael.models.registry import read_spec
from tael.models.spec import ContextExtension, cache_groups
from tael.request import FinishReason, TokenLogprobs


@pytest.fixture(scope="module")
def reference(folder: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def make_engine(
    folder: Path,
    num_blocks: int = 100,
    max_num_seqs: int = 8,
    backend_class: type[ReferenceBackend] = ReferenceBackend,
) -> Engine:
    """An engine whose budget leaves exactly ``num_blocks`` for the KV cache."""
    checkpoint = SafetensorsCheckpoint(folder)
    spec = read_spec(checkpoint)
    backend = backend_class(spec, checkpoint)
    scheduler = SchedulerConfig(max_num_seqs=max_num_seqs, max_num_batched_tokens=64)
    (group,) = cache_groups(spec, BLOCK_SIZE)
    taken = (
        overhead_bytes(spec, MAX_LEN) + backend.weights_bytes + backend.reserve(scheduler, MAX_LEN)
    )
    config = EngineConfig(memory_bytes=taken + num_blocks * group.block_bytes, scheduler=scheduler)
    tokenizer = Tokenizer.from_directory(folder)
    return Engine(spec, backend, tokenizer, config, baseline_bytes=0)


def run(
    engine: Engine, prompts: list[list[int]], params: SamplingParams
) -> dict[str, RequestOutput]:
    deltas: dict[str, list[OutputDelta]] = {}
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), prompt, params)
        deltas[str(i)] = []
    while engine.has_unfinished():
        for delta in engine.step():
            deltas[delta.request_id].append(delta)
    assert_idle(engine)
    return {str(i): gathered(prompt, deltas[str(i)]) for i, prompt in enumerate(prompts)}


def test_greedy_equals_transformers(llm: LLM, reference: LlamaForCausalLM) -> None:
    outputs = llm.generate(PROMPTS, GREEDY)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        ids = torch.tensor([output.prompt_token_ids])
        with torch.no_grad():
            expected = reference.generate(ids, max_new_tokens=24, do_sample=False)
        (completion,) = output.outputs
        assert completion.token_ids == tuple(expected[0, ids.shape[1] :].tolist())
        assert bytes_of(llm, output.prompt_token_ids) == prompt.encode()
        assert completion.text == llm.engine.tokenizer.decode(completion.token_ids)
        assert output.usage.num_prompt_tokens == ids.shape[1]
        assert output.usage.num_output_tokens == len(completion.token_ids)


def bytes_of(llm: LLM, token_ids: tuple[int, ...]) -> bytes:
    return b"".join(map(llm.engine.tokenizer.token_bytes, token_ids))


def test_random_text_does_not_depend_on_the_batch(llm: LLM) -> None:
    params = SamplingParams(seed=5, top_p=0.95, max_tokens=20, repetition_penalty=1.1)
    together = llm.generate(PROMPTS, params)
    for prompt, output in zip(PROMPTS, together, strict=True):
        alone = llm.generate(prompt, params)[0]
        assert alone.outputs == output.outputs
    other = llm.generate(PROMPTS, SamplingParams(seed=6, top_p=0.95, max_tokens=20))
    assert [o.text for o in other] != [o.text for o in together]


def test_parameters_for_each_prompt(llm: LLM) -> None:
    outputs = llm.generate(
        ["abc", [1, 2, 3]],
        [
            SamplingParams(max_tokens=3, ignore_eos=True),
            SamplingParams(max_tokens=5, ignore_eos=True),
        ],
    )
    assert [len(o.outputs[0].token_ids) for o in outputs] == [3, 5]
    assert outputs[1].prompt_token_ids == (1, 2, 3)
    assert outputs[0].outputs[0].finish_reason is FinishReason.LENGTH
    assert llm.generate([]) == []


def test_completions_of_one_prompt_share_its_blocks(llm: LLM) -> None:
    prompt = PROMPTS[1]
    params = SamplingParams(n=3, seed=1, max_tokens=10, ignore_eos=True)
    (output,) = llm.generate(prompt, params)
    num_shared = output.usage.num_prompt_tokens // BLOCK_SIZE * BLOCK_SIZE
    assert llm.engine.manager.num_prefix_hit_tokens == 2 * num_shared > 0
    assert [c.index for c in output.outputs] == [0, 1, 2]
    assert len({c.text for c in output.outputs}) == 3
    assert output.usage.num_output_tokens == 30
    # The first is what n=1 gives; all are reproducible.
    (single,) = llm.generate(prompt, SamplingParams(seed=1, max_tokens=10, ignore_eos=True))
    assert single.outputs[0] == output.outputs[0]
    assert llm.generate(prompt, params)[0].outputs == output.outputs


def test_completions_wait_for_a_prompt_that_takes_several_steps(folder: Path) -> None:
    engine = make_engine(folder)
    prompts = [list(range(100)), list(range(200, 240))]  # 64 tokens are computed in a step
    run(engine, prompts, SamplingParams(n=3, max_tokens=2, ignore_eos=True))
    assert engine.manager.num_prefix_hit_tokens == 2 * 96 + 2 * 32

    engine.add_request("aborted", list(range(150, 0, -1)), SamplingParams(n=3))
    engine.step()
    engine.abort("aborted")
    assert_idle(engine)


def test_stop_string(llm: LLM) -> None:
    whole = llm.generate("abc", GREEDY)[0].outputs[0]
    stop = whole.text[5:8]
    params = SamplingParams(temperature=0, max_tokens=24, stop=[stop])
    cut = llm.generate("abc", params)[0].outputs[0]
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish_reason is FinishReason.STOP
    assert stop in llm.engine.tokenizer.decode(cut.token_ids)
    assert stop not in llm.engine.tokenizer.decode(cut.token_ids[:-1])


def test_end_of_sequence(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=9, logit_bias={256: 1000.0})
    ended = llm.generate("abc", params)[0].outputs[0]
    assert (ended.text, ended.token_ids) == ("", (256,))
    assert ended.finish_reason is FinishReason.STOP


@pytest.mark.parametrize("prompt", [PROMPTS[3], [7, 8, 9], [{"role": "user", "content": "hi"}]])
def test_stream_equals_generate(llm: LLM, prompt: str | list[int]) -> None:
    params = SamplingParams(seed=3, max_tokens=30, n=2)
    whole = llm.generate([prompt], params)[0]
    deltas = list(llm.stream(prompt, params))
    assert gathered(whole.prompt_token_ids, deltas).outputs == whole.outputs
    assert [d.usage is not None for d in deltas] == [False] * (len(deltas) - 1) + [True]


def test_interleaved_streams_and_calls(llm: LLM) -> None:
    params = SamplingParams(seed=3, max_tokens=12, ignore_eos=True)
    expected = llm.generate(PROMPTS[:3], params)
    first, second = llm.stream(PROMPTS[0], params), llm.stream(PROMPTS[1], params)
    texts = [next(first).text, next(second).text]
    (third,) = llm.generate(PROMPTS[2], params)
    texts[0] += "".join(delta.text for delta in first)
    texts[1] += "".join(delta.text for delta in second)
    assert [*texts, third.text] == [output.text for output in expected]


def test_closing_a_stream_frees_its_blocks(llm: LLM) -> None:
    stream = llm.stream(PROMPTS[1], SamplingParams(n=3, ignore_eos=True))
    next(stream)
    assert llm.engine.manager.num_referenced > 0
    stream.close()
    assert_idle(llm.engine)


def test_chat(llm: LLM) -> None:
    messages = [{"role": "user", "content": "hi"}]
    output = llm.chat(messages, GREEDY)
    assert bytes_of(llm, output.prompt_token_ids) == b"user: hi\nassistant: "
    assert output.outputs == llm.generate([messages], GREEDY)[0].outputs


def test_logprobs(llm: LLM, reference: LlamaForCausalLM) -> None:
    params = SamplingParams(seed=2, max_tokens=6, logprobs=4, temperature=1.5, ignore_eos=True)
    output = llm.generate("abc", params)[0]
    (completion,) = output.outputs
    ids = torch.tensor([[*output.prompt_token_ids, *completion.token_ids]])
    with torch.no_grad():
        expected = torch.log_softmax(reference(ids).logits[0].double(), dim=-1)
    assert len(completion.logprobs) == 6
    for i, logprobs in enumerate(completion.logprobs):
        row = expected[len(output.prompt_token_ids) + i - 1]
        assert logprobs.token_id == completion.token_ids[i]
        assert logprobs.logprob == pytest.approx(float(row[logprobs.token_id]), abs=1e-4)
        assert [token_id for token_id, _ in logprobs.top] == row.topk(4).indices.tolist()
        assert sum(math.exp(p) for _, p in logprobs.top) <= 1


def test_usage(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    first = llm.generate(PROMPTS[1], params)[0].usage
    second = llm.generate(PROMPTS[1], params)[0].usage
    assert first.num_cached_tokens == 0
    assert second.num_cached_tokens == first.num_prompt_tokens // BLOCK_SIZE * BLOCK_SIZE
    (group,) = llm.engine.manager.groups
    num_blocks = -(-(first.num_prompt_tokens + 7) // BLOCK_SIZE)
    assert first.kv_bytes == second.kv_bytes == num_blocks * group.block_bytes
    assert 0 <= first.queue_s <= first.time_to_first_token_s
    assert first.decode_s > 0 and first.decode_tokens_per_s == 7 / first.decode_s
    assert first.num_cache_write_tokens == second.num_cached_tokens
    assert first.num_fresh_tokens == second.num_fresh_tokens < BLOCK_SIZE
    assert 0 < first.kv_byte_s < first.kv_bytes * (first.time_to_first_token_s + first.decode_s)


def test_usages_share_the_time_that_the_engine_computed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the caller pays once for a prompt with several answers."""
    engine = make_engine(folder)
    clock = itertools.count()  # a step takes a second
    monkeypatch.setattr("tael.engine.engine.time.monotonic", lambda: float(next(clock)))
    prompt = list(range(BLOCK_SIZE + 9))
    engine.add_request("one", prompt, SamplingParams(max_tokens=3, ignore_eos=True, n=3))
    engine.add_request("two", [1, 2], SamplingParams(max_tokens=9, ignore_eos=True))
    computed_s, usages = 0.0, {}
    while engine.has_unfinished():
        before = next(clock)
        deltas = engine.step()
        usages |= {delta.request_id: delta.usage for delta in deltas if delta.usage}
        computed_s += 1
        assert next(clock) > before + 2
        if "one" not in usages:
            assert engine.usage("one").num_prompt_tokens == len(prompt)
    assert sum(usage.compute_s for usage in usages.values()) == pytest.approx(computed_s)
    one = usages["one"]
    assert (one.num_cached_tokens, one.num_cache_write_tokens) == (0, BLOCK_SIZE)
    assert (one.num_prompt_tokens, one.num_output_tokens) == (len(prompt), 9)


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ("x" * MAX_LEN, GREEDY, "context"),
        ("", GREEDY, "no tokens"),
        ([0, 257], GREEDY, "does not know"),
        ([-1], GREEDY, "does not know"),
        ("abc", SamplingParams(logit_bias={257: 1.0}), "logit_bias"),
        ("abc", [GREEDY, GREEDY], "1 prompts"),
    ],
)
def test_what_cannot_run_is_refused(
    llm: LLM, prompt: str, params: SamplingParams, message: str
) -> None:
    with pytest.raises(TaelError, match=message):
        llm.generate(prompt, params)


def test_one_bad_prompt_of_a_batch_leaves_nothing_behind(llm: LLM) -> None:
    with pytest.raises(TaelError):
        llm.generate(["abc", "x" * MAX_LEN], GREEDY)
    assert_idle(llm.engine)


def test_a_request_id_is_used_once_at_a_time(folder: Path) -> None:
    engine = make_engine(folder)
    engine.add_request("a", [1], GREEDY)
    with pytest.raises(ValueError, match="'a'"):
        engine.add_request("a", [1], GREEDY)
    usage = engine.abort("a")
    assert usage is not None and usage.num_prompt_tokens == 1
    assert engine.abort("a") is None
    engine.add_request("a", [1], GREEDY)


def test_closed(folder: Path) -> None:
    llm = LLM(str(folder), backend="reference")
    stream = llm.stream("abc")
    next(stream)
    llm.close()
    with pytest.raises(TaelError, match="closed"):
        next(stream)
    with pytest.raises(TaelError, match="closed"):
        llm.generate("abc")


def test_unknown_backend(folder: Path) -> None:
    with pytest.raises(TaelError, match="no backend 'gpu'"):
        LLM(str(folder), backend="gpu")


def test_budget(folder: Path) -> None:
    with pytest.raises(TaelError, match="too small"):
        LLM(str(folder), backend="reference", memory="1MiB")
    engine = make_engine(folder, num_blocks=5)
    assert engine.max_model_len == 5 * BLOCK_SIZE
    assert engine.kv_store.num_bytes == 5 * BLOCK_SIZE * 128
    assert engine.describe().startswith("context 160 tokens (128 bytes a token), KV 20 KiB")
    with LLM(str(folder), backend="reference", max_model_len=100) as llm:
        assert llm.engine.max_model_len == 100
        (output,) = llm.generate("abc", SamplingParams(ignore_eos=True))
        assert output.usage.num_prompt_tokens + output.usage.num_output_tokens == 100


def test_context_beyond_the_training(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TaelError, match=f"{MAX_LEN + 1} tokens is beyond the {MAX_LEN}"):
        LLM(str(folder), backend="reference", max_model_len=MAX_LEN + 1)
    with pytest.raises(TaelError, match="describe no RoPE scaling yarn"):
        LLM(str(folder), backend="reference", max_model_len=2 * MAX_LEN, rope_scaling="yarn")

    extension = ContextExtension(("yarn",), 10000.0, (MAX_LEN,), MAX_LEN, 4 * MAX_LEN)
    monkeypatch.setitem(EXTENSIONS, "llama", extension)
    parameters = {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 2.0,
        "original_max_position_embeddings": MAX_LEN,
    }
    expected = LlamaForCausalLM.from_pretrained(
        folder, rope_parameters=parameters, dtype=torch.float32
    ).eval()
    prompt = [i % 251 for i in range(MAX_LEN + 40)]
    with LLM(
        str(folder), backend="reference", max_model_len=2 * MAX_LEN, rope_scaling="yarn"
    ) as llm:
        assert llm.engine.max_model_len == 2 * MAX_LEN
        (output,) = llm.generate([prompt], GREEDY)
    greedy = expected.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)
    assert list(output.outputs[0].token_ids) == greedy[0, len(prompt) :].tolist()


def test_preemption_changes_no_token(folder: Path) -> None:
    prompts = [list(range(i, i + 40)) for i in range(6)]
    params = SamplingParams(seed=4, max_tokens=50, ignore_eos=True, presence_penalty=0.5, n=2)
    calm = run(make_engine(folder), prompts, params)
    tight = run(make_engine(folder, num_blocks=8), prompts, params)
    assert sum(output.usage.num_preemptions for output in calm.values()) == 0
    assert sum(output.usage.num_preemptions for output in tight.values()) > 0
    for key, output in calm.items():
        assert tight[key].outputs == output.outputs


class PoisonedBackend(ReferenceBackend):
    """Gives NaN after token 99."""

    def logits(self, batch: ForwardBatch) -> NDArray[np.float32]:
        logits = super().logits(batch)
        logits[batch.token_ids[batch.logits_indices] == 99, 3] = np.nan
        return logits


def test_an_error_ends_one_request_only(folder: Path) -> None:
    params = SamplingParams(seed=1, max_tokens=10, ignore_eos=True, logit_bias={99: -1000.0}, n=2)
    prompts = [[1, 2, 3], [1, 2, 99], [4, 5, 6]]
    poisoned = run(make_engine(folder, backend_class=PoisonedBackend), prompts, params)
    healthy = run(make_engine(folder), prompts, params)
    assert poisoned["0"].outputs == healthy["0"].outputs
    assert poisoned["2"].outputs == healthy["2"].outputs
    for completion in poisoned["1"].outputs:
        assert completion.finish_reason is FinishReason.ERROR
        assert completion.error == "the logits are not finite"


def test_speed_counts_what_was_computed(folder: Path) -> None:
    engine = make_engine(folder)
    alone = measure(engine, Workload(num_prompt_tokens=100, num_decode_tokens=7))
    assert alone.num_decoded_tokens == 7
    assert alone.prefill_tokens_per_s == pytest.approx(100 / alone.prefill_s)
    assert alone.tokens_per_s == pytest.approx(107 / (alone.prefill_s + alone.decode_s))
    plain = measure(engine, Workload(num_prompt_tokens=10, num_decode_tokens=200))
    assert plain.num_decoded_tokens == 200  # in loops, and yet one by one
    # Prompts of 40 tokens in steps of 64: two start early and decode while the others wait.
    together = measure(engine, Workload(40, 7, batch_size=4))
    assert 7 <= together.num_decoded_tokens < 4 * 7
    assert engine.manager.num_prefix_hit_tokens == 0
    assert_idle(engine)


def test_speed_at_a_depth_computes_it_once(folder: Path) -> None:
    engine = make_engine(folder)
    decode = Workload(num_decode_tokens=5, depth=96, batch_size=2)
    for num_hits in (2 * 64, 2 * (64 + 64 + 64)):  # the last block of 32 is computed each time
        speed = measure(engine, decode)
        assert (speed.num_decoded_tokens, speed.prefill_s) == (10, 0)
        assert engine.manager.num_prefix_hit_tokens == num_hits
    with pytest.raises(TaelError, match="do not fit the context"):
        measure(engine, Workload(num_decode_tokens=MAX_LEN, depth=32))
    with pytest.raises(TaelError, match="does not run at once"):
        measure(engine, Workload(8, 1, batch_size=1000))


def test_threads_share_an_llm(llm: LLM) -> None:
    expected = [output.text for output in llm.generate(PROMPTS, GREEDY)]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda p: llm.generate(p, GREEDY)[0].text, PROMPTS * 5))
    assert answers == expected * 5


def test_text_that_cannot_fit_is_refused_before_it_is_tokenised(llm: LLM) -> None:
    text = "a" * (MAX_LEN * MAX_TOKEN_CHARACTERS + 1)
    for prompt in (text, [{"role": "user", "content": text}]):
        with pytest.raises(TaelError, match="characters cannot fit the context of 256 tokens"):
            llm.encode(prompt)


def test_prompt_logprobs(llm: LLM) -> None:
    """Those of a prompt are what its tokens would have had as output; whatever else runs, and
    although the prefix cache has the prompt."""
    params = SamplingParams(temperature=0, max_tokens=3, prompt_logprobs=2, n=2)
    alone = [llm.generate(prompt, params)[0] for prompt in PROMPTS]
    others = [SamplingParams(temperature=0, max_tokens=40)] * 3
    together = llm.generate([*["other text"] * 3, *PROMPTS], [*others, *[params] * len(PROMPTS)])
    for one, many in zip(alone, together[3:], strict=True):
        assert values(one.prompt_logprobs) == pytest.approx(values(many.prompt_logprobs), abs=1e-4)
        assert one.outputs == many.outputs
        token_ids = list(one.prompt_token_ids)
        assert [entry.token_id for entry in one.prompt_logprobs] == token_ids[1:]
        for i in (1, len(token_ids) // 2, len(token_ids) - 1):
            forced = SamplingParams(
                temperature=0, max_tokens=1, logprobs=2, logit_bias={token_ids[i]: 1e9}
            )
            (again,) = llm.generate([token_ids[:i]], forced)
            found = again.outputs[0].logprobs
            assert values(found) == pytest.approx(values(one.prompt_logprobs[i - 1 : i]), abs=1e-4)


def values(logprobs: Sequence[TokenLogprobs]) -> list[float]:
    return [v for entry in logprobs for v in (entry.logprob, *dict(entry.top).values())]
