"""Real runs: two gloo workers under Ray Train on a local Ray."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import torch

from ray_pipeline.store.files import Folder
from ray_pipeline.store.schemas import TRAIN_METRICS
from ray_pipeline.training.fit import fit
from ray_pipeline.training.methods import METHODS, TrainingInputError
from ray_pipeline.training.spec import PROGRESS, STOP, ModelNotWritten, TrainingStopped, TrainResult, TrainSpec
from tests.interpreter import interpreter

from .conftest import (
    DPO_SCHEMA,
    REPOSITORY,
    STEPS,
    MakeSpec,
    dpo_rows,
    undisturbed_spec,
    with_validation,
    write_rows,
)

pytestmark = pytest.mark.e2e

Finished = tuple[TrainSpec, TrainResult]


def weights(folder: str | Path, name: str = "adapter_model") -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(Path(folder) / f"{name}.safetensors")


def assert_same_weights(left: str | Path, right: str | Path, name: str = "adapter_model", atol: float = 0.0) -> None:
    one, two = weights(left, name), weights(right, name)
    assert one.keys() == two.keys()
    assert all(torch.allclose(one[key], two[key], rtol=0, atol=atol) for key in one)


def steps(result: TrainResult, split: str) -> list[int]:
    return [row["step"] for row in result.metrics.to_pylist() if row["split"] == split]


def mean_loss(rows: list[dict[str, Any]]) -> float:
    return sum(row["loss"] for row in rows) / len(rows)


def names(folder: str | Path) -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir())


def test_two_workers_train_with_a_row_per_step(finished: Finished) -> None:
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
    assert spec.settings.lora is not None and result.effective["lora_dropout"] == spec.settings.lora.dropout
    assert result.effective["reference"] == "the base, adapter switched off"
    assert (result.effective["world_size"], result.effective["effective_batch"]) == (2, 8)
    assert result.effective["eval_rows"] == result.data["val_rows_used"] == 8
    assert result.data["rows"] == result.effective["train_rows"] == 48


def test_adapter_and_merged_model_load_and_agree(finished: Finished) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec, result = finished
    assert result.adapter is not None and result.max_logit_diff is not None
    config = json.loads((Path(result.adapter) / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == spec.model
    assert {"adapter_model.safetensors", "tokenizer.json", "chat_template.jinja", "README.md"} <= set(
        names(result.adapter)
    )
    assert not [name for name in names(result.adapter) if name.endswith(".bin")]
    assert "0123abcd" in (Path(result.merged) / "README.md").read_text()
    assert names(spec.output_dir) == ["adapter", "merged", PROGRESS]
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


# --- kill -9 ----------------------------------------------------------------------------------------------------------


def training_workers() -> list[psutil.Process]:
    """Of this test's own cluster, whose processes are children of this one."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.name().startswith("ray::RayTrain"):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


