"""What is refused before workers start, and in which words."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from ray_pipeline.store.schemas import MESSAGES
from ray_pipeline.training import TrainingInputError, check_cluster, check_data, check_spec, validate_trainer_args

from .conftest import DPO_SCHEMA, KTO_SCHEMA, MakeSpec, assistant, dpo_rows, kto_rows, user, write_rows


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train_files": "data/*.parquet"}, "train_files must be an absolute path"),
        ({"val_files": "data/*.parquet"}, "val_files must be an absolute path"),
        ({"output_dir": "out"}, "output_dir must be an absolute path"),
        ({"storage_path": "out"}, "storage_path must be an absolute path or a URI"),
        ({"model": "./model"}, "model must be an absolute path or a hub name"),
        ({"model": "/nowhere/model"}, "no folder /nowhere/model"),
        ({"run_name": "a/b"}, "run_name"),
        ({"method": "ppo"}, "method must be one of kto, dpo"),
        ({"dtype": "float16"}, "dtype must be one of float32, bfloat16"),
        ({"num_workers": 0}, "num_workers must be at least 1"),
        ({"beta": 0.0}, "beta must be above 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be above 0"),
        ({"warmup_ratio": 5}, "warmup_ratio is a share"),
        ({"batch_size": 1}, "kto needs batch_size ≥ 2"),
        ({"lr_scheduler": "cosin"}, "lr_scheduler must be one of linear, cosine"),
        ({"report_to": ("wandbb",)}, "report_to: 'wandbb' is not installed"),
    ],
)
def test_settings_are_checked_by_name(make_spec: MakeSpec, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(TrainingInputError, match=words):
        check_spec(make_spec(**changes))


def test_good_settings_pass(make_spec: MakeSpec) -> None:
    check_spec(make_spec("kto"))
    check_spec(make_spec("dpo", batch_size=1, storage_path="s3://bucket/runs"))


def test_a_spec_survives_the_way_to_the_workers(make_spec: MakeSpec) -> None:
    from ray_pipeline.training import TrainSpec

    spec = make_spec("kto", trainer_args={"optim": "adamw_torch"})
    assert TrainSpec.from_dict(spec.to_dict()) == spec


@pytest.mark.parametrize(
    ("method", "args", "words"),
    [
        ("kto", {"max_step": 5}, "did you mean 'max_steps'"),
        ("kto", {"weight_decai": 0.1}, "did you mean 'weight_decay'"),
        ("kto", {"zzzz": 1}, "no such setting$"),
        ("kto", {"learning_rate": 1e-4}, "'learning_rate'"),
        ("kto", {"per_device_train_batch_size": 4}, "'batch_size'"),
        ("dpo", {"max_steps": 5}, "'epochs'"),
        ("dpo", {"warmup_ratio": 0.1}, "'warmup_ratio'"),
        ("dpo", {"bf16": True}, "'dtype'"),
        ("kto", {"dataset_num_proc": 4}, "breaks them"),
        ("kto", {"train_sampling_strategy": "random"}, "in file order"),
        ("dpo", {"sync_ref_model": True}, "adapter switched off"),
        ("kto", {"loss_type": "ktoo"}, "must be one of kto, apo_zero_unpaired"),
        ("dpo", {"model_init_kwargs": {"dtype": "float16"}}, "model_init_kwargs.dtype .* 'dtype'"),
        ("dpo", {"model_init_kwargs": "dtype"}, "must be a mapping"),
    ],
)
def test_trainer_args_are_checked_by_name(method: str, args: dict[str, Any], words: str) -> None:
    with pytest.raises(TrainingInputError, match=words):
        validate_trainer_args(method, args)


def test_good_trainer_args_pass() -> None:
    validate_trainer_args("kto", {"loss_type": "apo_zero_unpaired", "weight_decay": 0.1, "optim": "adamw_torch"})
    validate_trainer_args("dpo", {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.1]})
    validate_trainer_args("dpo", {"train_sampling_strategy": "random", "dataset_num_proc": 4})
    validate_trainer_args("dpo", {"model_init_kwargs": {"attn_implementation": "sdpa"}})


def test_trainer_args_and_fields_reach_trl(make_spec: MakeSpec, tmp_path: Path) -> None:
    from ray_pipeline.training.methods import trainer_config

    spec = make_spec(
        "kto", beta=0.3, warmup_ratio=0.1, desirable_weight=1.3, trainer_args={"weight_decay": 0.1, "seed_worker": 1}
    )
    with pytest.raises(TypeError):
        trainer_config(spec, str(tmp_path))
    args = trainer_config(dataclasses.replace(spec, trainer_args={"weight_decay": 0.1}), str(tmp_path))
    assert (args.beta, args.desirable_weight, args.weight_decay, args.get_warmup_steps(100)) == (0.3, 1.3, 0.1, 10)
    assert (args.disable_dropout, args.bf16, args.use_cpu, args.dataloader_drop_last) == (False, False, True, True)
    assert args.train_sampling_strategy == "sequential"


def test_counts_of_a_good_data_set(make_spec: MakeSpec) -> None:
    spec = make_spec("kto", gradient_accumulation=4)
    report = check_data(dataclasses.replace(spec, val_files=spec.train_files.replace("train", "val")))
    assert (report.rows, report.desirable, report.undesirable, report.dropped) == (48, 24, 24, 0)
    assert (report.steps_per_epoch, report.unused) == (2, 0)  # six micro-batches of 8 rows, four to a step
    assert (report.val_rows, report.val_rows_used) == (9, 8)
    assert report.warnings == ()


def over_long(rows: list[dict[str, Any]], every: int) -> list[dict[str, Any]]:
    return [{**row, "prompt": user("red " * 100)} if i % every == 0 else row for i, row in enumerate(rows)]


@pytest.mark.parametrize("method", ["kto", "dpo"])
def test_dropped_rows_are_those_that_trl_drops(make_spec: MakeSpec, tmp_path: Path, method: str) -> None:
    from ray_pipeline.training.trainer import build_trainer

    rows, schema = (kto_rows(40), KTO_SCHEMA) if method == "kto" else (dpo_rows(40), DPO_SCHEMA)
    spec = make_spec(
        method, num_workers=1, max_length=16, train_files=write_rows(tmp_path / "a.parquet", over_long(rows, 5), schema)
    )
    report = check_data(spec)
    trainer = build_trainer(spec, str(tmp_path / "scratch"))
    assert 8 <= report.dropped < 40
    assert len(trainer.train_dataset) == report.rows - report.dropped
    columns = [c for c in trainer.train_dataset.column_names if c in ("completion_ids", "chosen_ids", "rejected_ids")]
    cut = sum(
        any(len(row["prompt_ids"]) + len(row[c]) > spec.max_length for c in columns) for row in trainer.train_dataset
    )
    assert report.truncated == cut > 0
    assert any(f"{report.dropped} of 40 rows" in warning for warning in report.warnings)


def refuse(make_spec: MakeSpec, path: Path, rows: list[dict[str, Any]], schema: pa.Schema, words: str) -> None:
    method = "dpo" if "chosen" in schema.names else "kto"
    with pytest.raises(TrainingInputError, match=words) as caught:
        check_data(make_spec(method, train_files=write_rows(path, rows, schema)))
    assert "train_files" in str(caught.value) or str(path) in str(caught.value)


def test_unusable_files_are_refused_by_name(make_spec: MakeSpec, tmp_path: Path) -> None:
    with pytest.raises(TrainingInputError, match="no file matches"):
        check_data(make_spec(train_files=str(tmp_path / "*.parquet")))
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(TrainingInputError, match=r"torn\.parquet is no readable Parquet"):
        check_data(make_spec(train_files=str(tmp_path / "torn.parquet")))
    refuse(make_spec, tmp_path / "empty.parquet", [], KTO_SCHEMA, "holds no row")


def test_wrong_columns_are_refused_by_name(make_spec: MakeSpec, tmp_path: Path) -> None:
    rows = kto_rows(20)
    plain = pa.schema([("prompt", pa.string()), *list(KTO_SCHEMA)[2:]])
    nullable = pa.schema([("prompt", MESSAGES), ("completion", MESSAGES), ("label", pa.bool_())])
    without = pa.schema([field for field in KTO_SCHEMA if field.name != "label"])
    number = pa.schema([*list(KTO_SCHEMA)[:3], ("label", pa.int64())])
    refuse(make_spec, tmp_path / "1.parquet", rows, without, "has no column 'label'")
    refuse(make_spec, tmp_path / "2.parquet", [{**r, "label": 1} for r in rows], number, "'label' must be bool")
    refuse(make_spec, tmp_path / "3.parquet", [{**r, "prompt": "x"} for r in rows], plain, "'prompt' must be list of")
    rows[13] = {**rows[13], "label": None}
    refuse(make_spec, tmp_path / "4.parquet", rows, nullable, "'label' is empty in row 13")
    rows[7] = {**rows[7], "completion": []}
    refuse(make_spec, tmp_path / "5.parquet", rows, nullable, "'completion' is empty in row 7")


def test_data_that_teach_nothing_are_refused(make_spec: MakeSpec, tmp_path: Path) -> None:
    one_class = [{**row, "label": True} for row in kto_rows(20)]
    refuse(make_spec, tmp_path / "1.parquet", one_class, KTO_SCHEMA, "20 desirable and 0 undesirable")
    refuse(make_spec, tmp_path / "2.parquet", kto_rows(7), KTO_SCHEMA, r"7 usable rows .* 4 \(batch_size\) × 2")
    refuse(make_spec, tmp_path / "3.parquet", over_long(kto_rows(20), 1), KTO_SCHEMA, "0 usable rows .20 more")
    same = [{**row, "rejected": row["chosen"]} for row in dpo_rows(20)]
    refuse(make_spec, tmp_path / "4.parquet", same, DPO_SCHEMA, "equal after truncation to max_length=64 in all 20")
    tails = [{**row, "chosen": assistant("red " * 80 + "one"), "rejected": assistant("red " * 80 + "two")}
             for row in dpo_rows(20)]  # fmt: skip
    refuse(make_spec, tmp_path / "5.parquet", tails, DPO_SCHEMA, "equal after truncation")


def test_doubtful_data_are_said(make_spec: MakeSpec, tmp_path: Path) -> None:
    rows = kto_rows(40)
    few = [row for i, row in enumerate(rows) if row["label"] or i % 4 == 1]  # 20 desirable, 10 undesirable
    report = check_data(
        make_spec(
            train_files=write_rows(tmp_path / "a.parquet", few, KTO_SCHEMA),
            val_files=write_rows(tmp_path / "b.parquet", kto_rows(3), KTO_SCHEMA),
            gradient_accumulation=8,
        )
    )
    said = " ".join(report.warnings)
    assert "2.00 : 1" in said and "desirable_weight 0.50 to 0.67" in said
    assert "fewer than the effective batch of 64" in said and report.steps_per_epoch == 1
    assert "no evaluation" in said and report.val_rows_used == 0
    pairs = dpo_rows(20)
    pairs[0] = {**pairs[0], "rejected": pairs[0]["chosen"]}
    report = check_data(make_spec("dpo", train_files=write_rows(tmp_path / "c.parquet", pairs, DPO_SCHEMA)))
    assert report.identical_pairs == 1 and "1 of 20 pairs" in " ".join(report.warnings)


def test_a_cluster_that_can_never_place_the_workers_is_refused(
    make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    nodes = [{"Alive": True, "Resources": {"CPU": 3.0, "GPU": 1.0}}, {"Alive": False, "Resources": {"CPU": 64.0}}]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr(ray, "cluster_resources", lambda: nodes[0]["Resources"])
    check_cluster(make_spec(num_workers=3))
    check_cluster(make_spec(num_workers=1, use_gpu=True))
    with pytest.raises(TrainingInputError, match=r"num_workers=4 workers of 1 CPU each .* has 3 CPU .* room for 3"):
        check_cluster(make_spec(num_workers=4))
    with pytest.raises(TrainingInputError, match="1 GPU each"):
        check_cluster(make_spec(num_workers=2, use_gpu=True))
    with pytest.raises(TrainingInputError, match="room for 1"):
        check_cluster(make_spec(num_workers=2, cpus_per_worker=2))
    check_cluster(make_spec(num_workers=4, autoscaling=True))
