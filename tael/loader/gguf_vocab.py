"""Turns the vocabulary inside a GGUF file into a ``tokenizers`` object.

Two of GGUF's vocabulary kinds are read: "gpt2", byte-level BPE with its merges in the file, and
"llama", SentencePiece BPE, whose merges follow from the scores of the tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from tael.errors import TaelError
from tael.loader.pre_tokenizers import PRE_TOKENIZERS

# SentencePiece trains pieces of at most 16 characters; Gemma has some of 32. The time to find out
# how a token is made grows with the square of its length, so a hostile file must not choose it.
MAX_SENTENCEPIECE_TOKEN_LENGTH = 256

_NEVER = 1 << 32
"""The rank of a union that is no token."""


class TokenType(IntEnum):
    """Values of ``tokenizer.ggml.token_type``. Control tokens are never text; user-defined ones
    are text that is cut out before anything else."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """A tokenizer that gives the ids of the model's own.

    ``metadata`` holds Python scalars, lists of str and numpy arrays. BOS and EOS are left to the
    caller. Raises TaelError for a vocabulary that is damaged, of another kind, or cut into words
    by a pre-tokenizer Tael does not know.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        return _byte_level_bpe(metadata, _read_vocabulary(metadata))
    if kind == "llama":
        return _sentencepiece_bpe(metadata, _read_vocabulary(metadata))
    raise TaelError(
        f"the model's vocabulary is of kind {kind!r}, which Tael does not read; "
        "use a model with a byte-level BPE (gpt2) or SentencePiece BPE (llama) vocabulary."
    )


def special_token_id(metadata: Mapping[str, Any], name: str) -> int | None:
    """The value of ``tokenizer.ggml.<name>_token_id``, or None. Raises TaelError for an id that
    is not in the vocabulary."""
    token_id = metadata.get(f"tokenizer.ggml.{name}_token_id")
    if token_id is None:
        return None
    if not isinstance(token_id, int) or not 0 <= token_id < len(metadata["tokenizer.ggml.tokens"]):
        raise _damaged(f"{name}_token_id {token_id!r} is not a token")
    return token_id


@dataclass(frozen=True, slots=True)
class _Vocabulary:
    tokens: list[str]
    types: NDArray[np.int64]
    ids: dict[str, int]

    def of_type(self, *types: TokenType) -> list[str]:
        return [self.tokens[i] for i in np.flatnonzero(np.isin(self.types, types))]


def _read_vocabulary(metadata: Mapping[str, Any]) -> _Vocabulary:
    tokens = _string_list(metadata, "tokens")
    types = _number_array(metadata, "token_type", len(tokens)).astype(np.int64)
    try:
        "".join(tokens).encode()
    except UnicodeEncodeError as error:
        raise _damaged("a token is not valid UTF-8") from error
    ids = {token: i for i, token in enumerate(tokens)}
    if len(ids) != len(tokens):
        first = next(i for i, token in enumerate(tokens) if ids[token] != i)
        raise _damaged(f"tokens {first} and {ids[tokens[first]]} are both {tokens[first]!r}")
    for name in ("bos", "eos", "eot", "eom"):
        token_id = special_token_id(metadata, name)
        # Some files mark these as text, which would let a message end a turn.
        if token_id is not None and types[token_id] == TokenType.USER_DEFINED:
            types[token_id] = TokenType.CONTROL
    return _Vocabulary(tokens, types, ids)


def _byte_level_bpe(metadata: Mapping[str, Any], vocabulary: _Vocabulary) -> Tokenizer:
    name = metadata.get("tokenizer.ggml.pre")
    pre_tokenizer = PRE_TOKENIZERS.get(name) if isinstance(name, str) else None
    if pre_tokenizer is None:
        raise TaelError(
            f"the GGUF file names the pre-tokenizer {name!r}, which Tael does not know; "
            "use the model's safetensors files with their tokenizer.json."
        )
    ids = vocabulary.ids
    merges = []
    for merge in _string_list(metadata, "merges"):
        left, _, right = merge.partition(" ")
        # Checked here because the tokenizers package panics on a merge it cannot resolve.
        if left not in ids or right not in ids or left + right not in ids:
            raise _damaged(f"merge {merge!r} is not made of known tokens")
        merges.append((left, right))
    tokenizer = Tokenizer(BPE(ids, merges, ignore_merges=pre_tokenizer.ignore_merges))
    if pre_tokenizer.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(p), "isolated") for p in pre_tokenizer.patterns),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    _add_tokens(tokenizer, vocabulary, normalized=False)
    return tokenizer


