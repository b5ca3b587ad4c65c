"""Lines of what a length or a batch costs, with what the machine allows drawn in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from tael.errors import TaelError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Line: TypeAlias = Sequence[tuple[float, float]]
"""Points (x, y)."""


def plot(
    path: Path,
    lines: Mapping[str, Line],
    limits: Mapping[str, Line],
    *,
    title: str,
    x_label: str,
    y_label: str = "tokens per second",
    log_x: bool = False,
) -> None:
    """Write an image in the format of its suffix. The limits are for all lines together, or one
    for each. Raises TaelError without matplotlib."""
    figure = new_figure(6, 3.6)
    axes = figure.add_subplot()
    for name, line in lines.items():
        axes.plot(*zip(*line, strict=True), marker="o", markersize=4, label=name)
    for i, (name, line) in enumerate(limits.items()):
        color = f"C{i}" if len(limits) > 1 else "0.5"
        axes.plot(*zip(*line, strict=True), linestyle="--", color=color, label=name)
    if log_x:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.set_ylim(bottom=0)
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, path)


def new_figure(width: float, height: float) -> Figure:
    """Of so many inches. Raises TaelError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise TaelError("a plot needs matplotlib; run: pip install 'tael[plot]'.") from None
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Figure, path: Path) -> None:
    """In the format of the suffix. Raises TaelError if that cannot be."""
    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:
        raise TaelError(f"cannot write the plot to {path}: {error}; give another name.") from None
