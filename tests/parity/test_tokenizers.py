"""Ids against references that share no code or data with ``tael.loader``.

SentencePiece vocabularies: Google's own implementation on the same pieces and scores. Byte-level
BPE: the pattern its authors published, run by the ``regex`` module, and the textbook merge loop;
and the fingerprints of the authors' own tokenizers.
"""

from __future__ import annotations

import functools
import hashlib
import random
import struct
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import regex
import sentencepiece

from tael.loader.gguf import GGUFCheckpoint
from tael.loader.gguf_vocab import TokenType
from tael.loader.tokenizer import Tokenizer

CORPUS = Path(__file__).parents[1].joinpath("data", "multilingual.txt").read_bytes().decode()
LINES = CORPUS.split("\n")

ModelPath = Callable[[str], Path]
Loaded = tuple[Tokenizer, Mapping[str, Any]]


@functools.cache
def load(path: Path) -> Loaded:
    metadata = GGUFCheckpoint(path).metadata
    return Tokenizer.from_gguf(metadata), metadata


def random_texts(count: int, seed: int) -> Iterable[str]:
    """Strings over mixed scripts, with runs, periodic words, spaces and names of tokens."""
    rng = random.Random(seed)
    characters = [c for c in CORPUS if not c.isascii()] + list("aeiou stn \n\t.,'0123456789<>|▁")
    characters += [chr(c) for c in range(0x180)]
    # Of planes 0 to 2, all that was assigned long ago: Unicode versions differ on the rest.
    characters += [
        c
        for c in map(chr, rng.choices(range(0x180, 0x2FFFF), k=4000))
        if unicodedata.category(c) not in ("Cn", "Cs")
    ]
    pieces = ["  ", "\n\n\n", "\r\n", "\t\t", "<|im_end|>", "<bos>", "</s>", "aaaa", "abab", "'LL"]
    for _ in range(count):
        if rng.random() < 0.25:
            alphabet = rng.sample("abehinort' ", rng.randrange(1, 4))
        else:
            alphabet = rng.choices(characters, k=20) + rng.choices(pieces, k=3)
        yield "".join(rng.choices(alphabet, k=rng.randrange(1, 50)))


def assert_same_ids(
    tokenizer: Tokenizer, reference: Callable[[str], list[int]], num_random: int
) -> None:
    for text in (CORPUS, *LINES, *random_texts(num_random, seed=17)):
        assert tokenizer.encode(text, add_special_tokens=False) == reference(text), repr(text)


# --- Byte-level BPE ---------------------------------------------------------------------------

GPT2 = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
QWEN2 = (
    r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"""
    r"""| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
)


def smollm_words(text: str) -> list[str]:
    parts = regex.split(r"(\p{N})", text)
    return [word for part in parts for word in regex.findall(GPT2, part)]


def qwen2_words(text: str) -> list[str]:
    return regex.findall(QWEN2, unicodedata.normalize("NFC", text))


class TextbookBPE:
    def __init__(self, metadata: Mapping[str, Any], words: Callable[[str], list[str]]) -> None:
        self.ids = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
        merges = metadata["tokenizer.ggml.merges"]
        self.ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(merges)}
        self.words = words
        kinds = metadata["tokenizer.ggml.token_type"]
        names = [token for token, i in self.ids.items() if kinds[i] == TokenType.USER_DEFINED]
        self.user_defined = regex.compile(f"({'|'.join(map(regex.escape, names)) or '(?!)'})")
        # The table of GPT-2's encoder.py.
        bytes_ = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1)]
        bytes_ += range(ord("®"), ord("ÿ") + 1)
        characters = list(bytes_)
        for byte in range(256):
            if byte not in bytes_:
                characters.append(256 + len(bytes_) - 188)
                bytes_.append(byte)
        self.characters = dict(zip(bytes_, map(chr, characters), strict=True))

    def __call__(self, text: str) -> list[int]:
        ids: list[int] = []
        for index, part in enumerate(self.user_defined.split(text)):
            if index % 2:
                ids.append(self.ids[part])
            else:
                ids += [i for word in self.words(part) for i in self.encode_word(word)]
        return ids

    def encode_word(self, word: str) -> list[int]:
        parts = [self.characters[byte] for byte in word.encode()]
        while len(parts) > 1:
            ranks = [self.ranks.get(pair, len(self.ranks)) for pair in pairwise(parts)]
            best = min(range(len(ranks)), key=ranks.__getitem__)
            if ranks[best] == len(self.ranks):
                break
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        # A vocabulary may lack a byte that its training text did not have.
        return [self.ids[part] for part in parts if part in self.ids]


