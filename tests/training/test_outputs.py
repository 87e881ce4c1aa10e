"""The metrics table, the folders and the merge, without a training run."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from datasets import Dataset

from ray_pipeline.store.schemas import TRAIN_METRICS
from ray_pipeline.training.card import model_card
from ray_pipeline.training.folders import partial_folder, publish
from ray_pipeline.training.merge import MergeError, merge_adapter
from ray_pipeline.training.methods import METHODS
from ray_pipeline.training.metrics import mean_train_loss, train_metrics
from ray_pipeline.training.save import write_model
from ray_pipeline.training.spec import TrainSettings

from .conftest import MakeSpec


def test_the_metrics_table_has_one_row_per_step_and_split() -> None:
    table = train_metrics(
        [
            {"step": 1, "loss": 0.5, "epoch": 0.5, "kl": 0.0, "rewards/chosen": 0.1, "entropy": 5.0},
            {"step": 2, "loss": 0.25, "epoch": 1.0, "kl": 0.2, "rewards/rejected": -0.1},
            {"step": 2, "eval_loss": 0.375, "eval_kl": 0.1, "eval_runtime": 3.0, "epoch": 1.0},
            {"step": 2, "train_loss": 0.4, "train_runtime": 9.0, "epoch": 1.0},
        ]
    )
    assert table.schema == TRAIN_METRICS
    rows = table.to_pylist()
    assert [(row["step"], row["split"], row["loss"]) for row in rows] == [
        (1, "train", 0.5), (2, "train", 0.25), (2, "eval", 0.375)
    ]  # fmt: skip
    assert (rows[0]["rewards_chosen"], rows[0]["rewards_rejected"], rows[2]["kl"]) == (0.1, None, 0.1)
    assert mean_train_loss(table) == 0.375
    assert train_metrics([]).num_rows == 0


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    final = tmp_path / "adapter"
    for content in ("old", "new"):
        partial = partial_folder(final)
        partial.mkdir()
        (partial / "weights").write_text(content)
        assert not final.exists() or (final / "weights").read_text() == "old"
        publish(final)
        assert (final / "weights").read_text() == content
    assert os.listdir(tmp_path) == ["adapter"]


def save_adapter(base: str, folder: Path, scale: float) -> str:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=4, target_modules="all-linear"))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_().mul_(scale)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merged_weights_have_the_type_asked_for(tiny_model: str, tmp_path: Path, dtype: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "merged"
    partial_folder(out).mkdir()  # left by an attempt that was killed
    (partial_folder(out) / "half.safetensors").write_text("")
    report = merge_adapter(
        tiny_model, save_adapter(tiny_model, tmp_path / "adapter", 0.1), str(out), dtype, readme="# card"
    )
    assert report.max_logit_diff < 1e-5 < 1e-2 < report.adapter_effect
    assert AutoModelForCausalLM.from_pretrained(out).dtype == getattr(torch, dtype)
    assert AutoTokenizer.from_pretrained(out).chat_template
    assert (out / "generation_config.json").exists() and (out / "README.md").read_text() == "# card"
    assert sorted(os.listdir(tmp_path)) == ["adapter", "merged"]
    assert not (out / "half.safetensors").exists()


def test_a_merge_that_gives_no_numbers_is_refused(tiny_model: str, tmp_path: Path) -> None:
    adapter = save_adapter(tiny_model, tmp_path / "adapter", float("nan"))
    with pytest.raises(MergeError, match="moves logits by up to nan"):
        merge_adapter(tiny_model, adapter, str(tmp_path / "merged"), "float32")
    assert sorted(os.listdir(tmp_path)) == ["adapter"]


@pytest.mark.parametrize(
    ("save", "folders"), [("adapter", ["adapter"]), ("merged", ["merged"]), ("both", ["adapter", "merged"])]
)
def test_train_save_says_what_is_written(
    make_spec: MakeSpec, tiny_model: str, tmp_path: Path, save: str, folders: list[str]
) -> None:
    from transformers import AutoTokenizer

    spec = make_spec("kto", save=save, output_dir=str(tmp_path / "policy"))
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    trainer = SimpleNamespace(
        is_fsdp_enabled=False,
        is_world_process_zero=lambda: True,
        save_model=lambda folder: save_adapter(tiny_model, Path(folder), 0.1),
        train_dataset=Dataset.from_dict({"prompt_ids": [tokenizer("one two")["input_ids"]]}),
        processing_class=tokenizer,
    )
    Path(spec.output_dir).mkdir()
    (Path(spec.output_dir) / "adapter").mkdir()  # of an attempt whose merge failed
    figures = write_model(spec, trainer, lambda kind: f"# {kind}")
    assert sorted(os.listdir(spec.output_dir)) == folders
    assert [(Path(spec.output_dir) / name / "README.md").read_text() for name in folders] == [f"# {n}" for n in folders]
    assert (figures["max_logit_diff"] is None) == (save == "adapter")


def test_no_adapter_can_be_saved_where_every_weight_is_trained() -> None:
    with pytest.raises(ValueError, match=r"train\.save is adapter, but without train\.lora every weight is trained"):
        TrainSettings(save="adapter", lora=None)
    assert "save" not in TrainSettings().decisive()  # as before: no fingerprint changes
    assert TrainSettings(save="merged", lora=None).decisive()["save"] == "merged"


@pytest.mark.parametrize("method", list(METHODS))
def test_the_model_card_names_data_settings_and_result(make_spec: MakeSpec, method: str) -> None:
    beta = METHODS[method].beta
    spec = make_spec(method, beta=beta)
    card = model_card(spec, "adapter", 12, {"lora_dropout": 0.1}, {"loss": 0.25, "kl": None})
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["library_name"] == "peft" and front["tags"] == ["quorum", "trl", method, "lora"]
    assert f"with {method.upper()} in 12 optimiser steps" in card
    assert "base_model:" not in card  # a local path is no name on the hub
    assert "| dataset | 0123abcd |" in card and f"| method | {method} |" in card
    assert "| learning_rate | 0.005 |" in card and "'dropout': 0.1" in card
    assert (f"| beta | {beta:g} |" if beta else "| beta |") in card or beta is None
    assert ("| desirable_weight |" in card) == (method == "kto")
    assert "| lora_dropout | 0.1 |" in card and "| loss | 0.25 |" in card and "| kl |" not in card
    assert "kto/train/*.parquet |" in card or method != "kto"
    assert spec.model not in card and os.path.dirname(spec.train_files) not in card  # nor do readers need it
    assert "base_model: org/base" in model_card(make_spec(method, model="org/base"), "merged", 1, {}, None)
    full = model_card(make_spec(method, lora=None), "full", 1, {}, None)
    assert "library_name: transformers" in full and "with every weight trained" in full
    assert "lora" not in full.lower()
