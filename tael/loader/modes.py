"""Modes with names: settings whose loss was measured on a model before they are offered.

``tael calibrate`` measures a model and leaves what it found in the data directory, one file a
model. Files of models that were measured for a release are in ``tael/calibrations``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from tael.errors import TaelError
from tael.loader.paths import data_dir

MARGINS = {"balanced": 0.02, "frugal": 0.05}
"""Of the modes besides "exact": the score that is lost against it is less, at 95%."""

SHIPPED = Path(__file__).parents[1] / "calibrations"

Setting = str | int | None


@dataclass(frozen=True, slots=True)
class Measured:
    """Settings of an engine and what they lose."""

    settings: dict[str, Setting]
    """Fields of ``EngineConfig``."""
    lower_bound: float
    """Of the score's change against the exact model, one-sided at 95%, at the worst length."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """What was measured of one model."""

    model: str
    digest: str
    """Of the weights."""
    lengths: tuple[int, ...]
    tasks: tuple[str, ...]
    num_questions: int
    """At each length."""
    candidates: tuple[Measured, ...]
    """The most frugal first."""

    def mode(self, name: str) -> Measured:
        """The most frugal candidate within the margin of a mode; the exact settings if there is
        none."""
        for candidate in self.candidates:
            if candidate.lower_bound > -MARGINS[name]:
                return candidate
        return Measured({}, 0.0)


def mode_settings(name: str, digest: str) -> Mapping[str, Setting]:
    """What a mode changes in the settings of the model with these weights. Raises TaelError if it
    has not been measured."""
    calibration = find_calibration(digest)
    if calibration is None:
        raise TaelError(
            f"what --mode {name} would lose has not been measured for this model; run "
            "tael calibrate with it, or leave the mode out."
        )
    return calibration.mode(name).settings


def find_calibration(digest: str) -> Calibration | None:
    """The user's own, else that of the release."""
    for folder in (_own_folder(), SHIPPED):
        path = folder / f"{digest}.json"
        if path.exists():
            return read_calibration(path)
    return None


def read_calibration(path: Path) -> Calibration:
    """Raises TaelError if the file is not one."""
    try:
        fields = json.loads(path.read_text())
        fields["candidates"] = tuple(Measured(**candidate) for candidate in fields["candidates"])
        fields["lengths"], fields["tasks"] = tuple(fields["lengths"]), tuple(fields["tasks"])
        return Calibration(**fields)
    except (ValueError, LookupError, TypeError) as error:
        raise TaelError(f"{path} is damaged; remove it and run tael calibrate again.") from error


def save_calibration(calibration: Calibration) -> Path:
    """As the user's own. Returns where."""
    path = _own_folder() / f"{calibration.digest}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(asdict(calibration), indent=2) + "\n")
    part.replace(path)
    return path


def _own_folder() -> Path:
    return data_dir() / "calibrations"
