"""Which checkpoint a training resumes from when files of some are damaged."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from ray_pipeline.store.files import Folder
from ray_pipeline.training.checkpoints import (
    SNAPSHOT,
    check_checkpoints,
    checkpoint_name,
    newest_checkpoint,
    write_checksums,
)

FILES = ("trainer_state.json", "optimizer.pt", "adapter_model.safetensors", "rng_state_1.pth", "shards/__1_0.distcp")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of two ranks with checkpoints at steps 4 and 8, as Ray Train keeps them."""
    for step in (4, 8):
        for rank, files in enumerate((FILES[:3], FILES[3:])):
            part = tmp_path / f"rank-{rank}" / f"checkpoint-{step}"
            for name in files:
                (part / name).parent.mkdir(parents=True, exist_ok=True)
                (part / name).write_bytes(random.Random(f"{step} {name}").randbytes(5000))
            write_checksums(part, rank)
            for file in part.rglob("*"):
                if file.is_file():
                    target = tmp_path / f"step-{step:08d}" / file.relative_to(part)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(file.read_bytes())
    record = [{"checkpoint_dir_name": f"step-{step:08d}", "metrics": {}} for step in (4, 8)]
    (tmp_path / SNAPSHOT).write_text(json.dumps({"checkpoint_results": record}))
    return tmp_path


def chosen(run: Path, recorded: str | None = "step-00000008") -> tuple[str | None, list[str]]:
    told: list[str] = []
    check_checkpoints(Folder(str(run)), told.append)
    return newest_checkpoint(Folder(str(run)), recorded), told


def test_a_whole_checkpoint_is_used(run: Path) -> None:
    (run / "step-00000012").mkdir()  # its upload was interrupted
    assert chosen(run) == ("step-00000008", [])
    assert checkpoint_name(Folder(str(run)), 12) == "step-00000012"


@pytest.mark.parametrize("name", [*FILES, "checksums-0.json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "gone"])
def test_from_a_damaged_one_it_goes_back_to_the_one_before(run: Path, name: str, damage: str) -> None:
    path = run / "step-00000008" / name
    data = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes({"cut": data[: len(data) // 2], "flip": data, "empty": b""}[damage])
    found, (told,) = chosen(run)
    assert found == "step-00000004" and f"{run / 'step-00000008'} is damaged (" in told
    assert chosen(run) == ("step-00000004", [])  # told once
    assert checkpoint_name(Folder(str(run)), 8) == "step-00000008-2"
    (run / "step-00000004" / "optimizer.pt").unlink()
    found, (told,) = chosen(run)
    assert found is None and "step-00000004 is damaged (optimizer.pt is missing)" in told


def test_a_checkpoint_of_a_version_without_checksums_is_used(run: Path) -> None:
    for file in run.glob("step-*/checksums-*"):
        file.unlink()
    assert chosen(run) == ("step-00000008", [])


@pytest.mark.parametrize("damage", ["cut", "lost"])
def test_a_damaged_record_does_not_lose_the_checkpoints(run: Path, damage: str) -> None:
    if damage == "cut":
        (run / SNAPSHOT).write_text((run / SNAPSHOT).read_text()[:30])
    else:
        (run / "step-00000004").rename(run / "elsewhere")
    (run / "step-00000012").mkdir()
    (run / "step-00000012" / "trainer_state.json").write_text("{}")
    found, told = chosen(run, None)
    assert found == "step-00000008"
    assert f"{SNAPSHOT} is damaged (" in told[0] and f"{SNAPSHOT}.damaged-1" in told[0]
    assert "step-00000012 is damaged (its checksums are missing)" in told[1] and len(told) == 2


def test_a_new_run_begins_at_the_beginning(tmp_path: Path) -> None:
    (tmp_path / "step-00000002").mkdir()  # its upload was interrupted, and Ray Train has no record of it
    assert chosen(tmp_path, None) == (None, []) and chosen(tmp_path / "none", None) == (None, [])
