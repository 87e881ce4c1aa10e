"""The `quorum` command."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer
from rich.console import Console

from ray_pipeline.graph.progress import StageProgress

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

_err = Console(stderr=True, soft_wrap=True)


def _refuse(message: object) -> typer.Exit:
    _err.print(f"quorum: {message}", markup=False, highlight=False)
    return typer.Exit(BAD_INPUT)


@app.command()
def run(
    dag: Annotated[
        str,
        typer.Argument(
            help=(
                "workflow: dmapo, baselines (methods and data side by side), fellowship (feedback loop), agreement "
                "(judges with humans) or winrate"
            )
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
) -> None:
    """Run a workflow, or go on where it stopped: the same command does both.

    Finished stages are kept, unfinished ones make only their missing shards, and an LLM call that was ever answered
    is not made again.
    """
    from dags import DAGS
    from ray_pipeline.agreement_config import AGREEMENT_CONFIGS
    from ray_pipeline.config import CONFIGS, ConfigError, load_config
    from ray_pipeline.fellowship_config import FELLOWSHIP_CONFIGS
    from ray_pipeline.graph.heartbeat import RunBusy
    from ray_pipeline.graph.run import RunSettings, execute, load_result
    from ray_pipeline.stages.sources import InputError
    from ray_pipeline.store.files import Folder, StoreError, point_at

    configs: dict[str, Any] = {**CONFIGS, **FELLOWSHIP_CONFIGS, **AGREEMENT_CONFIGS}
    if dag not in configs:
        raise _refuse(f"there is no workflow {dag!r}; there is {', '.join(configs)}")
    changes = [*(overrides or []), *(["evaluate.skip_generation=true"] if skip_generation else [])]
    try:
        settings = load_config(dag, config, changes, configs[dag])
        folder = settings.run_folder(run_dir)
        graph = DAGS[dag](settings, folder)
        if dry_run:
            _show_plan(graph, folder, settings, from_stage, to_stage, load_result)
            return
        parent = os.path.dirname(folder)
        if "://" not in folder and os.path.basename(folder) != "latest":
            point_at(Folder(parent), "latest", os.path.basename(folder))
        outcome = execute(
            graph,
            RunSettings(
                folder=folder,
                calls_root=settings.calls_root(folder),
                num_shards=settings.num_shards,
                config=settings.model_dump(mode="json"),
                ray=settings.ray.arguments(),
                report=settings.page().model_dump(mode="json"),
                replay_only=settings.calls.replay_only,
                max_stages=settings.ray.max_stages,
            ),
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
    report = os.path.join(folder, "report", "report.md")
    if {"evaluate", "agreement", "winrate"} & set(outcome.results) and os.path.exists(report):
        _print(f"report: {report}")
    _print(f"run folder: {folder}")


def _print(text: str) -> None:
    Console(soft_wrap=True).print(text, markup=False, highlight=False)


def _show_plan(graph: Any, folder: str, settings: Any, from_stage: str | None, to_stage: str | None, load: Any) -> None:
    again = graph.downstream(from_stage) if from_stage else []
    for stage in graph.upto(to_stage):
        done = stage not in again and load(folder, stage, settings.num_shards) is not None
        reads = ", ".join(parent.name for parent in stage.inputs.values()) or "-"
        _print(f"{stage.name:<28} {'done' if done else 'to do':<6} {stage.folder_name:<48} reads {reads}")
    _print(f"run folder: {folder}; call log: {settings.calls_root(folder)}; {settings.num_shards} shards")


RunArgument = Annotated[str, typer.Argument(help="run folder")]


@app.command()
def status(run: RunArgument = "runs/latest") -> None:
    """Show what a run has done and what it is doing."""
    from ray_pipeline.graph.results import read_run
    from ray_pipeline.store.files import Folder, StoreError

    try:
        found = read_run(run)
    except StoreError as error:
        raise _refuse(error) from error
    for name, entry in found.manifest["stages"].items():
        rows = ", ".join(f"{n} {kind}" for kind, n in entry.get("rows", {}).items())
        usage = entry.get("usage", {})
        calls = (
            f"{usage['calls_engine']:.0f} engine + {usage['calls_log']:.0f} log calls"
            if usage.get("calls_engine") or usage.get("calls_log")
            else ""
        )
        seconds = f"{usage['wall_seconds']:.1f} s" if "wall_seconds" in usage else ""
        _print(
            f"{name:<28} {entry['status']:<8} "
            + ", ".join(x for x in (rows, calls, seconds, entry.get("error", "")) if x)
        )
    folder = Folder(run)
    if folder.exists("heartbeat.json") and folder.exists("progress.json"):
        _print("\nnow:")
        for stage in folder.read_json("progress.json"):
            if stage["status"] == "running":
                _print("  " + StageProgress(**stage).line())


@app.command()
def report(run: RunArgument = "runs/latest") -> None:
    """Write the report anew from the tables that a run has, finished or not."""
    from ray_pipeline.graph.results import read_run
    from ray_pipeline.stages import agreement, loop_page, method_table
    from ray_pipeline.stages.evaluate import write_report
    from ray_pipeline.store.files import StoreError

    pages = {
        "baselines": method_table.rewrite_page,
        "fellowship": loop_page.rewrite_page,
        "agreement": agreement.rewrite_page,
        "winrate": agreement.rewrite_page,
    }
    try:
        found = read_run(run)
        _print(f"report: {pages.get(found.manifest['dag'], write_report)(found)}")
    except StoreError as error:
        raise _refuse(error) from error


@app.command()
def audit(run: RunArgument = "runs/latest") -> None:
    """Walk every training row back to its verdicts, candidate and prompt, and recompute its label.

    Exit code 1 when a row is an orphan, a duplicate, chosen equal to rejected, or not what the formulas say.
    """
    from ray_pipeline.graph.results import read_run
    from ray_pipeline.stages.audit_run import audit_folder
    from ray_pipeline.store.files import StoreError

    try:
        reports = audit_folder(read_run(run))
    except (StoreError, FileNotFoundError) as error:
        raise _refuse(error) from error
    for name, found in reports.items():
        for problem in found.problems:
            _print(f"{problem.kind}: {problem.table} {problem.id}: {problem.message}")
        _print(found.summary() if len(reports) == 1 else f"{name}: {found.summary()}")
    if not all(found.ok for found in reports.values()):
        raise typer.Exit(STAGE_FAILED)


def main() -> None:
    """Entry point of the `quorum` command."""
    try:
        app(standalone_mode=True)
    except BrokenPipeError:
        # The reader of our output is gone (`quorum status | head`): nothing is wrong.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
