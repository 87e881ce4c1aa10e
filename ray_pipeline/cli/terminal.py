"""Shared by all commands: arguments, terminal output, exit codes, and the handling of bad input."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from ray_pipeline.store.outside import shown
from ray_pipeline.workflow.registry import default_config, find_workflow, workflow_names

if TYPE_CHECKING:
    from ray_pipeline.graph.driver import RunOutcome
    from ray_pipeline.operate.pending import Finding
    from ray_pipeline.workflow.config import RunConfig
    from ray_pipeline.workflow.registry import Workflow

#: Exit codes.
DONE, STAGE_FAILED, BAD_INPUT = 0, 1, 2

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
    str | None,
    typer.Option(
        "--config",
        "-c",
        help="YAML file, or the name of one that comes with Quorum; default: the workflow's own pocket configuration",
    ),
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


def chosen_config(workflow: Workflow[Any], config: str | None) -> str:
    """The configuration to read: the given one, else the workflow's pocket configuration, which is then named on
    standard error. Raises ConfigError where there is neither."""
    if config is not None:
        return config
    name = default_config(workflow)
    complain(
        f"no --config: using {name} (pocket models, no GPU); `quorum init {workflow.name}` writes a file of your own"
    )
    return name


def configured(
    workflow: str, config: str | None, overrides: Sequence[str] | None, run_dir: str | None
) -> tuple[Workflow[Any], RunConfig, str]:
    """The workflow, its configuration and the run folder of a command. Raises ConfigError."""
    from ray_pipeline.config.loading import load_config

    chosen = find_workflow(workflow)
    settings: RunConfig = load_config(chosen.config, chosen_config(chosen, config), overrides or [])
    return chosen, settings, settings.run_folder(run_dir)


def complain(message: object) -> None:
    """Print a line on standard error."""
    _err.print(shown(f"quorum: {message}"), markup=False, highlight=False)


def end_if_failed(outcome: RunOutcome) -> None:
    """End the command if stages failed, with their reasons: exit code 2 where each is the user's input, else 1."""
    if not outcome.failures:
        return
    for name, failure in outcome.failures.items():
        complain(f"{name} failed: {failure.reason}")
    if outcome.not_run:
        complain(f"not run as a result: {', '.join(outcome.not_run)}")
    complain("finished work is kept; rerun the same command to resume")
    raise typer.Exit(BAD_INPUT if all(f.bad_input for f in outcome.failures.values()) else STAGE_FAILED)


@contextlib.contextmanager
def refused() -> Iterator[None]:
    """End the command on bad input with one line and exit code 2, and after SIGINT or SIGTERM with 130 or 143."""
    from ray_pipeline.graph.heartbeat import RunBusy

    try:
        yield
    except (ValueError, FileNotFoundError, RunBusy) as error:  # configuration, input and storage errors are ValueErrors
        complain(error)
        raise typer.Exit(BAD_INPUT) from error
    except KeyboardInterrupt as interrupt:  # `Interrupted` has the signal
        complain("interrupted; finished work is kept; rerun the same command to resume")
        raise typer.Exit(128 + getattr(interrupt, "number", signal.SIGINT)) from None
