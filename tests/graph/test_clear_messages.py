"""Full disks, read-only storage, torn manifests, two processes at once: one clear message, and nothing is lost."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ray_pipeline.cli import app
from ray_pipeline.graph.heartbeat import Heartbeat
from ray_pipeline.graph.results import read_run
from ray_pipeline.graph.stage_work import explain
from ray_pipeline.store.errors import NotWritten, StoreError
from ray_pipeline.store.files import Folder, point_at


def no_room(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_is_told_with_the_file_and_leaves_what_was_there(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Folder(str(tmp_path))
    folder.write_bytes("a", b"old")
    with monkeypatch.context() as patch:
        patch.setattr(os, call, no_room)
        with pytest.raises(NotWritten, match=r"cannot write .*/a: No space left on device; free disk space there"):
            folder.write_bytes("a", b"new")
    assert folder.read_bytes("a") == b"old"
    assert os.listdir(tmp_path) == ["a"]
    folder.write_bytes("a", b"new")
    assert folder.read_bytes("a") == b"new"


@pytest.mark.parametrize(
    ("number", "told"),
    [
        (errno.EROFS, "mount it writable"),
        (errno.EACCES, "write permission there"),
        (errno.EDQUOT, "within the quota"),
        (errno.EIO, "rerun the same command to resume"),
    ],
)
def test_storage_that_takes_nothing_is_told_with_the_remedy(
    number: int, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(number, os.strerror(number))))
    with pytest.raises(NotWritten) as refused:
        Folder(str(tmp_path)).write_bytes("a", b"x")
    assert told in str(refused.value) and os.strerror(number) in str(refused.value)
    # Both what code that meets files expects, and what becomes a line for the user.
    assert isinstance(refused.value, OSError) and isinstance(refused.value, StoreError)
    assert explain("judge", refused.value).reason == str(refused.value)


def test_views_say_it_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "symlink", no_room)
    with pytest.raises(NotWritten, match=r"cannot write .*latest"):
        point_at(Folder(str(tmp_path)), "latest", "run")


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["run", "dmapo", "--config", "pocket", *arguments])
    return result.exit_code, " ".join(result.output.split())


def test_a_run_folder_below_a_file_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    code, said = run("--run-dir", str(tmp_path / "file" / "run"))
    assert code == 2
    assert said.startswith("quorum: ") and "cannot write" in said and "Traceback" not in said


def test_a_run_folder_on_a_full_disk_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.mkdir

    def full(path: Any, *args: Any, **kwargs: Any) -> None:
        if str(path).startswith(str(tmp_path)) and str(path).endswith("logs"):
            no_room()
        real(path, *args, **kwargs)

    monkeypatch.setattr(os, "mkdir", full)
    code, said = run("--run-dir", str(tmp_path / "run"))
    assert code == 2
    assert "logs: No space left on device; free disk space there, then rerun the same command to resume" in said
    assert "cannot write" in said


def test_a_second_submit_of_a_living_run_says_who_is_there(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path / "run"))
    with Heartbeat(folder, beat_seconds=0.1):
        code, said = run("--run-dir", folder.location)
    assert code == 2
    assert f"another process is running in {folder.location}" in said
    assert not (tmp_path / "run/manifest.json").exists()  # it touched nothing


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "is not valid JSON"),
        ("[]", "is no manifest"),
        ("{}", "is no manifest"),
        (json.dumps({"stages": {"gate": {}}, "num_shards": 4}), "is no manifest"),
        (json.dumps({"stages": {"gate": {"status": "done"}}, "num_shards": 4}), "is no manifest"),
        (json.dumps({"stages": ["gate"], "num_shards": 4}), "is no manifest"),
    ],
)
@pytest.mark.parametrize("command", ["report", "audit"])
def test_a_corrupt_manifest_is_named_with_the_remedy(command: str, content: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(StoreError, match=told):
        read_run(str(tmp_path))
    result = CliRunner().invoke(app, [command, str(tmp_path)])
    assert result.exit_code == 2
    said = " ".join(result.output.split())
    assert told in said and ("run again" in said or "rerun the same command" in said)
