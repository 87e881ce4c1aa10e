"""A training that is asked to end does so at a checkpoint, and goes on from it as if it had never stopped."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from transformers import TrainerCallback

from ray_pipeline.store.files import Folder
from ray_pipeline.training.spec import PROGRESS, STOP

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


class Breaks(TrainerCallback):
    """Put infinity into one place of the third step."""

    def __init__(self, trainer: Any, place: str) -> None:
        self._trainer, self._place, self._now = trainer, place, False
        self._weight = next(p for p in trainer.model.parameters() if p.requires_grad)
        self._weight.register_hook(lambda gradient: self._broken("gradients", gradient))
        loss = trainer.compute_loss
        trainer.compute_loss = lambda *args, **kwargs: self._broken("the loss", loss(*args, **kwargs))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._now = state.global_step == 2

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        with torch.no_grad():
            self._weight.copy_(self._broken("trained weights", self._weight))

    def _broken(self, place: str, value: torch.Tensor) -> torch.Tensor:
        return value + torch.inf if self._now and self._place == place else value


@pytest.mark.parametrize(
    ("place", "found"),
    [
        ("the loss", "the loss"),  # its gradients are those of a finite loss
        ("gradients", "gradients, trained weights"),
        ("trained weights", "trained weights"),
    ],
)
def test_a_diverged_training_ends_before_it_is_saved(
    make_spec: MakeSpec, tmp_path: Path, place: str, found: str
) -> None:
    from ray_pipeline.training.callbacks import Diverged, StopWhenDiverged
    from ray_pipeline.training.trainer import build_trainer

    torch.set_num_threads(1)
    spec = make_spec("simpo", num_workers=1, epochs=0.5, save_steps=1, logging_steps=10, micro_batches=2)
    trainer = build_trainer(spec, str(tmp_path / "scratch"))
    trainer.add_callback(Breaks(trainer, place))
    trainer.add_callback(StopWhenDiverged(trainer))
    with pytest.raises(Diverged, match=f"NaN or infinity in {found} at step 3 of 3"):
        trainer.train()
    assert sorted(path.name for path in (tmp_path / "scratch").glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]


def test_what_it_is_doing_reaches_the_stage(tmp_path: Path) -> None:
    """Through the file that worker and driver share: phases, and steps once the first of this attempt is made."""
    from ray_pipeline.policy import train
    from ray_pipeline.training.callbacks import LogProgress, report

    folder = Folder(str(tmp_path))
    progress: Any = LogProgress(4, folder, every_s=0.0)
    state: Any = SimpleNamespace(is_world_process_zero=True, global_step=100, max_steps=186, epoch=1.5)

    def step() -> None:
        state.global_step += 1
        progress.on_log(None, state, None, {"loss": 0.5})

    said: list[Any] = []
    moments = iter(
        [
            lambda: report(folder, "loading model"),
            lambda: progress.on_train_begin(None, state, None),
            step,
            lambda: progress.on_train_end(None, state, None),
        ]
    )

    def wait(seconds: float) -> bool:
        moment = next(moments, None)
        if moment is not None:
            moment()
        return moment is None

    given: Any = SimpleNamespace(
        folder=folder, stopping=lambda: None, phase=said.append, tick=lambda *a: said.append(a)
    )
    train._tell(given, cast(Any, SimpleNamespace(wait=wait)))
    assert [what for what in said if isinstance(what, str)] == [
        "loading model",
        "training",
        "training",
        "writing model",
    ]
    (first, last) = [what for what in said if not isinstance(what, str)]
    assert first[:2] == last[:2] == (101, 186) and first[2].startswith("epoch 1.50, loss 0.5000, ")
    progress.on_log(None, SimpleNamespace(**{**vars(state), "is_world_process_zero": False}), None, {"loss": 9.0})
    assert folder.read_json(PROGRESS)["phase"] == "writing model"
