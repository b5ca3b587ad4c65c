"""Which settings keep a model's answers: the effective-context suite over some candidates."""

from __future__ import annotations

from tael.evals.context.modes import EXACT, Mode
from tael.evals.context.report import scores
from tael.evals.context.statistics import retention
from tael.evals.context.suite import Result
from tael.loader.modes import Calibration, Measured

BUDGET = 2048
"""Tokens of context that a query reads of a KV head."""

LADDER: tuple[Mode, ...] = (
    Mode("k8v4, sparse", {"kv_format": "k8v4", "kv_budget": BUDGET, "prefill_budget": BUDGET}),
    Mode("q8, sparse", {"kv_format": "q8", "kv_budget": BUDGET, "prefill_budget": BUDGET}),
    Mode("q8, sparse answer", {"kv_format": "q8", "kv_budget": BUDGET}),
    Mode("k8v4", {"kv_format": "k8v4"}),
    Mode("q8", {"kv_format": "q8"}),
)
"""The most frugal first: of reading, then of memory."""


def calibration(result: Result, digest: str) -> Calibration:
    """Of a run of the suite with the modes of LADDER. A mode that failed at some length has lost
    all."""
    measured = []
    for mode in result.settings.modes:
        bounds = [
            retention(scores(result, EXACT.name, length), scores(result, mode.name, length))
            for length in result.samples
        ]
        failed = any(result.cells[mode.name, length].error for length in result.samples)
        worst = -1.0 if failed else min(bound.lower_bound for bound in bounds)
        measured.append(Measured(dict(mode.settings), worst))
    counted = scores(result, EXACT.name, min(result.samples))
    return Calibration(
        model=result.settings.model,
        digest=digest,
        lengths=tuple(sorted(result.samples)),
        tasks=result.counted,
        num_questions=sum(len(sample) for task in counted.values() for sample in task),
        candidates=tuple(measured),
    )
