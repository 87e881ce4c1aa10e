"""`quorum run`."""

from __future__ import annotations

import os
from typing import Annotated

import typer
from rich.console import Console

from ray_pipeline.cli.terminal import (
    ConfigOption,
    OverridesArgument,
    RunDirOption,
    WorkflowArgument,
    complain,
    configured,
    end_if_failed,
    refused,
    say,
    show_findings,
)


def run(
    workflow: WorkflowArgument,
    overrides: OverridesArgument = None,
    config: ConfigOption = None,
    run_dir: RunDirOption = None,
    from_stage: Annotated[
        str | None, typer.Option("--from", help="rerun this stage (name or number) and everything downstream")
    ] = None,
    to_stage: Annotated[str | None, typer.Option("--to", help="stop after this stage (name or number)")] = None,
    dry_run: Annotated[
        bool, typer.Option(help="show the stages by number, which of them are done, and the checks that take no time")
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
    quiet: Annotated[
        bool,
        typer.Option("--quiet", "-q", help="print only failures, warnings and the last lines; the log has all"),
    ] = False,
    log_json: Annotated[
        bool, typer.Option("--log-json", help="log as JSON lines with run, stage and shard, for log collectors")
    ] = False,
) -> None:
    """Run a workflow, or resume it: the same command does both.

    dmapo makes preference data with judges, critic and gate and trains on it; fellowship does so with a feedback loop;
    baselines compares training methods and datasets; agreement compares judges with humans; judge_check makes the card
    of a judge; winrate compares configurations; benchmarks runs MT-Bench, AlpacaEval and IFEval.

    Finished stages are kept, unfinished ones make only their missing shards, and an LLM call with a stored reply is
    never repeated. All that can be known is checked before the first stage, as `quorum check` does.

    Progress is a live picture on a terminal and a plain line now and then elsewhere.
    """
    from ray_pipeline.graph.driver import execute
    from ray_pipeline.graph.reach import check_location, in_a_job
    from ray_pipeline.graph.results import is_skipped
    from ray_pipeline.operate import check as checks
    from ray_pipeline.operate.last_lines import last_lines, warnings
    from ray_pipeline.operate.pending import Pending
    from ray_pipeline.operate.prices import budget_of
    from ray_pipeline.operate.run_settings import executor_of, run_settings

    changes = [*(overrides or []), *(["evaluate.skip_generation=true"] if skip_generation else [])]
    with refused():
        chosen, settings, folder = configured(workflow, config, changes, run_dir)
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
            pending = Pending.of(
                settings, dag, how.session, from_stage, to_stage, scope="light", on_cluster=elsewhere, engines=False
            )
            for stage in dag.upto(to_stage):
                skipped = is_skipped(stage, pending.results)
                state = "done" if stage.name in pending.results else "skipped" if skipped else "to do"
                reads = ", ".join(parent.name for parent in stage.inputs.values()) or "-"
                number = dag.groups.index(stage.group_name) + 1  # as --from and --to accept it
                say(f"{number:>2} {stage.name:<28} {state:<7} {stage.folder_name:<48} reads {reads}")
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
            console=Console(soft_wrap=True, quiet=quiet),
            before=checks.before_first_stage(settings, how.session, elsewhere),
        )
    end_if_failed(outcome)
    for warning in warnings(outcome.results):
        complain(f"warning: {warning}")
    for line in last_lines(dag, outcome.results, folder, settings.currency()):
        say(line)


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
