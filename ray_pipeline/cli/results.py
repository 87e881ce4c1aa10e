"""Commands that read a run's tables again: report, compare, audit."""

from __future__ import annotations

import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from ray_pipeline.cli.terminal import BAD_INPUT, STAGE_FAILED, RunArgument, complain, refused, say

if TYPE_CHECKING:
    from ray_pipeline.operate.side_by_side import Part


def report(
    run: RunArgument = "runs/latest",
    open_page: Annotated[bool, typer.Option("--open", help="show report.html in the browser")] = False,
) -> None:
    """Rebuild report.md, report.html and their numbers from the tables of a run, finished or not."""
    from ray_pipeline.graph.results import read_run
    from ray_pipeline.store.errors import StoreError
    from ray_pipeline.store.local import local_copy
    from ray_pipeline.workflow.registry import find_workflow

    with refused():
        stored = read_run(run)
        rewrite = find_workflow(stored.reference).page
        if rewrite is None:
            raise StoreError(f"{stored.folder.location}: {stored.workflow} has no report")
        written = rewrite(stored)
    say(f"report: {written.uri('report.md')}")
    if written.exists("report.html"):
        say(f"page: {written.uri('report.html')}")
        if open_page and not webbrowser.open(f"file://{local_copy(written.location)}/report.html"):
            complain("could not open a browser; open the file by hand")


def compare(
    run_a: Annotated[str, typer.Argument(help="run folder")],
    run_b: Annotated[str, typer.Argument(help="run folder of the same workflow")],
    out: Annotated[str | None, typer.Option(help="write the comparison to this HTML file as well")] = None,
) -> None:
    """Show two runs side by side: configuration, counts, scores, agreement, win rates and costs."""
    from ray_pipeline.graph.results import read_run
    from ray_pipeline.operate.compare_runs import side_of
    from ray_pipeline.operate.side_by_side import compare_page, side_by_side

    with refused():
        a, b = (side_of(read_run(run)) for run in (run_a, run_b))
        for part in side_by_side(a, b):
            _print_part(part, (run_a, run_b))
        if out is None:
            return
        page = compare_page(a, b)
    try:
        Path(out).write_text(page, encoding="utf-8", newline="\n")
    except OSError as error:
        complain(f"{out}: {error.strerror}; name a file in an existing folder")
        raise typer.Exit(BAD_INPUT) from error
    say(f"page: {out}")


def _print_part(part: Part, names: tuple[str, str]) -> None:
    """Print a part of a comparison as a table; names and values are never markup."""
    from rich.table import Table
    from rich.text import Text

    from ray_pipeline.store.outside import visible

    table = Table(title=part.title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column("", overflow="fold")
    for name in (*names, "difference"):
        table.add_column(Text(visible(name)), overflow="fold")
    for row in part.rows:
        table.add_row(*(Text(visible(text)) for text in (row.name, row.a, row.b, row.difference)))
    console = Console()
    console.print(table)
    console.print()


def audit(run: RunArgument = "runs/latest") -> None:
    """Trace every training row back to its verdicts, candidate and prompt, and recompute its label.

    Exit code 1 when a row is an orphan, a duplicate, chosen equal to rejected, or at odds with the formulas.
    """
    from ray_pipeline.graph.results import read_run
    from ray_pipeline.store.errors import StoreError
    from ray_pipeline.workflow.registry import find_workflow
    from ray_pipeline.workflow.stored import config_of

    with refused():
        stored = read_run(run)
        workflow = find_workflow(stored.reference)
        if workflow.audit is None:
            raise StoreError(f"{stored.folder.location}: {workflow.name} makes no training rows to audit")
        audited = workflow.audit(stored, config_of(stored))
    for name, report in audited.reports.items():
        for problem in report.problems:
            say(f"{problem.kind}: {problem.table} {problem.id}: {problem.message}")
        say(report.summary() if len(audited.reports) == 1 else f"{name}: {report.summary()}")
    if audited.skipped:
        say(f"not audited (not made by the gate from all candidates): {', '.join(audited.skipped)}")
    if not all(report.ok for report in audited.reports.values()):
        raise typer.Exit(STAGE_FAILED)
