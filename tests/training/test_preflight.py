"""What is refused before workers start, and in which words."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ray_pipeline.data.tokens import TokenCounter
from ray_pipeline.engines.chat_template import ChatTemplate
from ray_pipeline.store.schemas import MESSAGES
from ray_pipeline.training.data_check import check_data
from ray_pipeline.training.methods import METHODS, TrainingInputError, validate_trainer_args
from ray_pipeline.training.preflight import LOGGERS, check_cluster, check_spec

from .conftest import (
    DPO_SCHEMA,
    KTO_SCHEMA,
    ROWS,
    TEMPLATE,
    MakeSpec,
    assistant,
    dpo_rows,
    kto_rows,
    user,
    write_rows,
)
from .shapes import make_model

POLICY_METHODS = [name for name, method in METHODS.items() if method.trains_policy]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train_files": "data/*.parquet"}, "train_files must be an absolute path"),
        ({"val_files": "data/*.parquet"}, "val_files must be an absolute path"),
        ({"output_dir": "out"}, "output_dir must be an absolute path"),
        ({"storage_path": "out"}, "storage_path must be an absolute path or a URI"),
        ({"model": "./model"}, "model must be an absolute path or a Hub name"),
        ({"model": "/nowhere/model"}, "no folder /nowhere/model"),
        ({"run_name": "a/b"}, "run_name"),
        ({"max_length": 1}, "max_length must be at least 2"),
        ({"method": "ppo"}, "method\n  Value error, unknown method .*choose from sft, dpo, kto, orpo, simpo"),
        ({"dtype": "float16"}, "dtype\n  Input should be 'float32' or 'bfloat16'"),
        ({"num_workers": 0}, "num_workers\n  Input should be greater than or equal to 1"),
        ({"beta": 0.0}, "beta\n  Input should be greater than 0"),
        ({"method": "sft", "beta": 0.1}, "beta: the loss of sft has none"),
        ({"learning_rate": float("nan")}, "learning_rate\n  Input should be a finite number"),
        ({"warmup_ratio": 5}, "warmup_ratio\n  Input should be less than 1"),
        ({"batch_size": 1}, "batch_size must be 2 or more for kto"),
        ({"lr_scheduler": "cosin"}, "lr_scheduler must be one of linear, cosine"),
        ({"report_to": ("wandbb",)}, "report_to: 'wandbb' is not installed"),
        ({"report_to": ("wandbb",)}, "did you mean 'wandb'"),
        ({"report_to": ("trackioo",)}, "did you mean 'trackio'"),
        ({"quantization": "nf4", "lora": None}, "quantized weights cannot be trained"),
        ({"quantization": "nf4"}, "quantization needs workers with a GPU"),
        ({"quantization": "int8", "use_gpu": True, "shard": "fsdp"}, "together with shard=fsdp is not supported"),
        ({"shard": "fsdp", "num_workers": 1}, "has no effect with num_workers=1"),
        ({"shard": "zero2"}, "shard=zero2 needs workers with a GPU"),
        ({"trainer_args": {"fsdp_config": {}}}, "trainer_args.fsdp_config needs shard=fsdp"),
        ({"chat_template_args": {"mixed": [1, "a"]}}, "chat_template_args: kto cannot be trained with"),
        ({"chat_template_args": {"documents": [{"a": 1}, {"b": 2}]}}, "plain values and lists of one type"),
        ({"method": "orpo", "chat_template_args": {"tools": []}}, "orpo cannot be trained with {'tools'"),
    ],
)
def test_settings_are_checked_by_name(make_spec: MakeSpec, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):  # of the settings themselves, or a TrainingInputError
        check_spec(make_spec(**changes))


@pytest.mark.parametrize(
    ("changes", "package", "words"),
    [
        ({"quantization": "nf4", "use_gpu": True}, "bitsandbytes", r"quantization needs bitsandbytes; .*\[qlora\]"),
        ({"shard": "zero3", "use_gpu": True}, "deepspeed", r"shard=zero3 needs deepspeed; .*\[deepspeed\]"),
        ({"trainer_args": {"use_liger_kernel": True}}, "liger_kernel", r"use_liger_kernel needs .*\[liger\]"),
    ],
)
def test_packages_that_are_not_there_are_named(
    make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], package: str, words: str
) -> None:
    find, there = importlib.util.find_spec, False

    def find_spec(name: str, *rest: Any) -> Any:
        return (object() if there else None) if name == package else find(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    with pytest.raises(TrainingInputError, match=words):
        check_spec(make_spec(**changes))
    there = True
    check_spec(make_spec(**changes))


@pytest.mark.parametrize("name", LOGGERS)
def test_a_logger_is_an_extra(make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    place = "transformers.integrations.integration_utils.get_available_reporting_integrations"
    monkeypatch.setattr(place, lambda: [])
    with pytest.raises(
        TrainingInputError, match=rf"report_to: {name} is not installed; run: pip install '.*\[{name}\]'"
    ):
        check_spec(make_spec(report_to=(name,)))
    assert name in tomllib.loads(Path("pyproject.toml").read_text())["project"]["optional-dependencies"]
    monkeypatch.setattr(place, lambda: [name])
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    check_spec(make_spec(report_to=(name,)))


def test_wandb_without_a_key_is_refused(make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    place = "transformers.integrations.integration_utils.get_available_reporting_integrations"
    monkeypatch.setattr(place, lambda: ["wandb"])
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(TrainingInputError, match=r"WANDB_API_KEY.*wandb login.*WANDB_MODE=offline"):
        check_spec(make_spec(report_to=("wandb",)))
    (tmp_path / "netrc").write_text(f"machine api.wandb.ai login user password {'0' * 40}\n")
    check_spec(make_spec(report_to=("wandb",)))  # as `wandb login` leaves it
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_spec(make_spec(report_to=("wandb",)))


def test_good_settings_pass(make_spec: MakeSpec) -> None:
    check_spec(make_spec("kto"))
    check_spec(make_spec("dpo", batch_size=1, storage_path="s3://bucket/runs"))


def test_a_spec_survives_the_way_to_the_workers(make_spec: MakeSpec) -> None:
    from ray_pipeline.training.spec import TrainSpec

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
        ("dpo", {"sync_ref_model": True}, "the reference is always the base"),
        ("kto", {"logging_nan_inf_filter": True}, "a training stops at a loss of NaN"),
        ("dpo", {"truncation_mode": "keep_end"}, "responses truncated at the end"),
        ("kto", {"loss_type": "ktoo"}, "must be one of kto, apo_zero_unpaired"),
        ("dpo", {"model_init_kwargs": {"dtype": "float16"}}, "model_init_kwargs.dtype .* 'dtype'"),
        ("dpo", {"model_init_kwargs": "dtype"}, "must be a mapping"),
        ("sft", {"beta": 0.1}, "SFTConfig has no such setting"),
        ("sft", {"disable_dropout": True}, "SFTConfig has no such setting"),
        ("dpo", {"desirable_weight": 1.2}, "DPOConfig has no such setting"),
        ("orpo", {"sync_ref_model": True}, "ORPOConfig has no such setting"),
        ("orpo", {"packing": True}, "ORPOConfig has no such setting"),
        ("orpo", {"fsdp": True}, "'shard'"),
        ("simpo", {"loss_type": "ipo"}, "would not be SimPO"),
        ("cdpo", {"label_smoothing": 0.5}, "label_smoothing must be 0 or more and below 0.5, not 0.5"),
        ("rdpo", {"label_smoothing": "0.1"}, "label_smoothing must be 0 or more and below 0.5, not '0.1'"),
        ("rdpo", {"loss_type": ["sigmoid"]}, "another loss would be another method"),
        ("dpo_weighted", {"use_weighting": False}, "its weights are those of the rows"),
        ("simpo", {"simpo_gama": 1.5}, "did you mean 'simpo_gamma'"),
        ("simpo", {"model_init_kwargs": {"quantization_config": {}}}, "'quantization'"),
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
    validate_trainer_args("sft", {"packing": True, "packing_strategy": "wrapped", "assistant_only_loss": True})
    validate_trainer_args("orpo", {"weight_decay": 0.1, "max_completion_length": 64})
    validate_trainer_args("simpo", {"simpo_gamma": 1.5, "alpha": 0.25, "cpo_alpha": 0.5, "label_smoothing": 0.1})


def test_trainer_args_and_fields_reach_trl(make_spec: MakeSpec, tmp_path: Path) -> None:
    from ray_pipeline.training.trainer import trainer_config

    spec = make_spec(
        "kto", beta=0.3, warmup_ratio=0.1, desirable_weight=1.3, trainer_args={"weight_decay": 0.1, "seed_worker": 1}
    )
    with pytest.raises(TypeError):
        trainer_config(spec, str(tmp_path))
    args = trainer_config(
        make_spec("kto", beta=0.3, warmup_ratio=0.1, desirable_weight=1.3, trainer_args={"weight_decay": 0.1}),
        str(tmp_path),
    )
    assert (args.beta, args.desirable_weight, args.weight_decay, args.get_warmup_steps(100)) == (0.3, 1.3, 0.1, 10)
    assert (args.disable_dropout, args.bf16, args.use_cpu, args.dataloader_drop_last) == (False, False, True, True)
    assert args.train_sampling_strategy == "sequential"


@pytest.mark.parametrize("method", list(METHODS))
def test_every_method_makes_its_config(make_spec: MakeSpec, tmp_path: Path, method: str) -> None:
    from ray_pipeline.training.trainer import trainer_config

    args = trainer_config(make_spec(method, beta=None), str(tmp_path))
    published = {"sft": None, "dpo": 0.1, "kto": 0.1, "orpo": 0.1, "simpo": 2.0, "reward": None}
    assert getattr(args, "beta", None) == METHODS[method].beta == published[method]
    assert args.max_length == 64 and args.train_sampling_strategy == "sequential"
    assert args.model_init_kwargs == {"dtype": "float32", "device_map": None}
    if method == "simpo":
        assert (args.loss_type, args.cpo_alpha, args.simpo_gamma) == ("simpo", 0.0, 1.0)


@pytest.mark.parametrize(
    ("changes", "dtype"),
    [
        ({}, "bfloat16"),
        ({"lora": None}, "float32"),  # in bfloat16 most updates would be rounded away
        ({"lora": None, "shard": "zero3"}, "bfloat16"),  # DeepSpeed has float32 copies of its own
    ],
)
def test_trained_weights_are_precise(make_spec: MakeSpec, changes: dict[str, Any], dtype: str) -> None:
    from ray_pipeline.training.trainer import _model_args

    assert _model_args(make_spec(dtype="bfloat16", **changes), {})["dtype"] == dtype


def test_counts_of_a_good_data_set(make_spec: MakeSpec) -> None:
    spec = make_spec("kto", micro_batches=3)
    report = check_data(dataclasses.replace(spec, val_files=spec.train_files.replace("train", "val")))
    assert (report.rows, report.desirable, report.undesirable, report.sequences) == (48, 24, 24, 48)
    assert (report.steps_per_epoch, report.unused) == (2, 0)  # six micro-batches of 8 rows, three to a step
    assert (report.val_rows, report.val_rows_used) == (9, 8)
    assert report.warnings == ()


@pytest.mark.parametrize("batch_size", [4, 8])
def test_rows_that_fill_no_step_are_left_out(make_spec: MakeSpec, tmp_path: Path, batch_size: int) -> None:
    from ray_pipeline.training.trainer import build_trainer

    files = write_rows(tmp_path / "a.parquet", dpo_rows(30), DPO_SCHEMA)
    spec = make_spec("dpo", num_workers=1, batch_size=batch_size, global_batch=8, train_files=files)
    report, trainer = check_data(spec), build_trainer(spec, str(tmp_path / "scratch"))
    assert (report.rows, report.unused, report.steps_per_epoch) == (30, 6, 3)
    (said,) = [w for w in report.warnings if "global_batch" in w]
    assert said.startswith("6 of 30 rows do not fill a step of 8 (train.global_batch) and are not trained on")
    assert len(trainer.train_dataset) == 24 and trainer.args.gradient_accumulation_steps == 8 // batch_size
    assert len(trainer.get_train_dataloader()) == 24 // batch_size
    whole = build_trainer(make_spec("dpo", num_workers=1, batch_size=2, train_files=files), str(tmp_path / "whole"))
    assert len(whole.train_dataset) == 30 and trainer.train_dataset[:] == whole.train_dataset[:24]


def over_long(rows: list[dict[str, Any]], every: int) -> list[dict[str, Any]]:
    return [{**row, "prompt": user("red " * 100)} if i % every == 0 else row for i, row in enumerate(rows)]


@pytest.fixture(scope="module")
def bare_model(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny model with a chat template that neither begins with BOS nor ends with EOS, as Qwen's does not."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("bare") / "bare"
    shutil.copytree(tiny_model, folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.bos_token = "<|system|>"
    tokenizer.chat_template = TEMPLATE.replace("<eos>", "<eos>\n")
    tokenizer.save_pretrained(folder)
    return str(folder)


def lengths_in_trl(dataset: Any) -> list[tuple[int, int]]:
    """(tokens of the prompt, tokens of the longest whole) of each row that TRL has tokenized."""
    found = []
    for row in dataset:
        if "prompt_ids" in row:  # dpo, kto
            answers = [row[name] for name in ("completion_ids", "chosen_ids", "rejected_ids") if name in row]
            found.append((len(row["prompt_ids"]), len(row["prompt_ids"]) + max(map(len, answers))))
        else:  # sft; orpo and simpo
            labels = [row[name] for name in ("labels", "chosen_labels", "rejected_labels") if name in row]
            found.append((labels[0].count(-100), max(map(len, labels))))
    return found


@pytest.mark.parametrize("bare", [False, True], ids=["ended", "bare"])
@pytest.mark.parametrize("method", POLICY_METHODS)
def test_counts_are_those_of_trl(
    make_spec: MakeSpec, tiny_model: str, bare_model: str, tmp_path: Path, method: str, bare: bool
) -> None:
    from ray_pipeline.training.trainer import build_trainer

    make, schema = ROWS[METHODS[method].data]
    rows = [{**row, "prompt": user("red " * (i % 7))} for i, row in enumerate(make(40))]
    files = write_rows(tmp_path / "a.parquet", rows, schema)
    spec = make_spec(method, num_workers=1, max_length=256, model=bare_model if bare else tiny_model, train_files=files)
    trainer = build_trainer(spec, str(tmp_path / "scratch"))
    seen = lengths_in_trl(trainer.train_dataset)
    prompts, wholes = [prompt for prompt, _ in seen], [whole for _, whole in seen]
    assert trainer.args.train_sampling_strategy == "sequential" and len(seen) == 40
    batch = next(iter(trainer.get_train_dataloader()))
    widths = [ids.shape[1] for name, ids in batch.items() if name.endswith("input_ids") and "KL" not in name]
    assert max(wholes[: spec.settings.batch_size]) in widths  # the first rows of the file are the first batch

    longest_prompt = max(prompts)
    report = check_data(dataclasses.replace(spec, max_length=longest_prompt + 1))
    assert report.truncated == sum(whole > longest_prompt + 1 for whole in wholes) > 0
    filled = sum(prompt >= longest_prompt for prompt in prompts)
    with pytest.raises(TrainingInputError, match=f"in {filled} of 40 rows the prompt alone fills max_length"):
        check_data(dataclasses.replace(spec, max_length=longest_prompt))
    added = "<|system|> in front and <eos> at the end" in " ".join(report.warnings)
    assert added == (bare and METHODS[method].adds_ends)


def test_pairs_too_long_for_a_reward_model_are_left_out(make_spec: MakeSpec, tmp_path: Path) -> None:
    from ray_pipeline.training.trainer import build_trainer

    make, schema = ROWS["dpo"]
    rows = [{**row, "prompt": user("red " * (i % 7))} for i, row in enumerate(make(40))]
    files = write_rows(tmp_path / "a.parquet", rows, schema)
    spec = make_spec("reward", num_workers=1, batch_size=1, max_length=30, train_files=files, trainer_args={})
    report = check_data(spec)
    assert 0 < report.truncated < 40 and report.sequences == 40 - report.truncated
    assert f"{report.truncated} of 40 pairs are longer than max_length=30 and left out" in " ".join(report.warnings)
    assert len(build_trainer(spec, str(tmp_path / "scratch")).train_dataset) == report.sequences


@pytest.mark.parametrize("method", list(METHODS))
def test_chats_are_rendered_for_the_training_as_for_the_engine(
    make_spec: MakeSpec, tiny_model: str, tmp_path: Path, method: str
) -> None:
    """As Qwen3's template does it: thinking is on unless it is switched off, and then the thought is there, empty."""
    from transformers import AutoTokenizer

    from ray_pipeline.training.trainer import build_trainer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    thought = "{% if enable_thinking is defined and not enable_thinking %}no thought:{% endif %}"
    said = "{% if m['role'] == 'assistant' and loop.last %}no thought:{% endif %}"
    tokenizer.chat_template = TEMPLATE.replace("{{ m['content'] }}", said + "{{ m['content'] }}").replace(
        "<|assistant|>", "<|assistant|>" + thought
    )
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    tokenizer.save_pretrained(folder)
    chosen = {"enable_thinking": False}
    spec = make_spec(method, num_workers=1, model=str(folder), chat_template_args=chosen)
    row = build_trainer(spec, str(tmp_path / "scratch")).train_dataset[0]
    wholes = ("input_ids", "chosen_input_ids", "prompt_ids", "chosen_ids")
    whole = next(row[name] for name in wholes if name in row)
    prompt = pq.read_table(spec.train_files.replace("*", "00000"))["prompt"][0].as_py()
    asked = ChatTemplate(tokenizer, None, chosen).token_ids(prompt)
    assert asked != ChatTemplate(tokenizer, None, {}).token_ids(prompt)
    assert whole[: len(asked)] == asked == TokenCounter(tokenizer, chat_template_args=chosen)(prompt)
    row |= {} if METHODS[method].trains_policy else {"completion_ids": whole[len(asked) :]}
    answer = next(row[name] for name in ("completion_ids", "chosen_ids", "labels", "chosen_labels") if name in row)
    learnt = tokenizer.decode([token for token in answer if token != -100])
    assert "no thought" not in learnt and learnt.strip()


