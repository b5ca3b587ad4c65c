"""Real models write the same with and without speculation, greedily and when sampling."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from tael import LLM, SamplingParams
from tael.engine.engine import Engine, OutputDelta
from tael.llm import RequestOutput, gathered

CODE = (Path(__file__).parents[2] / "examples" / "stock.py").read_text()
TEXT = (Path(__file__).parents[2] / "examples" / "tael.txt").read_text()
GREEDY = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
SAMPLING = {
    "greedy": GREEDY,
    "hot": SamplingParams(temperature=1.0, top_p=0.95, seed=1, max_tokens=48, n=2),
    "penalties": replace(GREEDY, repetition_penalty=1.05, frequency_penalty=0.2, logprobs=3),
    "stops": SamplingParams(temperature=0.3, seed=2, max_tokens=64, stop=["self", "year"]),
}


@pytest.fixture(scope="module", params=["smollm2:135m", "gemma3:270m"])
def llm(request: pytest.FixtureRequest, model_path: Callable[[str], Path]) -> Iterator[LLM]:
    """Gemma has sliding windows of 512 tokens."""
    with LLM(str(model_path(request.param)), memory="3GiB", max_model_len=2048) as llm:
        yield llm


def run(
    engine: Engine, prompts: Sequence[list[int]], params: SamplingParams, speculation: bool
) -> list[RequestOutput]:
    deltas: dict[str, list[OutputDelta]] = {str(i): [] for i in range(len(prompts))}
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), prompt, params, speculation=speculation)
    while engine.has_unfinished():
        for delta in engine.step():
            deltas[delta.request_id].append(delta)
    engine.manager.check()
    assert engine.manager.num_referenced == 0
    return [gathered(prompt, deltas[str(i)]) for i, prompt in enumerate(prompts)]


@pytest.mark.parametrize("params", SAMPLING.values(), ids=SAMPLING)
def test_same_answers(llm: LLM, params: SamplingParams) -> None:
    """Texts to go on with, each alone and all together; some stop in the middle of a repetition.
    Outputs without speculation are not drafted from."""
    texts = [CODE + CODE[:200], TEXT + TEXT[:50], "1 2 3 4 5 6 7 8 9"]
    prompts = [llm.encode(text) for text in texts]
    batches = [*([prompt] for prompt in prompts), prompts]
    num_accepted_tokens = 0
    for batch in batches:
        plain = run(llm.engine, batch, params, speculation=False)
        fast = run(llm.engine, batch, params, speculation=True)
        assert [output.outputs for output in fast] == [output.outputs for output in plain]
        assert sum(output.usage.num_draft_tokens for output in plain) == 0
        num_accepted_tokens += sum(output.usage.num_accepted_tokens for output in fast)
    assert num_accepted_tokens > 0
