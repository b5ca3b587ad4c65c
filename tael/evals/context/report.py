"""What a run says: the headline, tables, and the JSON with every answer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from tael.evals.context.cell import Cell
from tael.evals.context.modes import EXACT
from tael.evals.context.statistics import (
    Estimate,
    Scores,
    accuracy,
    effective_length,
    retention,
    verdict,
)
from tael.evals.context.suite import Result
from tael.evals.context.tasks import TASKS, Kind
from tael.memory.budget import format_bytes

RELATIVE = 0.85
"""Of the exact score at the shortest length: what EC_rel demands."""
ABSOLUTE = 0.856
"""The score that RULER's effective length demands, Llama-2-7B's at 4K (arXiv:2404.06654)."""
MARGINS: dict[Kind, float] = {"retrieval": 0.02, "reasoning": 0.03}
"""Of the loss against the exact model that still counts as none."""


@dataclass(frozen=True, slots=True)
class Slo:
    """What a user still accepts."""

    time_to_first_token_s: float = 60.0
    s_per_token: float = 0.1
    memory_bytes: int | None = None

    def is_met(self, cell: Cell) -> bool:
        cost = cell.cost
        return (
            cost is not None
            and cost.time_to_first_token_s <= self.time_to_first_token_s
            and cost.s_per_token <= self.s_per_token
            and (self.memory_bytes is None or cost.peak_rss_bytes <= self.memory_bytes)
        )


@dataclass(frozen=True, slots=True)
class Headline:
    """Lengths in tokens; 0 if not even the shortest is reached."""

    ec_rel: int
    ec_slo: int
    ec_abs: int


@dataclass(frozen=True, slots=True)
class Flip:
    """A question that a mode answers better or worse than the exact model."""

    mode: str
    length: int
    task: str
    sample: int
    question: str
    expected: tuple[str, ...]
    depth: float
    exact: str
    answer: str
    change: float
    """Of the score."""


def scores(result: Result, mode: str, length: int, tasks: Iterable[str] | None = None) -> Scores:
    """Of some tasks, or of all that count."""
    answers = result.cells[mode, length].answers
    return {
        task: [[answer.score for answer in sample] for sample in answers[task]]
        for task in (result.counted if tasks is None else tasks)
    }


def headline(result: Result, mode: str, slo: Slo) -> Headline:
    lengths = sorted(result.samples)
    exact_score = accuracy(scores(result, EXACT.name, lengths[0])).mean
    estimates = {length: accuracy(scores(result, mode, length)) for length in lengths}
    within = {}
    for length in lengths:
        if not slo.is_met(result.cells[mode, length]):
            break
        within[length] = estimates[length]
    ec_abs = 0
    for length in lengths:
        if estimates[length].mean < ABSOLUTE:
            break
        ec_abs = length
    threshold = RELATIVE * exact_score
    return Headline(
        effective_length(estimates, threshold), effective_length(within, threshold), ec_abs
    )


def retentions(result: Result, mode: str, length: int) -> dict[Kind, Estimate]:
    """Against the exact model, by kind of the tasks that it passes at this length. None where
    one of the two failed."""
    if result.cells[mode, length].error is not None:
        return {}
    by_kind = {kind: _of_kind(result.passed(length), kind) for kind in MARGINS}
    return {
        kind: retention(
            scores(result, EXACT.name, length, tasks), scores(result, mode, length, tasks)
        )
        for kind, tasks in by_kind.items()
        if tasks
    }


def _of_kind(tasks: Iterable[str], kind: Kind) -> list[str]:
    return [task for task in tasks if TASKS[task].kind == kind]


def flips(result: Result) -> Iterator[Flip]:
    for (mode, length), cell in result.cells.items():
        exact = result.cells[EXACT.name, length]
        if cell.error is not None or exact.error is not None:
            continue
        for task in result.counted:
            samples = result.samples[length][task]
            for sample, *both in zip(samples, exact.answers[task], cell.answers[task], strict=True):
                for question, old, new in zip(sample.questions, *both, strict=True):
                    if old.score != new.score:
                        yield Flip(
                            mode=mode,
                            length=length,
                            task=task,
                            sample=sample.index,
                            question=question.text,
                            expected=question.answers,
                            depth=question.depth,
                            exact=old.text,
                            answer=new.text,
                            change=new.score - old.score,
                        )


def by_depth(result: Result, mode: str, length: int) -> list[float | None]:
    """Mean scores of the questions whose answers are in the first, second and last third."""
    thirds: list[list[float]] = [[], [], []]
    for task in result.counted:
        all_answers = result.cells[mode, length].answers[task]
        for sample, answers in zip(result.samples[length][task], all_answers, strict=True):
            for question, answer in zip(sample.questions, answers, strict=True):
                thirds[min(2, int(3 * question.depth))].append(answer.score)
    return [fmean(third) if third else None for third in thirds]


def render(result: Result, slo: Slo) -> str:
    """The tables, for a terminal."""
    return "\n".join(
        [*_render_headlines(result, slo), "", *_render_cells(result), "", *_render_tasks(result)]
    )


def _render_headlines(result: Result, slo: Slo) -> Iterator[str]:
    first = min(result.samples)
    if not result.counted:
        yield (
            f"the exact model reaches 70% in no task at {first} tokens: there is no effective "
            "context, only the log-likelihood of right answers"
        )
        return
    memory = "" if slo.memory_bytes is None else f", {format_bytes(slo.memory_bytes)} of memory"
    yield (
        f"EC_rel: longest context with 85% of the exact score at {first}, lower 95% bound; EC@SLO: "
        f"the same within {slo.time_to_first_token_s:g} s to the first token, "
        f"{1000 * slo.s_per_token:g} ms a token{memory}; EC_abs: score of 85.6%"
    )
    yield f"{'mode':12} {'EC_rel':>8} {'EC@SLO':>8} {'EC_abs':>8}"
    for mode in _modes(result):
        head = headline(result, mode, slo)
        yield f"{mode:12} {head.ec_rel:>8,} {head.ec_slo:>8,} {head.ec_abs:>8,}"


def _render_cells(result: Result) -> Iterator[str]:
    all_flips = list(flips(result))
    yield (
        f"{'mode':12} {'length':>7} {'score (95%)':>19} {'retrieval, pp':>25} "
        f"{'reasoning, pp':>25} {'flips':>7} {'KLD':>8} {'p99':>8} {'same top':>8} {'NLL':>6} "
        f"{'KV':>10} {'peak RSS':>10} {'first s':>8} {'ms/token':>8}"
    )
    for (mode, length), cell in result.cells.items():
        if cell.error is not None:
            yield f"{mode:12} {length:>7,} failed: {cell.error}"
            continue
        line = f"{mode:12} {length:>7,}"
        line += f" {_percent(accuracy(scores(result, mode, length))) if result.counted else '':>19}"
        kept = retentions(result, mode, length) if mode != EXACT.name else {}
        for kind, margin in MARGINS.items():
            line += f" {_points(kept[kind], margin) if kind in kept else '':>25}"
        changes = [f.change for f in all_flips if (f.mode, f.length) == (mode, length)]
        gained = sum(change > 0 for change in changes)
        line += f" {f'-{len(changes) - gained} +{gained}' if mode != EXACT.name else '':>7}"
        line += _figures(cell)
        yield line
    for length in result.samples:
        failed = sorted(set(result.counted) - set(result.passed(length)))
        if failed:
            yield f"points at {length:,} tokens are without {', '.join(failed)}: exact fails there"


def _figures(cell: Cell) -> str:
    line = " " * 34
    if (d := cell.divergence) is not None:
        line = f" {d.mean_kld:>8.5f} {d.p99_kld:>8.4f} {d.same_top:>8.1%} {d.nll:>6.3f}"
    if (cost := cell.cost) is not None:
        line += (
            f" {format_bytes(cost.kv_bytes):>10} {format_bytes(cost.peak_rss_bytes):>10}"
            f" {cost.time_to_first_token_s:>8.2f} {1000 * cost.s_per_token:>8.1f}"
        )
    return line


def _render_tasks(result: Result) -> Iterator[str]:
    """Scores, and for tasks that do not count the log-likelihood of a token of right answers."""
    columns = list(result.cells)
    yield f"{'task':16} " + " ".join(f"{f'{mode} {length:,}':>14}" for mode, length in columns)
    for task in result.settings.tasks:
        values = []
        for cell in result.cells.values():
            if task in result.counted:
                means = [answer.score for sample in cell.answers[task] for answer in sample]
                values.append(f"{fmean(means):.1%}")
            elif task in cell.log_likelihoods:
                values.append(f"{fmean(v for s in cell.log_likelihoods[task] for v in s):.3f}")
            else:
                values.append("")
        yield f"{task:16} " + " ".join(f"{value:>14}" for value in values)


def _percent(e: Estimate) -> str:
    return f"{100 * e.mean:.1f} [{100 * e.low:.1f}, {100 * e.high:.1f}]"


def _points(e: Estimate, margin: float) -> str:
    return f"{100 * e.mean:+.1f} [{100 * e.low:+.1f}, {100 * e.high:+.1f}] {verdict(e, margin)}"


def to_json(result: Result, slo: Slo) -> dict[str, Any]:
    """Everything, down to the answers."""
    settings = result.settings
    return {
        "model": settings.model,
        "seed": settings.seed,
        "num_samples": settings.num_samples,
        "num_questions": settings.num_questions,
        "slo": asdict(slo),
        "tasks": {task: task in result.counted for task in settings.tasks},
        "modes": {
            mode.name: {
                "settings": mode.settings,
                **(asdict(headline(result, mode.name, slo)) if result.counted else {}),
            }
            for mode in (EXACT, *settings.modes)
        },
        "cells": [_cell_json(result, mode, length) for mode, length in result.cells],
        "flips": [asdict(flip) for flip in flips(result)],
    }


def _cell_json(result: Result, mode: str, length: int) -> dict[str, Any]:
    cell = result.cells[mode, length]
    counted = result.counted
    compared = mode != EXACT.name and result.counted
    kept = retentions(result, mode, length) if compared else {}
    return {
        "mode": mode,
        "length": length,
        "error": cell.error,
        "score": asdict(accuracy(scores(result, mode, length))) if counted else None,
        "retention": {
            kind: {
                **asdict(estimate),
                "verdict": verdict(estimate, MARGINS[kind]),
                "tasks": _of_kind(result.passed(length), kind),
            }
            for kind, estimate in kept.items()
        },
        "by_depth": by_depth(result, mode, length),
        "by_task": {
            task: asdict(accuracy({task: task_scores}))
            for task, task_scores in scores(result, mode, length).items()
        },
        "log_likelihoods": {
            task: fmean(value for sample in samples for value in sample)
            for task, samples in cell.log_likelihoods.items()
        },
        "divergence": asdict(cell.divergence) if cell.divergence else None,
        "cost": asdict(cell.cost) if cell.cost else None,
        "answers": {
            task: [[asdict(answer) for answer in sample] for sample in samples]
            for task, samples in cell.answers.items()
        },
    }


def _modes(result: Result) -> list[str]:
    return [EXACT.name, *(mode.name for mode in result.settings.modes)]
