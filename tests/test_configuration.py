"""Every configuration key is described, and docs/configuration.md is what the settings classes say."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ray_pipeline.cli import app
from ray_pipeline.config.reference import blocks_of, description_of, reference
from ray_pipeline.workflow.registry import find_workflow, workflow_names

DOCUMENT = Path(__file__).parents[1] / "docs" / "configuration.md"


@pytest.mark.parametrize("workflow", workflow_names())
def test_every_key_has_a_description(workflow: str) -> None:
    bare = [
        f"{path}.{name} ({block.__name__})"
        for path, block in blocks_of(find_workflow(workflow).config)
        for name, field in block.model_fields.items()
        if not description_of(field)
    ]
    assert not bare


def test_the_document_is_up_to_date() -> None:
    made = reference({name: find_workflow(name).config for name in workflow_names()})
    message = "run `quorum config reference --write docs/configuration.md`"
    assert DOCUMENT.read_text(encoding="utf-8") == made, message
    assert "| `tau` | number, ≥ 0 | `2.5` |" in made


def test_the_command_prints_a_schema_that_knows_the_keys() -> None:
    done = CliRunner().invoke(app, ["config", "schema", "dmapo"])
    assert done.exit_code == 0
    schema = json.loads(done.stdout)
    assert schema["properties"]["gate"] and schema["$defs"]["GateConfig"]["properties"]["tau"]["description"]
    assert "$defs" in schema and "JsonlSource" in schema["$defs"] and schema["additionalProperties"] is False
    assert CliRunner().invoke(app, ["config", "schema", "dmapp"]).exit_code == 2