@pytest.mark.parametrize(
    ("model", "words"), [("smollm2:135m", smollm_words), ("qwen2.5-coder:0.5b", qwen2_words)]
)
def test_byte_level_bpe_against_the_published_pattern(
    model_path: ModelPath, model: str, words: Callable[[str], list[str]]
) -> None:
    tokenizer, metadata = load(model_path(model))
    assert_same_ids(tokenizer, TextbookBPE(metadata, words), num_random=1000)


# llama.cpp's convert_hf_to_gguf.py recognises the authors' tokenizers by the SHA-256 of their ids
# for this text, and carries these values for SmolLM and Qwen2.
FINGERPRINT_TEXT = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (normal) 😶\u200d🌫️ (multiple emojis "
    "concatenated) ✅ 🦙🦙 3 33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3...3 "
    "កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天\uff5e ------======= нещо на Български "
    "''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, 'RE you sure? 'M not "
    "sure I'll make it, 'D you like some tea? We'Ve a'lL"
)


@pytest.mark.parametrize(
    ("model", "sha256"),
    [
        ("smollm2:135m", "855059429035d75a914d1eda9f10a876752e281a054a7a3d421ef0533e5b6249"),
        ("qwen2.5-coder:0.5b", "e636dc30a262dcc0d8c323492e32ae2b70728f4df7dfe9737d9f920a282b8aea"),
    ],
)
def test_fingerprint_of_the_authors_tokenizer(
    model_path: ModelPath, model: str, sha256: str
) -> None:
    tokenizer, _ = load(model_path(model))
    ids = str(tokenizer.encode(FINGERPRINT_TEXT))
    assert hashlib.sha256(ids.encode()).hexdigest() == sha256


# --- SentencePiece ----------------------------------------------------------------------------


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def field(number: int, value: int | float | bytes) -> bytes:
    """One field of a protocol buffer."""
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, bytes):
        return varint(number << 3 | 2) + varint(len(value)) + value
    return varint(number << 3) + varint(value)


def sentencepiece_model(metadata: Mapping[str, Any]) -> sentencepiece.SentencePieceProcessor:
    """A ModelProto (sentencepiece_model.proto) of the vocabulary: BPE with byte fallback and no
    normalisation but the escaping of spaces."""
    tokens = metadata["tokenizer.ggml.tokens"]
    pieces = zip(
        tokens,
        metadata["tokenizer.ggml.scores"].tolist(),
        metadata["tokenizer.ggml.token_type"].tolist(),
        strict=True,
    )
    proto = b"".join(
        # GGUF stores user-defined pieces with plain spaces.
        field(1, field(1, token.replace(" ", "▁").encode()) + field(2, score) + field(3, kind))
        for token, score, kind in pieces
    )
    proto += field(2, field(3, 2) + field(4, len(tokens)) + field(35, 1))
    prefix = int(metadata["tokenizer.ggml.add_space_prefix"])
    proto += field(3, field(1, b"identity") + field(3, prefix) + field(4, 0) + field(5, 1))
    return sentencepiece.SentencePieceProcessor(model_proto=proto)


