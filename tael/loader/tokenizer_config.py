"""What a model's files say about its tokenizer beyond the vocabulary."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from tael.errors import TaelError
from tael.loader.gguf_vocab import special_token_id
from tael.loader.pre_tokenizers import PRE_TOKENIZERS


@dataclass(frozen=True, slots=True)
class TokenizerConfig:
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    """The ids that the files name; the first is the ``eos_token`` of chat templates."""
    add_bos: bool
    """Prompts begin with the BOS token."""
    chat_template: str | None
    space_prefix: bool = False
    """A prompt begins with a space, whether or not its author wrote one."""

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> TokenizerConfig:
        fields = json.loads(text)
        return cls(**{**fields, "eos_token_ids": tuple(fields["eos_token_ids"])})


def config_from_gguf(metadata: Mapping[str, Any]) -> TokenizerConfig:
    """Raises TaelError for ids outside the vocabulary."""
    bos = special_token_id(metadata, "bos")
    eos = [special_token_id(metadata, name) for name in ("eos", "eot", "eom")]
    if metadata["tokenizer.ggml.model"] == "llama":
        add_bos = True
    else:
        add_bos = PRE_TOKENIZERS[metadata["tokenizer.ggml.pre"]].add_bos
    template = metadata.get("tokenizer.chat_template")
    return TokenizerConfig(
        bos_token_id=bos,
        eos_token_ids=tuple(token_id for token_id in eos if token_id is not None),
        add_bos=bool(metadata.get("tokenizer.ggml.add_bos_token", add_bos)),
        chat_template=template if isinstance(template, str) else None,
    )


def config_from_directory(directory: Path, backend: Tokenizer) -> TokenizerConfig:
    """Reads the files that go with a Hugging Face ``tokenizer.json``. Each of them may be absent.

    Raises TaelError for a file that is not a JSON object.
    """
    config = _read_json(directory / "tokenizer_config.json")
    special = {**_read_json(directory / "special_tokens_map.json"), **config}

    def id_of(name: str) -> int | None:
        token = special.get(name)
        if isinstance(token, Mapping):  # a serialised AddedToken
            token = token.get("content")
        return backend.token_to_id(token) if isinstance(token, str) else None

    generation = _read_json(directory / "generation_config.json")
    eos = generation.get("eos_token_id", _read_json(directory / "config.json").get("eos_token_id"))
    eos_ids = [id_of("eos_token"), *(eos if isinstance(eos, list) else [eos])]
    bos = id_of("bos_token")
    add_bos = config.get("add_bos_token")
    if not isinstance(add_bos, bool):  # then the post-processor of tokenizer.json decides
        add_bos = bos in backend.encode("").ids
    return TokenizerConfig(
        bos_token_id=bos,
        eos_token_ids=tuple(dict.fromkeys(i for i in eos_ids if isinstance(i, int))),
        add_bos=add_bos,
        chat_template=_chat_template(directory, config),
    )


def _chat_template(directory: Path, config: Mapping[str, Any]) -> str | None:
    """``chat_template.jinja``, else the one in the config; of several, the one named default."""
    path = directory / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8", errors="replace")
    template = config.get("chat_template")
    if isinstance(template, list):
        named = [entry for entry in template if isinstance(entry, dict)]
        template = next((t.get("template") for t in named if t.get("name") == "default"), None)
    return template if isinstance(template, str) else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise TaelError(f"cannot read {path}: {error}; download the file again.") from error
    if not isinstance(value, dict):
        raise TaelError(f"{path} does not hold a JSON object; download the file again.")
    return value
