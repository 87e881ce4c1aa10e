"""Commands that look ahead: plan the cost of a run, and try other thresholds on the scores of one."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from ray_pipeline.cli.terminal import (
    STAGE_FAILED,
    ConfigOption,
    OverridesArgument,
    RunArgument,
    RunDirOption,
    WorkflowArgument,
    complain,
    configured,
    end_if_failed,
    refused,
    say,
    show_findings,
)


def plan(
    workflow: WorkflowArgument,
    overrides: OverridesArgument = None,
    config: ConfigOption = None,
    rates: Annotated[
        str | None, typer.Option("--rates", help="YAML file of rates and prices, each with source and date")
    ] = None,
    device_hour: Annotated[
        float | None, typer.Option(help="price of one GPU (without GPUs: of one engine) for an hour")
    ] = None,
    probe: Annotated[
        bool,
        typer.Option("--probe", help="measure rates on a share of the prompts with the real engines"),
    ] = False,
    share: Annotated[float, typer.Option(help="of the prompts, for --probe", min=0.0001, max=1.0)] = 0.01,
    run_dir: RunDirOption = None,
    write: Annotated[
        bool, typer.Option("--write/--no-write", help="keep plan.json in the run folder: the report compares with it")
    ] = True,
) -> None:
    """Estimate a run before it starts: calls, tokens, GPU-hours, wall time and money by stage.

    Works for every workflow. Prompts are read and counted for real. Time and money need rates: --probe measures them
    here (its calls are kept in the run's call log and not repeated), --rates takes them from a file. There are no
    built-in rates; each one that is used is printed with its source and date.

    A rates file:

    \b
      models:
        judge: {prompt_tokens_per_s: 20000, completion_tokens_per_s: 2500, source: "our bench, H100", date: 2026-11-01}
      reply_tokens: {tokens: {candidates: 300, judge: 80, critic: 90}, source: "our bench", date: 2026-11-01}
      train: {tokens_per_s: 9000, source: "our bench, H100", date: 2026-11-01}
      kept_share: {share: 0.6, source: "our last run", date: 2026-11-01}
      device_hour: {price: 2.5, currency: USD, source: "our contract", date: 2026-10-01}

    Example: `quorum plan dmapo -c configs/dmapo.yaml --probe --device-hour 2.5`, then
    `quorum run dmapo -c configs/dmapo.yaml --device-hour 2.5 --max-cost 400`.
    """
    from ray_pipeline.config.messages import ConfigError
    from ray_pipeline.operate import plan as planning
    from ray_pipeline.operate.prices import Rates, given_price, read_rates
    from ray_pipeline.store.files import Folder
    from ray_pipeline.workflow.training import TrainingConfig

    with refused():
        chosen, settings, folder = configured(workflow, config, overrides, run_dir)
        known = read_rates(rates) if rates is not None else Rates()
        dag = chosen.wire(settings, folder)
        if probe:
            if not isinstance(settings, TrainingConfig):
                raise ConfigError(f"{chosen.name} makes no datasets, which --probe runs up to; give --rates instead")
            from ray_pipeline.operate.probe import probe as measure

            known = measure(settings, folder, share, chosen.wire, known, Console(soft_wrap=True))
        if device_hour is not None:
            known = known.model_copy(update={"device_hour": given_price(device_hour, settings.currency())})
        found = planning.plan(settings, dag, known)
        if write:
            Folder(folder).write_json("plan.json", found.plain())
    for line in planning.plan_lines(found):
        say(line)


def check(
    workflow: WorkflowArgument,
    overrides: OverridesArgument = None,
    config: ConfigOption = None,
    run_dir: RunDirOption = None,
    from_stage: Annotated[str | None, typer.Option("--from", help="as of `quorum run`")] = None,
    to_stage: Annotated[str | None, typer.Option("--to", help="as of `quorum run`")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="contact no endpoint, Hub or object store")] = False,
    engines: Annotated[
        bool, typer.Option("--engines", help="start each local engine, one after the other, and make test calls")
    ] = False,
) -> None:
    """Check all that can be known before a run pays for anything; `quorum run` checks the same before its first stage.

    Checked are input files and their columns, rubrics and thresholds, model files, training settings and packages,
    disk space, API keys, and every endpoint with a few short calls in the forms that the stages will use (a few tokens
    each, counted in the model's budget). Only stages that are still to do count: a finished run contacts no endpoint.
    With --engines every local engine that these stages use is started in this process, makes the same calls, and ends.

    Prints a line per check: ok, warning, problem with its remedy, or not checked with the reason. Exit code 2 if there
    is a problem.

    Example: `quorum check dmapo -c configs/endpoint.yaml`, or with --offline before the key is at hand.
    """
    from ray_pipeline.operate import check as checks
    from ray_pipeline.operate.pending import Pending
    from ray_pipeline.operate.run_settings import run_settings

    with refused():
        chosen, settings, folder = configured(workflow, config, overrides, run_dir)
        dag, session = chosen.wire(settings, folder), run_settings(settings, folder).session
        pending = Pending.of(
            settings,
            dag,
            session,
            from_stage,
            to_stage,
            scope="offline" if offline else "all",
            on_cluster=checks.engines_elsewhere(settings),
            engines=engines,
        )
        show_findings(checks.findings(pending))
        say("no problem found" if pending.todo else "all stages are done: a run starts nothing")


def preview(
    workflow: WorkflowArgument,
    overrides: OverridesArgument = None,
    config: ConfigOption = None,
    count: Annotated[int, typer.Option("-n", "--count", help="number of prompts", min=1)] = 5,
    run_dir: RunDirOption = None,
    executor: Annotated[str, typer.Option(help="as of `quorum run`")] = "ray",
) -> None:
    """Run the first prompts through to their decisions and print them, to read before the big run.

    Shows each prompt with its candidates, their scores with the judges' reasons, critiques and decisions, and what it
    cost. The preview has a folder of its own (RUN-preview) and the run's call log, so the run does not pay for these
    calls again. For workflows that judge candidates (dmapo, fellowship, baselines).

    Example: `quorum preview dmapo -c configs/endpoint.yaml -n 3`.
    """
    from ray_pipeline.config.messages import ConfigError
    from ray_pipeline.operate.preview import run_preview, show
    from ray_pipeline.workflow.training import TrainingConfig

    console = Console(soft_wrap=True)
    with refused():
        chosen, settings, folder = configured(workflow, config, overrides, run_dir)
        if not isinstance(settings, TrainingConfig):
            raise ConfigError(f"{chosen.name} judges no candidates, so there is nothing to preview")
        outcome = run_preview(settings, folder, count, chosen.wire, executor, console)
    end_if_failed(outcome)
    show(outcome, settings.currency(), console)


def regate(
    run: RunArgument,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value of gate and datasets: gate.tau=1.5 datasets.min_gap=2")
    ] = None,
    write: Annotated[bool, typer.Option("--write", help="rebuild the gate and the datasets")] = False,
) -> None:
    """Try new thresholds on the stored scores of a run; needs no model and no GPU.

    Shows labels, kept rows, pairs and class balance of the old thresholds against the new ones. With --write the gate
    and the datasets are rebuilt, and the run folder's `datasets` points at them; a policy that was trained on the old
    ones stays as it is until the next `quorum run`. Works for every workflow with a gate.

    Examples: `quorum regate runs/pocket gate.tau=1.5`, then
    `quorum regate runs/pocket gate.tau=1.5 gate.desirable_at=8 --write`.
    """
    from ray_pipeline.graph.results import read_run
    from ray_pipeline.graph.stage import StageStop
    from ray_pipeline.operate import regate as gating

    with refused():
        given = gating.regate(read_run(run), overrides or [])
        for line in gating.preview_lines(gating.preview(given)):
            say(line)
        if given.cut:
            say(f"counted before rows are drawn at random to the size of another dataset: {', '.join(given.cut)}")
        if not write:
            say("dry run, nothing written; pass --write to rebuild the gate and datasets")
            return
        try:
            gating.write(given, Console(soft_wrap=True))
        except StageStop as error:
            complain(error)
            raise typer.Exit(STAGE_FAILED) from error
