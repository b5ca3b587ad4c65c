"""Modes with names: settings whose loss was measured on a model before they are offered.

``tael calibrate`` measures a model and leaves what it found in the data directory, one file a
model. Files of models that were measured for a release are in ``tael/calibrations``.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tael.errors import TaelError
from tael.loader.paths import data_dir

logger = logging.getLogger(__name__)

MARGINS = {"balanced": 0.02, "frugal": 0.05}
"""Of the modes besides "exact": the score that is lost against it is less, at 95%."""

SHIPPED = Path(__file__).parents[1] / "calibrations"

VERSION = 2
"""Of the calibrations that are valid: the next one when what a candidate reads has changed."""

Setting = str | int | tuple[int, ...] | None


@dataclass(frozen=True, slots=True)
class Measured:
    """Settings of an engine and what they lose."""

    settings: dict[str, Setting]
    """Fields of ``EngineConfig``."""
    lower_bound: float
    """Of the score's change against the exact model, one-sided at 95%, at the worst length and
    over the tasks that the exact model can do there."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """What was measured of one model."""

    version: int
    """VERSION."""
    model: str
    digest: str
    """Of the weights."""
    lengths: tuple[int, ...]
    tasks: tuple[str, ...]
    num_questions: int
    """At the length with the fewest."""
    candidates: tuple[Measured, ...]
    """Each gives up more than the one before."""

    def mode(self, name: str) -> Measured:
        """The last candidate before the first that is outside of the margin of a mode; the exact
        settings if there is none. Were those behind it looked at as well, one of them would be
        within by chance more often than in one of 20 cases."""
        chosen = Measured({}, 0.0)
        for candidate in self.candidates:
            if candidate.lower_bound <= -MARGINS[name]:
                break
            chosen = candidate
        return chosen


def mode_settings(name: str, digest: str, context: int) -> Mapping[str, Setting]:
    """What a mode changes in the settings of the model with these weights. Says so in the log if
    ``context`` tokens are more than were measured. Raises TaelError if none were."""
    calibration = find_calibration(digest)
    if calibration is None:
        raise TaelError(
            f"what --mode {name} would lose has not been measured for this model; run "
            "tael calibrate with it, or leave the mode out."
        )
    settings, measured = calibration.mode(name).settings, max(calibration.lengths)
    if settings and context > measured:
        logger.warning(
            "--mode %s was measured up to %s tokens; behind more of them it may lose more.",
            name,
            f"{measured:,}",
        )
    return settings


def find_calibration(digest: str) -> Calibration | None:
    """The user's own, else that of the release."""
    for folder in (_own_folder(), SHIPPED):
        path = folder / f"{digest}.json"
        if path.exists():
            calibration = read_calibration(path)
            if calibration.digest != digest:
                raise _damaged(path)
            return calibration
    return None


def read_calibration(path: Path) -> Calibration:
    """Raises TaelError if the file is not one."""
    try:
        fields = json.loads(path.read_text())
        fields["candidates"] = tuple(map(_read_measured, fields["candidates"]))
        fields["lengths"], fields["tasks"] = tuple(fields["lengths"]), tuple(fields["tasks"])
        calibration = Calibration(**fields)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise _damaged(path) from error
    if calibration.version != VERSION:
        raise TaelError(f"{path} is of another version of Tael; run tael calibrate again.")
    return calibration


def _read_measured(fields: dict[str, Any]) -> Measured:
    chosen = dict(fields["settings"])
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in chosen.items()}
    return Measured(settings, fields["lower_bound"])


def save_calibration(calibration: Calibration) -> Path:
    """As the user's own. Returns where. Raises TaelError if it cannot be written."""
    path = _own_folder() / f"{calibration.digest}.json"
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(asdict(calibration), indent=2) + "\n")
        part.replace(path)
    except OSError as error:
        raise TaelError(f"cannot write {path}: {error.strerror}; make room for it.") from error
    return path


def _damaged(path: Path) -> TaelError:
    return TaelError(f"{path} is damaged; remove it and run tael calibrate again.")


def _own_folder() -> Path:
    return data_dir() / "calibrations"
