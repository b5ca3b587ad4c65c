"""Tokenizers of every file format, on made-up vocabularies that all tests share: one file."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from tael.errors import TaelError
from tael.loader.gguf_vocab import TokenType, tokenizer_from_gguf
from tael.loader.tokenizer import Tokenizer

Metadata = dict[str, Any]

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_level_metadata() -> Metadata:
    merges = ["t h", "th e", "Ġ the", "i n", "i m", "< |", "| >", "Ġ a", "e r", "Ċ Ċ"]
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(m.replace(" ", "") for m in merges)]
    control = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|im_end|><|x|>"]
    types = [TokenType.NORMAL] * len(tokens) + [TokenType.CONTROL] * 4
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": [*tokens, *control, "<tool_call>", "[PAD7]"],
        "tokenizer.ggml.token_type": np.array([*types, TokenType.USER_DEFINED, TokenType.UNUSED]),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": len(tokens) + 2,
        "tokenizer.ggml.eos_token_id": len(tokens) + 1,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": TEMPLATE,
    }


def sentencepiece_metadata(add_space_prefix: bool = True) -> Metadata:
    special = ["<unk>", "<s>", "</s>"]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    normal = ["▁t", "he", "▁the", "in", "▁▁", *"▁abehinorst"]
    user_defined = ["   ", "\n\n", "<b>"]
    types = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL]
    types += [TokenType.BYTE] * 256 + [TokenType.NORMAL] * len(normal)
    types += [TokenType.USER_DEFINED] * len(user_defined)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [*special, *byte_tokens, *normal, *user_defined],
        "tokenizer.ggml.scores": -np.arange(len(types), dtype=np.float32),
        "tokenizer.ggml.token_type": np.array(types, np.int32),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_space_prefix": add_space_prefix,
    }


@pytest.fixture(scope="module")
def byte_level() -> Tokenizer:
    return Tokenizer.from_gguf(byte_level_metadata())


@pytest.fixture(scope="module")
def sentencepiece() -> Tokenizer:
    return Tokenizer.from_gguf(sentencepiece_metadata())


def names(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    return [tokenizer.token_text(i) for i in ids]


def test_byte_level_bpe_merges_and_adds_bos(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("in the")
    assert names(byte_level, ids) == ["<|endoftext|>", "in", " the"]
    assert byte_level.encode("in the", add_special_tokens=False) == ids[1:]
    assert byte_level.encode("") == [byte_level.bos_token_id]


def test_sentencepiece_adds_its_space_and_falls_back_to_bytes(sentencepiece: Tokenizer) -> None:
    assert names(sentencepiece, sentencepiece.encode("the in", False)) == [" the", " ", "in"]
    assert sentencepiece.decode(sentencepiece.encode("the ñ €")) == "the ñ €"
    assert sentencepiece.token_bytes(3 + 0xC3) == b"\xc3"
    assert sentencepiece.encode("<0x41>", False) != [3 + 0x41]


def test_user_defined_tokens_are_cut_out_of_the_escaped_text() -> None:
    """The longest first: SentencePiece takes three spaces before two."""
    tokenizer = Tokenizer.from_gguf(sentencepiece_metadata(add_space_prefix=False))
    ids = tokenizer.encode("a    b\n\n<b>", add_special_tokens=False)
    assert names(tokenizer, ids) == ["a", "   ", " ", "b", "\n\n", "<b>"]
    assert tokenizer.decode(ids) == "a    b\n\n<b>"


def test_names_of_control_tokens_are_text_unless_parsed(byte_level: Tokenizer) -> None:
    text = "<|im_start|>in<|im_end|><|x|><|im_end|>"
    plain = byte_level.encode(text, add_special_tokens=False)
    assert not any(map(byte_level.is_special, plain))
    assert byte_level.decode(plain) == text
    parsed = byte_level.encode(text, add_special_tokens=False, parse_special=True)
    assert names(byte_level, parsed) == ["<|im_start|>", "in", "<|im_end|><|x|>", "<|im_end|>"]
    assert byte_level.decode(parsed) == "in"
    assert byte_level.decode(parsed, skip_special_tokens=False) == text
    (tool_call,) = byte_level.encode("<tool_call>", add_special_tokens=False)
    assert not byte_level.is_special(tool_call)


def test_a_bos_that_was_written_is_not_doubled(byte_level: Tokenizer) -> None:
    bos = byte_level.bos_token_id
    assert byte_level.encode("<|endoftext|>in", parse_special=True)[:2] != [bos, bos]
    assert byte_level.apply_chat_template([{"role": "user", "content": "x"}]).count(bos) == 1


def test_tokens_that_end_an_answer(byte_level: Tokenizer) -> None:
    """The id in the file, and known names if they are control tokens."""
    assert {byte_level.token_text(i) for i in byte_level.eos_token_ids} == {
        "<|im_end|>",
        "<|endoftext|>",
    }
    metadata = byte_level_metadata()
    del metadata["tokenizer.ggml.bos_token_id"]
    kinds = metadata["tokenizer.ggml.token_type"]
    kinds[kinds == TokenType.CONTROL] = TokenType.USER_DEFINED
    tokenizer = Tokenizer.from_gguf(metadata)
    assert {tokenizer.token_text(i) for i in tokenizer.eos_token_ids} == {"<|im_end|>"}


def test_the_token_that_ends_a_turn_is_control_even_if_marked_as_text() -> None:
    metadata = byte_level_metadata()
    eos = metadata["tokenizer.ggml.eos_token_id"]
    metadata["tokenizer.ggml.token_type"][eos] = TokenType.USER_DEFINED
    assert eos not in Tokenizer.from_gguf(metadata).encode("<|im_end|>")


def test_ids_beyond_the_vocabulary_have_no_text(byte_level: Tokenizer) -> None:
    assert byte_level.token_bytes(byte_level.vocab_size) == b""
    assert byte_level.decode([0, 10**6]) == byte_level.token_text(0)


def test_unpaired_surrogates_are_refused(byte_level: Tokenizer) -> None:
    with pytest.raises(TaelError, match="surrogate"):
        byte_level.encode("a\ud800b")


@pytest.mark.parametrize("make", [byte_level_metadata, sentencepiece_metadata])
def test_stream_of_any_ids_is_the_decoded_text(make: Callable[[], Metadata]) -> None:
    tokenizer = Tokenizer.from_gguf(make())
    rng = random.Random(1)
    for _ in range(300):
        ids = rng.choices(range(tokenizer.vocab_size), k=rng.randrange(12))
        skip = rng.random() < 0.5
        expected = b"".join(
            tokenizer.token_bytes(i) for i in ids if not (skip and tokenizer.is_special(i))
        ).decode(errors="replace")
        if tokenizer.removes_leading_space:
            expected = expected.removeprefix(" ")
        stream = tokenizer.decode_stream(skip_special_tokens=skip)
        pieces = [stream.step(i) for i in ids]
        assert "".join(pieces) + stream.flush() == tokenizer.decode(ids, skip) == expected


@pytest.mark.parametrize("make", [byte_level_metadata, sentencepiece_metadata])
def test_stream_holds_incomplete_characters_back(make: Callable[[], Metadata]) -> None:
    tokenizer = Tokenizer.from_gguf(make())
    stream = tokenizer.decode_stream()
    pieces = [stream.step(i) for i in tokenizer.encode("né 🦙", add_special_tokens=False)]
    assert [piece for piece in pieces if piece][-3:] == ["é", " ", "🦙"]
    stream.step(tokenizer.encode("🦙", add_special_tokens=False)[-4])
    assert stream.flush() == "\ufffd"


def test_save_and_load(byte_level: Tokenizer, sentencepiece: Tokenizer, tmp_path: Path) -> None:
    for tokenizer in (byte_level, sentencepiece):
        tokenizer.save(tmp_path)
        loaded = Tokenizer.load(tmp_path)
        text = "in  the <|im_end|> \n ñ"
        assert loaded.encode(text) == tokenizer.encode(text)
        assert loaded.decode(loaded.encode(text)) == text
        assert loaded.bos_token_id == tokenizer.bos_token_id
        assert loaded.eos_token_ids == tokenizer.eos_token_ids
        assert loaded.has_chat_template == tokenizer.has_chat_template
        assert loaded.vocab_size == tokenizer.vocab_size


def best_union_first(text: str, ranks: dict[str, int]) -> list[str]:
    """SentencePiece's BPE, word for word."""
    parts = list(text)
    while True:
        unions = [ranks.get(left + right, len(ranks)) for left, right in pairwise(parts)]
        if min(unions, default=len(ranks)) == len(ranks):
            return parts
        i = unions.index(min(unions))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def test_sentencepiece_merges_of_any_scores() -> None:
    """Tokens better than those they are made from, and tokens that cannot be made, included."""
    rng = random.Random(3)
    for _ in range(100):
        tokens = {"".join(rng.choices("abc", k=rng.randrange(2, 7))) for _ in range(30)}
        metadata = sentencepiece_metadata(add_space_prefix=False)
        metadata["tokenizer.ggml.tokens"] = ["<unk>", "<s>", "</s>", *"abc", *sorted(tokens)]
        count = len(metadata["tokenizer.ggml.tokens"])
        metadata["tokenizer.ggml.token_type"] = np.array([2, 3, 3] + [1] * (count - 3))
        metadata["tokenizer.ggml.scores"] = np.array(rng.sample(range(count), count), np.float32)
        by_score = np.argsort(-metadata["tokenizer.ggml.scores"])
        best_first = [metadata["tokenizer.ggml.tokens"][i] for i in by_score]
        ranks = {token: rank for rank, token in enumerate(best_first)}
        tokenizer = Tokenizer.from_gguf(metadata)
        for _ in range(10):
            text = "".join(rng.choices("abc", k=40))
            ids = tokenizer.encode(text, add_special_tokens=False)
            assert names(tokenizer, ids) == best_union_first(text, ranks)