class AtCheckpoints(threading.Thread):
    """Calls each function as soon as Ray Train has another checkpoint to start from; `done` is what they returned."""

    def __init__(self, spec: TrainSpec, *acts: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self._snapshot = Path(spec.storage_path) / spec.run_name / "checkpoint_manager_snapshot.json"
        self._acts = acts
        self.done: list[Any] = []

    def run(self) -> None:
        before = ""
        for act in self._acts:
            while self._newest() <= before:
                time.sleep(0.02)
            before = self._newest()
            self.done.append(act())

    def _newest(self) -> str:
        text = self._snapshot.read_text() if self._snapshot.exists() else ""
        return max(re.findall(r"step-\d+", text), default="")


def kill(processes: list[psutil.Process]) -> int:
    for process in processes:
        process.send_signal(signal.SIGKILL)
    return len(processes)


def assert_undisturbed(killed: TrainResult, undisturbed: TrainResult) -> None:
    assert killed.resumed_from is not None and 2 <= killed.resumed_from < STEPS
    assert killed.steps == STEPS
    assert killed.metrics.equals(undisturbed.metrics)  # no hole, no duplicate, the same numbers
    assert killed.train_loss == undisturbed.train_loss
    assert_same_weights(killed.adapter, undisturbed.adapter)


def test_killed_workers_cost_nothing_but_time(finished: Finished, make_spec: MakeSpec) -> None:
    """One worker of two at the first checkpoint, both at the next one."""
    spec = undisturbed_spec(make_spec)
    killer = AtCheckpoints(spec, *(lambda n=n: kill(training_workers()[:n]) for n in (1, 2)))
    killer.start()
    result = fit(spec)
    killer.join(timeout=1)
    assert killer.done == [1, 2]
    assert_undisturbed(result, finished[1])


DRIVER = """
import json, sys
import pyarrow.parquet as pq
from ray_pipeline.graph.cluster import connected
from ray_pipeline.training.fit import fit
from ray_pipeline.training.spec import TrainSpec

address, spec, out = sys.argv[1:]
with connected({"address": address}):
    result = fit(TrainSpec.from_dict(json.load(open(spec))))
pq.write_table(result.metrics, out + ".parquet")
json.dump({"steps": result.steps, "resumed_from": result.resumed_from, "adapter": result.adapter,
           "train_loss": result.train_loss}, open(out + ".json", "w"))
"""


def test_a_killed_driver_goes_on_by_the_same_command(finished: Finished, make_spec: MakeSpec, tmp_path: Path) -> None:
    import ray

    spec = undisturbed_spec(make_spec)
    (tmp_path / "spec.json").write_text(json.dumps(spec.to_dict()))
    address = ray.get_runtime_context().gcs_address
    command = ["-c", DRIVER, address, str(tmp_path / "spec.json"), str(tmp_path / "result")]

    driver = subprocess.Popen([sys.executable, *command], cwd=REPOSITORY)
    killer = AtCheckpoints(spec, driver.kill)
    killer.start()
    assert driver.wait(timeout=240) == -signal.SIGKILL
    assert not (tmp_path / "result.json").exists()
    deadline = time.monotonic() + 30
    while training_workers():
        assert time.monotonic() < deadline, "workers outlive their driver"
        time.sleep(0.1)

    subprocess.run([interpreter(), *command], cwd=REPOSITORY, check=True, timeout=240)
    result = json.loads((tmp_path / "result.json").read_text())
    undisturbed = finished[1]
    assert 2 <= result["resumed_from"] < STEPS and result["steps"] == STEPS
    assert pq.read_table(tmp_path / "result.parquet").equals(undisturbed.metrics)
    assert result["train_loss"] == undisturbed.train_loss
    assert_same_weights(result["adapter"], undisturbed.adapter)


# --- the other methods and options ------------------------------------------------------------------------------------


def test_dpo_is_stopped_and_goes_on_from_bfloat16_with_accumulation(make_spec: MakeSpec, local_ray: None) -> None:
    spec = make_spec(
        "dpo",
        dtype="bfloat16",
        num_workers=1,
        batch_size=4,
        micro_batches=4,
        epochs=2,
        disable_dropout=True,
        gradient_checkpointing=True,
    )
    folder = Folder(spec.output_dir)
    folder.write_json(STOP, {"reason": "the money is gone"})
    with pytest.raises(TrainingStopped, match="the money is gone"):
        fit(spec)
    folder.delete(STOP)
    result = fit(spec)
    assert result.steps == 6 and steps(result, "train") == list(range(1, 7))
    assert result.resumed_from == spec.settings.save_steps
    first, *_, last = result.metrics.to_pylist()
    assert first["rewards_margins"] == 0.0 and first["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert last["loss"] < first["loss"]
    assert last["rewards_accuracies"] is not None and last["kl"] is None
    assert result.effective["lora_dropout"] == 0.0  # TRL zeroes the adapter's dropout too
    assert (result.effective["base_dtype"], result.effective["trained_dtype"]) == ("bfloat16", "float32")
    assert {t.dtype for t in weights(result.merged, "model").values()} == {torch.bfloat16}


def test_workers_and_micro_batches_do_not_change_the_policy(
    make_spec: MakeSpec, local_ray: None, tmp_path: Path
) -> None:
    files = write_rows(tmp_path / "a.parquet", dpo_rows(44), DPO_SCHEMA)  # two steps of 16 an epoch, 12 rows left out
    shared = {"global_batch": 16, "epochs": 2, "disable_dropout": True, "train_files": files}
    one, several, two = (
        fit(make_spec("dpo", num_workers=workers, batch_size=batch, **shared))
        for workers, batch in ((1, 16), (1, 2), (2, 4))
    )
    assert [r.effective["world_size"] for r in (one, several, two)] == [1, 1, 2]
    for other in (several, two):
        assert other.effective["effective_batch"] == 16 and other.data["unused"] == one.data["unused"] == 12
        assert other.steps == one.steps == 4 and other.epochs == one.epochs == 2
        for ours, theirs in zip(other.metrics.to_pylist(), one.metrics.to_pylist(), strict=True):
            assert (ours["step"], ours["epoch"]) == (theirs["step"], theirs["epoch"])
            assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-4)
        assert_same_weights(other.adapter, one.adapter, atol=1e-3)


def test_sft_learns_the_answers_and_tells_tensorboard(make_spec: MakeSpec, local_ray: None) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    spec = with_validation(make_spec("sft", num_workers=1, batch_size=8, report_to=("tensorboard",)))
    result = fit(spec)
    rows = result.metrics.to_pylist()
    train = [row["loss"] for row in rows if row["split"] == "train"]
    assert result.steps == len(train) == 18 and train[-1] < train[0] - 0.1
    held_out = [row["loss"] for row in rows if row["split"] == "eval"]
    assert len(held_out) == 3 and held_out[-1] < held_out[0]
    assert "reference" not in result.effective and "beta" not in result.effective
    assert result.effective["loss_type"] == "nll" and result.effective["lora_dropout"] == 0.1

    assert names(spec.output_dir) == ["adapter", "merged", PROGRESS, "tensorboard"]
    events = EventAccumulator(str(Path(spec.output_dir) / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 19))
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(train)


def test_orpo_trains_with_accumulation(make_spec: MakeSpec, local_ray: None) -> None:
    result = fit(with_validation(make_spec("orpo", num_workers=1, batch_size=4, micro_batches=2, epochs=2)))
    first, *_, last = [row for row in result.metrics.to_pylist() if row["split"] == "train"]
    assert result.steps == STEPS and steps(result, "eval") == [STEPS // 2, STEPS]
    # The mean over the micro-batches, not their sum: NLL of a random model is about log(vocabulary) + λ·log 2.
    assert 3 < last["loss"] < first["loss"] < 12
    assert last["logps_chosen"] > first["logps_chosen"]
    assert last["rewards_chosen"] == pytest.approx(0.1 * last["logps_chosen"])
    assert result.effective["objective"] == METHODS["orpo"].objective and result.effective["beta"] == 0.1


def test_full_fine_tuning_leaves_one_model(full: Finished) -> None:
    spec, result = full
    assert (result.adapter, result.max_logit_diff) == (None, None)
    assert names(spec.output_dir) == ["merged", PROGRESS]
    effective = result.effective
    assert (effective["trains"], effective["trained_dtype"]) == ("every weight", "float32")
    assert effective["trained_parameters"] == effective["parameters"]
    assert (effective["beta"], effective["simpo_gamma"], effective["loss_type"]) == (2.0, 1.0, "simpo")
    trained, base = weights(result.merged, "model"), weights(spec.model, "model")
    assert {t.dtype for t in trained.values()} == {torch.bfloat16} and trained.keys() == base.keys()
    assert all((trained[name].float() - base[name]).abs().max() > 1e-3 for name in base)
    card = (Path(result.merged) / "README.md").read_text()
    assert "every weight trained" in card and "| simpo_gamma | 1 |" in card and "0123abcd" in card
    rows = result.metrics.to_pylist()
    assert mean_loss(rows[STEPS // 2 :]) < mean_loss(rows[: STEPS // 2])


def test_a_finished_run_takes_no_more_steps(full: Finished) -> None:
    import ray

    spec, result = full
    before = names(Path(spec.storage_path) / spec.run_name)
    inside_a_task = ray.remote(num_cpus=0)(fit)  # as the train stage calls it
    again = ray.get(inside_a_task.remote(dataclasses.replace(spec, output_dir=spec.output_dir + "-again")))
    assert names(Path(spec.storage_path) / spec.run_name) == before
    assert (again.steps, again.resumed_from) == (STEPS, STEPS)
    assert again.metrics.equals(result.metrics)
    assert_same_weights(again.merged, result.merged, "model")


def test_a_finished_training_is_not_lost_when_its_model_cannot_be_written(make_spec: MakeSpec, local_ray: None) -> None:
    spec = make_spec("kto", num_workers=1, epochs=0.5)
    in_the_way = Path(spec.output_dir) / ".merged.partial"
    in_the_way.parent.mkdir(parents=True)
    in_the_way.write_text("")
    words = rf"the training is finished \(6 steps\), .*; the adapter is in {spec.output_dir}/adapter.* not train again"
    with pytest.raises(ModelNotWritten, match=words):
        fit(spec)
    adapter = weights(Path(spec.output_dir) / "adapter")
    in_the_way.unlink()
    result = fit(spec)
    assert (result.steps, result.resumed_from) == (6, 6)
    again = weights(result.adapter or "")
    assert all(torch.equal(again[name], adapter[name]) for name in adapter | again)


def test_a_diverged_training_leaves_no_policy(make_spec: MakeSpec, local_ray: None) -> None:
    spec = make_spec("dpo", learning_rate=1e18)
    with pytest.raises(
        TrainingInputError, match=r"NaN or infinity in .* at step \d+ of 18; no model .* Lower learning_r"
    ):
        fit(spec)
    assert names(spec.output_dir) == [PROGRESS]


def test_from_a_newest_checkpoint_that_is_cut_in_half_training_goes_back_by_one(full: Finished, tmp_path: Path) -> None:
    spec, result = full
    shutil.copytree(spec.storage_path, tmp_path / "ray_train")
    newest = tmp_path / "ray_train" / spec.run_name / f"step-{STEPS:08d}"
    (weights,) = newest.glob("*.safetensors")
    os.truncate(weights, weights.stat().st_size // 2)
    told: list[str] = []
    damaged = dataclasses.replace(spec, storage_path=str(tmp_path / "ray_train"), output_dir=str(tmp_path / "policy"))
    again = fit(damaged, told.append)
    assert (again.steps, again.resumed_from) == (STEPS, STEPS - spec.settings.save_steps)
    assert f"{newest} is damaged ({weights.name} does not match its checksum)" in told[-1]
    assert again.metrics.equals(result.metrics)
    assert_same_weights(again.merged, result.merged, "model")
    assert f"step-{STEPS:08d}-2" in names(newest.parent)


def test_a_sharded_model_trains_resumes_and_is_gathered(finished: Finished, make_spec: MakeSpec) -> None:
    spec = undisturbed_spec(make_spec, shard="fsdp")
    killer = AtCheckpoints(spec, lambda: kill(training_workers()[:1]))
    killer.start()
    result = fit(spec)
    killer.join(timeout=1)
    assert killer.done == [1] and result.resumed_from is not None and 2 <= result.resumed_from < STEPS
    checkpoint = next((Path(spec.storage_path) / spec.run_name).glob("step-*"))
    assert len(list((checkpoint / "pytorch_model_fsdp_0").glob("*.distcp"))) == 2  # each worker has a part
    undisturbed = finished[1]
    assert steps(result, "train") == steps(undisturbed, "train")
    for ours, theirs in zip(result.metrics.to_pylist(), undisturbed.metrics.to_pylist(), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-4)
    assert_same_weights(result.adapter, undisturbed.adapter, atol=1e-3)
    assert result.max_logit_diff is not None and result.max_logit_diff < 1e-5
