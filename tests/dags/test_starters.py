"""Starter files of `quorum init`: each loads and passes a dry run as it is written, and none replaces a file."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from ray_pipeline.bench.settings import BenchmarksSettings
from ray_pipeline.config.loading import UniqueKeys, load_config, read_yaml
from ray_pipeline.config.starters import MACHINES
from ray_pipeline.workflow import training
from ray_pipeline.workflow.registry import find_workflow, workflow_names
from tests.golden.test_goldens import outside_world
from tests.operate.at_an_endpoint import quorum

POCKET = {name: pocket for name in workflow_names() if (pocket := find_workflow(name).pocket) is not None}
COMBINATIONS = [(name, machine) for name in workflow_names() for machine in find_workflow(name).starters]


@pytest.fixture(autouse=True)
def _away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    """A folder of the user's, the hub's replies, and no TRL, which takes many seconds to import."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-0123456789abcdef0123")
    monkeypatch.setattr(training, "validate_trainer_args", lambda *_: None)
    monkeypatch.setattr(BenchmarksSettings, "check", lambda self: None)  # question files and nltk's data
    with outside_world(tmp_path):
        yield


def test_every_workflow_has_starters_where_they_make_sense() -> None:
    found = {machine: {name for name, of in COMBINATIONS if of == machine} for machine in MACHINES}
    assert found["gpus"] == set(workflow_names()) and found["laptop"] == set(POCKET)
    assert found["endpoint"] == set(workflow_names()) - {"train", "baselines"}  # these train


@pytest.mark.parametrize(("workflow", "machine"), COMBINATIONS)
def test_a_starter_file_passes_a_dry_run(workflow: str, machine: str, tmp_path: Path) -> None:
    told = quorum("init", workflow, "--for", machine, "-o", "mine.yaml")
    assert f"next: quorum check {workflow} -c mine.yaml" in told
    text = (tmp_path / "mine.yaml").read_text()
    assert text.startswith(f"# Starter file of `quorum init {workflow} --for {machine}`")
    assert all(len(line) <= 120 for line in text.splitlines()[:5])
    dry = quorum("run", workflow, "-c", "mine.yaml", "--dry-run")
    assert "to do" in dry and "problem" not in dry
    if machine == "endpoint":
        config = load_config(find_workflow(workflow).config, "mine.yaml")
        assert all(model.endpoint is not None for model in config.served().values())
        assert " train " not in dry


@pytest.mark.parametrize(("workflow", "source"), [("dmapo", "dmapo"), ("fellowship", "fellowship")])
def test_a_starter_file_is_a_shipped_one(workflow: str, source: str, tmp_path: Path) -> None:
    """Word for word where the machine needs nothing else, and block by block at an endpoint."""
    shipped = read_yaml(source)
    quorum("init", workflow, "--for", "gpus", "-o", "mine.yaml")
    assert yaml.load((tmp_path / "mine.yaml").read_text(), UniqueKeys) == shipped
    quorum("init", workflow, "--for", "endpoint", "-o", "mine.yaml", "--force")
    made = yaml.load((tmp_path / "mine.yaml").read_text(), UniqueKeys)
    assert made["train"] is None and set(made["models"]) == set(shipped["models"])
    if workflow == "fellowship":
        for block in set(shipped) - {"models", "train", "evaluate"}:
            assert made[block] == shipped[block]


def test_a_file_is_replaced_only_by_force(tmp_path: Path) -> None:
    quorum("init")
    (tmp_path / "dmapo.yaml").write_text("mine: true\n")
    assert "dmapo.yaml exists; choose another file with -o, or pass --force" in quorum("init", code=2)
    assert (tmp_path / "dmapo.yaml").read_text() == "mine: true\n"
    quorum("init", "--force")
    assert "Starter file" in (tmp_path / "dmapo.yaml").read_text()


def test_what_makes_no_sense_is_refused() -> None:
    for workflow, nearest in (("train", "init dmapo --for endpoint"), ("baselines", "init benchmarks --for endpoint")):
        refusal = " ".join(quorum("init", workflow, "--for", "endpoint", code=2).split())
        assert f"{workflow} has no starter file for 'endpoint': it trains models, and an endpoint gives out" in refusal
        assert nearest in refusal
    assert "dmapo has no starter file for 'gpu'; choose from laptop, gpus, endpoint" in quorum(
        "init", "dmapo", "--for", "gpu", code=2
    )
    assert "unknown workflow 'dmapp'" in quorum("init", "dmapp", code=2)
    assert "name a file in an existing folder" in quorum("init", "-o", "nowhere/mine.yaml", code=2)


@pytest.mark.parametrize(("workflow", "name"), POCKET.items())
def test_without_a_file_a_workflow_runs_its_pocket_configuration(workflow: str, name: str, tmp_path: Path) -> None:
    told = quorum("run", workflow, "--dry-run", "--run-dir", str(tmp_path / "run"))
    assert f"no --config: using {name} (pocket models, no GPU)" in told and "to do" in told


def test_a_workflow_of_ones_own_needs_a_file(tmp_path: Path) -> None:
    own = Path(__file__).parents[2] / "examples" / "my_workflow.py"
    assert "sample has no configuration of its own; pass one with --config" in quorum("run", str(own), code=2)
