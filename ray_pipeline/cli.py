"""The `quorum` command."""

from __future__ import annotations

import os
import sys
import webbrowser
from typing import Annotated, Any

import typer
from rich.console import Console

from ray_pipeline import operator_cli
from ray_pipeline.submit.command import submit

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help=(
        "Preference data by consensus of LLM judges, and a policy aligned with it, on Ray.\n\n"
        "Try `quorum run dmapo --config configs/pocket.yaml`: the whole method on small real models, without a GPU.\n\n"
        "Exit codes: 0 done, 1 a stage failed, 2 bad input or configuration."
    ),
)

#: What a command returns to the shell.
DONE, STAGE_FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

#: Stages that write the page of their workflow, the first of those that a run has.
_PAGES = ("evaluate", "agreement", "winrate", "benchmarks")

_err = Console(stderr=True, soft_wrap=True)


def _refuse(message: object) -> typer.Exit:
    _err.print(f"quorum: {message}", markup=False, highlight=False)
    return typer.Exit(BAD_INPUT)


@app.command()
def run(
    dag: Annotated[
        str,
        typer.Argument(
            help="workflow: dmapo, fellowship (feedback loop), baselines (methods and data side by side), agreement "
            "(judges with humans), winrate or benchmarks (MT-Bench, AlpacaEval, IFEval)"
        ),
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, for example gate.tau=2 candidates.k=8")
    ] = None,
    config: Annotated[
        str, typer.Option("--config", "-c", help="YAML file, or the name of one that comes with Quorum")
    ] = "pocket",
    run_dir: Annotated[str | None, typer.Option(help="run folder (default: run.root/run.name of the config)")] = None,
    from_stage: Annotated[str | None, typer.Option("--from", help="make this stage and what follows anew")] = None,
    to_stage: Annotated[str | None, typer.Option("--to", help="stop after this stage")] = None,
    dry_run: Annotated[
        bool, typer.Option(help="show the stages, what is done and what is to do; start nothing")
    ] = False,
    skip_generation: Annotated[
        bool, typer.Option(help="evaluate what the stored tables hold, without new responses")
    ] = False,
    max_cost: Annotated[
        float | None, typer.Option(help="stop in good order when the run has cost so much, all its sessions together")
    ] = None,
    device_hour: Annotated[
        float | None, typer.Option(help="price of one GPU (without GPUs: of one engine) for an hour, for --max-cost")
    ] = None,
    executor: Annotated[
        str, typer.Option(help="ray, or inprocess: everything in this process, so that breakpoints work")
    ] = "ray",
    debug: Annotated[bool, typer.Option("--debug", help="show workers' tracebacks, which the log always has")] = False,
    log_json: Annotated[
        bool, typer.Option("--log-json", help="log as JSON lines with run, stage and shard, for log collectors")
    ] = False,
) -> None:
    """Run a workflow, or go on where it stopped: the same command does both.

    Finished stages are kept, unfinished ones make only their missing shards, and an LLM call that was ever answered
    is not made again.
    """
    from dags import DAGS
    from ray_pipeline.config import ConfigError, load_config
    from ray_pipeline.data.sources import InputError
    from ray_pipeline.graph.driver import execute
    from ray_pipeline.graph.heartbeat import RunBusy
    from ray_pipeline.graph.reach import check_location, in_a_job
    from ray_pipeline.graph.resume import load_result
    from ray_pipeline.graph.stage import StageRef
    from ray_pipeline.operate.prices import budget_of
    from ray_pipeline.operate.run_settings import executor_of, run_settings
    from ray_pipeline.store.files import Folder, StoreError
    from ray_pipeline.workflows import WORKFLOWS

    if dag not in WORKFLOWS:
        raise _refuse(f"there is no workflow {dag!r}; there is {', '.join(WORKFLOWS)}")
    changes = [*(overrides or []), *(["evaluate.skip_generation=true"] if skip_generation else [])]
    try:
        settings = load_config(dag, config, changes, WORKFLOWS[dag])
        folder = settings.run_folder(run_dir)
        graph = DAGS[dag](settings, folder)
        if dry_run:
            _show_plan(
                graph,
                folder,
                settings,
                from_stage,
                to_stage,
                lambda stage: load_result(StageRef.of(stage, folder, settings.num_shards)),
            )
            return
        if in_a_job():
            check_location(run_dir or settings.run.root, "--run-dir" if run_dir else "run.root")
            check_location(settings.calls.root or folder, "calls.root")
        _link_latest(folder, settings.run.root)
        outcome = execute(
            graph,
            run_settings(
                settings, folder, budget=budget_of(settings, max_cost, device_hour), log_json=log_json, debug=debug
            ),
            executor_of(settings, executor),
            from_group=from_stage,
            to_group=to_stage,
            console=Console(soft_wrap=True),
        )
    except (ConfigError, InputError, StoreError, RunBusy) as error:
        raise _refuse(error) from error
    except ValueError as error:
        raise _refuse(error) from error
    except KeyboardInterrupt:
        _err.print("quorum: interrupted; the same command goes on from here", markup=False)
        raise typer.Exit(INTERRUPTED) from None
    if outcome.failures:
        for name, failure in outcome.failures.items():
            _err.print(f"quorum: {name} failed: {failure.reason}", markup=False, highlight=False)
        if outcome.not_run:
            _err.print(f"quorum: not run because of that: {', '.join(outcome.not_run)}", markup=False, highlight=False)
        _err.print("quorum: what is done is kept; the same command goes on from here", markup=False)
        raise typer.Exit(BAD_INPUT if all(f.bad_input for f in outcome.failures.values()) else STAGE_FAILED)
    written = [outcome.results[name] for name in _PAGES if name in outcome.results]
    if written and (page := Folder(written[0].folder)).exists("report.md"):
        _print(f"report: {(Folder(folder) / 'report' if page.is_local else page).uri('report.md')}")
    _print(f"run folder: {folder}")