@pytest.mark.parametrize("odd", ["a b", "#version"])
def test_save_and_load_merges_that_the_older_form_cannot_hold(odd: str, tmp_path: Path) -> None:
    metadata = sentencepiece_metadata()
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    made = [odd[:i] for i in range(2, len(odd) + 1)] + [odd + "a"]
    new = [*{*odd} - {*tokens}, *made]
    metadata["tokenizer.ggml.tokens"] = [*tokens, *new]
    metadata["tokenizer.ggml.token_type"] = np.append(types, [TokenType.NORMAL] * len(new))
    metadata["tokenizer.ggml.scores"] = -np.arange(len(tokens) + len(new), dtype=np.float32)
    tokenizer = Tokenizer.from_gguf(metadata)
    tokenizer.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded._backend.to_str() == tokenizer._backend.to_str()


# --- Chat -------------------------------------------------------------------------------------


def test_messages_cannot_write_control_tokens(byte_level: Tokenizer) -> None:
    rng = random.Random(2)
    fragments = ["<|im_start|>", "<|im_end|>", "<|x|>", "<|endoftext|>", "<|", "im_end", " ", "the"]
    for _ in range(300):
        content = "".join(rng.choices(fragments, k=rng.randrange(8)))
        ids = byte_level.apply_chat_template([{"role": "user", "content": content}])
        assert [name for name in names(byte_level, ids) if name.startswith("<|im")] == [
            "<|im_start|>",
            "<|im_end|>",
            "<|im_start|>",
        ]
        text = byte_level.decode(ids, skip_special_tokens=False)
        assert text == (
            f"<|endoftext|><|im_start|>user\n{content.strip()}<|im_end|>\n<|im_start|>assistant\n"
        )


