"""A mode: a name, and what it changes in the settings of an engine."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from tael.config import EngineConfig
from tael.errors import TaelError

NOT_A_MODE = {
    "backend",
    "cache_bytes",
    "cache_dir",
    "mode",
    "kv_disk_bytes",
    "kv_disk_dir",
    "memory_bytes",
    "max_model_len",
    "rope_scaling",
    "num_threads",
    "scheduler",
}
"""Settings that the suite makes the same for all modes."""


Value: TypeAlias = str | int | bool | tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Mode:
    name: str
    settings: dict[str, Value] = field(default_factory=dict)
    """Fields of ``EngineConfig``."""

    def config(self, base: EngineConfig) -> EngineConfig:
        return dataclasses.replace(base, **self.settings)  # type: ignore[arg-type]


EXACT = Mode("exact")


def parse_modes(texts: Sequence[str]) -> tuple[Mode, ...]:
    """Each as ``parse_mode`` reads it. Raises TaelError if two have the same name."""
    modes = tuple(map(parse_mode, texts))
    names = [mode.name for mode in modes]
    if twice := {name for name in names if names.count(name) > 1}:
        raise TaelError(f"two modes are called {twice.pop()!r}; give them different names.")
    return modes


def parse_mode(text: str) -> Mode:
    """``NAME=SETTING:VALUE,...``, such as ``frugal=kv_format:q8,kv_budget:2048``. Raises TaelError
    if there is no such setting or the value is not of its kind."""
    name, _, rest = text.partition("=")
    if not name or not rest or name == EXACT.name:
        raise TaelError(f"cannot read the mode {text!r}; write NAME=SETTING:VALUE,...")
    kinds = {f.name: str(f.type) for f in dataclasses.fields(EngineConfig)}
    settings = {}
    for part in rest.split(","):
        setting, _, value = part.partition(":")
        if setting not in kinds or setting in NOT_A_MODE:
            known = ", ".join(sorted(kinds.keys() - NOT_A_MODE))
            raise TaelError(f"a mode has no setting {setting!r}; known are {known}.")
        settings[setting] = _value(setting, value, kinds[setting])
    return Mode(name, settings)


def _value(setting: str, text: str, kind: str) -> Value:
    if kind == "bool" and text in ("on", "off"):
        return text == "on"
    if kind.startswith("int") and text.isdecimal():
        return int(text)
    if kind.startswith("str") and text:
        return text
    if kind.startswith("tuple") and all(part.isdecimal() for part in text.split("+")):
        return tuple(map(int, text.split("+")))
    wanted = {"bool": "on or off", "int": "a number", "tuple": "numbers with + between them"}
    kind = re.split(r"\W", kind)[0]
    raise TaelError(f"{setting}:{text} is no setting of a mode; give {wanted.get(kind, 'a name')}.")
