"""How many instructions the kernels take: a measure of speed that a noisy machine does not blur.

    python -m benchmarks.instructions            counts, beside the baseline
    python -m benchmarks.instructions --update   makes those of this compiler the baseline

A child process stops itself before and after each call, and is run in between one instruction at a
time (ptrace). That works for instructions that valgrind does not know, needs no hardware counters,
and repeats but for a few hundred instructions of malloc and Python around a call. What a product
with a matrix of no rows takes, the rounding of the activations to int8 above all, is a cell of its
own and left out of the others.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tael import _native
from tael.backends.base import ForwardBatch
from tael.backends.cpu.backend import chosen_isa
from tael.config import BLOCK_SIZE
from tael.memory.kv_store import KVStore
from tael.models.spec import cache_groups

ROOT = Path(__file__).parents[1]
BASELINE = ROOT / "tests" / "kernels" / "instructions.json"
TYPES = ("Q4_1", "Q5_0", "Q4_K", "Q6_K", "Q8_0")
COLUMNS = 256
ROWS = {1: 256, 4: 128, 16: 32}
"""By the number of tokens."""


class StepCell(NamedTuple):
    """A step of a model."""

    position: int
    num_tokens: int
    kv_format: str = "bf16"
    budget_blocks: int = 0
    """That each token reads; 0: all."""

    @property
    def name(self) -> str:
        name = f"step of {self.num_tokens} tokens at {self.position}"
        if self.kv_format != "bf16":
            name += f", {self.kv_format}"
        return name + (f", {self.budget_blocks} blocks read" if self.budget_blocks else "")


STEPS = (
    StepCell(32, 1),
    StepCell(256, 1),
    StepCell(32, 8),
    StepCell(256, 1, "q8"),
    StepCell(256, 1, "k8v4"),
    StepCell(960, 1, budget_blocks=12),
)

Call = Callable[[], object]
NOT_PERMITTED = 77
"""Exit code of the child."""

PTRACE_TRACEME, PTRACE_CONT, PTRACE_SINGLESTEP = 0, 7, 9


def count_instructions(isa: str) -> dict[str, int]:
    """Instructions of every cell, on one thread. Raises PermissionError where processes may not be
    traced."""
    ptrace = _ptrace()
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    env = {**os.environ, "TAEL_ISA": isa, "PYTHONPATH": path, "PYTHONHASHSEED": "0"}
    child = subprocess.Popen([sys.executable, "-m", "benchmarks.instructions", "--child"], env=env)
    counts = []
    while _stopped(child.pid):
        count = 0
        while True:
            ptrace(PTRACE_SINGLESTEP, child.pid, None, None)
            if _stopped(child.pid) == signal.SIGSTOP:
                break
            count += 1
        counts.append(count)
        ptrace(PTRACE_CONT, child.pid, None, None)
    cells = dict(zip(names(), counts, strict=True))
    for name in TYPES:
        for num_tokens in ROWS:
            cells[f"{name}, {num_tokens} tokens"] -= cells[f"no rows, {num_tokens} tokens"]
    return cells


def names() -> Iterator[str]:
    """Of the cells."""
    for name in ("no rows", *TYPES):
        yield from (f"{name}, {num_tokens} tokens" for num_tokens in ROWS)
    yield from (step.name for step in STEPS)


def build(isa: str) -> str:
    """What counts can be compared within."""
    return f"{isa}, {_native.COMPILER}"


def baselines() -> dict[str, dict[str, int]]:
    """The counts that were agreed on, by build."""
    agreed: dict[str, dict[str, int]] = json.loads(BASELINE.read_text())
    return agreed


def calls() -> Iterator[Call]:
    """What is counted, in the order of the cells."""
    from random_weights import random_rows

    isa = chosen_isa()
    for name in ("no rows", *TYPES):
        for num_tokens, rows in ROWS.items():
            format_name, rows = ("Q8_0", 0) if name == "no rows" else (name, rows)
            num_bytes = _native.num_tiles(rows) * _native.tile_bytes(format_name, COLUMNS)
            tiles = np.empty(num_bytes, np.uint8)
            raw = random_rows(format_name, max(rows, 16), COLUMNS)[:rows]
            _native.repack(format_name, raw, COLUMNS, tiles)
            matrix = _native.Matrix(format_name, rows, COLUMNS, tiles)
            x = np.random.default_rng(0).standard_normal((num_tokens, COLUMNS), np.float32)
            yield partial(_native.matmul, matrix, x, isa, 1)
    yield from model_steps()


def model_steps() -> Iterator[Call]:
    """Steps of a small random model, for the logits of the last token."""
    from random_models import VOCAB_SIZE, RandomCheckpoint, random_cpu_backend, random_spec

    for step in STEPS:
        spec = random_spec(2, 1, 32, [None], step.kv_format, key_summaries=step.budget_blocks > 0)
        backend = random_cpu_backend(spec, RandomCheckpoint(spec, "Q8_0"), num_threads=1)
        num_blocks = 1 + step.position // BLOCK_SIZE
        store = KVStore(cache_groups(spec, BLOCK_SIZE), [num_blocks], num_open_blocks=1)
        backend.bind_kv(store.pools, store.open_pools, store.summaries)
        batch = ForwardBatch(
            token_ids=np.arange(step.num_tokens, dtype=np.int32) % VOCAB_SIZE,
            positions=np.arange(step.position, step.position + step.num_tokens, dtype=np.int32),
            query_start=np.array([0, step.num_tokens], np.int32),
            block_tables=(np.arange(num_blocks, dtype=np.int32)[None],),
            open_tables=(np.zeros((1, 1), np.int32),) if len(store.open_pools[0]) else (),
            logits_indices=np.array([step.num_tokens - 1], np.int32),
            temperatures=np.ones(1, np.float32),
            full_logits=np.zeros(1, np.bool_),
            kv_budgets=np.full(step.num_tokens, step.budget_blocks, np.int32)
            if step.budget_blocks
            else None,
        )
        yield partial(backend.forward, batch)


def _child() -> None:
    """Runs every call, after it is warm, between two stops."""
    everything = list(calls())
    if _ptrace()(PTRACE_TRACEME, 0, None, None):
        os._exit(NOT_PERMITTED)
    gc.disable()
    pid, stop = os.getpid(), signal.SIGSTOP
    for call in everything:
        for _ in range(16):  # Python specialises a function in its first calls
            call()
        os.kill(pid, stop)
        call()
        os.kill(pid, stop)
    os._exit(0)


def _stopped(pid: int) -> int:
    """Waits for the child; the signal that stopped it, or 0 when it has ended."""
    _, status = os.waitpid(pid, 0)
    if os.WIFSTOPPED(status):
        return os.WSTOPSIG(status)
    code = os.waitstatus_to_exitcode(status)
    if code == NOT_PERMITTED:
        raise PermissionError("processes may not be traced here")
    if code:
        raise RuntimeError(f"the child ended with {code}")
    return 0


def _ptrace() -> Callable[..., int]:
    function = ctypes.CDLL(None).ptrace
    function.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]
    function.restype = ctypes.c_long
    return function


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--update", action="store_true", help="make the counts the baseline")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        _child()
        return
    agreed = baselines()
    if args.update:
        isas = [isa for isa in _native.supported_isas() if isa != "portable"]
        agreed |= {build(isa): count_instructions(isa) for isa in isas}
        BASELINE.write_text(json.dumps(agreed, indent=2) + "\n")
        return
    isa = chosen_isa()
    for cell, count in count_instructions(isa).items():
        print(f"{cell:32} {count:8,} {agreed.get(build(isa), {}).get(cell, 0):8,}")


if __name__ == "__main__":
    main()
