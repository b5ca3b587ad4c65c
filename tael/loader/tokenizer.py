"""Text to token ids and back.

Control tokens (``<|im_end|>``, ``<bos>``) are commands to the model, so user text must not
produce them. The ``tokenizers`` object never does: it is set to read them as text. Only
``parse_special`` and chat templates turn their names into ids, in this file.
"""

# Tokens and patterns contain letters that look like others.
# ruff: noqa: RUF001

from __future__ import annotations

import codecs
import json
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import pre_tokenizers

from tael.errors import TaelError
from tael.loader.chat_template import ChatTemplate
from tael.loader.gguf_vocab import tokenizer_from_gguf
from tael.loader.tokenizer_config import (
    TokenizerConfig,
    config_from_directory,
    config_from_gguf,
)

# Names of control tokens that end an answer, for files that do not list all of theirs (the list
# of llama.cpp, without its fill-in-the-middle tokens).
_END_OF_TURN = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<end_of_utterance>",
    "<turn|>",
    "<EOT>",
    "[EOT]",
    "<｜end▁of▁sentence｜>",
)

_PIECE_CHARS = 1 << 16
"""Of a long text, so much is encoded at once: what ``tokenizers`` keeps meanwhile takes 600 bytes a
token."""
_WORD_END = re.compile(r"[A-Za-z](?= [A-Za-z])")
_TOKEN_OF_TWO_WORDS = re.compile("[A-Za-z][ Ġ\u2581]+[A-Za-z]?")

