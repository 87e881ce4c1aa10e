"""A user's mistakes get one clear message and exit code 2 before anything starts, or 1 when a stage finds them."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from ray_pipeline.graph.heartbeat import Heartbeat
from ray_pipeline.store.files import Folder
from tests.dags.conftest import CONFIG, SMALL, run

pytestmark = pytest.mark.e2e


def refused(folder: Path, *arguments: str) -> str:
    quorum = run("run", "dmapo", "-c", CONFIG, "--run-dir", str(folder), *arguments, expect=2)
    assert quorum.engines == {}
    assert "Traceback" not in quorum.output
    return quorum.output


def test_a_misspelt_key(tmp_path: Path) -> None:
    assert "did you mean 'desirable_at'" in refused(tmp_path / "run", "gate.desireable_at=8")


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
    quorum = run(
        "run", "dmapo", "-c", CONFIG, "--run-dir", str(tmp_path / "run"), "--to", "prompts",
        f"prompts.sources={source}", expect=2,
    )  # fmt: skip
    assert str(file) in quorum.output and "line 1" in quorum.output and "Traceback" not in quorum.output


def test_a_run_folder_with_a_living_owner_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    done = threading.Event()
    with Heartbeat(Folder(str(folder)), beat_seconds=0.5):
        output = refused(folder, "--to", "prompts", *SMALL)
    done.set()
    assert "another process is running" in output


def test_from_needs_the_stages_before_it(tmp_path: Path) -> None:
    assert "--from gate needs" in refused(tmp_path / "run", "--from", "gate", "--to", "gate", *SMALL)
