"""What `quorum run` refuses when it is the driver of a submitted job."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from ray_pipeline.cli import app


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "run.root is 'runs'"),
        (["--run-dir", "mine/run"], "--run-dir is 'mine/run'"),
        (["--run-dir", "/tmp/nowhere/run", "calls.root=calls"], "calls.root is 'calls'"),
    ],
)
def test_folders_that_would_vanish_with_the_job_are_refused_before_anything_is_written(
    arguments: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["run", "dmapo", "--config", "pocket", *arguments])
    assert result.exit_code == 2, result.output
    said = " ".join(result.output.split())
    assert told in said and "absolute path" in said and "s3://" in said
    assert list(tmp_path.iterdir()) == []
