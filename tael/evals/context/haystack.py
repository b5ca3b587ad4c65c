"""Filling a given number of tokens with lines, and hiding facts among them."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from tael.loader.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Hidden:
    haystack: str
    depths: tuple[float, ...]
    """Of the facts: the share of the haystack's tokens that lies before each."""


def spread(rng: random.Random, count: int, num_places: int) -> list[int]:
    """Different ones of ``range(count)``, one in each of ``num_places`` equal parts."""
    ends = [count * i // num_places for i in range(num_places + 1)]
    return [rng.randrange(start, end) for start, end in pairwise(ends)]


@dataclass(frozen=True, slots=True)
class Room:
    """Tokens of one tokenizer. Lines are counted one by one, which gives at least the tokens of
    them together: a line's end is a boundary to tokenizers, or joins what follows."""

    tokenizer: Tokenizer
    num_tokens: int

    def take(self, lines: Iterable[str]) -> list[str]:
        """The longest front of ``lines`` that fits."""
        taken = []
        left = self.num_tokens
        for line in lines:
            left -= self.count(line)
            if left < 0:
                break
            taken.append(line)
        return taken

    def hide(self, facts: Sequence[str], lines: Iterable[str], rng: random.Random) -> Hidden:
        """As many lines as fit with the facts between them: in their order, one in each of as
        many equal parts. Raises ValueError if the facts alone are too long."""
        left = self.num_tokens - sum(map(self.count, facts))
        if left < 0:
            raise ValueError(f"{len(facts)} facts do not fit {self.num_tokens} tokens")
        filler = Room(self.tokenizer, left).take(lines)
        places = spread(rng, len(filler) + len(facts), len(facts))
        remaining = iter(filler)
        at = dict(zip(places, facts, strict=True))
        merged = [at[i] if i in at else next(remaining) for i in range(len(filler) + len(facts))]
        return Hidden("\n".join(merged), self.depths(merged, places))

    def depths(self, lines: Sequence[str], rows: Iterable[int]) -> tuple[float, ...]:
        """Of the lines at ``rows``."""
        starts = [0]
        for line in lines:
            starts.append(starts[-1] + self.count(line))
        return tuple(starts[row] / starts[-1] for row in rows)

    def count(self, line: str) -> int:
        return len(self.tokenizer.encode(line + "\n", add_special_tokens=False))
