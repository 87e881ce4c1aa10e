"""Checks that the pocket policy can be aligned: KTO on the rule's labels must raise its true accuracy, flipped labels
lower it.

`python -m ray_pipeline.pocket.learnability --seeds 0 1 2 --flip 0`; a minute per run on one core. It uses plain TRL
instead of the pipeline, whose labels come from the judge. It is the yardstick for new weights, and the source of the
training numbers in configs/pocket.yaml.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ray_pipeline.pocket import WEIGHTS
from ray_pipeline.pocket.measure import gate_label, share
from ray_pipeline.pocket.tasks import PocketPrompt, is_correct, make_prompts
from ray_pipeline.pocket.training import answer

SAMPLING = {"do_sample": True, "temperature": 0.8, "top_p": 0.95, "top_k": 0}


def accuracy(model: Any, tokenizer: Any, prompts: list[PocketPrompt]) -> tuple[float, float]:
    """True accuracy (greedy, sampled) on the prompts."""
    instructions = [prompt.instruction for prompt in prompts]
    found = []
    for sampling in ({}, SAMPLING):
        torch.manual_seed(0)
        replies = answer(model, tokenizer, instructions, 24, **sampling)
        found.append(share(is_correct(text, reply) for text, reply in zip(instructions, replies, strict=True)))
    return found[0], found[1]


def kto_rows(model: Any, tokenizer: Any, prompts: list[PocketPrompt], seed: int, flip: bool) -> list[dict[str, Any]]:
    """The kept candidates (4 per prompt) as TRL's KTO rows, shuffled, with the labels interleaved in proportion."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    instructions = [prompt.instruction for prompt in prompts for _ in range(4)]
    samples = answer(model, tokenizer, instructions, 24, **SAMPLING)
    by_label: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    for text, reply in zip(instructions, samples, strict=True):
        label = gate_label(text, reply)
        if label in ("desirable", "undesirable"):
            wanted = (label == "desirable") != flip
            chat = {
                "prompt": [{"role": "user", "content": text}],
                "completion": [{"role": "assistant", "content": reply}],
            }
            by_label[wanted].append({**chat, "label": wanted})
    placed = []
    for rows in by_label.values():
        rng.shuffle(rows)
        placed += [((index + rng.random()) / len(rows), row) for index, row in enumerate(rows)]
    return [row for _, row in sorted(placed, key=lambda item: item[0])]


def align(weights: Path, seed: int, flip: bool, prompts: int, settings: dict[str, Any]) -> str:
    """One KTO run; a line with the accuracies before and after."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import KTOConfig, KTOTrainer

    tokenizer = AutoTokenizer.from_pretrained(weights / "policy")
    model = AutoModelForCausalLM.from_pretrained(weights / "policy", dtype=torch.float32)
    drawn = make_prompts(prompts + 300, seed=seed)
    training, unseen = drawn[:prompts], drawn[prompts:]
    before = accuracy(model, tokenizer, unseen)
    rows = kto_rows(model, tokenizer, training, seed, flip)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        arguments = KTOConfig(
            output_dir=scratch,
            seed=seed,
            beta=0.1,
            max_length=256,
            lr_scheduler_type="cosine",
            dataloader_drop_last=True,
            gradient_checkpointing=False,
            save_strategy="no",
            logging_steps=10,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
            **settings,
        )
        lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM")
        trainer = KTOTrainer(
            model=model,
            args=arguments,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=lora,
        )
        trainer.train()
    spent = time.monotonic() - started
    model.eval()  # the trainer put the adapter into it
    after = accuracy(trainer.model, tokenizer, unseen)
    good = sum(row["label"] for row in rows)
    return (
        f"seed {seed}{' flipped' if flip else ''}: {good} desirable, {len(rows) - good} undesirable, "
        f"{trainer.state.global_step} steps in {spent:.0f} s; "
        f"greedy {before[0]:.3f} -> {after[0]:.3f}, sampled {before[1]:.3f} -> {after[1]:.3f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--flip", type=int, nargs="*", default=[], help="seeds to run with flipped labels as well")
    parser.add_argument("--prompts", type=int, default=400)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument(
        "--keep-dropout", action="store_true", help="train with the LoRA dropout on (TRL switches it off by default)"
    )
    parser.add_argument("--threads", type=int, default=1)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    settings = {
        "learning_rate": chosen.learning_rate,
        "per_device_train_batch_size": chosen.batch,
        "gradient_accumulation_steps": chosen.accumulation,
        "num_train_epochs": chosen.epochs,
        "warmup_steps": 0.05,
        "disable_dropout": not chosen.keep_dropout,
    }
    for seed, flip in [*((seed, False) for seed in chosen.seeds), *((seed, True) for seed in chosen.flip)]:
        print(align(chosen.weights, seed, flip, chosen.prompts, settings), flush=True)


if __name__ == "__main__":
    main()
