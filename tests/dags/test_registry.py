"""Workflows by name, from an installed package, and from a user's file."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ray_pipeline import extensions
from ray_pipeline.cli import app
from ray_pipeline.config.messages import ConfigError
from ray_pipeline.graph.failures import ShardFailure, write_failures
from ray_pipeline.graph.results import read_run
from ray_pipeline.store.files import Folder
from ray_pipeline.workflow.registry import find_workflow, workflow_names
from ray_pipeline.workflow.stored import stored

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
    assert workflow_names() == [
        "agreement",
        "baselines",
        "benchmarks",
        "dmapo",
        "fellowship",
        "judge_check",
        "train",
        "winrate",
    ]
    for name in workflow_names():
        assert find_workflow(name).name == name
    with pytest.raises(ConfigError, match=r"unknown workflow 'dmapp'; choose from agreement, .* or name a \.py file"):
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


def test_a_run_of_a_users_file_is_found_by_the_file_again(tmp_path: Path) -> None:
    """Its manifest has the file: the name of the workflow alone is unknown to the next process."""
    file, folder = tmp_path / "my_stored_dag.py", tmp_path / "run"
    file.write_text(MINE.replace("wire=wire)", "wire=wire, page=lambda run: run.folder)"))
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "hello"}\n')
    config = tmp_path / "mine.yaml"
    config.write_text(f"prompts: {{sources: [{{type: jsonl, path: {tmp_path}/prompts.jsonl, column: prompt}}]}}")

    def quorum(*arguments: str, code: int = 0) -> str:
        shown = CliRunner().invoke(app, list(arguments))
        assert shown.exit_code == code, shown.output
        return " ".join(shown.output.split())

    quorum("run", str(file), "-c", str(config), "--run-dir", str(folder), "--executor", "inprocess")
    run = read_run(str(folder))
    assert (run.workflow, run.reference) == ("mine", str(file))
    assert stored(run).config.num_shards == run.num_shards
    assert "report:" in quorum("report", str(folder))
    assert "mine makes no training rows to audit" in quorum("audit", str(folder), code=2)
    assert "runs of mine cannot be compared" in quorum("compare", str(folder), str(folder), code=2)

    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["stages"]["prompts"]["status"] = "failed"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    failed = ShardFailure(0, 1, "StoreError: the disk was full")
    write_failures(Folder(str(folder)) / manifest["stages"]["prompts"]["path"], {0: failed})
    assert "no failed shard is left" in quorum("retry", str(folder))
    assert read_run(str(folder)).reference == str(file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "registers no workflow"),
        (
            f"{MINE}\nregister('workflow', 'other')(Workflow(name='other', config=MyConfig, wire=wire))",
            "several: mine, other",
        ),
        ("import no_such_module", "raised ModuleNotFoundError"),
        (None, "cannot read"),
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