def _sentencepiece_bpe(metadata: Mapping[str, Any], vocabulary: _Vocabulary) -> Tokenizer:
    scores = _number_array(metadata, "scores", len(vocabulary.tokens))
    unknown_id = special_token_id(metadata, "unknown")
    add_space_prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    tokenizer = Tokenizer(
        BPE(
            vocabulary.ids,
            _merges_from_scores(vocabulary, scores),
            unk_token=None if unknown_id is None else vocabulary.tokens[unknown_id],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    escape = normalizers.Replace(" ", "\u2581")
    unescape = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    if add_space_prefix:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), escape])
        unescape.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.normalizer = escape
    tokenizer.decoder = decoders.Sequence(unescape)
    # SentencePiece finds user-defined tokens in the escaped text. Where a prefix is added they
    # must be found in the raw text: the tokenizers package would add the prefix to them too.
    _add_tokens(tokenizer, vocabulary, normalized=not add_space_prefix)
    return tokenizer


def _merges_from_scores(
    vocabulary: _Vocabulary, scores: NDArray[np.float64]
) -> list[tuple[str, str]]:
    """The two tokens that each normal token is made from, the best token first.

    SentencePiece merges the neighbours whose union has the highest score. User-defined tokens
    are never merged, control and byte tokens never made.
    """
    tokens = vocabulary.tokens
    normal = set(vocabulary.of_type(TokenType.NORMAL))
    if max(map(len, normal), default=0) > MAX_SENTENCEPIECE_TOKEN_LENGTH:
        raise _damaged(f"a token is longer than {MAX_SENTENCEPIECE_TOKEN_LENGTH} characters")
    best_first = [tokens[i] for i in np.argsort(-scores, kind="stable").tolist()]
    ranks = {token: rank for rank, token in enumerate(best_first) if token in normal}
    characters = {token for token in ranks if len(token) == 1}
    made = (token for token in ranks if len(token) > 1 and characters.issuperset(token))
    return [merge for token in made if (merge := _last_merge(token, ranks)) is not None]


def _last_merge(token: str, ranks: dict[str, int]) -> tuple[str, str] | None:
    """The step that completes ``token`` when its characters are merged, or None if none does.

    No text needs another way to make it: the merges before that step lie between the first and
    the last character of the token, so that the text around it had no part in their choice.
    """
    rank_of = ranks.get
    parts = list(token)
    unions = [rank_of(left + right, _NEVER) for left, right in pairwise(parts)]
    while len(parts) > 2:
        best = min(unions)
        if best == _NEVER:
            return None
        i = unions.index(best)
        del unions[i]
        parts[i] += parts.pop(i + 1)
        if i > 0:
            unions[i - 1] = rank_of(parts[i - 1] + parts[i], _NEVER)
        if i < len(unions):
            unions[i] = rank_of(parts[i] + parts[i + 1], _NEVER)
    return parts[0], parts[1]


def _add_tokens(tokenizer: Tokenizer, vocabulary: _Vocabulary, normalized: bool) -> None:
    special = vocabulary.of_type(TokenType.CONTROL, TokenType.UNKNOWN)
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in special]
    )
    user_defined = vocabulary.of_type(TokenType.USER_DEFINED)
    tokenizer.add_tokens([AddedToken(token, normalized=normalized) for token in user_defined])


def _string_list(metadata: Mapping[str, Any], name: str) -> list[str]:
    values = metadata.get(f"tokenizer.ggml.{name}")
    if not isinstance(values, list) or not values or not isinstance(values[0], str):
        raise _damaged(f"it has no list of strings tokenizer.ggml.{name}")
    return values


def _number_array(metadata: Mapping[str, Any], name: str, length: int) -> NDArray[np.float64]:
    values = np.asarray(metadata.get(f"tokenizer.ggml.{name}"))
    if values.dtype.kind not in "iuf":
        raise _damaged(f"it has no list of numbers tokenizer.ggml.{name}")
    if values.shape != (length,):
        raise _damaged(f"it has {length} tokens but {values.size} values in {name}")
    return values.astype(np.float64)


def _damaged(what: str) -> TaelError:
    return TaelError(
        f"the model's vocabulary is damaged: {what}; pull the model again or use another file."
    )
