"""A sample as token ids.

The haystack comes first and is computed as a request of its own, so that nothing in it can be
chosen, compressed or skipped by looking at a question. A prompt is the haystack's ids and then the
ids of a question: tokenised apart, since the last token of a text may change with what follows.
"""

from __future__ import annotations

from tael.evals.context.sample import Question
from tael.loader.tokenizer import Tokenizer

INTRODUCTION = "Read this text. A question about it follows after it.\n\n"
MARK = "\ue000"
"""Stands for the content of the message in the rendered template. Of the private use area."""


class PromptFormat:
    """Of one model: its chat template around haystack and question, if it has one."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        if tokenizer.has_chat_template:
            message = {"role": "user", "content": MARK}
            text = tokenizer.render_chat([message], enable_thinking=False)
            self._before, self._after = text.split(MARK)
        else:
            self._before, self._after = "", "\n"

    def prefix(self, haystack: str) -> list[int]:
        """All that comes before a question."""
        before = self._tokenizer.encode(self._before, parse_special=True)
        return before + self._encode(INTRODUCTION + haystack + "\n\n")

    def suffix(self, question: Question) -> list[int]:
        """A question, and the beginning of its answer."""
        after = self._tokenizer.encode(self._after, add_special_tokens=False, parse_special=True)
        return self._encode(f"Question: {question.text}") + after + self._encode(question.lead)

    def answer(self, question: Question) -> list[int]:
        """What a perfect model would say after the suffix."""
        return self._encode(f" {', '.join(question.answers)}")

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)
