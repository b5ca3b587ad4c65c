"""Where the end of one token sequence has occurred before in another, or in itself."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

NGRAM = 3
"""Tokens that must agree before an occurrence is looked at."""

MAX_MATCH = 32
"""Matches are measured up to this length; of longer ones the most recent counts."""

MAX_CANDIDATES = 64
"""Occurrences looked at in one search, the most recent first. Text such as indented code repeats
its n-grams hundreds of times, and one draft must cost microseconds."""


class NGramIndex:
    """The occurrences of every n-gram of a sequence that grows.

    These are the hash chains of zlib (RFC 1951, section 4): ``_heads`` gives the most recent
    position after an n-gram of a hash, ``_previous`` the one before a position. 12 to 20 bytes
    a token, and constant time to add one.
    """

    def __init__(self, token_ids: Sequence[int]) -> None:
        self.token_ids = token_ids
        """Live: the caller appends to it."""
        self._heads = array("i")
        self._previous = array("i")

    def longest_match(self, context: Sequence[int]) -> tuple[int, int]:
        """The longest end of ``context`` that occurs in the sequence with a token after it: its
        length, at most MAX_MATCH, and the position of that token. (0, 0): none of NGRAM tokens."""
        self._catch_up()
        tail = context[-MAX_MATCH:]
        if len(tail) < NGRAM or not self._heads:
            return 0, 0
        token_ids, previous = self.token_ids, self._previous
        best_length, best_position = NGRAM - 1, 0
        position = self._heads[hash(tuple(tail[-NGRAM:])) % len(self._heads)]
        for _ in range(MAX_CANDIDATES):
            if position < 0 or best_length == len(tail):
                break
            # Only a longer match counts, so the token that would make it longer goes first.
            farthest = position - best_length - 1
            if farthest >= 0 and token_ids[farthest] == tail[-best_length - 1]:
                length = _common_end(token_ids, position, tail)
                if length > best_length:
                    best_length, best_position = length, position
            position = previous[position]
        return (best_length, best_position) if best_length >= NGRAM else (0, 0)

    def _catch_up(self) -> None:
        """Index what was appended since the last call."""
        num_tokens = len(self.token_ids)
        if num_tokens > len(self._heads):  # start over with two to four entries a token
            self._heads = array("i", [-1]) * (2 << num_tokens.bit_length())
            self._previous = array("i", [-1]) * NGRAM
        start = len(self._previous)  # positions from NGRAM on have an n-gram before them
        heads, append, num_heads = self._heads, self._previous.append, len(self._heads)
        recent = self.token_ids[start - NGRAM : -1]
        ngrams = zip(*(recent[i:] for i in range(NGRAM)), strict=False)
        for position, ngram in enumerate(ngrams, start):
            slot = hash(ngram) % num_heads
            append(heads[slot])
            heads[slot] = position


def _common_end(token_ids: Sequence[int], position: int, tail: Sequence[int]) -> int:
    """How many tokens before ``position`` equal the last ones of ``tail``."""
    length = 0
    for token_id in reversed(tail):
        if length == position or token_ids[position - length - 1] != token_id:
            break
        length += 1
    return length
