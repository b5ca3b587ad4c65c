"""What is measured: the points of the grid, by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tael.evals.speed import Workload
from tael.loader.catalogue import entries

MODELS = ("smollm2:135m", "gemma3:270m", "qwen2.5-coder:0.5b", "qwen2.5-coder:1.5b")
"""Of Tael's catalogue."""

DECODE = Workload(num_decode_tokens=64)
BATCH = Workload(num_prompt_tokens=128, num_decode_tokens=64)

PREFILLS = {f"prefill-{n}": Workload(num_prompt_tokens=n) for n in (512, 8192)}
DEPTHS = {f"decode-at-{n}": replace(DECODE, depth=n) for n in (1024, 2048, 4096, 8192, 16384)}
BATCHES = {f"batch-{n}": replace(BATCH, batch_size=n) for n in (1, 2, 4, 8, 16, 32)}
CASES = {"decode": DECODE, **PREFILLS, **DEPTHS, **BATCHES}

GRID = ("decode", *PREFILLS, "decode-at-8192", "decode-at-16384", "batch-16", "batch-32")
"""The cells of the table."""

GROUPS = {"grid": GRID, "depths": ("decode", *DEPTHS), "batches": tuple(BATCHES)}
"""The last two are the lines of the plots."""


def label(model: str) -> str:
    """What result files call a model of the catalogue, or at a path."""
    return model.replace(":", "-") if model in entries() else Path(model).stem


def named(names: str) -> dict[str, Workload]:
    """The cases of a comma-separated list of cases and groups. Raises KeyError."""
    cases = (case for name in names.split(",") for case in GROUPS.get(name, (name,)))
    return {case: CASES[case] for case in cases}


def fitted(workload: Workload, max_model_len: int) -> Workload | None:
    """The workload with its prompt cut to what the model holds; None if that leaves nothing of
    what it is about."""
    room = max_model_len - workload.depth - workload.num_decode_tokens - 1
    if workload.num_prompt_tokens:
        workload = replace(workload, num_prompt_tokens=min(workload.num_prompt_tokens, room))
    return workload if room > 0 else None
