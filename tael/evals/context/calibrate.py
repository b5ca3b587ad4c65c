"""Which settings keep a model's answers: the effective-context suite over some candidates."""

from __future__ import annotations

from tael.errors import TaelError
from tael.evals.context.modes import EXACT, Mode
from tael.evals.context.report import scores
from tael.evals.context.statistics import retention
from tael.evals.context.suite import Result
from tael.loader.modes import VERSION, Calibration, Measured

BUDGET = 2048
"""Tokens of context that a query reads of a KV head."""

LADDER: tuple[Mode, ...] = (
    Mode("q8", {"kv_format": "q8"}),
    Mode("q8, sparse answer", {"kv_format": "q8", "kv_budget": BUDGET}),
    Mode("q8, sparse", {"kv_format": "q8", "kv_budget": BUDGET, "prefill_budget": BUDGET}),
    Mode("k8v4, sparse", {"kv_format": "k8v4", "kv_budget": BUDGET, "prefill_budget": BUDGET}),
)
"""Each gives up more than the one before."""


def calibration(result: Result, digest: str) -> Calibration:
    """Of a run of the suite with the modes of LADDER. A mode that failed at some length has lost
    all. Raises TaelError for a length at which the exact model tells nothing."""
    lengths = sorted(result.samples)
    for length in lengths:
        if not result.passed(length):
            error = result.cells[EXACT.name, length].error
            raise TaelError(
                f"at {length:,} tokens the exact model "
                + (f"fails ({error})" if error else "answers too few of the questions")
                + ", so what a mode loses cannot be measured there; leave that length out."
            )
    measured = []
    for mode in result.settings.modes:
        bounds = [_lower_bound(result, mode.name, length) for length in lengths]
        measured.append(Measured(dict(mode.settings), min(bounds)))
    asked = [scores(result, EXACT.name, length, result.passed(length)) for length in lengths]
    return Calibration(
        version=VERSION,
        model=result.settings.model,
        digest=digest,
        lengths=tuple(lengths),
        tasks=result.counted,
        num_questions=min(sum(len(s) for task in of.values() for s in task) for of in asked),
        candidates=tuple(measured),
    )


def _lower_bound(result: Result, mode: str, length: int) -> float:
    if result.cells[mode, length].error is not None:
        return -1.0
    tasks = result.passed(length)
    exact, answers = (scores(result, name, length, tasks) for name in (EXACT.name, mode))
    return retention(exact, answers).lower_bound