_SPACES = re.compile(r"\s+")
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Tokenizer:
    """A model's tokenizer, whatever file it came from. Thread-safe.

    ``bos_token_id`` may be None. ``eos_token_ids`` are all the tokens that end an answer.
    """

    def __init__(self, backend: tokenizers.Tokenizer, config: TokenizerConfig) -> None:
        backend.encode_special_tokens = True
        backend.no_truncation()  # some tokenizer.json files carry the limits of their training
        backend.no_padding()
        self._backend = backend
        self._config = config
        added = backend.get_added_tokens_decoder()
        special = {i: token for i, token in added.items() if token.special}
        self._special_ids = frozenset(special)
        # By name. One character cannot be broken up, so it is never parsed.
        self._special = {
            token.content: (i, token) for i, token in special.items() if len(token.content) > 1
        }
        self._added = {i: token.content for i, token in added.items()}
        self._decoder = _TokenDecoder(backend)
        self.vocab_size: int = backend.get_vocab_size()
        self.bos_token_id = config.bos_token_id
        self.eos_token_ids = frozenset(config.eos_token_ids) | self._end_of_turn_ids()

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """From GGUF metadata. Raises TaelError for a vocabulary Tael cannot read."""
        backend = tokenizer_from_gguf(metadata)
        return cls(backend, config_from_gguf(metadata))

    @classmethod
    def from_directory(cls, directory: Path) -> Tokenizer:
        """From a Hugging Face model directory with a ``tokenizer.json``.

        Raises TaelError when that file is absent, damaged or of a kind Tael does not read.
        """
        backend = _read_backend(directory / "tokenizer.json")
        config = config_from_directory(directory, backend)
        return cls(*_own_space_prefix(backend, config))

    def save(self, directory: Path) -> None:
        """Write ``tokenizer.json`` and ``tokenizer_meta.json``, for ``load``."""
        directory.mkdir(parents=True, exist_ok=True)
        # Not its save(): that raises a bare Exception when the disk is full.
        text = _quick_to_read(self._backend.to_str())
        (directory / "tokenizer.json").write_text(text, encoding="utf-8")
        (directory / "tokenizer_meta.json").write_text(self._config.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, directory: Path) -> Tokenizer:
        """Read what ``save`` wrote. Raises TaelError if it is not there or damaged."""
        path = directory / "tokenizer_meta.json"
        try:
            config = TokenizerConfig.from_json(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise TaelError(f"cannot read {path}: {error}; remove {directory}.") from error
        return cls(_read_backend(directory / "tokenizer.json"), config)

    def encode(
        self, text: str, add_special_tokens: bool = True, parse_special: bool = False
    ) -> list[int]:
        """Token ids of ``text``, after BOS if the model wants it and ``add_special_tokens``.

        The names of control tokens in ``text`` are ordinary text, unless ``parse_special``; then
        a leading BOS is not doubled. Raises TaelError for text with unpaired surrogates.
        """
        ids = self._encode_parsed(text) if parse_special else self._encode_text(text)
        return self._with_bos(ids) if add_special_tokens else ids

    def decode(self, token_ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of ``token_ids``. Bytes that are not UTF-8 become U+FFFD."""
        stream = self.decode_stream(skip_special_tokens)
        return "".join([stream.step(token_id) for token_id in token_ids]) + stream.flush()

    def decode_stream(self, skip_special_tokens: bool = True) -> DecodeStream:
        return DecodeStream(self, skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for, which need not be whole characters. Empty for an id
        beyond the vocabulary: the output layer of some models is padded with such ids."""
        if token_id in self._added:
            return self._decoder.added_token(self._added[token_id])
        token = self._backend.id_to_token(token_id)
        return b"" if token is None else self._decoder.token(token)

    def token_text(self, token_id: int) -> str:
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def is_special(self, token_id: int) -> bool:
        """Whether the token is a control token, which ``decode`` leaves out."""
        return token_id in self._special_ids

    @property
    def removes_leading_space(self) -> bool:
        """Whether ``decode`` drops one leading space, the one that ``encode`` put there."""
        return self._decoder.removes_leading_space

    @property
    def has_chat_template(self) -> bool:
        return self._config.chat_template is not None

    @property
    def chat_template_has_tools(self) -> bool:
        """Whether the model's template shows tools to the model."""
        return re.search(r"\btools\b", self._config.chat_template or "") is not None

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        **arguments: Any,
    ) -> list[int]:
        """Token ids of a conversation, as the model's own template writes it.

        ``messages`` follow the OpenAI form. ``arguments`` are those the template may be given
        (``chat_template.ARGUMENTS``: tools, enable_thinking and the like). BOS is added if the
        model wants it and the template did not write it.

        Control tokens come from the template alone. Wherever a message or an argument spells
        the name of one, a marker is put inside the name before the template runs, and taken out
        of the plain text between the control tokens afterwards. Limits: a template that itself
        cuts up, pads or changes the case of a message may see the marker, or write a control
        token's name that no message contained; roles choose control tokens in many templates, so
        the caller must restrict them.

        Raises TaelError if there is no template, or if it fails on or refuses the messages.
        """
        marker = _new_marker()
        text = self._render(messages, add_generation_prompt, arguments, marker)
        return self._with_bos(self._encode_parsed(text, marker))

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        **arguments: Any,
    ) -> str:
        """The text of ``apply_chat_template``, to look at. Encoding it would not keep the control
        tokens of the template apart from their names in messages."""
        marker = _new_marker()
        return self._render(messages, add_generation_prompt, arguments, marker).replace(marker, "")

    def _render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool,
        arguments: Mapping[str, Any],
        marker: str,
    ) -> str:
        return self._chat_template.render(
            self._break_special(list(messages), marker),
            self._break_special(dict(arguments), marker),
            add_generation_prompt=add_generation_prompt,
            bos_token=self._name(self.bos_token_id),
            eos_token=self._name(next(iter(self._config.eos_token_ids), None)),
        )

    def _end_of_turn_ids(self) -> frozenset[int]:
        ids = {name: self._special[name][0] for name in _END_OF_TURN if name in self._special}
        if "<|return|>" in ids:  # gpt-oss: <|end|> only ends a section of the answer
            ids.pop("<|end|>", None)
        return frozenset(ids.values())

    @cached_property
    def _chat_template(self) -> ChatTemplate:
        if self._config.chat_template is None:
            raise TaelError("this model has no chat template; give it a plain prompt instead.")
        return ChatTemplate(self._config.chat_template)

    def _name(self, token_id: int | None) -> str:
        return "" if token_id is None else self._backend.id_to_token(token_id) or ""

    def _with_bos(self, ids: list[int]) -> list[int]:
        if not self._config.add_bos or self.bos_token_id is None or ids[:1] == [self.bos_token_id]:
            return ids
        return [self.bos_token_id, *ids]

    def _encode_text(self, text: str, at_start: bool = True) -> list[int]:
        if at_start and self._config.space_prefix and text and text[0] not in " \u2581":
            text = " " + text
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise TaelError("the text has an unpaired surrogate; send valid Unicode.") from error
        ids: list[int] = []
        for piece in self._pieces(text):
            ids += self._backend.encode(piece, add_special_tokens=False).ids
        return ids

    def _pieces(self, text: str) -> Iterator[str]:
        """Parts of the text whose ids are those of the text: it is cut only behind words, and only
        if no token reaches from one word into what follows it."""
        start = 0
        while len(text) - start > 2 * _PIECE_CHARS and self._words_are_apart:
            end = _WORD_END.search(text, start + _PIECE_CHARS)
            if end is None:
                break
            yield text[start : end.end()]
            start = end.end()
        yield text[start:]

    @cached_property
    def _words_are_apart(self) -> bool:
        return not any(map(_TOKEN_OF_TWO_WORDS.search, self._backend.get_vocab()))

    def _encode_parsed(self, text: str, marker: str | None = None) -> list[int]:
        """Ids of text in which the names of control tokens mean the tokens. ``marker`` is removed
        from the text between them."""
        ids: list[int] = []
        for position, piece in self._split_special(text):
            if isinstance(piece, int):
                ids.append(piece)
            else:
                plain = piece.replace(marker, "") if marker else piece
                ids += self._encode_text(plain, at_start=position == 0)
        return ids

    def _split_special(self, text: str) -> Iterator[tuple[int, str | int]]:
        """Position and text of the plain pieces, position and id of the control tokens."""
        start = 0
        for match in self._special_starts.finditer(text):
            position = match.start()
            name = self._special_at(text, position) if position >= start else None
            if name is None:
                continue
            token_id, token = self._special[name]
            plain = text[start:position]
            if plain := plain.rstrip() if token.lstrip else plain:
                yield start, plain
            yield position, token_id
            start = position + len(name)
            if token.rstrip and (spaces := _SPACES.match(text, start)):
                start = spaces.end()
        if start < len(text):
            yield start, text[start:]

    def _special_at(self, text: str, position: int) -> str | None:
        """The longest name of a control token that begins at ``position``."""
        for length in self._special_lengths:
            if (name := text[position : position + length]) in self._special:
                return name
        return None

    def _break_special(self, value: Any, marker: str) -> Any:
        """``value`` with ``marker`` after the first character of each control token's name."""
        if isinstance(value, str):
            return self._special_starts.sub(
                lambda match: (
                    match[0] + marker if self._special_at(value, match.start()) else match[0]
                ),
                value,
            )
        if isinstance(value, Mapping):
            return {
                self._break_special(key, marker): self._break_special(item, marker)
                for key, item in value.items()
            }
        if isinstance(value, (list, tuple)):
            return [self._break_special(item, marker) for item in value]
        return value

    @cached_property
    def _special_lengths(self) -> list[int]:
        return sorted({len(name) for name in self._special}, reverse=True)

    @cached_property
    def _special_starts(self) -> re.Pattern[str]:
        """Finds the characters that begin a control token's name."""
        starts = sorted({name[0] for name in self._special})
        return re.compile("|".join(map(re.escape, starts)) or r"(?!)")