@pytest.mark.parametrize("method", ["sft", "kto", "simpo"])
def test_system_text_goes_where_the_engine_puts_it(make_spec: MakeSpec, tmp_path: Path, method: str) -> None:
    from transformers import AutoTokenizer

    from ray_pipeline.training.trainer import build_trainer

    model = make_model(tmp_path / "model", "gemma", ["no system role"])
    make, schema = ROWS[METHODS[method].data]
    system = {"role": "system", "content": "please sort them"}
    rows = [{**row, "prompt": [system, *row["prompt"]]} for row in make(12)]
    spec = make_spec(method, num_workers=1, model=model, train_files=write_rows(tmp_path / "a.parquet", rows, schema))
    assert check_data(spec).rows == 12
    row = build_trainer(spec, str(tmp_path / "scratch")).train_dataset[0]
    whole = next(row[name] for name in ("input_ids", "chosen_input_ids", "prompt_ids") if name in row)
    asked = ChatTemplate(AutoTokenizer.from_pretrained(model)).token_ids(rows[0]["prompt"])
    assert whole[: len(asked)] == asked


def test_packed_rows_are_counted_as_sequences(make_spec: MakeSpec, tmp_path: Path) -> None:
    from ray_pipeline.training.trainer import build_trainer

    spec = make_spec("sft", num_workers=1, batch_size=2, trainer_args={"packing": True}, chat_template_args={})
    report, trainer = check_data(spec), build_trainer(spec, str(tmp_path / "scratch"))
    assert 4 < report.sequences == len(trainer.train_dataset) < report.rows == 48
    assert report.steps_per_epoch == len(trainer.train_dataset) // 2
    assert trainer.args.train_sampling_strategy == "random"  # TRL sorts the rows by length to pack them
    with pytest.raises(TrainingInputError, match=r"48 rows .packed into \d+ sequences. do not fill"):
        check_data(
            dataclasses.replace(spec, settings=spec.settings.model_copy(update={"batch_size": 40, "global_batch": 40}))
        )