def _link_latest(folder: str, root: str) -> None:
    """Point `latest` in the folder of runs at this one, for the commands' default. A convenience, and no more."""
    from ray_pipeline.store.files import Folder, StoreError, point_at

    root = os.path.abspath(os.path.expanduser(root))
    if "://" in folder or os.path.basename(folder) == "latest":
        return
    if os.path.dirname(folder) == root or os.path.isdir(root):
        try:
            point_at(Folder(root), "latest", os.path.relpath(folder, root))
        except StoreError as error:
            _err.print(f"quorum: no link to this run: {error}", markup=False, highlight=False)


def _print(text: str) -> None:
    Console(soft_wrap=True).print(text, markup=False, highlight=False)


def _show_plan(graph: Any, folder: str, settings: Any, from_stage: str | None, to_stage: str | None, load: Any) -> None:
    again = graph.downstream(from_stage) if from_stage else []
    for stage in graph.upto(to_stage):
        done = stage not in again and load(stage) is not None
        reads = ", ".join(parent.name for parent in stage.inputs.values()) or "-"
        _print(f"{stage.name:<28} {'done' if done else 'to do':<6} {stage.folder_name:<48} reads {reads}")
    _print(f"run folder: {folder}; call log: {settings.calls_root(folder)}; {settings.num_shards} shards")


app.command()(submit)

RunArgument = Annotated[str, typer.Argument(help="run folder")]


