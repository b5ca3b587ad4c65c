"""``tael calibrate``: what the modes with names mean for a model, measured here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tael.cli.bench_context import report_options, sample_options, show_cell, write_reports
from tael.cli.common import TransferBar
from tael.errors import TaelError

if TYPE_CHECKING:
    from tael.evals.context.suite import Settings
    from tael.loader.modes import Setting

NUM_FOCUS_QUESTIONS = 8
"""Of a task, which every layer is measured with."""


@click.command("calibrate")
@click.argument("model")
@sample_options(lengths="4K,8K", tasks="those of retrieval", num_samples=2, num_questions=50)
@click.option(
    "--focus",
    is_flag=True,
    help="First look for layers that need to read more of a context than others (--kv-focus): as "
    "many runs as the model has layers.",
)
@report_options
def command(
    model: str,
    focus: bool,
    lengths: tuple[int, ...],
    tasks: str | None,
    samples: int,
    questions: int,
    seed: int,
    threads: int | None,
    json_path: Path | None,
    plot: Path | None,
    keep: Path | None,
) -> None:
    """Measure what KV formats and reading budgets lose on this model, and choose the settings of
    --mode balanced (less than 2 points of the exact score, at 95%) and frugal (5 points)."""
    from tael.config import EngineConfig
    from tael.evals.context.calibrate import calibration, ladder
    from tael.evals.context.report import Slo
    from tael.evals.context.suite import Settings, run_suite
    from tael.evals.context.tasks import TASKS, parse_tasks
    from tael.evals.context.texts import fetch_texts
    from tael.loader.modes import MARGINS, save_calibration
    from tael.loader.prepared import load_prepared
    from tael.loader.sources import resolve

    retrieval = tuple(name for name, task in TASKS.items() if task.kind == "retrieval")
    settings = Settings(
        model=model,
        modes=(),
        lengths=lengths,
        tasks=retrieval if tasks is None else parse_tasks(tasks),
        num_samples=samples,
        num_questions=questions,
        num_texts=0,
        seed=seed,
        config=EngineConfig(num_threads=threads),
    )
    with TransferBar() as progress:
        path = resolve(model, progress=progress)
        fetch_texts(progress)
    # First what the model can do at all, so that no mode is asked for the rest.
    first = replace(settings, lengths=(min(lengths),))
    counted = run_suite(first, show_cell, keep).counted
    if not counted:
        raise TaelError(
            f"{Path(model).name} answers too few of these questions to show what a mode loses."
        )
    layers = _find_focus(path, first, counted) if focus else ()
    result = run_suite(replace(settings, modes=ladder(layers), tasks=counted), show_cell, keep)
    write_reports(result, Slo(), json_path, plot)
    found = calibration(result, load_prepared(path).weights.digest)
    click.echo(
        f"{Path(model).name}: {len(found.tasks)} tasks, {found.num_questions} questions a length, "
        f"up to {max(found.lengths):,} tokens"
    )
    for candidate in found.candidates:
        points = -100 * candidate.lower_bound
        click.echo(f"  {_text(candidate.settings)}: loses at most {points:.1f} points")
    for name in MARGINS:
        click.echo(f"--mode {name}: {_text(found.mode(name).settings)}")
    click.echo(f"written to {save_calibration(found)}")


def _find_focus(path: Path, first: Settings, tasks: Sequence[str]) -> tuple[int, ...]:
    """``first`` is of one length."""
    from tael.evals.context.focus import find_focus
    from tael.evals.context.tasks import make_samples
    from tael.loader.prepared import load_prepared

    tokenizer = load_prepared(path).tokenizer
    [length] = first.lengths
    few = {
        task: make_samples(
            tokenizer,
            task,
            length,
            num_samples=1,
            num_questions=min(first.num_questions, NUM_FOCUS_QUESTIONS),
            seed=first.seed,
        )
        for task in tasks
    }
    config = replace(first.config, max_model_len=length)
    return find_focus(path, config, few, _show_gain)


def _show_gain(name: str, nats: float) -> None:
    click.echo(f"tael: {name}: {nats:+.3f} nats a token", err=True)


def _text(settings: Mapping[str, Setting]) -> str:
    return ", ".join(f"{k.replace('_', ' ')} {_shown(v)}" for k, v in settings.items()) or (
        "as exact"
    )


def _shown(value: Setting) -> str:
    return " and ".join(map(str, value)) if isinstance(value, tuple) else str(value)
