"""Runs of the effective-context suite, made up."""

from __future__ import annotations

from tael.config import EngineConfig
from tael.evals.context.cell import Answer, Cell, Cost
from tael.evals.context.modes import Mode
from tael.evals.context.sample import Question, Sample
from tael.evals.context.suite import Result, Settings

TASKS = ("multikey", "variables_1")
LENGTHS = (1024, 2048, 4096)
COST = Cost(peak_rss_bytes=1 << 30, kv_bytes=1 << 20, time_to_first_token_s=1.0, s_per_token=0.02)


def cell(num_right: int, cost: Cost = COST) -> Cell:
    """Of the 20 haystacks with 10 questions of each task, the first questions are right."""
    scores = [[1.0] * num_right + [0.0] * (10 - num_right)] * 20
    answers = [[Answer(str(score), score) for score in sample] for sample in scores]
    return Cell(dict.fromkeys(TASKS, answers), {}, cost, None)


def result(*right: int, mode_cells: dict[int, Cell] | None = None) -> Result:
    """The exact mode has 10 right answers of 10; the mode "q8" as many as told, by length."""
    questions = tuple(Question(f"What is {i}?", (str(i),), "", i / 10) for i in range(10))
    samples = {
        length: {
            task: [Sample(task, length, i, "", questions) for i in range(20)] for task in TASKS
        }
        for length in LENGTHS
    }
    cells: dict[tuple[str, int], Cell] = {}
    for length, num_right in zip(LENGTHS, right, strict=True):
        cells["exact", length] = cell(10)
        cells["q8", length] = (mode_cells or {}).get(length, cell(num_right))
    settings = Settings(
        "m", (Mode("q8", {"speculation": False}),), LENGTHS, TASKS, 20, 10, 0, 0, EngineConfig()
    )
    return Result(settings, TASKS, samples, cells)