def refuse(
    make_spec: MakeSpec, path: Path, rows: list[dict[str, Any]], schema: pa.Schema, words: str, method: str = ""
) -> None:
    method = method or ("dpo" if "chosen" in schema.names else "kto")
    with pytest.raises(TrainingInputError, match=words) as caught:
        check_data(make_spec(method, train_files=write_rows(path, rows, schema)))
    assert "train_files" in str(caught.value) or str(path) in str(caught.value)


def test_unusable_files_are_refused_by_name(make_spec: MakeSpec, tmp_path: Path) -> None:
    with pytest.raises(TrainingInputError, match="no file matches"):
        check_data(make_spec(train_files=str(tmp_path / "*.parquet")))
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(TrainingInputError, match=r"torn\.parquet is no readable Parquet"):
        check_data(make_spec(train_files=str(tmp_path / "torn.parquet")))
    refuse(make_spec, tmp_path / "empty.parquet", [], KTO_SCHEMA, "has no rows")


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


def test_weights_that_are_missing_or_no_weights_are_refused(make_spec: MakeSpec, tmp_path: Path) -> None:
    refused = functools.partial(refuse, make_spec, method="kto_weighted")
    without = pa.schema([field for field in KTO_SCHEMA if field.name != "weight"])
    refused(tmp_path / "1.parquet", kto_rows(20), without, "no column 'weight'.*set datasets.weights to true")
    for number, (value, words) in enumerate([(None, "is empty"), (-0.5, "is -0.5"), (float("nan"), "is nan")], 2):
        rows = kto_rows(20)
        rows[13] = {**rows[13], "weight": value}
        refused(tmp_path / f"{number}.parquet", rows, KTO_SCHEMA, f"'weight' {words} in row 13")


