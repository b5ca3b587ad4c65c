"""The asyncio API, with the reference backend on a tiny random model."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from byte_llama import GREEDY, MAX_LEN, PROMPTS, assert_idle
from numpy.typing import NDArray

from tael import LLM, AsyncLLM, SamplingParams, TaelError
from tael.backends.base import ForwardBatch
from tael.engine.engine import OutputDelta
from tael.llm import gathered


def with_async_llm(llm: LLM, body: Callable[[AsyncLLM], object]) -> None:
    async def main() -> None:
        async with AsyncLLM(llm) as async_llm:
            await body(async_llm)  # type: ignore[misc]

    engine = llm.engine
    asyncio.run(main())
    assert_idle(engine)


def test_async_equals_sync(llm: LLM) -> None:
    params = SamplingParams(seed=8, max_tokens=12, n=2)
    messages = [{"role": "user", "content": "hi"}]
    expected, answer = llm.generate(PROMPTS, params), llm.chat(messages, params)

    async def body(async_llm: AsyncLLM) -> None:
        outputs, chat, deltas = await asyncio.gather(
            async_llm.generate(PROMPTS, params),
            async_llm.chat(messages, params),
            collect(async_llm, PROMPTS[0], params),
        )
        assert [o.outputs for o in outputs] == [o.outputs for o in expected]
        assert chat.outputs == answer.outputs
        assert gathered((), deltas).outputs == expected[0].outputs

    with_async_llm(llm, body)


async def collect(llm: AsyncLLM, prompt: str, params: SamplingParams) -> list[OutputDelta]:
    return [delta async for delta in llm.stream(prompt, params)]


def test_cancelling_a_task_ends_its_request(llm: LLM) -> None:
    endless = SamplingParams(ignore_eos=True, n=2)
    expected = llm.generate("abc", GREEDY)[0].outputs

    async def body(async_llm: AsyncLLM) -> None:
        stream = async_llm.stream("abc", endless)
        await anext(stream)
        task = asyncio.create_task(async_llm.generate(["abc", "abcd"], endless))
        await anext(stream)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await stream.aclose()
        (output,) = await async_llm.generate("abc", GREEDY)
        assert output.outputs == expected

    with_async_llm(llm, body)


def test_close_finishes_what_runs_and_refuses_more(llm: LLM) -> None:
    async def main() -> None:
        async_llm = AsyncLLM(llm)
        stream = async_llm.stream("abc", SamplingParams(ignore_eos=True, max_tokens=40))
        await anext(stream)
        closing = asyncio.create_task(async_llm.close())
        assert len([delta async for delta in stream]) == 39
        await closing
        with pytest.raises(TaelError, match="closed"):
            await async_llm.generate("abc")

    asyncio.run(main())


def test_async_errors_reach_their_caller(llm: LLM) -> None:
    async def body(async_llm: AsyncLLM) -> None:
        with pytest.raises(TaelError, match="context"):
            await async_llm.generate(["abc", "x" * MAX_LEN], GREEDY)
        (output,) = await async_llm.generate("abc", GREEDY)
        assert output.text

    with_async_llm(llm, body)


def test_a_failing_engine_reaches_every_caller(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(batch: ForwardBatch) -> NDArray[np.float32]:
        raise OSError("the weights are gone")

    monkeypatch.setattr(llm.engine.backend, "forward", fail)

    async def main() -> None:
        async with AsyncLLM(llm) as async_llm:
            results = await asyncio.gather(
                async_llm.generate(["abc", "abcd"]),
                collect(async_llm, "abc", GREEDY),
                return_exceptions=True,
            )
            results += await asyncio.gather(async_llm.generate("abc"), return_exceptions=True)
            for result in results:
                assert isinstance(result, RuntimeError)
                assert str(result.__cause__) == "the weights are gone"

    asyncio.run(main())
    assert llm._engine is None


def test_a_program_may_end_without_closing(folder: Path) -> None:
    script = f"""
import asyncio, atexit, threading
from tael import LLM, AsyncLLM, SamplingParams

atexit.register(lambda: print(*(thread.name for thread in threading.enumerate())))

async def main():
    llm = AsyncLLM(LLM({str(folder)!r}, backend="reference"))
    await anext(llm.stream("abc", SamplingParams(ignore_eos=True, n=100)))

asyncio.run(main())
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=60)
    assert (result.returncode, result.stdout, result.stderr) == (0, b"MainThread\n", b"")
