"""A user's mistakes get one clear message and exit code 2 before anything starts, or 1 when a stage finds them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ray_pipeline.graph.heartbeat import Heartbeat
from ray_pipeline.store.files import Folder
from tests.dags.conftest import CONFIG, SMALL, run
from tests.dags.in_process import here

pytestmark = pytest.mark.e2e


def command(folder: Path, *arguments: str) -> list[str]:
    return ["run", "dmapo", "-c", CONFIG, "--run-dir", str(folder), *arguments]


def refused(folder: Path, *arguments: str) -> str:
    ended = here(*command(folder, *arguments), expect=2)
    assert not ended.engines and "Traceback" not in ended.output
    return ended.output


def test_a_misspelt_key(tmp_path: Path) -> None:
    """In a process of its own, as a user meets it."""
    quorum = run(*command(tmp_path / "run", "gate.desireable_at=8"), expect=2)
    assert quorum.engines == {} and "Traceback" not in quorum.output
    assert "did you mean 'desirable_at'" in quorum.output


def test_a_model_that_does_not_exist(tmp_path: Path) -> None:
    output = refused(tmp_path / "run", f"models.judge.model={tmp_path}/no-such-model")
    assert "no-such-model" in output and "models.judge" in output
    assert not (tmp_path / "run" / "manifest.json").exists()


def test_an_unknown_stage(tmp_path: Path) -> None:
    assert "no stage 'jugde'" in refused(tmp_path / "run", "--to", "jugde")


def test_an_unusable_prompt_file(tmp_path: Path) -> None:
    """How a stage's own refusal comes back; what is unusable, in which words, is in tests/data/test_sources.py."""
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"question": 3}\n')
    source = json.dumps([{"type": "jsonl", "path": str(file), "column": "question"}])
    output = refused(tmp_path / "run", "--to", "prompts", f"prompts.sources={source}")
    assert str(file) in output and "line 1" in output


def test_a_run_folder_with_a_living_owner_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with Heartbeat(Folder(str(folder)), beat_seconds=0.5):
        quorum = run(*command(folder, "--to", "prompts", *SMALL), expect=2)
    assert quorum.engines == {} and "Traceback" not in quorum.output
    assert "another process is running" in quorum.output


def test_from_needs_the_stages_before_it(tmp_path: Path) -> None:
    assert "--from gate needs" in refused(tmp_path / "run", "--from", "gate", "--to", "gate", *SMALL)
