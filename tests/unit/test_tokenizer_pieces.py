"""Long texts are encoded piece by piece, to the ids of the whole."""

from __future__ import annotations

import random

import pytest
import tokenizers
from tokenizers import decoders, pre_tokenizers, trainers
from tokenizers.models import BPE

from tael.loader import tokenizer as module
from tael.loader.tokenizer import Tokenizer
from tael.loader.tokenizer_config import TokenizerConfig

WORDS = [
    "the",
    "sea",
    "it's",
    "I'll",
    "Ä",
    "éa",
    "42",
    "a",
    "\n",
    "\n\n",
    " ",
    "  ",
    "\t",
    "don't.",
]
QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def text(rng: random.Random) -> str:
    return "".join(rng.choice(WORDS) + rng.choice(["", " ", " ", "  "]) for _ in range(200))


def make(splits: list[object]) -> Tokenizer:
    """Trained on such texts, so that tokens reach as far as they may."""
    backend = tokenizers.Tokenizer(BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([text(random.Random(i)) for i in range(50)], trainer)
    return Tokenizer(backend, TokenizerConfig(None, (), add_bos=False, chat_template=None))


@pytest.mark.parametrize("apart", [True, False])
def test_pieces_give_the_ids_of_the_whole(apart: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = make([pre_tokenizers.Split(tokenizers.Regex(QWEN), "isolated")] if apart else [])
    texts = [text(random.Random(1000 + i)) for i in range(100)]
    whole = [tokenizer.encode(text) for text in texts]
    monkeypatch.setattr(module, "_PIECE_CHARS", 16)
    assert [tokenizer.encode(text) for text in texts] == whole
    num_pieces = sum(len(list(tokenizer._pieces(text))) for text in texts)
    assert num_pieces > 1000 if apart else num_pieces == 100


def test_the_pieces_are_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = make([pre_tokenizers.Split(tokenizers.Regex(QWEN), "isolated")])
    monkeypatch.setattr(module, "_PIECE_CHARS", 16)
    for seed in range(50):
        original = text(random.Random(seed))
        pieces = list(tokenizer._pieces(original))
        assert "".join(pieces) == original
        assert all(len(piece) >= 16 for piece in pieces[:-1])
    assert list(tokenizer._pieces("x" * 1000)) == ["x" * 1000]
