"""How far the distributions of a mode are from the exact ones, on plain text.

Of a text as long as the context, the last tokens are forced (see ``teacher``): the front is read
before, as a haystack is. Longer contexts are later positions, so the loss by length is the loss by
position.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tael.engine.engine import Engine
from tael.evals.context import texts
from tael.evals.context.haystack import Room
from tael.evals.context.teacher import forced_logprobs
from tael.loader.tokenizer import Tokenizer

NUM_FORCED = 64
"""Tokens of each text. A row is 600 KB with a vocabulary of 150,000."""


@dataclass(frozen=True, slots=True)
class Divergence:
    """Over all forced tokens. In nats, except ``same_top``."""

    num_positions: int
    mean_kld: float
    """Of the mode from the exact model."""
    p99_kld: float
    same_top: float
    """Share of positions with the same most likely token."""
    nll: float
    """Mean of -log p of the text's own tokens."""


def make_texts(tokenizer: Tokenizer, length: int, num_texts: int, seed: int) -> list[list[int]]:
    """Prose and code in turns, ``length`` tokens each with the beginning of a text if the model
    has one."""
    made = []
    for index in range(num_texts):
        rng = random.Random(f"{seed}/text/{index}")
        lines = texts.prose(rng) if index % 2 == 0 else texts.source_lines(rng)
        # Lines together are fewer tokens than one by one.
        text = "\n".join(Room(tokenizer, 2 * length).take(lines))
        token_ids = tokenizer.encode(text)[:length]
        assert len(token_ids) == length, "the texts are too short"
        made.append(token_ids)
    return made


def forced_rows(engine: Engine, token_ids: list[list[int]]) -> Iterator[NDArray[np.float32]]:
    """[NUM_FORCED, vocab_size] log-probabilities of each text's last tokens."""
    for ids in token_ids:
        yield forced_logprobs(engine, ids, len(ids) - NUM_FORCED)


def divergence(
    exact: list[NDArray[np.float32]],
    mode: list[NDArray[np.float32]],
    token_ids: list[list[int]],
) -> Divergence:
    """From the rows of each text."""
    klds, same, nlls = [], [], []
    for p, q, ids in zip(exact, mode, token_ids, strict=True):
        klds.append((np.exp(p, dtype=np.float64) * (p.astype(np.float64) - q)).sum(1))
        same.append(p.argmax(1) == q.argmax(1))
        nlls.append(-q[np.arange(NUM_FORCED), ids[-NUM_FORCED:]])
    kld = np.concatenate(klds)
    return Divergence(
        num_positions=len(kld),
        mean_kld=float(kld.mean()),
        p99_kld=float(np.quantile(kld, 0.99)),
        same_top=float(np.mean(same)),
        nll=float(np.mean(nlls)),
    )
