"""All modes at all lengths on the same samples, each cell in a process of its own.

A process of its own makes peak memory that of one cell, and a cell that runs out of memory a
result, a failure, instead of the end of the run.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing import get_context, parent_process
from pathlib import Path
from statistics import fmean
from threading import Thread
from typing import TypeAlias

import numpy as np

from tael.config import EngineConfig
from tael.errors import TaelError
from tael.evals.context.cell import Answer, Cell, answer_all, answer_log_likelihoods
from tael.evals.context.divergence import divergence, forced_rows, make_texts
from tael.evals.context.kept import KeptCells
from tael.evals.context.modes import EXACT, Mode
from tael.evals.context.sample import Sample
from tael.evals.context.tasks import make_samples
from tael.llm import open_engine
from tael.loader.prepared import load_prepared
from tael.loader.sources import resolve

GATE = 0.7
"""A task counts if the exact model scores this at the shortest length: of one it cannot do, its
answers tell nothing about a mode."""

Samples: TypeAlias = dict[str, list[Sample]]
"""By task."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What is measured."""

    model: str
    modes: tuple[Mode, ...]
    """Besides the exact one."""
    lengths: tuple[int, ...]
    tasks: tuple[str, ...]
    num_samples: int
    """Haystacks of each task and length."""
    num_questions: int
    num_texts: int
    """For the divergence. 0: none."""
    seed: int
    config: EngineConfig
    """Of the exact mode, its ``max_model_len`` aside."""


@dataclass(frozen=True, slots=True)
class Result:
    settings: Settings
    counted: tuple[str, ...]
    """Tasks."""
    samples: dict[int, Samples]
    """By length."""
    cells: dict[tuple[str, int], Cell]
    """By mode and length."""

    def passed(self, length: int) -> tuple[str, ...]:
        """Tasks that the exact model can do at this length too. Of another one it cannot be seen
        what a mode loses."""
        exact = self.cells[EXACT.name, length]
        return () if exact.error is not None else _passed(exact.answers)


def run_suite(
    settings: Settings, show: Callable[[str, int, Cell], None], keep: Path | None = None
) -> Result:
    """Measure everything, from the shortest length to the longest and the exact mode first.
    ``show`` is told of every cell when it is done. What an earlier run has left in the folder
    ``keep`` is not measured again (see ``kept``). Raises TaelError if samples cannot be made or the
    exact model does not run at the shortest length."""
    model = load_prepared(resolve(settings.model))
    tokenizer, kept = model.tokenizer, KeptCells(keep, model.weights.digest)
    configs = {mode.name: mode.config(settings.config) for mode in (EXACT, *settings.modes)}
    counted: tuple[str, ...] | None = None
    all_samples: dict[int, Samples] = {}
    cells: dict[tuple[str, int], Cell] = {}
    for length in sorted(settings.lengths):
        samples = {
            task: make_samples(
                tokenizer,
                task,
                length,
                num_samples=settings.num_samples,
                num_questions=settings.num_questions,
                seed=settings.seed,
            )
            for task in settings.tasks
        }
        texts = make_texts(tokenizer, length, settings.num_texts, settings.seed)
        all_samples[length] = samples
        with tempfile.TemporaryDirectory() as folder:
            for name, mode_config in configs.items():
                # Scaled RoPE follows the context: all lengths are to be of one model.
                context = length if mode_config.rope_scaling is None else max(settings.lengths)
                config = replace(mode_config, max_model_len=context)
                is_exact = name == EXACT.name
                job = _Job(settings.model, config, is_exact, samples, counted, texts)
                if is_exact:
                    rows = kept.rows_of(job) or Path(folder)
                cell = kept.find(job)
                if cell is None:
                    cell = _run_isolated(job, rows)
                    kept.keep(job, cell)
                cells[name, length] = cell
                if counted is None:
                    if cell.error is not None:
                        raise TaelError(cell.error)
                    counted = _passed(cell.answers)
                show(name, length, cell)
    assert counted is not None
    return Result(settings, counted, all_samples, cells)


@dataclass(frozen=True, slots=True)
class _Job:
    model: str
    config: EngineConfig
    is_exact: bool
    samples: Samples
    counted: tuple[str, ...] | None
    """None: not known yet."""
    texts: list[list[int]]


def _run_isolated(job: _Job, rows: Path) -> Cell:
    with ProcessPoolExecutor(
        1, mp_context=get_context("spawn"), initializer=_end_with_parent
    ) as executor:
        try:
            return executor.submit(_run, job, rows).result()
        except (TaelError, MemoryError, OSError) as error:
            return _failure(job, str(error) or "there is not enough memory")
        except BrokenProcessPool:
            return _failure(job, "the process was ended from outside, for its memory perhaps")


def _end_with_parent() -> None:
    """A cell computes for minutes; nobody waits for it any more when this process was killed."""
    parent = parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    Thread(target=wait, daemon=True).start()


def _failure(job: _Job, error: str) -> Cell:
    answers = {
        task: [[Answer("", 0.0) for _ in sample.questions] for sample in job.samples[task]]
        for task in job.counted or ()
    }
    return Cell(answers, {}, None, None, error)


def _run(job: _Job, folder: Path) -> Cell:
    """The exact mode leaves its distributions in ``folder`` for the others."""
    engine = open_engine(job.model, job.config)
    if engine.max_model_len < (job.config.max_model_len or 0):
        raise TaelError(
            f"a context of {job.config.max_model_len} tokens does not fit; {engine.max_model_len} "
            "do."
        )
    asked = job.samples if job.counted is None else {t: job.samples[t] for t in job.counted}
    answers, cost = answer_all(engine, asked)
    counted = _passed(answers) if job.counted is None else job.counted
    forced = {task: samples for task, samples in job.samples.items() if task not in counted}
    log_likelihoods = answer_log_likelihoods(engine, forced)
    rows = list(forced_rows(engine, job.texts))
    paths = [folder / f"{i}.npy" for i in range(len(rows))]
    if job.is_exact:
        for path, exact_rows in zip(paths, rows, strict=True):
            np.save(path, exact_rows)
    # None are there if the exact model failed at this length.
    exact = [np.load(path, mmap_mode="r") for path in paths if path.exists()]
    return Cell(
        answers, log_likelihoods, cost, divergence(exact, rows, job.texts) if exact else None
    )


def _passed(answers: dict[str, list[list[Answer]]]) -> tuple[str, ...]:
    return tuple(
        task
        for task, samples in answers.items()
        if fmean(answer.score for sample in samples for answer in sample) >= GATE
    )
