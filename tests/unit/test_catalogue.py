"""The catalogue is data: what it must hold for a pull to succeed."""

from __future__ import annotations

import re

import pytest

from tael.loader import catalogue


def test_default_is_the_first_entry() -> None:
    assert next(iter(catalogue.entries())) == catalogue.DEFAULT_MODEL


@pytest.mark.parametrize("entry", catalogue.entries().values(), ids=lambda entry: entry.name)
def test_entry_is_complete(entry: catalogue.Entry) -> None:
    assert re.fullmatch(r"[a-z0-9.-]+:[a-z0-9.]+", entry.name)
    assert entry.name == entry.name.lower()
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*\.gguf", entry.file)
    assert re.fullmatch(r"[0-9a-f]{64}", entry.sha256)
    assert entry.licence and entry.description and entry.context > 0
    assert sum(part.size for part in entry.parts) == entry.size
    for part in entry.parts:
        assert re.fullmatch(r"[a-z0-9-]+==[0-9.]+", part.requirement)


def test_files_and_names_are_unique() -> None:
    entries = catalogue.entries().values()
    assert len({entry.file for entry in entries}) == len(catalogue.entries()) == len(list(entries))


def test_unknown_name_gets_the_nearest_one() -> None:
    message = str(catalogue.unknown_model("qwen2.5-coder:0.6b"))
    assert 'did you mean "qwen2.5-coder:0.5b"?' in message
    assert all(name in message for name in catalogue.entries())
    assert "did you mean" not in str(catalogue.unknown_model("zzz"))
