"""What the HTTP process and the engine process tell each other.

A message is a frame: four bytes of length, big-endian, and a tagged msgspec struct in MessagePack.
Types are checked on arrival, so a frame can be wrong and never be code.
"""

from __future__ import annotations

import struct

import msgspec

from tael.engine.engine import OutputDelta
from tael.request import SamplingParams, Usage

MAX_FRAME_BYTES = 1 << 28
"""More than the longest prompt of token ids takes."""

HEADER = struct.Struct(">I")


class Message(msgspec.Struct, frozen=True, tag=True):
    """A struct whose name goes with it."""


class EngineSettings(Message, frozen=True):
    """The first message to an engine process: the arguments of ``LLM``, by their names."""

    model: str
    backend: str = "cpu"
    memory: int | None = None
    max_model_len: int | None = None
    rope_scaling: str | None = None
    num_threads: int | None = None
    speculation: bool = True
    kv_format: str = "bf16"
    kv_budget: int | None = None
    prefill_budget: int | None = None
    kv_focus: tuple[int, ...] = ()
    mode: str = "exact"
    kv_disk: int | None = None
    kv_cache_dir: str | None = None
    kv_cache_size: int = 10 << 30
    max_num_seqs: int = 32


class Add(Message, frozen=True):
    """A request. The answer is ``Accepted`` or ``Refused``."""

    request_id: str
    token_ids: list[int]
    params: SamplingParams
    cache_salt: str = ""
    grammar: str | None = None
    """What the answer must match, in the JSON of llguidance."""


class Abort(Message, frozen=True):
    """End a request that is no longer wanted. The answer is ``Ended``."""

    request_id: str


class Ready(Message, frozen=True):
    """The model is loaded."""

    max_model_len: int
    vocab_size: int
    description: str
    tokenizer_dir: str
    """Where the engine process has saved the tokenizer, for ``Tokenizer.load``."""


class Failed(Message, frozen=True):
    """The model cannot be loaded. ``message`` is that of a TaelError."""

    message: str


class Accepted(Message, frozen=True):
    request_id: str


class Refused(Message, frozen=True):
    """The request cannot be run. ``message`` is that of a TaelError, ``code`` says to programs
    what the matter is."""

    request_id: str
    code: str
    message: str


class Begun(Message, frozen=True):
    """The first token of a request is there, and comes in the next ``Deltas``. ``usage`` says what
    its prompt took, which is what it costs if the engine does not live to say more."""

    request_id: str
    usage: Usage


class Deltas(Message, frozen=True):
    """What a step has added. A delta with ``usage`` is the last of its request."""

    deltas: list[OutputDelta]


class Ended(Message, frozen=True):
    """A request was aborted. ``usage`` is None if it was not there any more."""

    request_id: str
    usage: Usage | None


class TierUsage(msgspec.Struct, frozen=True):
    """Where KV lies. What is neither used nor cached is free."""

    name: str
    capacity_bytes: int
    used_bytes: int
    """Of blocks that requests hold."""
    cached_bytes: int
    """Of blocks that only the prefix cache keeps."""
    num_io_errors: int = 0
    """Of a disk. One that was given up has a capacity of 0."""


class Status(Message, frozen=True):
    """Sent by the thread that computes: several times a second, or after a step that took longer.
    That it comes is the proof that the engine is alive."""

    num_steps: int
    num_running: int
    num_waiting: int
    num_blocks: int
    """KV blocks, in all pools."""
    num_referenced_blocks: int
    """Those that unfinished requests hold."""
    num_prefix_query_tokens: int
    num_prefix_hit_tokens: int
    tiers: tuple[TierUsage, ...]
    """The fastest first."""


Command = EngineSettings | Add | Abort
Report = Ready | Failed | Accepted | Refused | Begun | Deltas | Ended | Status

_encoder = msgspec.msgpack.Encoder()
command_decoder = msgspec.msgpack.Decoder(Command)
report_decoder = msgspec.msgpack.Decoder(Report)


def frame(message: Message) -> bytes:
    """The bytes of a message. Raises ValueError for one that is too large to be sent."""
    body = _encoder.encode(message)
    if len(body) > MAX_FRAME_BYTES:
        raise ValueError(f"a message of {len(body)} bytes")
    return HEADER.pack(len(body)) + body
