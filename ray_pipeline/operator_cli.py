"""The operator's commands of `quorum`: what the user types, and what the shell gets back."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live

#: What a command returns to the shell.
DONE, STAGE_FAILED, BAD_INPUT = 0, 1, 2

_err = Console(stderr=True, soft_wrap=True)

RunArgument = Annotated[str, typer.Argument(help="run folder: a path, or the URI of any pyarrow filesystem")]


def register(app: typer.Typer) -> None:
    """Add the operator's commands to the `quorum` command."""
    app.command()(status)
    app.command()(plan)
    app.command()(regate)
    app.command()(retry)
    app.command()(export)
    app.command()(clean)


def say(text: str) -> None:
    """A line of plain text: what models and servers said is never markup."""
    Console(soft_wrap=True).print(text, markup=False, highlight=False)


@contextlib.contextmanager
def refused() -> Iterator[None]:
    """What the user gave and cannot be used: one line, exit code 2."""
    from ray_pipeline.graph.heartbeat import RunBusy

    try:
        yield
    except (ValueError, FileNotFoundError, RunBusy) as error:  # configuration, input and storage errors are ValueErrors
        _err.print(f"quorum: {error}", markup=False, highlight=False)
        raise typer.Exit(BAD_INPUT) from error


def status(
    run: RunArgument = "runs/latest",
    watch: Annotated[bool, typer.Option("--watch", "-w", help="look again until nobody works on the run")] = False,
    every: Annotated[float, typer.Option(help="seconds between two looks", min=0.2)] = 2.0,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON document a look, for scripts")] = False,
) -> None:
    """Show what a run has done and what it is doing, wherever it runs.

    Everything comes from the run folder: stages, shards done and failed, rows/s, tokens/s, prefix hits, time to go,
    and errors by kind (`rows.unparsed`: a judge's reply could not be read; `shards.StoreError`: a shard failed).
    Rates are of the time since the last look. A heartbeat that stands still for some seconds means that the run was
    killed or lost its storage.

    With --watch the exit code tells how it ended: 0 all stages done, 1 a stage failed or work is left.

    Examples: `quorum status runs/pocket`, `quorum status s3://bucket/run --watch`,
    `quorum status RUN --json | jq '.stages[] | select(.status == "running")'`.
    """
    from ray_pipeline.operate.status import Watch
    from ray_pipeline.operate.status_page import lines, picture

    console = Console()
    with refused():
        looks = Watch(run)
        state = None
        live = Live(console=console, auto_refresh=False) if watch and console.is_terminal and not as_json else None
        with live or contextlib.nullcontext():
            for state in looks.until_ended(every) if watch else [looks.look()]:
                if as_json:
                    print(json.dumps(state.plain(), ensure_ascii=False), flush=True)
                elif live is not None:
                    live.update(picture(state), refresh=True)
                else:
                    for line in lines(state):
                        say(line)
        if watch and state is not None and not state.done:
            raise typer.Exit(STAGE_FAILED)


