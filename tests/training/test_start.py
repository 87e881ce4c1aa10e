"""Trainings that start from a trained adapter: its weights, their reference, and what is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ray_pipeline.training.methods import TrainingInputError
from ray_pipeline.training.spec import Reference, TrainSpec
from ray_pipeline.training.trainer import build_trainer, effective_settings

from .conftest import MakeSpec
from .test_fit import assert_same_weights, weights
from .test_losses import move

pytestmark = pytest.mark.e2e


@pytest.fixture
def start(make_spec: MakeSpec, tmp_path: Path) -> str:
    """The folder of an adapter that moved far from the base."""
    torch.set_num_threads(1)
    trainer = build_trainer(alone(make_spec), str(tmp_path / "first"))
    move(trainer)
    trainer.save_model(str(tmp_path / "start"))
    return str(tmp_path / "start")


def alone(make_spec: MakeSpec, method: str = "kto", **changes: Any) -> TrainSpec:
    return make_spec(method, num_workers=1, epochs=1, disable_dropout=True, **changes)


@pytest.mark.parametrize("method", ["kto", "dpo"])
@pytest.mark.parametrize("reference", ["base", "previous"])
def test_a_training_goes_on_from_an_adapter(
    make_spec: MakeSpec, tmp_path: Path, start: str, method: str, reference: Reference
) -> None:
    spec = alone(make_spec, method, adapter=start, reference=reference)
    trainer = build_trainer(spec, str(tmp_path / "scratch"))
    assert ("previous" if "starts from" in effective_settings(spec, trainer)["reference"] else "base") == reference
    trainer.save_model(str(tmp_path / "untrained"))
    assert_same_weights(start, tmp_path / "untrained")

    trainer.train()
    losses = [row for row in trainer.state.log_history if "loss" in row]
    moved = [abs(row["rewards/chosen"]) + abs(row["rewards/rejected"]) for row in losses]
    # Against its own start, an untrained policy has no reward; against the base, it has.
    assert (moved[0] < 1e-4) == (reference == "previous") and moved[-1] > 1e-4
    trainer.save_model(str(tmp_path / "trained"))
    assert [path.name for path in (tmp_path / "trained").iterdir() if path.is_dir()] == []
    trained = weights(tmp_path / "trained")
    assert trained.keys() == weights(start).keys()
    assert any(not torch.equal(trained[name], weight) for name, weight in weights(start).items())


def test_a_resumed_training_keeps_policy_and_reference(make_spec: MakeSpec, tmp_path: Path, start: str) -> None:
    spec = alone(make_spec, adapter=start, reference="previous")
    whole = build_trainer(spec, str(tmp_path / "whole"))
    whole.train()
    whole.save_model(str(tmp_path / "one"))
    resumed = build_trainer(spec, str(tmp_path / "resumed"))
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{whole.state.max_steps - 2}"))
    resumed.save_model(str(tmp_path / "two"))
    assert_same_weights(tmp_path / "one", tmp_path / "two", atol=1e-6)


def test_an_adapter_of_another_shape_is_refused(make_spec: MakeSpec, tmp_path: Path, start: str) -> None:
    fewer = alone(make_spec, adapter=start, lora={"r": 4, "alpha": 8, "target_modules": ["q_proj"]})
    with pytest.raises(TrainingInputError, match=r"weights that train\.lora does not"):
        build_trainer(fewer, str(tmp_path / "scratch"))
