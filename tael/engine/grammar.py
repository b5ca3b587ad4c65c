"""Answers that must match a grammar: which tokens may come next.

llguidance does the work. It needs no torch, keeps its parser within limits and drops the
interpreter lock; this module compiles under a deadline, away from the thread that computes.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tael.errors import TaelError
from tael.loader.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer


class TokenMask:
    """Follows one answer through a grammar."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def copy(self) -> TokenMask:
        """Another one at the same place, for another answer."""
        return TokenMask(self._matcher.deep_copy())

    def allowed(self) -> NDArray[np.bool_]:
        """[vocab_size] the tokens that may come next; at the end of the grammar, those that end
        the answer. Raises ValueError if the grammar has become too large to follow."""
        mask = np.frombuffer(self._matcher.compute_logit_bias(), np.uint8).astype(np.bool_)
        if self._matcher.is_error():
            raise ValueError(f"the grammar failed: {self._matcher.get_error()}")
        return mask

    def accept(self, token_id: int) -> None:
        """Go on by an allowed token."""
        self._matcher.consume_token(token_id)


class GrammarCompiler:
    """Compiles grammars in threads of its own."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="tael-grammar")

    def compile(self, grammar: str, done: Callable[[TokenMask | TaelError], None]) -> None:
        """Calls ``done`` from another thread, with a TaelError for a grammar that is wrong or too
        large. ``grammar`` is JSON as ``LLMatcher.grammar_from_json_schema`` makes it, or Lark."""

        def work() -> None:
            try:
                done(self._compile(grammar))
            except Exception as error:  # llguidance's own; what it is must reach the caller
                done(_refusal(str(error)))

        self._threads.submit(work)

    def _compile(self, grammar: str) -> TokenMask | TaelError:
        from llguidance import LLMatcher

        matcher = LLMatcher(self._vocabulary, grammar, log_level=0)
        return _refusal(matcher.get_error()) if matcher.is_error() else TokenMask(matcher)

    @cached_property
    def _vocabulary(self) -> LLTokenizer:
        from llguidance import LLTokenizer, TokenizerWrapper

        return LLTokenizer(
            TokenizerWrapper(_Vocabulary(self._tokenizer, self._vocab_size)),
            n_vocab=self._vocab_size,
            eos_token=sorted(self._tokenizer.eos_token_ids),
        )


class _Vocabulary:
    """A tokenizer as llguidance asks for it."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = min(tokenizer.eos_token_ids)
        self.bos_token_id = tokenizer.bos_token_id
        self.tokens = [tokenizer.token_bytes(i) for i in range(vocab_size)]
        self.special_token_ids = [i for i in range(vocab_size) if tokenizer.is_special(i)]

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)


def _refusal(reason: str) -> TaelError:
    line = " ".join(reason.split("\n", 1)[0].split())[:200].rstrip(".")
    return TaelError(f"the schema cannot be compiled: {line}; simplify it.")
