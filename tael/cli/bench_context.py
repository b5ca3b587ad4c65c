"""``tael bench context``: up to what length a mode answers well, what it loses, what it costs."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tael.cli.common import F, TransferBar, byte_size, output_file

if TYPE_CHECKING:
    from tael.evals.context.cell import Cell
    from tael.evals.context.report import Slo
    from tael.evals.context.suite import Result


def _lengths(text: str) -> tuple[int, ...]:
    """Of a list such as 1K,4K,32768."""
    try:
        parts = [part.strip().upper() for part in text.split(",")]
        lengths = {int(p[:-1]) * 1024 if p.endswith("K") else int(p) for p in parts}
    except ValueError:
        raise click.BadParameter(f"{text!r} is no list of lengths such as 1K,8K") from None
    if min(lengths) < 512:
        raise click.BadParameter("a context below 512 tokens holds no haystack")
    return tuple(sorted(lengths))


def sample_options(
    *, lengths: str, tasks: str, num_samples: int, num_questions: int
) -> Callable[[F], F]:
    """What is asked, and how often, with these defaults."""
    options = (
        click.option(
            "--lengths",
            default=lengths,
            type=_lengths,
            metavar="N,...",
            show_default=True,
            help="Contexts, in tokens.",
        ),
        click.option("--tasks", metavar="NAME,...", help=f"Only these.  [default: {tasks}]"),
        click.option(
            "--samples",
            default=num_samples,
            type=click.IntRange(min=1),
            metavar="N",
            show_default=True,
            help="Haystacks a task and length.",
        ),
        click.option(
            "--questions",
            default=num_questions,
            type=click.IntRange(1, 50),
            metavar="N",
            show_default=True,
            help="About each haystack, at most; tasks of several facts a question ask fewer.",
        ),
        click.option("--seed", default=0, metavar="N", show_default=True, help="Of all samples."),
        click.option("--threads", type=int, metavar="N", help="Threads to compute with."),
    )

    def decorate(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def report_options(command: F) -> F:
    """Where to put what was found."""
    file = click.Path(dir_okay=False, path_type=Path)
    for option in (
        click.option(
            "--keep",
            type=click.Path(file_okay=False, path_type=Path),
            metavar="FOLDER",
            help="What is measured is kept there, and not measured again by a run that goes on.",
        ),
        click.option(
            "--plot",
            type=file,
            callback=output_file,
            metavar="FILE.png",
            help="Draw quality against KV bytes and against time per token.",
        ),
        click.option(
            "--json",
            "json_path",
            type=file,
            callback=output_file,
            metavar="FILE",
            help="Write everything, down to the answers.",
        ),
    ):
        command = option(command)
    return command


@click.command("context")
@click.argument("model")
@click.option(
    "--mode",
    "mode_texts",
    multiple=True,
    metavar="NAME=SETTING:VALUE,...",
    help="Compare with the exact model; may be given several times.",
)
@sample_options(lengths="1K,2K,4K,8K", tasks="all", num_samples=8, num_questions=8)
@click.option(
    "--texts",
    default=4,
    type=click.IntRange(min=0),
    metavar="N",
    show_default=True,
    help="Texts a length for the divergence of distributions; 0: none.",
)
@click.option(
    "--slo-first", default=60.0, metavar="S", show_default=True, help="Seconds to the first token."
)
@click.option(
    "--slo-token", default=100.0, metavar="MS", show_default=True, help="Milliseconds a token."
)
@click.option("--slo-memory", type=byte_size, metavar="SIZE", help="Peak of the process.")
@click.option(
    "--memory",
    type=byte_size,
    metavar="SIZE",
    help="Memory for everything; what does not fit has failed.",
)
@click.option(
    "--rope-scaling", metavar="KIND[:FACTOR]", help="For lengths beyond the trained one: yarn."
)
@report_options
def command(
    model: str,
    mode_texts: tuple[str, ...],
    lengths: tuple[int, ...],
    tasks: str | None,
    samples: int,
    questions: int,
    texts: int,
    seed: int,
    slo_first: float,
    slo_token: float,
    slo_memory: int | None,
    memory: int | None,
    rope_scaling: str | None,
    threads: int | None,
    json_path: Path | None,
    plot: Path | None,
    keep: Path | None,
) -> None:
    """Measure the effective context of a model, and what --mode settings lose against it:
    questions about haystacks that were read before the questions were known."""
    from tael.config import EngineConfig, RopeScaling
    from tael.evals.context.modes import parse_modes
    from tael.evals.context.report import Slo, render
    from tael.evals.context.suite import Settings, run_suite
    from tael.evals.context.tasks import TASKS, parse_tasks
    from tael.evals.context.texts import fetch_texts
    from tael.loader.sources import resolve

    settings = Settings(
        model=model,
        modes=parse_modes(mode_texts),
        lengths=lengths,
        tasks=tuple(TASKS) if tasks is None else parse_tasks(tasks),
        num_samples=samples,
        num_questions=questions,
        num_texts=texts,
        seed=seed,
        config=EngineConfig(
            memory_bytes=memory,
            rope_scaling=RopeScaling.parse(rope_scaling) if rope_scaling else None,
            num_threads=threads,
        ),
    )
    slo = Slo(slo_first, slo_token / 1000, slo_memory)
    with TransferBar() as progress:
        resolve(model, progress=progress)
        fetch_texts(progress)
    result = run_suite(settings, show_cell, keep)
    click.echo(render(result, slo))
    write_reports(result, slo, json_path, plot)


def write_reports(result: Result, slo: Slo, json_path: Path | None, plot: Path | None) -> None:
    """To the files that were asked for."""
    from tael import __version__
    from tael.backends.cpu.backend import chosen_isa
    from tael.evals.context.plot import plot_quality
    from tael.evals.context.report import to_json

    if json_path:
        machine = {
            "tael": __version__,
            "python": platform.python_version(),
            "isa": chosen_isa(),
            "date": f"{date.today()}",
            "num_threads": result.settings.config.num_threads,
        }
        report = {**machine, **to_json(result, slo)}
        json_path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if plot:
        plot_quality(
            plot, result, title=f"{Path(result.settings.model).name}: quality against cost"
        )


def show_cell(mode: str, length: int, cell: Cell) -> None:
    """One line on stderr while the next cell runs."""
    if cell.error is not None:
        text = f"failed: {cell.error}"
    else:
        scores = [a.score for task in cell.answers.values() for sample in task for a in sample]
        text = f"{len(scores)} questions, mean score {sum(scores) / max(1, len(scores)):.3f}"
    click.echo(f"tael: {mode} at {length:,} tokens: {text}", err=True)