def test_gemma_against_sentencepiece(model_path: ModelPath) -> None:
    tokenizer, metadata = load(model_path("gemma3:270m"))
    reference = sentencepiece_model(metadata)
    assert_same_ids(tokenizer, reference.encode, num_random=4000)
    for length in (1, 2, 15, 30, 31, 32, 33, 63, 100):
        for character in " \n\t▁":
            text = f"a{character * length}b"
            assert tokenizer.encode(text, add_special_tokens=False) == reference.encode(text)


@pytest.mark.parametrize("prefix", [True, False])
def test_a_freshly_trained_vocabulary_against_sentencepiece(tmp_path: Path, prefix: bool) -> None:
    """Covers the space prefix of Llama 2, which none of the catalogue's models has."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES),
        model_prefix=str(tmp_path / "tiny"),
        model_type="bpe",
        vocab_size=1100,
        character_coverage=0.98,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=prefix,
        user_defined_symbols=[] if prefix else ["▁▁", "▁▁▁", "\n\n", "<table>"],
        minloglevel=2,
    )
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tiny.model"))
    ids = range(reference.vocab_size())
    kinds = [
        TokenType.UNKNOWN
        if reference.is_unknown(i)
        else TokenType.CONTROL
        if reference.is_control(i)
        else TokenType.BYTE
        if reference.is_byte(i)
        else TokenType.USER_DEFINED
        if reference.id_to_piece(i) in ("▁▁", "▁▁▁", "\n\n", "<table>") and not prefix
        else TokenType.NORMAL
        for i in ids
    ]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [reference.id_to_piece(i) for i in ids],
        "tokenizer.ggml.scores": np.array([reference.get_score(i) for i in ids]),
        "tokenizer.ggml.token_type": np.array(kinds),
        "tokenizer.ggml.unknown_token_id": reference.unk_id(),
        "tokenizer.ggml.bos_token_id": reference.bos_id(),
        "tokenizer.ggml.eos_token_id": reference.eos_id(),
        "tokenizer.ggml.add_space_prefix": prefix,
    }
    tokenizer = Tokenizer.from_gguf(metadata)
    assert_same_ids(tokenizer, reference.encode, num_random=2000)
    for text in LINES:
        ids_of_text = reference.encode(text)
        assert tokenizer.decode(ids_of_text) == reference.decode(ids_of_text)


# --- Every real model -------------------------------------------------------------------------

MODELS = ["smollm2:135m", "gemma3:270m", "qwen2.5-coder:0.5b"]


def expected_text(model: str, text: str) -> str:
    """What these models keep of a text."""
    if model == "qwen2.5-coder:0.5b":
        return unicodedata.normalize("NFC", text)
    if model == "gemma3:270m":
        return text.replace("▁", " ")  # SentencePiece's own sign for a space
    # SmolLM2 has no tokens for these bytes, nor for some that begin characters of plane 1 up.
    kept = (c for c in text if c not in "\x04\x06\x13\x14\x16\x1d")
    return b"".join(c.encode().translate(None, b"\xf1\xf2") for c in kept).decode(errors="replace")


@pytest.mark.parametrize("model", MODELS)
def test_decoding_gives_the_text_back(model_path: ModelPath, model: str, tmp_path: Path) -> None:
    tokenizer, _ = load(model_path(model))
    tokenizer.save(tmp_path)
    warm = Tokenizer.load(tmp_path)
    for text in (CORPUS, *random_texts(300, seed=5)):
        ids = tokenizer.encode(text)
        assert warm.encode(text) == ids
        assert tokenizer.decode(ids) == warm.decode(ids) == expected_text(model, text)
    assert warm.eos_token_ids == tokenizer.eos_token_ids
    assert warm.has_chat_template == tokenizer.has_chat_template


@pytest.mark.parametrize("model", MODELS)
def test_no_control_token_comes_from_text(model_path: ModelPath, model: str) -> None:
    tokenizer, metadata = load(model_path(model))
    kinds = metadata["tokenizer.ggml.token_type"]
    control = set(np.flatnonzero(kinds == TokenType.CONTROL).tolist())
    names = [metadata["tokenizer.ggml.tokens"][i] for i in sorted(control)]
    assert control.isdisjoint(tokenizer.encode(" ".join(names), add_special_tokens=False))
    assert tokenizer.encode("".join(names[:40]), False, parse_special=True) == sorted(control)[:40]


EXPECTED_EOS = {
    "smollm2:135m": {"<|im_end|>", "<|endoftext|>"},
    "gemma3:270m": {"<eos>", "<end_of_turn>"},
    "qwen2.5-coder:0.5b": {"<|im_end|>", "<|endoftext|>"},
}


@pytest.mark.parametrize("model", MODELS)
def test_tokens_that_end_an_answer(model_path: ModelPath, model: str) -> None:
    tokenizer, _ = load(model_path(model))
    assert {tokenizer.token_text(i) for i in tokenizer.eos_token_ids} == EXPECTED_EOS[model]


@pytest.mark.parametrize("model", ["smollm2:135m", "qwen2.5-coder:0.5b", "qwen2.5-coder:1.5b"])
def test_chat_is_what_transformers_renders_and_parses(model_path: ModelPath, model: str) -> None:
    """Where no message spells a control token, parsing the whole text is the same thing."""
    from transformers.utils.chat_template_utils import render_jinja_template

    tokenizer, metadata = load(model_path(model))
    tools = [{"type": "function", "function": {"name": "wéather", "parameters": {"a": [1, None]}}}]
    call = {"type": "function", "function": {"name": "wéather", "arguments": {"city": "Köln"}}}
    conversations: list[list[dict[str, Any]]] = [
        [{"role": "user", "content": "Hello <b>you</b> & me"}],
        [
            {"role": "system", "content": " Be brief.\n"},
            {"role": "user", "content": CORPUS.replace("<|", "<¦")},
            {"role": "assistant", "content": "Köln", "tool_calls": [call]},
            {"role": "tool", "content": '{"t": 3}'},
            {"role": "user", "content": "And now?"},
        ],
    ]
    template = metadata["tokenizer.chat_template"]
    for messages in conversations:
        for arguments in ({}, {"tools": tools}):
            (expected,), _ = render_jinja_template(
                [messages], chat_template=template, add_generation_prompt=True, **arguments
            )
            assert tokenizer.render_chat(messages, **arguments) == expected
            ids = tokenizer.encode(expected, False, parse_special=True)
            assert tokenizer.apply_chat_template(messages, **arguments) == ids


@pytest.mark.parametrize("model", ["smollm2:135m", "qwen2.5-coder:0.5b", "qwen2.5-coder:1.5b"])
def test_messages_cannot_write_control_tokens(model_path: ModelPath, model: str) -> None:
    tokenizer, metadata = load(model_path(model))
    kinds = metadata["tokenizer.ggml.token_type"]
    names = [metadata["tokenizer.ggml.tokens"][i] for i in np.flatnonzero(kinds == 3)]
    fragments = [*names, "<|", "|>", "<", "im_end", "im_start|>", " ", "\n", "user", "é"]
    rng = random.Random(3)
    for _ in range(200):
        contents = ["".join(rng.choices(fragments, k=rng.randrange(8))) for _ in range(3)]

        def conversation(contents: list[str]) -> list[dict[str, str]]:
            roles = ("system", "user", "assistant")
            return [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)]

        ids = tokenizer.apply_chat_template(conversation(contents))
        benign = tokenizer.apply_chat_template(conversation(["x"] * 3))
        assert list(filter(tokenizer.is_special, ids)) == list(filter(tokenizer.is_special, benign))
        text = tokenizer.decode(ids, skip_special_tokens=False)
        assert all(content in text for content in contents)
