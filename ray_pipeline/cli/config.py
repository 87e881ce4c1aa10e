"""`quorum config`: the reference of all keys, and JSON schemas for editors."""

from __future__ import annotations

import json
import pathlib
from typing import Annotated

import typer

from ray_pipeline.cli.terminal import refused

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