def test_data_that_teach_nothing_are_refused(make_spec: MakeSpec, tmp_path: Path) -> None:
    one_class = [{**row, "label": True} for row in kto_rows(20)]
    refuse(make_spec, tmp_path / "1.parquet", one_class, KTO_SCHEMA, "20 desirable and 0 undesirable")
    refuse(make_spec, tmp_path / "2.parquet", kto_rows(7), KTO_SCHEMA, r"7 rows do not fill .* 4 \(batch_size\) × 2")
    words = "in 4 of 20 rows the prompt alone fills max_length=64 .* raise max_length"
    refuse(make_spec, tmp_path / "3.parquet", over_long(kto_rows(20), 5), KTO_SCHEMA, words)
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
            micro_batches=8,
        )
    )
    said = " ".join(report.warnings)
    assert "20 desirable, 10 undesirable rows; with desirable_weight 1 and undesirable_weight 1" in said
    assert "they weigh 2.00 : 1" in said and "desirable_weight between 0.50 and 0.67" in said
    assert "30 rows are fewer than train.global_batch (64): one step per epoch" in said and report.steps_per_epoch == 1
    assert "no evaluation" in said and report.val_rows_used == 0
    balanced = check_data(make_spec(train_files=str(tmp_path / "a.parquet"), undesirable_weight=1.7143))
    assert "undesirable_weight 1.714 they weigh 1.17 : 1" in " ".join(balanced.warnings)
    assert "recommends" not in " ".join(balanced.warnings)
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
