"""Drafts for running requests, from their own text and from recent outputs of others."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from tael.request import Request
from tael.speculative.draft_length import draft_lengths
from tael.speculative.ngram_index import NGramIndex

POOL_TOKENS = 8192
"""Of recent outputs that a tenant's requests draft from: at least these, at most twice as many."""

MAX_POOLS = 8
"""Tenants with a pool; the one that finished a request least recently loses its own."""

MEMORY = 0.95
"""Weight of a request's past acceptance after each further draft: the last twenty or so count, so
that drafts from matches of three tokens can fall below their cost."""


class Drafter:
    """Guesses the next tokens of requests by looking up what followed the same words before:
    in the request's prompt and output, and in the outputs of finished requests with the same
    ``cache_salt``. Guesses cost no model time and change no output, only how soon it comes.
    """

    def __init__(self) -> None:
        self._histories: dict[Request, _History] = {}
        self._pools: dict[str, _Pool] = {}
        """By cache_salt, the most recently used last."""

    def draft(
        self,
        requests: Sequence[Request],
        limits: Sequence[int],
        num_tokens: int,
        max_num_drafts: int,
    ) -> list[list[int]]:
        """Guesses of the tokens after the last one of each request: at most ``limits`` for each
        and ``max_num_drafts`` in all. The step has ``num_tokens`` without them."""
        matches = [self._match(request) for request in requests]
        lengths = draft_lengths(
            [match.acceptance for match in matches], limits, num_tokens, max_num_drafts
        )
        return [match.continuation(n) for match, n in zip(matches, lengths, strict=True)]

    def observe(self, request: Request, num_draft_tokens: int, num_accepted_tokens: int) -> None:
        """Learn what became of a draft."""
        history = self._histories[request]
        history.num_accepted = MEMORY * history.num_accepted + num_accepted_tokens
        rejected = num_accepted_tokens < num_draft_tokens
        history.num_rejected = MEMORY * history.num_rejected + rejected

    def finish(self, request: Request) -> None:
        """Forget a request but for its output, which others may repeat."""
        self._histories.pop(request, None)
        if not request.speculation:
            return
        pool = self._pools.pop(request.cache_salt, None) or _Pool()
        pool.add(request.output_token_ids)
        self._pools[request.cache_salt] = pool
        if len(self._pools) > MAX_POOLS:
            del self._pools[next(iter(self._pools))]

    def _match(self, request: Request) -> _Match:
        history = self._histories.get(request)
        if history is None:
            history = self._histories[request] = _History(NGramIndex(request.token_ids))
        length, position = history.index.longest_match(request.token_ids)
        source = history.index.token_ids
        pool = self._pools.get(request.cache_salt)
        if pool is not None:
            pool_length, pool_position = pool.index.longest_match(request.token_ids)
            if pool_length > length:
                length, position, source = pool_length, pool_position, pool.index.token_ids
        return _Match(source, position, history.acceptance(length))


@dataclass(slots=True)
class _History:
    """What drafting knows of one request."""

    index: NGramIndex
    num_accepted: float = 0.0
    num_rejected: float = 0.0
    """Drafts of which a token was rejected; like the tokens above, old ones count less."""

    def acceptance(self, match_length: int) -> float:
        """Probability that the next token follows a match: Laplace's rule of succession, over
        the tokens of the match, which agreed, and those of earlier drafts."""
        if match_length == 0:
            return 0.0
        num_agreed = match_length + self.num_accepted
        return num_agreed / (num_agreed + self.num_rejected + 1)


@dataclass(frozen=True, slots=True)
class _Match:
    """A place in ``source`` whose text is expected to go on as it does there."""

    source: Sequence[int]
    position: int
    acceptance: float

    def continuation(self, num_tokens: int) -> list[int]:
        """What follows. Past the end of the source it begins again, as text in a loop does."""
        period = len(self.source) - self.position
        return [self.source[self.position + i % period] for i in range(num_tokens)]


class _Pool:
    """The last outputs of a tenant, one after another."""

    def __init__(self) -> None:
        self._token_ids = array("i")
        self.index = NGramIndex(self._token_ids)

    def add(self, token_ids: Sequence[int]) -> None:
        self._token_ids.extend(token_ids)
        if len(self._token_ids) > 2 * POOL_TOKENS:
            self._token_ids = self._token_ids[-POOL_TOKENS:]
            self.index = NGramIndex(self._token_ids)
