"""The app with all of its commands."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from typing import Annotated

import typer

from ray_pipeline.cli import config, operator, planning, results, run
from ray_pipeline.cli.judge_check import judge_check
from ray_pipeline.cli.submit import submit
from ray_pipeline.cli.terminal import say

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help=(
        "Preference data by consensus of LLM judges, and a policy aligned with it, on Ray.\n\n"
        "Try `quorum run dmapo`: the whole method on small real models, without a GPU. `quorum init` writes a "
        "configuration of your own.\n\n"
        "Exit codes: 0 done, 1 a stage failed, 2 bad input or configuration, 130 and 143 ended by SIGINT and SIGTERM."
    ),
)

for command in (
    config.init,
    run.run,
    judge_check,
    submit,
    results.report,
    results.compare,
    results.audit,
    results.review,
    operator.status,
    planning.plan,
    planning.check,
    planning.preview,
    planning.regate,
    operator.retry,
    operator.export,
    operator.clean,
):
    app.command()(command)
app.command("list")(results.list_runs)
app.add_typer(config.app, name="config")


def _version(show: bool) -> None:
    if show:
        say(f"quorum {importlib.metadata.version('quorum-align')}")
        raise typer.Exit


@app.callback()
def quorum(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version and exit")
    ] = False,
) -> None:
    # The help text is the app's.
    pass


def main() -> None:
    """Entry point of the `quorum` command."""
    try:
        app(standalone_mode=True)
    except BrokenPipeError:
        # The reader of the output is gone (`quorum status | head`): not an error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
