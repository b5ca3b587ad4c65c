"""Where Tael keeps its files: the XDG cache, and the data directory for what cannot be remade."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """``$XDG_CACHE_HOME/tael``, or ``~/.cache/tael``. Everything in it can be made again."""
    return _base("XDG_CACHE_HOME", ".cache") / "tael"


def data_dir() -> Path:
    """``$XDG_DATA_HOME/tael``, or ``~/.local/share/tael``: the ledger and the keys."""
    return _base("XDG_DATA_HOME", ".local/share") / "tael"


def models_dir() -> Path:
    """Pulled models."""
    return cache_dir() / "models"


def prepared_dir() -> Path:
    """Weights repacked for the kernels: one folder per model, holding ``source.json``."""
    return cache_dir() / "prepared"


def keys_file() -> Path:
    """Who may call the server."""
    return data_dir() / "keys.sqlite"


def ledger_file() -> Path:
    """What the server has served."""
    return data_dir() / "ledger.sqlite"


def _base(variable: str, default: str) -> Path:
    # The XDG base directory specification ignores relative paths.
    base = Path(os.environ.get(variable, ""))
    return base if base.is_absolute() else Path.home() / default