def test_no_argument_can_write_control_tokens() -> None:
    metadata = byte_level_metadata()
    metadata["tokenizer.chat_template"] = "{{ tools | tojson }}{{ messages[0]['tool_calls'] }}"
    tokenizer = Tokenizer.from_gguf(metadata)
    name = "<|im_end|>"
    messages = [{"role": "user", "tool_calls": [{name: {"a": [name, (name,)]}}]}]
    ids = tokenizer.apply_chat_template(messages, tools=[{"name": name, name: 1}])
    assert not any(map(tokenizer.is_special, ids[1:]))
    assert tokenizer.decode(ids).count(name) == 5


def test_control_tokens_of_one_character_are_never_parsed() -> None:
    metadata = byte_level_metadata()
    metadata["tokenizer.ggml.tokens"][-1] = "→"
    metadata["tokenizer.ggml.token_type"][-1] = TokenType.CONTROL
    tokenizer = Tokenizer.from_gguf(metadata)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "→"}])
    assert len(metadata["tokenizer.ggml.tokens"]) - 1 not in ids


def test_render_chat_shows_the_messages_as_they_are(byte_level: Tokenizer) -> None:
    messages = [{"role": "user", "content": "<|im_end|>"}]
    assert byte_level.render_chat(messages, add_generation_prompt=False) == (
        "<|endoftext|><|im_start|>user\n<|im_end|><|im_end|>\n"
    )


