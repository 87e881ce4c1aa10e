"""Shared by all commands: arguments, terminal output, exit codes, and the handling of bad input."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from ray_pipeline.store.outside import shown
from ray_pipeline.workflow.registry import workflow_names

if TYPE_CHECKING:
    from ray_pipeline.operate.pending import Finding

#: Exit codes.
DONE, STAGE_FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

WorkflowArgument = Annotated[
    str,
    typer.Argument(
        metavar="WORKFLOW",
        help=f"{', '.join(workflow_names())}, or a Python file that defines one",
        autocompletion=workflow_names,
    ),
]
OverridesArgument = Annotated[list[str] | None, typer.Argument(help="key=value, for example gate.tau=2 candidates.k=8")]
ConfigOption = Annotated[
    str, typer.Option("--config", "-c", help="YAML file, or the name of one that comes with Quorum")
]
RunDirOption = Annotated[str | None, typer.Option(help="run folder; default: run.root/run.name of the configuration")]
RunArgument = Annotated[str, typer.Argument(help="run folder: a path, or the URI of any pyarrow filesystem")]

_err = Console(stderr=True, soft_wrap=True)


def say(text: str) -> None:
    """Print a line of plain text: output of models and servers is never markup, and keys are removed."""
    Console(soft_wrap=True).print(shown(text), markup=False, highlight=False)


def show_findings(findings: Iterable[Finding]) -> None:
    """Print a line for each finding of the checks. Ends the command with exit code 2 if one is a problem."""
    problems = 0
    for finding in findings:
        say(finding.line)
        problems += finding.state == "problem"
    if problems:
        complain(f"{problems} problem{'s' * (problems > 1)} found")
        raise typer.Exit(BAD_INPUT)


def complain(message: object) -> None:
    """Print a line on standard error."""
    _err.print(shown(f"quorum: {message}"), markup=False, highlight=False)


@contextlib.contextmanager
def refused() -> Iterator[None]:
    """End the command on bad input with one line and exit code 2."""
    from ray_pipeline.graph.heartbeat import RunBusy

    try:
        yield
    except (ValueError, FileNotFoundError, RunBusy) as error:  # configuration, input and storage errors are ValueErrors
        complain(error)
        raise typer.Exit(BAD_INPUT) from error
