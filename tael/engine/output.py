"""From tokens to text, and when a text ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tael.loader.tokenizer import Tokenizer
from tael.request import FinishReason, Request


@dataclass(frozen=True, slots=True)
class Piece:
    """What one step adds to an answer."""

    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason | None
    """Why the last token was the last, if it was."""
    stop_string: str | None = None
    """The one that ended the answer."""


class OutputProcessor:
    """Turns the tokens of one request into text as they come, and ends it where it should.

    The text never includes an end-of-sequence or stop token, nor any part of a stop string. What
    might be the beginning of a stop string is held back until it is known.
    """

    def __init__(self, request: Request, length_limit: int, tokenizer: Tokenizer) -> None:
        params = request.params
        self._num_left = length_limit - request.num_tokens
        self._stop_token_ids = frozenset(params.stop_token_ids)
        if not params.ignore_eos:
            self._stop_token_ids |= request.eos_token_ids
        self._detokenizer = tokenizer.decode_stream()
        self._stop_strings = StopStrings(params.stop)

    def extend(self, token_ids: Sequence[int]) -> Piece:
        """What the next tokens add to the answer. Those after its end are dropped."""
        text = ""
        for i, token_id in enumerate(token_ids):
            added, reason = self.append(token_id)
            text += added
            if reason is not None:
                stop_string = self._stop_strings.found
                return Piece(tuple(token_ids[: i + 1]), text, reason, stop_string)
        return Piece(tuple(token_ids), text, None)

    def append(self, token_id: int) -> tuple[str, FinishReason | None]:
        """What the next token adds to the text, and why it was the last, if it was."""
        self._num_left -= 1
        if token_id in self._stop_token_ids:
            return self._rest(), FinishReason.STOP
        text, stopped = self._stop_strings.push(self._detokenizer.step(token_id))
        if stopped:
            return text, FinishReason.STOP
        if self._num_left > 0:
            return text, None
        return text + self._rest(), FinishReason.LENGTH

    def _rest(self) -> str:
        text, stopped = self._stop_strings.push(self._detokenizer.flush())
        return text if stopped else text + self._stop_strings.flush()


class StopStrings:
    """Cuts a text, given in pieces, before the stop string that is complete first.

    Of those that end at the same character the longest counts. How the text is split into
    pieces makes no difference.
    """

    def __init__(self, stop_strings: Sequence[str]) -> None:
        self.found: str | None = None
        """The stop string that ended the text."""
        self._stop_strings = stop_strings
        self._held = ""
        """The end of the text so far that is the beginning of a stop string."""

    def push(self, piece: str) -> tuple[str, bool]:
        """More of the text. Returns what of it can be shown, and whether a stop string ended it."""
        text = self._held + piece
        starts = [(stop, text.find(stop)) for stop in self._stop_strings]
        found = [(start + len(stop), start, stop) for stop, start in starts if start >= 0]
        if found:
            self._held = ""
            _, start, self.found = min(found)
            return text[:start], True
        num_held = max((overlap(text, stop) for stop in self._stop_strings), default=0)
        shown = len(text) - num_held
        self._held = text[shown:]
        return text[:shown], False

    def flush(self) -> str:
        """What was held back, once the text has ended otherwise."""
        held, self._held = self._held, ""
        return held


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop``, without being all of it."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
