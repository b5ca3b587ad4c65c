"""The Python API for asyncio: many callers, one engine in a thread of its own."""

from __future__ import annotations

import asyncio
import atexit
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, suppress
from functools import partial
from itertools import count
from queue import SimpleQueue
from threading import Thread

from tael.engine.engine import OutputDelta
from tael.errors import TaelError
from tael.llm import LLM, Message, Prompt, RequestOutput, gathered, paired
from tael.request import SamplingParams

Deliver = Callable[[OutputDelta | Exception], None]


class AsyncLLM:
    """Runs an ``LLM``, which it takes over, for the tasks of one event loop.

    Cancelling the task that awaits an answer ends the request. An exception of the engine itself
    reaches every caller, and the ones after that.
    """

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self._engine = llm.engine
        self._ids = count()
        self._deliver: dict[str, Deliver] = {}
        """Where the deltas of each request go."""
        # Only the thread below touches the engine. Others send it what to do before a step.
        self._commands: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._closed = False
        """Callers are refused."""
        self._stopping = False
        """The thread ends when nothing is left to do."""
        self._failure: Exception | None = None
        self._thread = Thread(target=self._run, name="tael-engine", daemon=True)
        self._thread.start()
        # A program that ends without close() must not tear down the interpreter under a step.
        atexit.register(self._exit)

    async def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """As ``LLM.generate``."""
        tasks = [asyncio.create_task(self._answer(*pair)) for pair in paired(prompts, params)]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:  # one may have failed
                task.cancel()

    async def chat(
        self, messages: Sequence[Message], params: SamplingParams | None = None
    ) -> RequestOutput:
        """As ``LLM.chat``."""
        return await self._answer(messages, params or SamplingParams())

    async def stream(
        self, prompt: Prompt, params: SamplingParams | None = None
    ) -> AsyncGenerator[OutputDelta, None]:
        """As ``LLM.stream``."""
        token_ids = await asyncio.to_thread(self._llm.encode, prompt)
        async with aclosing(self._follow(token_ids, params or SamplingParams())) as deltas:
            async for delta in deltas:
                yield delta

    async def close(self) -> None:
        """Finish the requests that are under way, refuse others, and release the memory."""
        self._closed = True
        self._commands.put(self._stop)
        await asyncio.to_thread(self._thread.join)
        atexit.unregister(self._exit)
        self._llm.close()

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _answer(self, prompt: Prompt, params: SamplingParams) -> RequestOutput:
        token_ids = await asyncio.to_thread(self._llm.encode, prompt)
        return gathered(token_ids, [delta async for delta in self._follow(token_ids, params)])

    async def _follow(
        self, token_ids: list[int], params: SamplingParams
    ) -> AsyncGenerator[OutputDelta, None]:
        if self._closed:
            raise TaelError("this AsyncLLM is closed; make another one.")
        loop = asyncio.get_running_loop()
        received: asyncio.Queue[OutputDelta | Exception] = asyncio.Queue()

        def deliver(item: OutputDelta | Exception) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(received.put_nowait, item)

        request_id = str(next(self._ids))
        self._commands.put(partial(self._add, request_id, token_ids, params, deliver))
        try:
            while True:
                item = await received.get()
                if isinstance(item, Exception):
                    raise item
                yield item
                if item.usage is not None:
                    return
        finally:
            self._commands.put(partial(self._end, request_id))

    def _exit(self) -> None:
        self._commands.put(self._drop)
        self._thread.join()

    # What follows runs in the thread.

    def _run(self) -> None:
        while not (self._stopping and self._is_idle()):
            if self._is_idle():
                self._commands.get()()
            while not self._commands.empty():
                self._commands.get()()
            if not self._is_idle():
                self._step()

    def _is_idle(self) -> bool:
        return self._failure is not None or not self._engine.has_unfinished()

    def _step(self) -> None:
        try:
            for delta in self._engine.step():
                self._deliver[delta.request_id](delta)
        except Exception as error:
            self._failure = error
            for deliver in self._deliver.values():
                deliver(self._engine_failed())

    def _engine_failed(self) -> Exception:
        error = RuntimeError("the engine failed; make another AsyncLLM.")
        error.__cause__ = self._failure
        return error

    def _add(
        self, request_id: str, token_ids: list[int], params: SamplingParams, deliver: Deliver
    ) -> None:
        self._deliver[request_id] = deliver
        if self._failure is not None:
            deliver(self._engine_failed())
            return
        try:
            self._engine.add_request(request_id, token_ids, params)
        except Exception as error:
            deliver(error)

    def _end(self, request_id: str) -> None:
        self._engine.abort(request_id)
        del self._deliver[request_id]

    def _stop(self) -> None:
        self._stopping = True

    def _drop(self) -> None:
        self._stopping = True
        self._failure = RuntimeError("the program ends")