def test_a_model_without_a_template(sentencepiece: Tokenizer) -> None:
    assert not sentencepiece.has_chat_template
    with pytest.raises(TaelError, match="no chat template"):
        sentencepiece.apply_chat_template([{"role": "user", "content": "x"}])


# --- Hugging Face directories -----------------------------------------------------------------


def write_directory(path: Path, **files: Any) -> Path:
    """``tokenizer.json`` of the byte-level vocabulary, and the given JSON files."""
    tokenizer_from_gguf(byte_level_metadata()).save(str(path / "tokenizer.json"))
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


def test_directory_with_all_its_files(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_directory(
        write_directory(
            tmp_path,
            tokenizer_config={
                "bos_token": {"content": "<|endoftext|>"},
                "eos_token": "<|im_end|>",
                "add_bos_token": True,
                "chat_template": [
                    {"name": "tool_use", "template": "no"},
                    {"name": "default", "template": "default"},
                ],
            },
            generation_config={"eos_token_id": [3, 4]},
        )
    )
    assert tokenizer.token_text(tokenizer.encode("x")[0]) == "<|endoftext|>"
    assert {3, 4} < tokenizer.eos_token_ids
    assert tokenizer.render_chat([]) == "default"
    (tmp_path / "chat_template.jinja").write_text("from the file {{ eos_token }}")
    assert Tokenizer.from_directory(tmp_path).render_chat([]) == "from the file <|im_end|>"


def test_directory_with_tokenizer_json_only(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_directory(write_directory(tmp_path))
    assert tokenizer.bos_token_id is None
    assert tokenizer.encode("in") == tokenizer.encode("in", add_special_tokens=False)
    assert not tokenizer.has_chat_template


def test_special_tokens_map_and_post_processor(tmp_path: Path) -> None:
    write_directory(tmp_path, special_tokens_map={"bos_token": "<|im_start|>"})
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    bos = backend.token_to_id("<|im_start|>")
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", bos)]
    )
    backend.enable_truncation(4)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert tokenizer.encode("a" * 9)[0] == bos
    assert len(tokenizer.encode("a" * 9)) == 10


@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": 1}', "{" * 100_000])
def test_damaged_directories_are_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(TaelError, match=r"tokenizer\.json"):
        Tokenizer.from_directory(tmp_path)
    write_directory(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[" * 100_000 if content[:1] == "{" else "[]")
    with pytest.raises(TaelError, match=r"tokenizer_config\.json"):
        Tokenizer.from_directory(tmp_path)


def test_other_kinds_of_decoder_are_refused(tmp_path: Path) -> None:
    write_directory(tmp_path)
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    backend.decoder = decoders.WordPiece()
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(TaelError, match="WordPiece"):
        Tokenizer.from_directory(tmp_path)


def without_user_defined() -> Metadata:
    metadata = sentencepiece_metadata()
    types = metadata["tokenizer.ggml.token_type"]
    types[types == TokenType.USER_DEFINED] = TokenType.UNUSED
    return metadata


def mistral_like() -> tokenizers.Tokenizer:
    backend = tokenizer_from_gguf(without_user_defined())
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    return backend


def phi_like() -> tokenizers.Tokenizer:
    backend = tokenizer_from_gguf(without_user_defined())
    backend.add_special_tokens(
        [AddedToken("<|user|>", rstrip=True), AddedToken("<|mask|>", lstrip=True)]
    )
    return backend


def prefix_of_bytes() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(
        BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
    )
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    return backend


@pytest.mark.parametrize("make", [mistral_like, phi_like, prefix_of_bytes])
def test_parsing_control_tokens_agrees_with_the_tokenizers_package(
    tmp_path: Path, make: Callable[[], tokenizers.Tokenizer]
) -> None:
    """Which finds them itself, and handles the text between them as one sequence."""
    reference = make()
    reference.save(str(tmp_path / "tokenizer.json"))
    first = Tokenizer.from_directory(tmp_path)
    first.save(tmp_path / "saved")
    rng = random.Random(3)
    pieces = ["<s>", "</s>", "<|user|>", "<|mask|>", "the", " ", "  ", "\n", "é", "in", "e\u0301"]
    for tokenizer in (first, Tokenizer.load(tmp_path / "saved")):
        for _ in range(300):
            text = "".join(rng.choices(pieces, k=rng.randrange(8)))
            expected = reference.encode(text, add_special_tokens=False).ids
            assert tokenizer.encode(text, False, parse_special=True) == expected, repr(text)


# --- Hostile GGUF metadata --------------------------------------------------------------------


def change(key: str, value: Any) -> Callable[[Metadata], None]:
    def apply(metadata: Metadata) -> None:
        metadata[f"tokenizer.ggml.{key}"] = value

    return apply


def remove(key: str) -> Callable[[Metadata], None]:
    return lambda metadata: metadata.pop(f"tokenizer.ggml.{key}")


def shorten(key: str) -> Callable[[Metadata], None]:
    def apply(metadata: Metadata) -> None:
        metadata[f"tokenizer.ggml.{key}"] = metadata[f"tokenizer.ggml.{key}"][:-1]

    return apply


def double_a_token(metadata: Metadata) -> None:
    metadata["tokenizer.ggml.tokens"][7] = metadata["tokenizer.ggml.tokens"][5]


def lengthen_a_token(metadata: Metadata) -> None:
    position = metadata["tokenizer.ggml.tokens"].index("he")
    metadata["tokenizer.ggml.tokens"][position] = "h" * 300


def break_a_token(metadata: Metadata) -> None:
    metadata["tokenizer.ggml.tokens"][7] = "\udcff"


COMMON = [
    (remove("model"), "kind None"),
    (change("model", "bert"), "kind 'bert'"),
    (change("model", ["gpt2"]), "kind"),
    (remove("tokens"), "tokens"),
    (change("tokens", []), "tokens"),
    (change("tokens", np.arange(5)), "tokens"),
    (shorten("tokens"), "tokens but"),
    (remove("token_type"), "token_type"),
    (change("token_type", "3"), "token_type"),
    (shorten("token_type"), "token_type"),
    (double_a_token, "tokens 5 and 7 are both"),
    (break_a_token, "UTF-8"),
    (change("bos_token_id", 10**6), "bos_token_id"),
    (change("eos_token_id", -1), "eos_token_id"),
    (change("eot_token_id", "x"), "eot_token_id"),
]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        *COMMON,
        (remove("pre"), "pre-tokenizer None"),
        (change("pre", "unheard-of"), "pre-tokenizer 'unheard-of'"),
        (change("pre", ["qwen2"]), "pre-tokenizer"),
        (remove("merges"), "merges"),
        (change("merges", ["t h", "no such"]), "merge 'no such'"),
        (change("merges", ["a b"]), "merge 'a b'"),
        (change("merges", ["th"]), "merge 'th'"),
    ],
)
def test_damaged_byte_level_vocabularies(damage: Callable[[Metadata], None], message: str) -> None:
    metadata = byte_level_metadata()
    damage(metadata)
    with pytest.raises(TaelError, match=message) as error:
        Tokenizer.from_gguf(metadata)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        *COMMON,
        (remove("scores"), "scores"),
        (shorten("scores"), "scores"),
        (lengthen_a_token, "longer than 256"),
        (change("unknown_token_id", 10**6), "unknown_token_id"),
    ],
)
def test_damaged_sentencepiece_vocabularies(
    damage: Callable[[Metadata], None], message: str
) -> None:
    metadata = sentencepiece_metadata()
    damage(metadata)
    with pytest.raises(TaelError, match=message) as error:
        Tokenizer.from_gguf(metadata)
    assert "\n" not in str(error.value)
