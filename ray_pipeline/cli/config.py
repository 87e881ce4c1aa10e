"""`quorum config`: the reference of all keys, and JSON schemas for editors. `quorum init`: a file to start from."""

from __future__ import annotations

import json
import pathlib
from typing import Annotated

import typer

from ray_pipeline.cli.terminal import WorkflowArgument, refused, say
from ray_pipeline.config.messages import ConfigError
from ray_pipeline.config.starters import MACHINES

app = typer.Typer(help="list configuration keys; print JSON schemas for editors", no_args_is_help=True)


@app.command()
def reference(
    write: Annotated[str | None, typer.Option(help="file to write; default: print")] = None,
) -> None:
    """List all configuration keys with values, defaults and meaning, as Markdown."""
    from ray_pipeline.config.reference import reference as render
    from ray_pipeline.workflow.registry import find_workflow, workflow_names

    text = render({name: find_workflow(name).config for name in workflow_names()})
    if write is None:
        typer.echo(text)
    else:
        pathlib.Path(write).write_text(text, encoding="utf-8", newline="\n")


@app.command()
def schema(workflow: Annotated[str, typer.Argument(help="name of a workflow, or a file that registers one")]) -> None:
    """Print the JSON schema of a workflow's configuration.

    Save it, and refer to it in the first line of a YAML file: `# yaml-language-server: $schema=dmapo.schema.json`.
    """
    from ray_pipeline.workflow.registry import find_workflow

    with refused():
        config = find_workflow(workflow).config
    typer.echo(json.dumps(config.model_json_schema(), indent=2, ensure_ascii=False))


def init(
    workflow: WorkflowArgument = "dmapo",
    machine: Annotated[str, typer.Option("--for", help=f"where the models run: {', '.join(MACHINES)}")] = "laptop",
    out: Annotated[
        pathlib.Path | None, typer.Option("--out", "-o", help="file to write; default: WORKFLOW.yaml")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="overwrite the file")] = False,
) -> None:
    """Write a commented configuration to start from, which runs as it is.

    laptop: small models without a GPU; gpus: the published models; endpoint: an OpenAI-compatible endpoint alone, for
    data, judgements, win rates and benchmarks; nothing is trained.

    Examples: `quorum init`, `quorum init fellowship --for endpoint -o mine.yaml`, then `quorum check` as it says.
    """
    from ray_pipeline.workflow.registry import find_workflow

    with refused():
        found = find_workflow(workflow)
        if (starter := found.starters.get(machine)) is None:  # type: ignore[call-overload]
            choice = f"choose from {', '.join(found.starters)}" if found.starters else "it comes without any"
            reason = found.not_on.get(machine)  # type: ignore[call-overload]
            raise ConfigError(
                f"{workflow} has no starter file for {machine!r}{f': {reason}' if reason else f'; {choice}'}"
            )
        file = out or pathlib.Path(f"{pathlib.Path(workflow).stem}.yaml")
        try:
            with file.open("w" if force else "x", encoding="utf-8", newline="\n") as stream:
                stream.write(starter.text(workflow, machine, str(file)))
        except FileExistsError as error:
            raise ConfigError(f"{file} exists; choose another file with -o, or pass --force to overwrite it") from error
        except OSError as error:
            raise ConfigError(f"{file}: {error.strerror}; name a file in an existing folder") from error
    say(f"wrote {file}, for {MACHINES[machine]}")
    say(f"next: quorum check {workflow} -c {file}")
    say(f"then: quorum run {workflow} -c {file}")