def regate(
    run: RunArgument,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value of gate and datasets: gate.tau=1.5 datasets.min_gap=2")
    ] = None,
    write: Annotated[
        bool, typer.Option("--write", help="make the gate and the data sets, not only the preview")
    ] = False,
) -> None:
    """Try new thresholds on the scores that a run has; no model is asked and no GPU is needed.

    Shows labels, kept rows, pairs and class balance of the old thresholds against the new ones. With --write the gate
    and the data sets are made, and the run folder's `datasets` points at them; a policy that was trained on the old
    ones stays as it is until the next `quorum run`.

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
        if not write:
            say("nothing is written; --write makes the gate and the data sets")
            return
        try:
            gating.write(given, say)
        except StageStop as error:
            _err.print(f"quorum: {error}", markup=False, highlight=False)
            raise typer.Exit(STAGE_FAILED) from error


def retry(
    run: RunArgument,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value that the repair needs, for example failure.retries=5")
    ] = None,
    config: Annotated[
        str | None, typer.Option("--config", "-c", help="configuration of the run (default: what its manifest holds)")
    ] = None,
) -> None:
    """Make the failed and quarantined shards of a run, and no others.

    A shard that fails is tried again with back-off (`failure.retries`, `failure.backoff_s`); one that was given up in
    `failure.quarantine_after` sessions is left alone by `quorum run`, with its error in the manifest, until this
    command. Answered calls are not repeated. When it ends well, `quorum run` goes on with what follows.

    Example: `quorum status RUN` (which shards failed, and of what), then `quorum retry RUN`.
    """
    from dags import DAGS
    from ray_pipeline.config import load_config, read_config
    from ray_pipeline.graph.results import read_run
    from ray_pipeline.operate.retry import failed_shards, retry_shards
    from ray_pipeline.workflows import WORKFLOWS

    with refused():
        found = read_run(run)
        failed = failed_shards(found)
        if not failed:
            say("no shard failed or is in quarantine; `quorum run` makes what is missing")
            return
        dag, folder = found.manifest["dag"], found.folder.location
        if config is not None:
            settings = load_config(dag, config, overrides or [], WORKFLOWS[dag])
        else:
            source = found.folder.uri("manifest.json")
            settings = read_config(dag, found.manifest["given"], overrides or [], source, WORKFLOWS[dag])
        for stage, shards in failed.items():
            say(f"{stage}: {len(shards)} shards to try again: {', '.join(map(str, shards[:20]))}")
        problems = retry_shards(found, DAGS[dag](settings, folder), settings, failed, Console(soft_wrap=True))
    for problem in problems:
        _err.print(f"quorum: {problem}", markup=False, highlight=False)
    if problems:
        raise typer.Exit(STAGE_FAILED)
    say("every failed shard is there now; `quorum run` goes on with what follows")


def export(
    run: RunArgument,
    out: Annotated[Path, typer.Option("--out", "-o", help="folder to write; empty, or an earlier export")],
    kind: Annotated[
        list[str] | None, typer.Option("--kind", help="kto, dpo or sft; default: all that the run has")
    ] = None,
    stage: Annotated[str, typer.Option(help="stage that wrote them, where a run has several")] = "datasets",
    push: Annotated[
        str | None, typer.Option("--push", help="OWNER/NAME on the Hugging Face hub; your token is read from HF_TOKEN")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="make a new hub repository public")] = False,
) -> None:
    """Write the data sets of a run as one folder with a card, as the Hugging Face hub takes it.

    The folder opens with `datasets.load_dataset(DIR, "kto")`. Every file is checked against the run's fingerprint
    before it is copied. The card says how the rows were made; no path of this machine is in it.

    Examples: `quorum export runs/pocket --out pocket-data`,
    `HF_TOKEN=… quorum export RUN --out data --kind dpo --push me/my-preferences`.
    """
    from ray_pipeline.graph.results import read_run
    from ray_pipeline.operate import export as exporting

    with refused():
        written = exporting.export(read_run(run), out, kind or (), stage)
        say(f"{len(written)} files in {out}")
        if push is not None:
            say(exporting.push(out, push, public=public))


def clean(
    run: RunArgument,
    yes: Annotated[bool, typer.Option("--yes/--dry-run", help="delete; default: show what would go")] = False,
) -> None:
    """Show or delete what the newest manifest of a run does not refer to: outputs of earlier settings.

    Stage folders that the manifest names stay, and so does what `datasets`, `policy` and `report` point at, the call
    log and the logs. Nothing outside the run folder is touched, links are not followed, and a run at work is refused.

    Examples: `quorum clean runs/pocket`, then `quorum clean runs/pocket --yes`.
    """
    from ray_pipeline.graph.results import read_run
    from ray_pipeline.operate import clean as cleaning

    with refused():
        found = read_run(run)
        if yes:
            gone = cleaning.clean(found, say)
        else:
            gone = cleaning.leftovers(found)
            for left in gone:
                say(f"{cleaning.size_text(left.size):>10}  {left.name}")
    total = cleaning.size_text(sum(left.size for left in gone))
    say(f"{len(gone)} leftovers, {total}{' deleted' if yes else '; --yes deletes them'}")


def plan(
    dag: Annotated[str, typer.Argument(help="workflow: dmapo")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, as in `quorum run`")] = None,
    config: Annotated[str, typer.Option("--config", "-c", help="YAML file, or the name of one of ours")] = "pocket",
    rates: Annotated[
        str | None, typer.Option("--rates", help="YAML file of rates and prices, each with source and date")
    ] = None,
    device_hour: Annotated[
        float | None, typer.Option(help="price of one GPU (without GPUs: of one engine) for an hour")
    ] = None,
    probe: Annotated[
        bool,
        typer.Option("--probe", help="measure: a share of the prompts on the real engine, up to the data sets"),
    ] = False,
    share: Annotated[float, typer.Option(help="of the prompts, for --probe", min=0.0001, max=1.0)] = 0.01,
    run_dir: Annotated[str | None, typer.Option(help="run folder (default: run.root/run.name of the config)")] = None,
    write: Annotated[
        bool, typer.Option("--write/--no-write", help="keep plan.json in the run folder: the report compares with it")
    ] = True,
) -> None:
    """Say what a run would cost before it starts: calls, tokens, GPU-hours, wall time and money by stage.

    Prompts are read and counted for real. Time and money need rates: --probe measures them here (its calls are kept in
    the run's call log and not made again), --rates takes them from a file. There are no built-in rates; each one that
    is used is printed with its source and date.

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
    from ray_pipeline.config import ConfigError, load_config
    from ray_pipeline.operate import plan as planning
    from ray_pipeline.operate.prices import Rates, currency_of, given_price, read_rates
    from ray_pipeline.store.files import Folder

    with refused():
        if dag != "dmapo":
            raise ConfigError(f"plan knows the calls of dmapo alone, not of {dag!r}")
        settings = load_config(dag, config, overrides or [])
        folder = settings.run_folder(run_dir)
        given = read_rates(rates) if rates is not None else Rates()
        if probe:
            from dags import DAGS
            from ray_pipeline.operate.probe import probe as measure

            given = measure(settings, folder, share, DAGS[dag], given, Console(soft_wrap=True))
        if device_hour is not None:
            given = given.model_copy(update={"device_hour": given_price(device_hour, currency_of(settings))})
        found = planning.plan(settings, given)
        if write:
            Folder(folder).write_json("plan.json", found.plain())
    for line in planning.plan_lines(found):
        say(line)
