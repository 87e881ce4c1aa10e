"""Commands for operating a run: status, retry, export, clean."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live

from ray_pipeline.cli.terminal import STAGE_FAILED, RunArgument, complain, refused, say


def status(
    run: RunArgument = "runs/latest",
    watch: Annotated[bool, typer.Option("--watch", "-w", help="keep refreshing until the run finishes")] = False,
    every: Annotated[float, typer.Option(help="seconds between refreshes", min=0.2)] = 2.0,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON document per refresh, for scripts")] = False,
) -> None:
    """Show the progress of a run, wherever it runs.

    Everything comes from the run folder: stages, shards done and failed, rows/s, tokens/s, prefix hits, time left,
    and errors by kind (`rows.unparsed`: a judge's reply was unreadable; `shards.StoreError`: a shard failed).
    Rates cover the time since the last refresh. A heartbeat that stops for some seconds means that the run was killed
    or lost its storage.

    With --watch the exit code is 0 when all stages are done, and 1 when a stage failed or work is left.

    Examples: `quorum status runs/pocket`, `quorum status s3://bucket/run --watch`,
    `quorum status RUN --json | jq '.stages[] | select(.status == "running")'`.
    """
    from ray_pipeline.operate.status import Watch
    from ray_pipeline.operate.status_page import lines, picture

    console = Console()
    with refused():
        watcher = Watch(run)
        state = None
        live = Live(console=console, auto_refresh=False) if watch and console.is_terminal and not as_json else None
        with live or contextlib.nullcontext():
            for state in watcher.until_ended(every) if watch else [watcher.look()]:
                if as_json:
                    print(json.dumps(state.plain(), ensure_ascii=False), flush=True)
                elif live is not None:
                    live.update(picture(state), refresh=True)
                else:
                    for line in lines(state):
                        say(line)
        if watch and state is not None and not state.done:
            raise typer.Exit(STAGE_FAILED)


def retry(
    run: RunArgument,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value for the retry, for example failure.retries=5")
    ] = None,
    config: Annotated[
        str | None, typer.Option("--config", "-c", help="configuration of the run; default: the one in its manifest")
    ] = None,
) -> None:
    """Retry the failed and quarantined shards of a run, and no others; of shards with failed calls, only those calls.

    A failing shard is retried with back-off (`failure.retries`, `failure.backoff_s`). After it was given up in
    `failure.quarantine_after` sessions, `quorum run` skips it, with its error in the manifest, until this command.
    Calls with a stored reply are not repeated. After a successful retry, `quorum run` continues with the later stages.

    Example: `quorum status RUN` (which shards failed, and why), then `quorum retry RUN`.
    """
    from ray_pipeline.config.loading import load_config
    from ray_pipeline.graph.results import read_run
    from ray_pipeline.operate.retry import failed_shards, retry_shards
    from ray_pipeline.workflow.stored import stored

    with refused():
        found = read_run(run)
        failed = failed_shards(found)
        if not failed:
            say("no failed or quarantined shards; `quorum run` makes missing shards")
            return
        typed = stored(found)
        if config is not None:
            settings = load_config(typed.workflow.config, config, overrides or [])
        else:
            settings = typed.changed(overrides or [])
        for stage, shards in failed.items():
            calls = sum(shard.calls for shard in shards.values())
            rows = f" ({calls} calls that failed)" if calls else ""
            say(f"{stage}: {len(shards)} shards to retry{rows}: {', '.join(map(str, list(shards)[:20]))}")
        dag = typed.workflow.wire(settings, found.folder.location)
        problems = retry_shards(found, dag, settings, failed, Console(soft_wrap=True))
    for problem in problems:
        complain(problem)
    if problems:
        raise typer.Exit(STAGE_FAILED)
    say("no failed shard is left; `quorum run` continues with the later stages")


def export(
    run: RunArgument,
    out: Annotated[Path, typer.Option("--out", "-o", help="folder to write; empty, or an earlier export")],
    kind: Annotated[
        list[str] | None, typer.Option("--kind", help="kto, dpo or sft; default: all kinds of the run")
    ] = None,
    stage: Annotated[str, typer.Option(help="stage that wrote the datasets, if a run has several")] = "datasets",
    policy: Annotated[str, typer.Option(help="stage that trained a policy (train) to write into policy/")] = "",
    datasets: Annotated[bool, typer.Option("--datasets/--no-datasets", help="write the datasets")] = True,
    push: Annotated[
        str | None, typer.Option("--push", help="OWNER/NAME on the Hugging Face Hub; needs a token in HF_TOKEN")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="make a new Hub repository public")] = False,
) -> None:
    """Write datasets and policy of a run as one folder with cards, ready for the Hugging Face Hub.

    Load the folder with `datasets.load_dataset(DIR, "kto")`. Every file is checked against the run's fingerprint
    before it is copied. Beside the card, which describes how the rows were made, `pipeline.yaml` has the configuration;
    neither contains a local path. The policy's cards have the evaluation results of the run.

    Examples: `quorum export runs/pocket --out pocket-data`,
    `HF_TOKEN=… quorum export RUN --out data --kind dpo --push me/my-preferences`.
    """
    from ray_pipeline.graph.results import read_run
    from ray_pipeline.operate import export as exporting
    from ray_pipeline.store.errors import StoreError

    with refused():
        if push is not None and not datasets:
            raise StoreError("--push uploads datasets; upload a policy with `hf upload OWNER/NAME DIR/policy/merged`")
        written = exporting.export(read_run(run), out, kind or (), stage, policy=policy, datasets=datasets)
        say(f"{len(written)} files in {out}")
        if push is not None:
            say(exporting.push(out, push, public=public))


def clean(
    run: RunArgument,
    yes: Annotated[bool, typer.Option("--yes/--dry-run", help="delete; default: show what would go")] = False,
) -> None:
    """Show or delete outputs of earlier settings, which the newest manifest of a run does not refer to.

    Stage folders that the manifest names are kept, and so are the targets of `datasets`, `policy` and `report`, all
    that a kept policy was made from, the call log and the logs. Nothing outside the run folder is touched, links are
    not followed, and an active run is refused.

    Examples: `quorum clean runs/pocket`, then `quorum clean runs/pocket --yes`.
    """
    from ray_pipeline.graph.results import read_run
    from ray_pipeline.operate import clean as cleaning

    with refused():
        stored = read_run(run)
        if yes:
            leftovers = cleaning.clean(stored, say)
        else:
            leftovers = cleaning.leftovers(stored)
            for left in leftovers:
                say(f"{cleaning.size_text(left.size):>10}  {left.name}")
    total = cleaning.size_text(sum(left.size for left in leftovers))
    say(f"{len(leftovers)} leftovers, {total}{' deleted' if yes else '; pass --yes to delete them'}")
