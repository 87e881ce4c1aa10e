"""A tiny random Llama with its own tokenizer and chat template, small datasets, a local Ray, and finished runs."""

from __future__ import annotations

import dataclasses
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ray_pipeline.store.schemas import MESSAGES
from ray_pipeline.training.fit import fit
from ray_pipeline.training.methods import METHODS, NOISE_AWARE
from ray_pipeline.training.spec import TrainResult, TrainSettings, TrainSpec

REPOSITORY = Path(__file__).parents[2]
TEXT = "add two numbers and say the largest word of three red green blue seven nine please sort them"
WORDS = TEXT.split(" ")

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

KTO_SCHEMA = pa.schema([("candidate_id", pa.string()), ("prompt", MESSAGES), ("completion", MESSAGES),
                        ("label", pa.bool_()), ("images", pa.string()), ("weight", pa.float64())])  # fmt: skip
SFT_SCHEMA = pa.schema([("prompt", MESSAGES), ("completion", MESSAGES), ("final_score", pa.float64())])
DPO_SCHEMA = pa.schema(
    [
        ("prompt", MESSAGES),
        ("chosen", MESSAGES),
        ("rejected", MESSAGES),
        ("gap", pa.float64()),
        ("weight", pa.float64()),
    ]
)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a random Llama: hidden 64, two layers, heads of 32 (the smallest that vLLM has a kernel for), a BPE
    tokenizer of 300 entries."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model") / "tiny"
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<pad>", "<eos>", "<|system|>", "<|user|>", "<|assistant|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        [TEXT] * 20, trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="<eos>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=256,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    ).save_pretrained(folder)
    return str(folder)


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def assistant(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def sentence(rng: random.Random, words: int = 5) -> str:
    return " ".join(rng.choices(WORDS, k=words))


def kto_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Labels alternate, as the dataset stage interleaves them."""
    rng = random.Random(seed)
    return [
        {"candidate_id": f"c{i}", "prompt": user(sentence(rng)), "completion": assistant(sentence(rng, 3 + i % 4)),
         "label": i % 2 == 0, "images": "a provenance column with a name that TRL knows", "weight": float(i % 3)}
        for i in range(count)
    ]  # fmt: skip


def dpo_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    return [
        {"prompt": user(sentence(rng)), "chosen": assistant(sentence(rng, 4)), "rejected": assistant(sentence(rng, 6)),
         "gap": 2.0, "weight": float(i % 3)}
        for i in range(count)
    ]  # fmt: skip


def sft_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    return [{"prompt": row["prompt"], "completion": row["completion"], "final_score": 8.0}
            for row in kto_rows(count, seed)]  # fmt: skip


ROWS: dict[str, tuple[Callable[..., list[dict[str, Any]]], pa.Schema]] = {
    "sft": (sft_rows, SFT_SCHEMA),
    "dpo": (dpo_rows, DPO_SCHEMA),
    "kto": (kto_rows, KTO_SCHEMA),
}


def write_rows(path: Path, rows: list[dict[str, Any]], schema: pa.Schema) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
    return str(path)


MakeSpec = Callable[..., TrainSpec]


@pytest.fixture(scope="session")
def make_spec(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> MakeSpec:
    """`make_spec(method, **changes)`: a spec with other fields or settings, over 48 training and 9 evaluation rows.

    Without `global_batch` a step is `micro_batches` (by default one) of all workers.
    """
    data = tmp_path_factory.mktemp("data")
    for kind, (rows, schema) in ROWS.items():
        write_rows(data / kind / "train" / "00000.parquet", rows(28, seed=1), schema)
        write_rows(data / kind / "train" / "00001.parquet", rows(20, seed=2), schema)
        write_rows(data / kind / "val" / "00000.parquet", rows(9, seed=3), schema)

    def make(method: str = "kto", micro_batches: int = 1, **changes: Any) -> TrainSpec:
        out = tmp_path_factory.mktemp("run")
        known = {**METHODS, **NOISE_AWARE}
        files = data / (known[method].data if method in known else "kto")
        settings: dict[str, Any] = {
            "method": method,
            "dtype": "float32",
            "num_workers": 2,
            "seed": 7,
            "learning_rate": 5e-3,
            "epochs": 3,
            "batch_size": 4,
            "gradient_checkpointing": False,
            "save_steps": 2,
            "lora": {"r": 4, "alpha": 8, "dropout": 0.1},
        }
        if method == "kto":  # as the train stage resolves them
            settings |= {"desirable_weight": 1.0, "undesirable_weight": 1.0}
        values: dict[str, Any] = {
            "model": tiny_model,
            "train_files": str(files / "train" / "*.parquet"),
            "output_dir": str(out / "policy"),
            "storage_path": str(out / "ray_train"),
            "run_name": f"{method}-0123abcd",
            "max_length": 64,
            "chat_template_args": {"enable_thinking": False},  # as every model of a run has them
            "card": {"dataset": "0123abcd"},
        }
        own = {name: value for name, value in changes.items() if name not in TrainSettings.model_fields}
        own |= {"model": changes["model"]} if "model" in changes else {}
        settings |= {name: value for name, value in changes.items() if name not in own}
        settings.setdefault("global_batch", max(1, settings["num_workers"] * settings["batch_size"] * micro_batches))
        return TrainSpec(settings=TrainSettings.model_validate(settings), **{**values, **own})

    return make


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    from ray_pipeline.graph.cluster import connected

    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.2"  # steps here take less than the usual 2 s
    with connected({"num_cpus": 2}):
        yield


#: Optimiser steps of `undisturbed_spec`.
STEPS = 12


def with_validation(spec: TrainSpec) -> TrainSpec:
    return dataclasses.replace(spec, val_files=spec.train_files.replace("train", "val"))


def undisturbed_spec(make_spec: MakeSpec, **changes: Any) -> TrainSpec:
    """KTO on two workers, evaluated after each of two epochs; the run that killed ones must equal."""
    return with_validation(make_spec("kto", epochs=2, **changes))


@pytest.fixture(scope="session")
def finished(make_spec: MakeSpec, local_ray: None) -> tuple[TrainSpec, TrainResult]:
    spec = undisturbed_spec(make_spec)
    return spec, fit(spec)


@pytest.fixture(scope="session")
def full(make_spec: MakeSpec, local_ray: None) -> tuple[TrainSpec, TrainResult]:
    """SimPO with every weight trained, written in bfloat16."""
    spec = make_spec("simpo", lora=None, dtype="bfloat16", learning_rate=1e-3, epochs=2)
    return spec, fit(spec)
