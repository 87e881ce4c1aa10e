"""Commands that read what runs left: list, report, compare, audit, review."""

from __future__ import annotations

import dataclasses
import json
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from ray_pipeline.cli.terminal import BAD_INPUT, STAGE_FAILED, RunArgument, complain, refused, say

if TYPE_CHECKING:
    from ray_pipeline.operate.side_by_side import Part


def list_runs(
    root: Annotated[str, typer.Argument(help="folder of runs, or one run: a path or a URI")] = "runs",
    as_json: Annotated[bool, typer.Option("--json", help="one JSON document, for scripts")] = False,
) -> None:
    """List the runs in a folder, newest first: date, state, workflow, models, training method and result.

    Reads manifests only. Folders without a run and damaged runs are listed as such. A run with a heartbeat is watched
    for 3 s to see whether it lives.

    Examples: `quorum list`, `quorum list s3://bucket/runs`,
    `quorum list --json | jq '.[] | select(.state == "failed")'`.
    """
    from ray_pipeline.operate.run_list import COLUMNS, list_runs
    from ray_pipeline.store.outside import shown

    with refused():
        runs = list_runs(root)
    if as_json:
        print(json.dumps([dataclasses.asdict(run) for run in runs], ensure_ascii=False))
        return
    if not (console := Console()).is_terminal:
        for run in runs:
            say("  ".join(" ".join(cell.split()) or "-" for cell in run.cells))
        return
    from rich.table import Table
    from rich.text import Text

    table = Table(*COLUMNS[:-1], box=None, pad_edge=False)
    table.add_column(COLUMNS[-1], no_wrap=True, overflow="ellipsis", ratio=1)
    for run in runs:
        table.add_row(*(Text(shown(" ".join(cell.split()))) for cell in run.cells))
    console.print(table)


def report(
    run: RunArgument = "runs/latest",
    open_page: Annotated[bool, typer.Option("--open", help="show report.html in the browser")] = False,
) -> None:
    """Rebuild report.md, report.html and their numbers from the tables of a run, finished or not."""
    from ray_pipeline.store.errors import StoreError
    from ray_pipeline.store.local import local_copy
    from ray_pipeline.workflow.stored import read_stored

    with refused():
        stored = read_stored(run)
        if stored.workflow.page is None:
            raise StoreError(f"{stored.run.folder.location}: {stored.run.workflow} has no report")
        written = stored.workflow.page(stored.run)
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
    from ray_pipeline.graph.results import decision
    from ray_pipeline.store.errors import StoreError
    from ray_pipeline.workflow.stored import read_stored

    with refused():
        stored = read_stored(run)
        if stored.workflow.audit is None:
            raise StoreError(f"{stored.run.folder.location}: {stored.workflow.name} makes no training rows to audit")
        audited = stored.workflow.audit(stored.run, stored.config)
    for name, report in audited.reports.items():
        for problem in report.problems:
            say(f"{problem.kind}: {problem.table} {problem.id}: {problem.message}")
        say(report.summary() if len(audited.reports) == 1 else f"{name}: {report.summary()}")
    if decided := decision(stored.run.results):
        say(decided.facts["text"])
    if audited.skipped:
        say(f"not audited (not made by the gate from all candidates): {', '.join(audited.skipped)}")
    if audited.cut:
        say(f"not audited (files of rows drawn at random from a dataset): {', '.join(audited.cut)}")
    if not all(report.ok for report in audited.reports.values()):
        raise typer.Exit(STAGE_FAILED)


def review(
    run: RunArgument = "runs/latest",
    rows: Annotated[int, typer.Option("--rows", "-n", min=1, help="how many rows to look at")] = 100,
    out: Annotated[Path, typer.Option("--out", "-o", help="folder to write")] = Path("review"),
    chance: Annotated[
        bool, typer.Option("--chance", help="draw all rows evenly, by chance, for gate.labels of a certified gate")
    ] = False,
) -> None:
    """Write the rows whose label most needs a person: a page for labelling them, JSONL, and records for Argilla.

    Rows are drawn with probabilities that go with what their labels are expected to tell: rows on which the judges
    disagree and rows near a threshold more often than others. The probabilities are kept with the labels, so that
    estimates for the whole run stay unbiased; a fifth of the rows is drawn evenly. The page is one file that works
    offline; it saves the labels as a JSONL file, which goes back into the run:

    `quorum run dmapo -c CONFIG human_labels=labels-RUN.jsonl` shows in the report how far the gate agrees with people;
    `human_labels.path=… human_labels.use=gate` lets their labels replace the gate's. No call is repeated.
    """
    from ray_pipeline.operate.review import CHANCE, PAGE, ROWS
    from ray_pipeline.operate.review import review as write_review
    from ray_pipeline.store.errors import StoreError
    from ray_pipeline.workflow.stored import read_stored

    with refused():
        stored = read_stored(run)
        workflow, place = stored.workflow, stored.run.folder.location
        gate = None if workflow.scored is None else workflow.scored(stored.config)[0].gate
        if gate is None:
            raise StoreError(f"{place}: {workflow.name} has no gate, so there are no labels to review")
        found = write_review(stored.run, gate, out, rows, 1.0 if chance else CHANCE)
    say(f"{sum(found.values())} rows: {', '.join(f'{count} {reason}' for reason, count in found.items())}")
    say(f"page: {out / PAGE} (labels are saved from it)")
    say(f"rows: {out / ROWS}")
