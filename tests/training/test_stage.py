"""The train stage: its settings, and what it asks of the training."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from ray_pipeline.engines.models import ModelSettings
from ray_pipeline.graph.stage import BadInput, Stage, StageResult, StageStop, WholeInput, WholeWork
from ray_pipeline.policy import train as stage
from ray_pipeline.policy.train import train, train_policy
from ray_pipeline.store.errors import DamagedFile
from ray_pipeline.store.files import RESULT, Folder
from ray_pipeline.store.schemas import TRAIN_METRICS
from ray_pipeline.training.methods import METHODS, TrainingInputError
from ray_pipeline.training.spec import STOP, TrainingStopped, TrainResult, TrainSettings, TrainSpec
from tests.store.test_damage import flip


def test_beta_is_the_methods_own_and_shown() -> None:
    shown = {name: TrainSettings.model_validate({"method": name}).model_dump()["beta"] for name in METHODS}
    assert shown == {"sft": None, "dpo": 0.1, "kto": 0.1, "orpo": 0.1, "simpo": 2.0, "reward": None}
    assert TrainSettings.model_validate({"method": "simpo", "beta": 2.5}).beta == 2.5
    # Filled in and yet not set: the same block for another method gets that method's β.
    assert TrainSettings(learning_rate=1e-3).model_dump(exclude_unset=True) == {"learning_rate": 1e-3}
    again = TrainSettings.model_validate(TrainSettings().model_dump(mode="json"))
    assert again == TrainSettings()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"method": "sft", "beta": 0.1}, "the loss of sft has none"),
        ({"method": "kto", "batch_size": 1}, "batch_size must be 2 or more for kto"),
        (
            {"num_workers": 3},
            r"train\.global_batch is 16, which is not a multiple of num_workers \(3\) × batch_size \(2\) = 6; "
            r"set global_batch to 12 or 18, or num_workers to 2 or 4",
        ),
        ({"num_workers": 32}, "= 64; set global_batch to 64, or num_workers to 8"),
        ({"method": "dpo", "num_workers": 16}, "set global_batch to 32, or batch_size to 1, or num_workers to 8"),
        ({"batch_size": 3}, "set global_batch to 15 or 18, or batch_size to 2 or 4"),
        ({"num_workers": 8, "gradient_accumulation": 8}, r"set train\.global_batch to .* = 128 for the same training"),
        ({"gradient_accumulation": 4, "batch_size": 4}, "follows from train.global_batch.* = 16 for the same"),
        ({"method": "ppo"}, "choose from sft, dpo, kto, orpo, simpo"),
        ({"lora": None, "quantization": "nf4"}, "quantized weights cannot be trained"),
        ({"quantization": "int4"}, "Input should be 'nf4' or 'int8'"),
        ({"shard": "zero1"}, "Input should be 'none', 'fsdp', 'zero2' or 'zero3'"),
        ({"lora": {"rank": 4}}, "Extra inputs are not permitted"),
    ],
)
def test_settings_that_contradict_are_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        TrainSettings.model_validate(given)


@settings(deadline=None)
@given(
    st.integers(1, 64),
    st.integers(1, 32),
    st.integers(1, 16),
    st.integers(1, 5000),
    st.sampled_from(["dpo", "sft", "kto"]),
)
def test_workers_and_micro_batches_only_divide_a_step(
    global_batch: int, workers: int, batch: int, rows: int, method: str
) -> None:
    """A step has `global_batch` rows and an epoch the same steps, whatever divides them; the rest is refused."""
    block = {"method": method, "global_batch": global_batch, "num_workers": workers, "batch_size": batch}
    if method == "kto" and batch == 1:
        return
    if global_batch % (workers * batch):
        with pytest.raises(ValidationError) as caught:
            TrainSettings.model_validate(block)
        remedies = re.findall(r"(global_batch|batch_size|num_workers) to (\d+)(?: or (\d+))?", str(caught.value))
        assert "global_batch" in [key for key, *_ in remedies]
        for key, *values in remedies:
            for value in filter(None, values):  # every value that is named is accepted
                assert TrainSettings.model_validate({**block, key: int(value)}).gradient_accumulation >= 1
        return
    spec, alone = (
        TrainSpec(
            settings=TrainSettings.model_validate(values),
            model="m", train_files="/f", output_dir="/o", storage_path="/s", run_name="r",
        )
        for values in (block, {**block, "num_workers": 1})
    )  # fmt: skip
    assert spec.settings.gradient_accumulation * workers * batch == global_batch
    assert spec.settings.model_dump().keys() == TrainSettings.model_fields.keys()
    if rows >= global_batch:
        assert spec.rows_per_epoch(rows) == alone.rows_per_epoch(rows) == rows // global_batch * global_batch
    else:
        assert spec.rows_per_epoch(rows) == rows // (workers * batch) * workers * batch


def data_stage() -> Stage:
    return Stage("datasets", WholeWork(lambda given: {}), {})


def test_one_workflow_can_have_many_policies(tiny_model: str) -> None:
    model, data = ModelSettings(model=tiny_model), data_stage()
    one = train(TrainSettings(), model, 64, data)
    assert (one.name, one.view, one.group_name) == ("train", "policy", "train")
    many = [
        train(TrainSettings(method=method, seed=seed), model, 64, data, name=f"train-{method}-gated-s{seed}", view="")
        for method in METHODS
        for seed in (0, 1)
    ]
    assert len({policy.fingerprint for policy in many}) == len(many)
    assert {policy.group_name for policy in many} == {"train"} and not any(policy.view for policy in many)
    whole = train(TrainSettings(lora=None), model, 64, data)
    assert len({one.fingerprint, whole.fingerprint}) == 2
    assert train(TrainSettings(), model, 64, data, steps_of=data).fingerprint != one.fingerprint
    # What only says how to run makes no other policy.
    elsewhere = train(TrainSettings(cpus_per_worker=2, report_to=("wandb",), max_failures=9), model, 64, data)
    assert elsewhere.fingerprint == one.fingerprint


def test_a_run_that_is_to_end_asks_the_workers(
    tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Folder(str(tmp_path / "stage"))
    folder.write_json(STOP, {"reason": "of the last time"})
    said: list[str] = []

    def fit(spec: TrainSpec, warn: Callable[[str], None]) -> TrainResult:
        assert spec.output_dir == folder.location and not folder.exists(STOP)
        end = time.monotonic() + 30
        while not folder.exists(STOP):
            assert time.monotonic() < end, "nobody asks"
            time.sleep(0.05)
        raise TrainingStopped(folder.read_json(STOP)["reason"])

    monkeypatch.setattr(stage, "fit", fit)
    monkeypatch.setattr("ray_pipeline.graph.cluster.connected", lambda **_: contextlib.nullcontext())
    monkeypatch.setattr("ray_pipeline.graph.in_process.warm_python", lambda **_: contextlib.nullcontext())
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 2.0})
    made = train(TrainSettings(), ModelSettings(model=tiny_model), 64, data_stage())
    assert isinstance(made.work, WholeWork)
    data = StageResult("datasets", "d" * 16, str(tmp_path / "data"), 1, (), {}, {})
    given = WholeInput(
        {"datasets": data}, folder, folder, "f" * 16, 1, made.work.settings, said.append, lambda *step: None,
        lambda: "the run has cost 2 USD",
    )  # fmt: skip
    with pytest.raises(StageStop, match="the run has cost 2 USD"):
        train_policy(given)
    assert said == ["ends at its next checkpoint, unless that is the last: the run has cost 2 USD"]


RunStage = Callable[..., tuple[TrainSpec, dict[str, Any], list[str]]]


@pytest.fixture
def run_stage(tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunStage:
    """`run_stage(settings, max_length)`: what the training was asked for, what the stage found and what it said."""

    def run(
        settings: TrainSettings, max_length: int = 64, steps_of: int | None = None
    ) -> tuple[TrainSpec, dict[str, Any], list[str]]:
        asked: list[TrainSpec] = []
        said: list[str] = []

        def fit(spec: TrainSpec, warn: Callable[[str], None]) -> TrainResult:
            asked.append(spec)
            if spec.max_length < 16:
                raise TrainingInputError("train_files: no row fits")
            warn("class imbalance: 2 desirable, 1 undesirable rows")
            steps = TRAIN_METRICS.empty_table()
            return TrainResult(1, 1.0, 0.5, None, f"{spec.output_dir}/merged", {}, {}, None, None, steps, 1.0, 1.0)

        monkeypatch.setattr(stage, "fit", fit)
        monkeypatch.setattr("ray_pipeline.graph.cluster.connected", lambda **_: contextlib.nullcontext())
        monkeypatch.setattr("ray_pipeline.graph.in_process.warm_python", lambda **_: contextlib.nullcontext())
        monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 2.0})
        facts = {
            "rows": {kind: {"train": 40, "val": 9 if kind == "kto" else 0} for kind in ("sft", "dpo", "kto")},
            "kto_weights": {"desirable_weight": 1.3, "undesirable_weight": 1.7},
        }
        data = StageResult("datasets", "d" * 16, str(tmp_path / "data"), 1, (), {}, facts)
        made = train(settings, ModelSettings(model=tiny_model), max_length, data_stage())
        assert isinstance(made.work, WholeWork)
        inputs = {"datasets": data}
        if steps_of is not None:
            rows = {"rows": {kind: {"train": steps_of} for kind in ("sft", "dpo", "kto")}}
            inputs["steps of"] = StageResult("others", "e" * 16, str(tmp_path / "others"), 1, (), {}, rows)
        given = WholeInput(
            inputs, Folder(str(tmp_path / "stage")), Folder(str(tmp_path / "calls")), "f" * 16, 1,
            made.work.settings, said.append, lambda *step: None,
        )  # fmt: skip
        found = train_policy(given)
        assert Folder(str(tmp_path / "stage")).exists(stage.METRICS)
        return asked[0], found, said

    return run


@pytest.mark.parametrize("method", list(METHODS))
def test_a_method_reads_its_kind_of_rows(run_stage: RunStage, tmp_path: Path, method: str) -> None:
    spec, found, said = run_stage(TrainSettings.model_validate({"method": method}))
    kind = METHODS[method].data
    assert spec.train_files == str(tmp_path / "data" / kind / "train" / "*.parquet")
    assert spec.val_files == (str(tmp_path / "data" / kind / "val" / "*.parquet") if kind == "kto" else None)
    weights = (spec.settings.desirable_weight, spec.settings.undesirable_weight)
    assert weights == ((1.3, 1.7) if method == "kto" else (None, None))
    assert spec.card == {"dataset": "d" * 16, "kind of rows": kind, "training": "f" * 16}
    assert (found["method"], found["max_logit_diff"]) == (method, None)
    assert said == ["warning: class imbalance: 2 desirable, 1 undesirable rows"]


def test_a_class_weight_that_is_set_replaces_that_of_the_data(run_stage: RunStage) -> None:
    spec, _, _ = run_stage(TrainSettings(desirable_weight=0.6))
    assert (spec.settings.desirable_weight, spec.settings.undesirable_weight) == (0.6, 1.7)


@pytest.mark.parametrize(
    ("rows", "epochs", "steps"), [(5, 2, 2), (16, 2, 2), (50, 2, 6), (50, 0.5, 2), (160, 1, 10), (7 * 16, 1 / 7, 1)]
)
def test_a_policy_can_take_the_steps_of_other_rows(
    run_stage: RunStage, rows: int, epochs: float, steps: int, tmp_path: Path
) -> None:
    from ray_pipeline.training.trainer import trainer_config

    spec, _, _ = run_stage(TrainSettings(epochs=epochs, use_gpu=False), steps_of=rows)
    assert spec.steps == steps == trainer_config(spec, str(tmp_path)).max_steps
    alone, _, _ = run_stage(TrainSettings(epochs=epochs, use_gpu=False))
    assert alone.steps is None and trainer_config(alone, str(tmp_path)).max_steps == -1
    assert alone.steps_for(rows) == steps


def test_options_reach_the_training(run_stage: RunStage) -> None:
    spec, _, _ = run_stage(TrainSettings(method="simpo", lora=None, shard="fsdp", trainer_args={"simpo_gamma": 0.5}))
    settings = spec.settings
    assert (settings.lora, settings.shard, settings.beta, settings.trainer_args) == (
        None,
        "fsdp",
        2.0,
        {"simpo_gamma": 0.5},
    )


def test_data_that_cannot_be_trained_on_stop_the_stage(run_stage: RunStage) -> None:
    with pytest.raises(BadInput, match="no row fits"):
        run_stage(TrainSettings(), 15)


def test_a_damaged_file_of_rows_is_found_before_the_training(run_stage: RunStage, tmp_path: Path) -> None:
    data = Folder(str(tmp_path / "data"))
    data.write_json(RESULT, {})
    (data / "kto/train").write_table("part-00000.parquet", pa.table({"a": list(range(1000))}), fingerprint="d" * 16)
    run_stage(TrainSettings())
    flip(tmp_path / "data/kto/train/part-00000.parquet")
    with pytest.raises(
        DamagedFile, match=r"part-00000\.parquet is damaged .*set aside as part-00000\.parquet\.damaged-1"
    ):
        run_stage(TrainSettings())
    assert not data.exists(RESULT)  # the datasets are made again before the next training
