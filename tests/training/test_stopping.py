"""A training that is asked to end does so at a checkpoint, and goes on from it as if it had never stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ray_pipeline.store.files import Folder
from ray_pipeline.training.spec import STOP

from .conftest import MakeSpec


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("method", ["kto", "simpo"])
def test_it_ends_at_a_checkpoint_and_goes_on(make_spec: MakeSpec, tmp_path: Path, method: str) -> None:
    from ray_pipeline.training.callbacks import StopAtCheckpoint
    from ray_pipeline.training.trainer import build_trainer

    folder = Folder(str(tmp_path / "policy"))
    spec = make_spec(method, num_workers=1, epochs=0.5, save_steps=4)

    def trainer(scratch: str) -> tuple[Any, StopAtCheckpoint]:
        stop = StopAtCheckpoint(folder)
        return build_trainer(spec, str(tmp_path / scratch), callbacks=[stop]), stop

    whole, stop = trainer("whole")
    whole.train()
    assert stop.reason is None and whole.state.global_step == 6

    folder.write_json(STOP, {"reason": "the money is gone"})
    cut, stop = trainer("cut")
    cut.train()
    assert (stop.reason, cut.state.global_step) == ("the money is gone", 4)

    folder.delete(STOP)
    again, stop = trainer("cut")
    again.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-4"))
    assert stop.reason is None and again.state.global_step == 6
    assert losses(again) == losses(whole)


def test_a_last_checkpoint_is_no_place_to_stop(make_spec: MakeSpec, tmp_path: Path) -> None:
    from ray_pipeline.training.callbacks import StopAtCheckpoint
    from ray_pipeline.training.trainer import build_trainer

    folder = Folder(str(tmp_path / "policy"))
    folder.write_json(STOP, {"reason": "the money is gone"})
    stop = StopAtCheckpoint(folder)
    trainer = build_trainer(
        make_spec("kto", num_workers=1, epochs=0.5, save_steps=6), str(tmp_path / "scratch"), callbacks=[stop]
    )
    trainer.train()
    assert stop.reason is None and trainer.state.global_step == 6
