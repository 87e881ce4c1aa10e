"""Workflows by name, from an installed package, and from a user's file."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ray_pipeline import extensions
from ray_pipeline.cli import app
from ray_pipeline.config.messages import ConfigError
from ray_pipeline.workflow.registry import find_workflow, workflow_names

MINE = """
from ray_pipeline import register
from ray_pipeline.data.prompts import prompts
from ray_pipeline.data.prompts import PromptsConfig
from ray_pipeline.graph.stage import Dag
from ray_pipeline.workflow.config import RunConfig
from ray_pipeline.workflow.registry import Workflow


class MyConfig(RunConfig):
    prompts: PromptsConfig = PromptsConfig()

    @property
    def num_shards(self) -> int:
        return self.prompts.num_shards


def wire(config, run_folder):
    return Dag("mine", [prompts(config.prompts)])


register("workflow", "mine")(Workflow(name="mine", config=MyConfig, wire=wire))
"""


def test_every_module_of_dags_defines_the_workflow_of_its_name() -> None:
    assert workflow_names() == ["agreement", "baselines", "benchmarks", "dmapo", "fellowship", "winrate"]
    for name in workflow_names():
        assert find_workflow(name).name == name
    with pytest.raises(ConfigError, match=r"unknown workflow 'dmapp'; choose from agreement, .* or give a \.py file"):
        find_workflow("dmapp")


def test_a_users_file_runs(tmp_path: Path) -> None:
    (tmp_path / "my_file_dag.py").write_text(MINE)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "hello"}\n')
    config = tmp_path / "mine.yaml"
    config.write_text(f"prompts: {{sources: [{{type: jsonl, path: {tmp_path}/prompts.jsonl, column: prompt}}]}}")
    command = ["run", str(tmp_path / "my_file_dag.py"), "-c", str(config), "--run-dir", str(tmp_path / "run")]
    shown = CliRunner().invoke(app, [*command, "--dry-run"])
    assert shown.exit_code == 0 and "prompts" in shown.output, shown.output
    refused = CliRunner().invoke(app, [*command, "models={x: {model: y}}", "--dry-run"])
    assert refused.exit_code == 2
    assert "models.x is not used by any stage; remove it or reference it" in " ".join(refused.output.split())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "registers no workflow"),
        (
            f"{MINE}\nregister('workflow', 'other')(Workflow(name='other', config=MyConfig, wire=wire))",
            "several: mine, other",
        ),
        ("import no_such_module", "raised ModuleNotFoundError"),
        (None, "cannot be read"),
    ],
)
def test_a_file_that_defines_no_workflow(text: str | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / f"wrong_dag_{len(text or '')}.py"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        find_workflow(str(file))


def test_an_installed_package_brings_its_workflow(monkeypatch: pytest.MonkeyPatch) -> None:
    point = importlib.metadata.EntryPoint("theirs", "dags.dmapo:WORKFLOW", extensions.GROUPS["workflow"])
    monkeypatch.setattr(extensions, "_entry_points", lambda kind: iter([point]))
    monkeypatch.setattr(extensions, "_registered", dict(extensions._registered))
    assert workflow_names()[-1] == "theirs" and find_workflow("theirs") is find_workflow("dmapo")


def test_the_version() -> None:
    shown = CliRunner().invoke(app, ["--version"])
    assert shown.exit_code == 0 and shown.output.split() == ["quorum", importlib.metadata.version("quorum-align")]
