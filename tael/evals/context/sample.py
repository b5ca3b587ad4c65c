"""A haystack and the questions about it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Question:
    text: str
    answers: tuple[str, ...]
    """All are wanted. None of them is in ``text`` or ``lead``."""
    lead: str
    """How the answer begins: given to the model, so that it says the rest at once."""
    depth: float
    """Where in the haystack the answer is, from 0 at the front to 1. Of several places the mean."""
    max_tokens: int = 24


@dataclass(frozen=True, slots=True)
class Draft:
    """What a task makes: no more than fits into the tokens that it was given."""

    haystack: str
    questions: tuple[Question, ...]


@dataclass(frozen=True, slots=True)
class Sample:
    """One haystack of one task. ``index`` numbers those of the same task and length."""

    task: str
    length: int
    """Tokens that the haystack, any one of the questions and its answer do not exceed together."""
    index: int
    haystack: str
    questions: tuple[Question, ...]