@app.command()
def report(
    run: RunArgument = "runs/latest",
    open_page: Annotated[bool, typer.Option("--open", help="show report.html in the browser")] = False,
) -> None:
    """Write report.md, report.html and their numbers anew from the tables that a run has, finished or not."""
    from ray_pipeline.agreement import stages as agreement
    from ray_pipeline.bench import report as benchmark_report
    from ray_pipeline.evaluate import method_table
    from ray_pipeline.evaluate.stage import write_report
    from ray_pipeline.feedback import page as loop_page
    from ray_pipeline.graph.results import read_run
    from ray_pipeline.store.files import StoreError
    from ray_pipeline.store.local import local_copy

    pages = {
        "baselines": method_table.rewrite_page,
        "fellowship": loop_page.rewrite_page,
        "agreement": agreement.rewrite_page,
        "winrate": agreement.rewrite_page,
        "benchmarks": benchmark_report.rewrite_page,
    }
    try:
        found = read_run(run)
        written = pages.get(found.manifest["dag"], write_report)(found)
    except StoreError as error:
        raise _refuse(error) from error
    _print(f"report: {written.uri('report.md')}")
    if written.exists("report.html"):
        _print(f"page: {written.uri('report.html')}")
        if open_page and not webbrowser.open(f"file://{local_copy(written.location)}/report.html"):
            _err.print("quorum: there is no browser to open the page in; open the file by hand", markup=False)


@app.command()
def compare(
    run_a: Annotated[str, typer.Argument(help="run folder")],
    run_b: Annotated[str, typer.Argument(help="run folder of the same workflow")],
    out: Annotated[str | None, typer.Option(help="write the comparison as an HTML page to this file, too")] = None,
) -> None:
    """Show two runs side by side: configuration, counts, scores, agreement, win rates and costs."""
    from pathlib import Path

    from ray_pipeline.graph.results import read_run
    from ray_pipeline.operate.compare_runs import side_of
    from ray_pipeline.operate.side_by_side import compare_page, side_by_side
    from ray_pipeline.store.files import StoreError

    try:
        a, b = (side_of(read_run(run)) for run in (run_a, run_b))
        for part in side_by_side(a, b):
            _print_part(part, (run_a, run_b))
        if out is not None:
            Path(out).write_text(compare_page(a, b), encoding="utf-8", newline="\n")
            _print(f"page: {out}")
    except (StoreError, ValueError) as error:
        raise _refuse(error) from error
    except OSError as error:
        raise _refuse(f"{out}: {error.strerror}; name a file in a folder that exists") from error


def _print_part(part: Any, names: tuple[str, str]) -> None:
    """A part of a comparison as a table; names and values are text, whatever is in them."""
    from rich.table import Table
    from rich.text import Text

    from ray_pipeline.report.markdown import visible

    table = Table(title=part.title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column("", overflow="fold")
    for name in (*names, "difference"):
        table.add_column(Text(visible(name)), overflow="fold")
    for row in part.rows:
        table.add_row(*(Text(visible(text)) for text in (row.name, row.a, row.b, row.difference)))
    console = Console()
    console.print(table)
    console.print()


@app.command()
def audit(run: RunArgument = "runs/latest") -> None:
    """Walk every training row back to its verdicts, candidate and prompt, and recompute its label.

    Exit code 1 when a row is an orphan, a duplicate, chosen equal to rejected, or not what the formulas say.
    """
    from ray_pipeline.audit.run import audit_folder, not_audited
    from ray_pipeline.graph.results import read_run
    from ray_pipeline.store.files import StoreError

    try:
        found_run = read_run(run)
        reports = audit_folder(found_run)
    except (StoreError, FileNotFoundError) as error:
        raise _refuse(error) from error
    for name, found in reports.items():
        for problem in found.problems:
            _print(f"{problem.kind}: {problem.table} {problem.id}: {problem.message}")
        _print(found.summary() if len(reports) == 1 else f"{name}: {found.summary()}")
    if skipped := not_audited(found_run):
        _print(f"not audited, for they are not the gate's on all candidates: {', '.join(skipped)}")
    if not all(found.ok for found in reports.values()):
        raise typer.Exit(STAGE_FAILED)


operator_cli.register(app)


def main() -> None:
    """Entry point of the `quorum` command."""
    try:
        app(standalone_mode=True)
    except BrokenPipeError:
        # The reader of our output is gone (`quorum status | head`): nothing is wrong.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
