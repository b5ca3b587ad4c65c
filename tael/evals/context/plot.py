"""Quality against what it costs: KV bytes on the left, time per token on the right."""

from __future__ import annotations

from pathlib import Path

from tael.errors import TaelError
from tael.evals.context.report import scores
from tael.evals.context.statistics import accuracy
from tael.evals.context.suite import Result
from tael.evals.plot import new_figure, save_figure


def plot_quality(path: Path, result: Result, title: str) -> None:
    """Write an image in the format of its suffix: one line for each length, one point for each
    mode; up and to the left is better. Raises TaelError without matplotlib or counted tasks."""
    if not result.counted:
        raise TaelError("there is nothing to plot: no task counts; measure a more capable model.")
    figure = new_figure(10, 4.2)
    figure.suptitle(title)
    left, right = figure.subplots(1, 2, sharey=True)
    for i, length in enumerate(sorted(result.samples)):
        points = []
        for (mode, cell_length), cell in result.cells.items():
            if cell_length == length and cell.cost is not None:
                estimate = accuracy(scores(result, mode, length))
                costs = (cell.cost.kv_bytes / 2**20, 1000 * cell.cost.s_per_token)
                points.append((mode, estimate, costs))
        for axes, which in ((left, 0), (right, 1)):
            points.sort(key=lambda point: point[2][which])
            x = [costs[which] for _, _, costs in points]
            y = [100 * estimate.mean for _, estimate, _ in points]
            errors = [
                [100 * max(0.0, e.mean - e.low) for _, e, _ in points],
                [100 * max(0.0, e.high - e.mean) for _, e, _ in points],
            ]
            style = {"marker": "o", "markersize": 4, "capsize": 2, "color": f"C{i}"}
            axes.errorbar(x, y, yerr=errors, label=f"{length:,} tokens", **style)
            for mode, estimate, costs in points:
                axes.annotate(
                    mode,
                    (costs[which], 100 * estimate.mean),
                    xytext=(4, 4),
                    textcoords="offset points",
                    fontsize=7,
                )
    left.set_xscale("log", base=2)
    left.xaxis.set_major_formatter("{x:g}")
    left.set_xlabel("MiB of KV blocks of one request")
    left.set_ylabel("score, %")
    right.set_xlabel("ms per token")
    right.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
    save_figure(figure, path)