class DecodeStream:
    """Text of tokens as they come. The pieces and ``flush`` together are ``Tokenizer.decode``."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._remove_space = tokenizer.removes_leading_space

    def step(self, token_id: int) -> str:
        """The text that became complete with this token. A character is held back until its last
        byte has come."""
        if self._skip_special_tokens and self._tokenizer.is_special(token_id):
            return ""
        return self._emit(self._utf8.decode(self._tokenizer.token_bytes(token_id)))

    def flush(self) -> str:
        """What is held back at the end, as U+FFFD."""
        return self._emit(self._utf8.decode(b"", final=True))

    def _emit(self, text: str) -> str:
        if text and self._remove_space:
            self._remove_space = False
            return text.removeprefix(" ")
        return text


class _TokenDecoder:
    """Tokens to bytes, for the two families of decoder that language models have.

    Not ``tokenizers.Tokenizer.decode``: that works on whole sequences only, and replaces a whole
    run of byte tokens by U+FFFD when one of them is out of place.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        steps: list[dict[str, Any]] = []
        if backend.decoder is not None:
            state = json.loads(backend.decoder.__getstate__())
            steps = state["decoders"] if state["type"] == "Sequence" else [state]
        types = [step["type"] for step in steps]
        self._byte_level = types == ["ByteLevel"]
        sentencepiece = set(types) <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}
        if not types or not (self._byte_level or sentencepiece):
            raise TaelError(
                f"the tokenizer decodes with {types or 'nothing'}, which Tael does not read; "
                "use a model with a byte-level or SentencePiece BPE tokenizer."
            )
        self.removes_leading_space = any(
            step["type"] == "Strip"
            or (step["type"] == "Metaspace" and step["prepend_scheme"] != "never")
            for step in steps
        )
        self._has_byte_tokens = "ByteFallback" in types

    def token(self, token: str) -> bytes:
        if self._byte_level:
            try:
                return bytes(_BYTE_OF_CHARACTER[character] for character in token)
            except KeyError:  # an unused token such as "[PAD 7]", in plain text
                return token.encode()
        if self._has_byte_tokens and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        return token.replace("\u2581", " ").encode()

    def added_token(self, content: str) -> bytes:
        return content.encode() if self._byte_level else self.token(content)


