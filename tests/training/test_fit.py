"""Real runs: two gloo workers under Ray Train on a local Ray."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch

from ray_pipeline.store.schemas import TRAIN_METRICS
from ray_pipeline.training import TrainResult, TrainSpec, fit
from ray_pipeline.training.spec import PROGRESS

from .conftest import MakeSpec

pytestmark = pytest.mark.e2e

STEPS = 12


def kto_spec(make_spec: MakeSpec) -> TrainSpec:
    spec = make_spec("kto", epochs=2, disable_dropout=False)
    return dataclasses.replace(spec, val_files=spec.train_files.replace("train", "val"))


@pytest.fixture(scope="module")
def finished(make_spec: MakeSpec, local_ray: None) -> tuple[TrainSpec, TrainResult]:
    spec = kto_spec(make_spec)
    return spec, fit(spec)


def weights(adapter: str) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(Path(adapter) / "adapter_model.safetensors")


def assert_same_adapter(left: str, right: str) -> None:
    one, two = weights(left), weights(right)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def steps(result: TrainResult, split: str) -> list[int]:
    return [row["step"] for row in result.metrics.to_pylist() if row["split"] == split]


def test_two_workers_train_with_a_row_per_step(finished: tuple[TrainSpec, TrainResult]) -> None:
    spec, result = finished
    assert (result.steps, result.epochs, result.resumed_from) == (STEPS, 2.0, None)
    assert result.metrics.schema == TRAIN_METRICS
    assert steps(result, "train") == list(range(1, STEPS + 1))
    assert steps(result, "eval") == [STEPS // 2, STEPS]
    first, *_, last = [row for row in result.metrics.to_pylist() if row["split"] == "train"]
    assert first["rewards_chosen"] == first["rewards_rejected"] == 0.0  # the policy is the reference still
    assert first["loss"] == pytest.approx(0.5)
    assert last["loss"] < first["loss"]
    assert first["rewards_accuracies"] is None  # KTO has none
    assert result.effective["lora_dropout"] == spec.lora.dropout
    assert result.effective["world_size"] == 2
    assert result.effective["effective_batch"] == 8
    assert result.effective["eval_rows"] == result.data["val_rows_used"] == 8
    assert result.data["rows"] == result.effective["train_rows"] == 48


def test_adapter_and_merged_model_load_and_agree(finished: tuple[TrainSpec, TrainResult]) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec, result = finished
    config = json.loads((Path(result.adapter) / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == spec.model
    names = {path.name for path in Path(result.adapter).iterdir()}
    assert {"adapter_model.safetensors", "tokenizer.json", "chat_template.jinja", "README.md"} <= names
    assert not [name for name in names if name.endswith(".bin")]
    assert "0123abcd" in (Path(result.merged) / "README.md").read_text()
    assert sorted(path.name for path in Path(spec.output_dir).iterdir()) == ["adapter", "merged", PROGRESS]
    assert json.loads((Path(spec.output_dir) / PROGRESS).read_text())["step"] == result.steps

    tokenizer = AutoTokenizer.from_pretrained(result.merged)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "add seven and nine"}], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    merged = AutoModelForCausalLM.from_pretrained(result.merged).eval()
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(spec.model), result.adapter).eval()
    with torch.no_grad():
        difference = (merged(ids).logits - adapted(ids).logits).abs().max()
        with adapted.disable_adapter():
            effect = (merged(ids).logits - adapted(ids).logits).abs().max()
    assert difference < 1e-5 and result.max_logit_diff < 1e-5
    assert effect > 1e-2


def test_a_finished_run_takes_no_more_steps(finished: tuple[TrainSpec, TrainResult]) -> None:
    import ray

    spec, result = finished
    before = sorted(os.listdir(Path(spec.storage_path) / spec.run_name))
    inside_a_task = ray.remote(num_cpus=0)(fit)  # as the train stage calls it
    again = ray.get(inside_a_task.remote(dataclasses.replace(spec, output_dir=spec.output_dir + "-again")))
    assert sorted(os.listdir(Path(spec.storage_path) / spec.run_name)) == before
    assert (again.steps, again.resumed_from) == (STEPS, STEPS)
    assert again.metrics.equals(result.metrics)
    assert_same_adapter(again.adapter, result.adapter)


def test_a_killed_worker_costs_nothing_but_time(
    finished: tuple[TrainSpec, TrainResult], make_spec: MakeSpec, local_ray: None
) -> None:
    spec = kto_spec(make_spec)
    killed: list[int] = []

    def kill_a_worker() -> None:
        snapshot = Path(spec.storage_path) / spec.run_name / "checkpoint_manager_snapshot.json"
        while not snapshot.exists() or "step-" not in snapshot.read_text():  # what Ray Train restarts from
            time.sleep(0.02)
        for process in psutil.Process().children(recursive=True):  # the raylet's, so of this test's own cluster
            if process.name().startswith("ray::RayTrain") and not killed:
                process.send_signal(signal.SIGKILL)
                killed.append(process.pid)

    killer = threading.Thread(target=kill_a_worker, daemon=True)
    killer.start()
    result = fit(spec)
    killer.join(timeout=1)
    assert killed
    assert result.resumed_from is not None and 2 <= result.resumed_from < STEPS
    assert result.steps == STEPS
    assert result.metrics.equals(finished[1].metrics)  # no hole, no duplicate, the same numbers
    assert result.train_loss == finished[1].train_loss
    assert_same_adapter(result.adapter, finished[1].adapter)


def test_dpo_trains_from_bfloat16_with_accumulation(make_spec: MakeSpec, local_ray: None) -> None:
    from safetensors.torch import load_file

    spec = make_spec(
        "dpo",
        dtype="bfloat16",
        batch_size=2,
        gradient_accumulation=4,
        epochs=2,
        disable_dropout=True,
        gradient_checkpointing=True,
    )
    result = fit(spec)
    assert result.steps == 6 and steps(result, "train") == list(range(1, 7))
    first, *_, last = result.metrics.to_pylist()
    assert first["rewards_margins"] == 0.0 and first["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert last["loss"] < first["loss"]
    assert last["rewards_accuracies"] is not None and last["kl"] is None
    assert result.effective["lora_dropout"] == 0.0  # TRL zeroes the adapter's dropout too
    assert (result.effective["base_dtype"], result.effective["adapter_dtype"]) == ("bfloat16", "float32")
    assert {t.dtype for t in load_file(Path(result.merged) / "model.safetensors").values()} == {torch.bfloat16}
