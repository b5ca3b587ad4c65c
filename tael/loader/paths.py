"""Where Tael keeps its files: the XDG cache."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """``$XDG_CACHE_HOME/tael``, or ``~/.cache/tael``. Everything in it can be made again."""
    # The XDG base directory specification ignores relative paths.
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "tael"


def models_dir() -> Path:
    """Pulled models."""
    return cache_dir() / "models"


def prepared_dir() -> Path:
    """Weights repacked for the kernels: one folder per model, holding ``source.json``."""
    return cache_dir() / "prepared"
