"""What the train stage costs over TRL: tokens/s of its training loop, over those of a plain TRL script with the same
settings, rows, model and number of processes.

    python perf/train_overhead.py [--method kto] [--rows 1600] [--workers 2] [--rounds 3]

The plain script is `plain` below under torchrun. Both sides write the metrics of every step and a checkpoint every 20
steps, and leave an adapter and a merged model. Each run is a process of its own, the two sides take turns, and the
median ratio of the rounds is the figure. Wall time counts the whole process: imports, start, tokenizing, training and
merging. The settings are those of the pocket demo; `perf/gpu.py` compares the same sides at other sizes, on a GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

WEIGHTS = Path(__file__).parents[1] / "ray_pipeline" / "pocket" / "weights" / "policy"


@dataclasses.dataclass(frozen=True)
class Task:
    """What both sides train: the model's folder, the longest row in tokens, and a `train` block with LoRA."""

    model: str
    max_length: int
    settings: dict[str, Any]


def write_data(folder: Path, rows: Iterable[tuple[str, str, str]], kind: str, model: str) -> int:
    """Training rows of every kind in files of our layout, from prompts with a right and a wrong response each; returns
    the tokens of one pass over those of a kind."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from transformers import AutoTokenizer

    from ray_pipeline.store.schemas import MESSAGES

    tables: dict[str, list[dict[str, Any]]] = {"kto": [], "dpo": [], "sft": []}
    for index, (asked, *responses) in enumerate(rows):
        prompt = [{"role": "user", "content": asked}]
        right, wrong = ([{"role": "assistant", "content": response}] for response in responses)
        tables["dpo"].append({"prompt": prompt, "chosen": right, "rejected": wrong})
        tables["sft"].append({"prompt": prompt, "completion": right})
        tables["kto"].append({"prompt": prompt, "completion": wrong if index % 2 else right, "label": index % 2 == 0})
    types = {name: MESSAGES for name in ("prompt", "completion", "chosen", "rejected")} | {"label": pa.bool_()}
    for name, found in tables.items():
        (folder / name / "train").mkdir(parents=True)
        schema = pa.schema([(column, types[column]) for column in found[0]])
        pq.write_table(pa.Table.from_pylist(found, schema=schema), folder / name / "train" / "part-00000.parquet")
    tokenizer = AutoTokenizer.from_pretrained(model)
    answers = ("chosen", "rejected") if kind == "dpo" else ("completion",)
    chats = [row["prompt"] + row[answer] for row in tables[kind] for answer in answers]
    return sum(len(ids) for ids in tokenizer.apply_chat_template(chats)["input_ids"])


def pocket_rows(count: int) -> Iterator[tuple[str, str, str]]:
    from ray_pipeline.pocket.responses import make_response
    from ray_pipeline.pocket.tasks import make_prompts

    rng = random.Random(0)
    for asked in make_prompts(count, seed=3):
        right, wrong = (make_response(asked.instruction, grade, rng) for grade in ("right", "wordy"))
        yield asked.instruction, right, wrong


def pocket_task(method: str, workers: int) -> Task:
    """The `train` block of configs/pocket.yaml."""
    settings = {
        "method": method,
        "dtype": "float32",
        "num_workers": workers,
        "learning_rate": 2e-3,
        "epochs": 2,
        "global_batch": 8 * workers,
        "batch_size": 8,
        "save_steps": 20,
        "gradient_checkpointing": False,
    }
    return Task(str(WEIGHTS), 128, settings)


def ours(task: Task, data: Path, out: Path) -> dict[str, Any]:
    """The train stage on a Ray of its own, as `quorum run` starts one."""
    import ray

    from ray_pipeline.engines.models import ModelSettings
    from ray_pipeline.graph.cluster import start_ray
    from ray_pipeline.graph.stage import Stage, StageResult, WholeInput, WholeWork
    from ray_pipeline.policy.train import train, train_policy
    from ray_pipeline.store.files import Folder
    from ray_pipeline.training.spec import TrainSettings

    settings = TrainSettings(**task.settings)
    start_ray({"num_cpus": settings.num_workers})
    datasets = Stage("datasets", WholeWork(lambda given: {}), {})
    read = StageResult("datasets", "benchmark", str(data), 1, (), {}, {})
    stage = train(settings, ModelSettings(model=task.model), task.max_length, datasets)
    given = WholeInput(
        {"datasets": read}, Folder(str(out)), Folder(str(out / "calls")), "benchmark", 1, stage.work.settings,
        lambda line: print(line, file=sys.stderr), lambda step, steps: None,
    )  # fmt: skip
    facts = train_policy(given)
    ray.shutdown()
    return {"seconds": facts["train_seconds"], "steps": facts["steps"]}


def plain(task: Task, data: Path, out: Path) -> dict[str, Any]:
    """What one would write with TRL alone; runs in every process of torchrun."""
    import torch
    import trl
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    from ray_pipeline.training.spec import TrainSettings

    classes: dict[str, tuple[Any, Any, str, dict[str, Any]]] = {
        "sft": (trl.SFTConfig, trl.SFTTrainer, "sft", {}),
        "dpo": (trl.DPOConfig, trl.DPOTrainer, "dpo", {"beta": 0.1, "disable_dropout": False}),
        "kto": (trl.KTOConfig, trl.KTOTrainer, "kto", {"beta": 0.1, "disable_dropout": False}),
        "orpo": (ORPOConfig, ORPOTrainer, "dpo", {"beta": 0.1, "disable_dropout": False}),
        "simpo": (
            CPOConfig, CPOTrainer, "dpo",
            {"beta": 2.0, "loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 1.0, "disable_dropout": False},
        ),
    }  # fmt: skip
    settings, gpu = TrainSettings(**task.settings), torch.cuda.is_available()
    assert settings.lora is not None
    config, trainer_class, kind, own = classes[settings.method]
    if not gpu:
        torch.set_num_threads(1)
    arguments = config(
        output_dir=str(out / "checkpoints"), max_length=task.max_length, learning_rate=settings.learning_rate,
        num_train_epochs=settings.epochs, lr_scheduler_type=settings.lr_scheduler, warmup_steps=settings.warmup_ratio,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.global_batch // (settings.batch_size * settings.num_workers),
        logging_steps=1, save_strategy="steps", save_steps=settings.save_steps, save_total_limit=2, seed=settings.seed,
        use_cpu=not gpu, bf16=gpu and settings.dtype == "bfloat16",
        gradient_checkpointing=settings.gradient_checkpointing, dataloader_drop_last=True,
        ddp_find_unused_parameters=False, disable_tqdm=True, train_sampling_strategy="sequential", report_to="none",
        model_init_kwargs={"dtype": settings.dtype}, **own,
    )  # fmt: skip
    trainer = trainer_class(
        model=task.model,
        args=arguments,
        train_dataset=load_dataset("parquet", data_files=str(data / kind / "train" / "*.parquet"), split="train"),
        processing_class=AutoTokenizer.from_pretrained(task.model),
        peft_config=LoraConfig(
            r=settings.lora.r,
            lora_alpha=settings.lora.alpha,
            lora_dropout=settings.lora.dropout,
            target_modules=settings.lora.target_modules,
            task_type="CAUSAL_LM",
        ),
    )
    begin = time.monotonic()
    trainer.train()
    seconds = time.monotonic() - begin
    trainer.save_model(str(out / "adapter"))
    if settings.save != "adapter" and trainer.is_world_process_zero():
        merged = trainer.accelerator.unwrap_model(trainer.model).merge_and_unload()
        merged.save_pretrained(out / "merged")
        trainer.processing_class.save_pretrained(out / "merged")
    return {"seconds": seconds, "steps": trainer.state.global_step}


def run(side: str, task: Task, data: Path, folder: Path) -> dict[str, Any]:
    """One side in processes of its own: seconds and steps of its training loop, and its wall time in seconds."""
    workers = task.settings["num_workers"]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}"] if side == "plain" else []
    command = [sys.executable, *launcher, __file__, "--side", side, "--data", str(data), "--out", str(folder)]
    quiet = {"HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false", "TRL_EXPERIMENTAL_SILENCE": "1"}
    cache = {"HF_DATASETS_CACHE": str(folder / "cache")}  # both sides tokenize
    folder.mkdir(parents=True)
    (folder / "task.json").write_text(json.dumps(dataclasses.asdict(task)))
    begin = time.monotonic()
    done = subprocess.run(command, env={**os.environ, **quiet, **cache}, capture_output=True, text=True)
    wall = time.monotonic() - begin
    if done.returncode:
        sys.exit(f"{side} failed:\n{done.stderr[-4000:]}")
    return {**json.loads((folder / "result.json").read_text()), "wall": wall}


def main() -> None:
    parser = argparse.ArgumentParser(description="tokens/s of the train stage over a plain TRL script")
    parser.add_argument("--method", choices=["sft", "dpo", "kto", "orpo", "simpo"], default="kto")
    parser.add_argument("--rows", type=int, default=1600)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", choices=["ours", "plain"], help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        task = Task(**json.loads((given.out / "task.json").read_text()))
        result = (ours if given.side == "ours" else plain)(task, given.data, given.out)
        if os.environ.get("RANK", "0") == "0":
            (given.out / "result.json").write_text(json.dumps(result))
        return

    from ray_pipeline.training.methods import METHODS

    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "data"
        task, kind = pocket_task(given.method, given.workers), METHODS[given.method].data
        tokens = write_data(data, pocket_rows(given.rows), kind, task.model) * task.settings["epochs"]
        print(f"{given.method}, {given.rows} rows, 2 epochs, {tokens} tokens, {given.workers} workers")
        print(
            f"{'round':>5} {'ours tok/s':>11} {'plain tok/s':>12} {'ratio':>6} {'ours wall s':>12} {'plain wall s':>13}"
        )
        ratios = []
        for number in range(given.rounds):
            sides = ["ours", "plain"] if number % 2 == 0 else ["plain", "ours"]
            found = {side: run(side, task, data, Path(scratch) / f"{side}-{number}") for side in sides}
            assert found["ours"]["steps"] == found["plain"]["steps"], found
            a, b = found["ours"], found["plain"]
            ratios.append(b["seconds"] / a["seconds"])
            print(
                f"{number:>5} {tokens / a['seconds']:>11.0f} {tokens / b['seconds']:>12.0f} {ratios[-1]:>6.3f} "
                f"{a['wall']:>12.1f} {b['wall']:>13.1f}",
                flush=True,
            )
        print(f"median ratio {statistics.median(ratios):.3f}")


if __name__ == "__main__":
    main()
