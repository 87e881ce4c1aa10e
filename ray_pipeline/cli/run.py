"""`quorum run`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from ray_pipeline.cli.terminal import (
    BAD_INPUT,
    STAGE_FAILED,
    ConfigOption,
    OverridesArgument,
    RunDirOption,
    WorkflowArgument,
    complain,
    refused,
    say,
    show_findings,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ray_pipeline.graph.stage import StageResult

#: Share of a stage's rows without a value from which the run's last lines say so.
MAX_BAD = 0.05


def run(
    workflow: WorkflowArgument,
    overrides: OverridesArgument = None,
    config: ConfigOption = "pocket",
    run_dir: RunDirOption = None,
    from_stage: Annotated[str | None, typer.Option("--from", help="rerun this stage and everything downstream")] = None,
    to_stage: Annotated[str | None, typer.Option("--to", help="stop after this stage")] = None,
    dry_run: Annotated[
        bool, typer.Option(help="show the stages, which of them are done, and the checks that take no time")
    ] = False,
    skip_generation: Annotated[bool, typer.Option(help="evaluate stored responses, generate no new ones")] = False,
    max_cost: Annotated[
        float | None, typer.Option(help="stop gracefully once total spend across sessions reaches this amount")
    ] = None,
    device_hour: Annotated[
        float | None, typer.Option(help="price of one GPU (without GPUs: of one engine) for an hour, for --max-cost")
    ] = None,
    executor: Annotated[
        str, typer.Option(help="ray, or inprocess: all stages in this process, without a cluster, for breakpoints")
    ] = "ray",
    debug: Annotated[
        bool, typer.Option("--debug", help="show tracebacks of workers on the terminal; the log always has them")
    ] = False,
    log_json: Annotated[
        bool, typer.Option("--log-json", help="log as JSON lines with run, stage and shard, for log collectors")
    ] = False,
) -> None:
    """Run a workflow, or resume it: the same command does both.

    dmapo makes preference data with judges, critic and gate and trains on it; fellowship does so with a feedback loop;
    baselines compares training methods and datasets; agreement compares judges with humans; winrate compares
    configurations; benchmarks runs MT-Bench, AlpacaEval and IFEval.

    Finished stages are kept, unfinished ones make only their missing shards, and an LLM call with a stored reply is
    never repeated. All that can be known is checked before the first stage, as `quorum check` does.
    """
    from ray_pipeline.config.loading import load_config
    from ray_pipeline.graph.driver import execute
    from ray_pipeline.graph.reach import check_location, in_a_job
    from ray_pipeline.operate import check as checks
    from ray_pipeline.operate.pending import Pending
    from ray_pipeline.operate.prices import budget_of
    from ray_pipeline.operate.run_settings import executor_of, run_settings
    from ray_pipeline.store.files import Folder
    from ray_pipeline.workflow.registry import find_workflow

    changes = [*(overrides or []), *(["evaluate.skip_generation=true"] if skip_generation else [])]
    with refused():
        chosen = find_workflow(workflow)
        settings = load_config(chosen.config, config, changes)
        folder = settings.run_folder(run_dir)
        dag = chosen.wire(settings, folder)
        how = run_settings(
            settings,
            folder,
            workflow=workflow,
            budget=budget_of(settings, max_cost, device_hour),
            log_json=log_json,
            debug=debug,
        )
        elsewhere = checks.engines_elsewhere(settings, executor)
        if dry_run:
            pending = Pending.of(settings, dag, how.session, from_stage, to_stage, scope="light", on_cluster=elsewhere)
            for stage in dag.upto(to_stage):
                state = "done" if stage.name in pending.results else "to do"
                reads = ", ".join(parent.name for parent in stage.inputs.values()) or "-"
                say(f"{stage.name:<28} {state:<6} {stage.folder_name:<48} reads {reads}")
            say(f"run folder: {folder}; call log: {settings.calls_root(folder)}; {settings.num_shards} shards")
            show_findings(checks.findings(pending))
            return
        if in_a_job():
            check_location(run_dir or settings.run.root, "--run-dir" if run_dir else "run.root")
            check_location(settings.calls.root or folder, "calls.root")
        _link_latest(folder, settings.run.root)
        outcome = execute(
            dag,
            how,
            executor_of(settings, executor),
            from_group=from_stage,
            to_group=to_stage,
            console=Console(soft_wrap=True),
            before=checks.before_first_stage(settings, how.session, elsewhere),
        )
    if outcome.failures:
        for name, failure in outcome.failures.items():
            complain(f"{name} failed: {failure.reason}")
        if outcome.not_run:
            complain(f"not run as a result: {', '.join(outcome.not_run)}")
        complain("finished work is kept; rerun the same command to resume")
        raise typer.Exit(BAD_INPUT if all(f.bad_input for f in outcome.failures.values()) else STAGE_FAILED)
    for name, result in outcome.results.items():
        for warning in _warnings(result):
            complain(f"warning: {name}: {warning}")
    for stage in dag.stages:
        if stage.view == "report" and stage.name in outcome.results:
            page = Folder(outcome.results[stage.name].folder)
            if page.exists("report.md"):
                say(f"report: {(Folder(folder) / 'report' if page.is_local else page).uri('report.md')}")
    say(f"run folder: {folder}")


def _warnings(result: StageResult) -> Iterator[str]:
    """What a user should see of a finished stage before spending more: rows without a value, datasets without rows."""
    from ray_pipeline.operate.status import bad_rows

    bad, rows = bad_rows(result.facts.get("counts", {})), sum(result.rows.values())
    if sum(bad.values()) > MAX_BAD * rows:
        kinds = ", ".join(f"{kind.removeprefix('rows.')} {count:,}" for kind, count in bad.items())
        yield f"{sum(bad.values()) / rows:.0%} of {rows:,} rows have no value ({kinds})"
    yield from result.facts.get("warnings", ())


def _link_latest(folder: str, root: str) -> None:
    """Point `latest` in the folder of runs at this run, the default of the other commands. Failures only warn."""
    from ray_pipeline.store.errors import StoreError
    from ray_pipeline.store.files import Folder, point_at

    root = os.path.abspath(os.path.expanduser(root))
    if "://" in folder or os.path.basename(folder) == "latest":
        return
    if os.path.dirname(folder) == root or os.path.isdir(root):
        try:
            point_at(Folder(root), "latest", os.path.relpath(folder, root))
        except StoreError as error:
            complain(f"could not link to this run: {error}")
