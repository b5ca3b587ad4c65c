"""From an answer to a score between 0 and 1."""

from __future__ import annotations

import re

from tael.evals.context.sample import Question
from tael.evals.context.words import FIRST_NAMES, THINGS

_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")


def recall(question: Question, text: str) -> float:
    """Share of the answers that ``text`` has, as whole words or numbers."""
    found = _words(text)
    return sum(answer.lower() in found for answer in question.answers) / len(question.answers)


def first_things(question: Question, text: str) -> float:
    """As ``recall``, of no more things than are asked for: a list that goes on names them all."""
    named = [word for word in re.findall(r"\w+", text.lower()) if word in THINGS]
    first = named[: len(question.answers)]
    return sum(answer in first for answer in question.answers) / len(question.answers)


def name_f1(question: Question, text: str) -> float:
    """F1 of the set of first names in ``text``: one too many costs as one too few does."""
    named = _words(text).intersection(name.lower() for name in FIRST_NAMES)
    wanted = {answer.lower() for answer in question.answers}
    return 2 * len(named & wanted) / (len(named) + len(wanted))


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", _THOUSANDS.sub("", text).lower()))
