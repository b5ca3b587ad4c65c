"""Which settings keep a model's answers: the effective-context suite over some candidates."""

from __future__ import annotations

from tael.errors import TaelError
from tael.evals.context.modes import EXACT, Mode, Value
from tael.evals.context.report import scores
from tael.evals.context.statistics import retention
from tael.evals.context.suite import Result
from tael.loader.modes import VERSION, Calibration, Measured

BUDGET = 2048
"""Tokens of context that a query reads of a KV head."""

PREFILL_BUDGET = 4096
"""The same of the prompt, whose every token leaves what it overlooked to all after it."""


def ladder(focus: tuple[int, ...]) -> tuple[Mode, ...]:
    """The candidates, each of which gives up more than the one before. The layers ``focus`` read
    more than the others where there is a budget."""
    answer: dict[str, Value] = {"kv_budget": BUDGET}
    if focus:
        answer["kv_focus"] = focus
    both = answer | {"prefill_budget": PREFILL_BUDGET}
    return (
        Mode("q8", {"kv_format": "q8"}),
        Mode("q8, sparse answer", {"kv_format": "q8", **answer}),
        Mode("q8, sparse", {"kv_format": "q8", **both}),
        Mode("k8v4, sparse", {"kv_format": "k8v4", **both}),
    )


def calibration(result: Result, digest: str) -> Calibration:
    """Of a run of the suite with the modes of ``ladder``. A mode that failed at some length has
    lost all. Raises TaelError for a length at which the exact model tells nothing."""
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
