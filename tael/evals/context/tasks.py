"""All tasks by name, and the samples of a run."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from tael.errors import TaelError
from tael.evals.context import reasoning, retrieval
from tael.evals.context.haystack import Room
from tael.evals.context.sample import Draft, Question, Sample
from tael.evals.context.scoring import first_things, name_f1, recall
from tael.loader.tokenizer import Tokenizer

QUESTION_ROOM = 144
"""Tokens of a length that are left for the chat template, a question and its answer: half as many
again as the longest question of three keys takes."""

MAX_EMPTY_TOKENS = 128
"""That the last line may leave, or a tenth of the room."""

Kind = Literal["retrieval", "reasoning"]


@dataclass(frozen=True, slots=True)
class Task:
    kind: Kind
    draft: Callable[[random.Random, Room, int], Draft]
    """(rng, room, num_questions): about so many questions about one haystack."""
    score: Callable[[Question, str], float] = recall


TASKS: dict[str, Task] = {
    "needle_digits": Task("retrieval", retrieval.needle_digits),
    "needle_hex": Task("retrieval", retrieval.needle_hex),
    "multikey": Task("retrieval", retrieval.multikey),
    "multivalue": Task("retrieval", retrieval.multivalue),
    "multiquery": Task("retrieval", retrieval.multiquery),
    "entities": Task("retrieval", retrieval.entities),
    "code": Task("retrieval", retrieval.code),
    "variables_1": Task("reasoning", reasoning.variables(1)),
    "variables_2": Task("reasoning", reasoning.variables(2)),
    "variables_4": Task("reasoning", reasoning.variables(4)),
    "frequent_words": Task("reasoning", reasoning.frequent_words, first_things),
    "whereabouts": Task("reasoning", reasoning.whereabouts),
    "possessions": Task("reasoning", reasoning.possessions),
    "parents": Task("reasoning", reasoning.parents, name_f1),
}


def make_samples(
    tokenizer: Tokenizer,
    task: str,
    length: int,
    *,
    num_samples: int,
    num_questions: int,
    seed: int,
) -> list[Sample]:
    """The same for the same arguments, tokenizer and Python. Facts and questions are the same
    for every length; only the haystack grows. Raises TaelError if they do not fit ``length``."""
    room = Room(tokenizer, length - QUESTION_ROOM)
    samples = []
    for index in range(num_samples):
        rng = random.Random(f"{seed}/{task}/{index}")
        try:
            draft = TASKS[task].draft(rng, room, num_questions)
        except ValueError as error:
            raise TaelError(
                f"{task} does not fit {length} tokens ({error}); ask fewer questions or measure "
                "longer contexts."
            ) from error
        num_missing = room.num_tokens - sum(map(room.count, draft.haystack.split("\n")))
        if num_missing > max(MAX_EMPTY_TOKENS, room.num_tokens // 10):
            raise TaelError(
                f"the texts of {task} are {num_missing} tokens too short for {length}; measure "
                "shorter contexts."
            )
        samples.append(Sample(task, length, index, draft.haystack, draft.questions))
    return samples


def parse_tasks(text: str) -> tuple[str, ...]:
    """Names joined by commas. Raises TaelError for one that there is not."""
    names = tuple(text.split(","))
    for name in names:
        if name not in TASKS:
            raise TaelError(f"there is no task {name!r}; known are {', '.join(TASKS)}.")
    return names