def _gpt2_byte_of_character() -> dict[str, int]:
    """GPT-2 writes each byte of a token as a printable character: itself if it is one in
    Latin-1, else the next of U+0100 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + i): byte for i, byte in enumerate(others)
    }


_BYTE_OF_CHARACTER = _gpt2_byte_of_character()


def _new_marker() -> str:
    """Cannot be guessed by the author of a message; digits survive JSON and changes of case."""
    return f"{secrets.randbits(96):029d}"


def _read_backend(path: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # plain Exception, or a Rust panic, which is not even that
        raise TaelError(f"cannot read {path}: {error}; download the file again.") from error


def _quick_to_read(tokenizer_json: str) -> str:
    """The same with its merges in their older form, "left right" for ["left", "right"]: the
    tokenizers package reads that a fifth faster. Tokens with a space in them cannot be so written,
    nor can a line that looks like the first of a merges file."""
    state = json.loads(tokenizer_json)
    if state["model"]["type"] != "BPE":
        return tokenizer_json
    merges = [" ".join(merge) for merge in state["model"]["merges"]]
    if any(merge.count(" ") != 1 or merge.startswith("#version") for merge in merges):
        return tokenizer_json
    state["model"]["merges"] = merges
    return json.dumps(state, ensure_ascii=False)


def _own_space_prefix(
    backend: tokenizers.Tokenizer, config: TokenizerConfig
) -> tuple[tokenizers.Tokenizer, TokenizerConfig]:
    """Move the "first" scheme of Metaspace from ``backend`` to ``config.space_prefix``.

    It puts a space before the first text of a prompt; the backend is given the texts between the
    control tokens one at a time, and would put one before each.
    """
    pre = backend.pre_tokenizer
    if isinstance(pre, pre_tokenizers.Metaspace) and pre.prepend_scheme == "first":
        pre.prepend_scheme = "never"
        backend.pre_tokenizer = pre
        config = replace(config, space_prefix=True)
    return backend, config
