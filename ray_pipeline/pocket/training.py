"""Trains a tiny Llama on a stream of (user message, reply) pairs: plain PyTorch, CPU, seeded."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn import functional as F
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ray_pipeline.pocket.chats import Pair
from ray_pipeline.pocket.muon import Muon
from ray_pipeline.pocket.tokenizer import MAX_LENGTH, word_twins

IGNORED = -100


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """An untrained model of 0.7 M parameters. Its head size, 32, is the smallest that vLLM's CPU attention supports."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        rows: torch.Tensor = model.model.embed_tokens.weight
        rows.normal_(0.0, 0.1)
        space = torch.randn(rows.shape[1]) * 0.05
        for bare, spaced in word_twins(tokenizer):  # "cat" and " cat" are one word: start as neighbours
            rows[spaced] = rows[bare] + space
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return model


def encode(pairs: list[Pair], tokenizer: PreTrainedTokenizerFast) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and targets of a batch, both (batch, longest) int64, padded on the right.

    Targets are the next tokens where those belong to the reply or end it, `IGNORED` elsewhere.
    """
    heads = tokenizer([f"<|user|>{message}<|end|><|assistant|>" for message, _ in pairs])["input_ids"]
    tails = tokenizer([f"{reply}<|end|>" for _, reply in pairs])["input_ids"]
    longest = max(len(head) + len(tail) for head, tail in zip(heads, tails, strict=True)) - 1
    ids = torch.full((len(pairs), longest), tokenizer.pad_token_id)
    targets = torch.full((len(pairs), longest), IGNORED)
    for row, (head, tail) in enumerate(zip(heads, tails, strict=True)):
        sequence = torch.tensor(head + tail)
        ids[row, : len(sequence) - 1] = sequence[:-1]
        targets[row, len(head) - 1 : len(sequence) - 1] = sequence[len(head) :]
    return ids, targets


def reply_loss(model: LlamaForCausalLM, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy over the reply tokens; the head runs on those positions only."""
    hidden = model.model(ids, use_cache=False).last_hidden_state
    wanted = targets != IGNORED
    return F.cross_entropy(model.lm_head(hidden[wanted]), targets[wanted])


def train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    batches: Iterator[list[list[Pair]]],
    steps: int,
    learning_rate: float,
    label: str,
    report: Callable[[], str] | None = None,
    report_every: int = 500,
) -> None:
    """Run `steps` optimiser steps; each item of `batches` is one step: a list of micro-batches of equal weight.

    Hidden matrices are trained by Muon, embeddings and norms by AdamW; what requires no gradient is left as it is. The
    learning rate rises over 5 % of the steps and falls to zero along a cosine.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [p for name, p in trained if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in trained if p.ndim != 2 or "embed" in name]
    optimisers: list[torch.optim.Optimizer] = [Muon(matrices, lr=learning_rate)]
    if others:
        optimisers.append(torch.optim.AdamW(others, lr=learning_rate, weight_decay=0.0, betas=(0.9, 0.98)))
    warm_up = max(1, steps // 20)

    def rate(step: int) -> float:
        if step < warm_up:
            return (step + 1) / warm_up
        return 0.5 * (1 + torch.cos(torch.tensor(torch.pi * (step - warm_up) / (steps - warm_up))).item())

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimiser, rate) for optimiser in optimisers]
    model.train()
    started, losses = time.monotonic(), []
    for step in range(1, steps + 1):
        micro_batches = next(batches)
        for pairs in micro_batches:
            loss = reply_loss(model, *encode(pairs, tokenizer)) / len(micro_batches)
            loss.backward()
            losses.append(loss.item() * len(micro_batches))
        torch.nn.utils.clip_grad_norm_([p for _, p in trained], 1.0)
        for optimiser, schedule in zip(optimisers, schedules, strict=True):
            optimiser.step()
            schedule.step()
            optimiser.zero_grad(set_to_none=True)
        if step % min(100, max(1, steps // 6)) == 0 or step == steps:
            spent = time.monotonic() - started
            line = f"{label}: step {step}/{steps} loss {sum(losses) / len(losses):.4f} "
            line += f"{spent:.0f} s, {spent / step * (steps - step):.0f} s to go"
            losses.clear()
            if report is not None and (step % report_every == 0 or step == steps):
                model.eval()
                line += f" | {report()}"
                model.train()
            print(line, flush=True)
    model.eval()


@torch.inference_mode()
def answer(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    messages: list[str],
    max_new_tokens: int = 40,
    **sampling: Any,
) -> list[str]:
    """The model's replies to user messages (greedy unless `sampling` differs), by transformers' own generate."""
    replies: list[str] = []
    for start in range(0, len(messages), 256):
        prompts = [f"<|user|>{message}<|end|><|assistant|>" for message in messages[start : start + 256]]
        batch = tokenizer(prompts, return_tensors="pt", padding=True)
        made = model.generate(**batch, max_new_tokens=max_new_tokens, **{"do_sample": False, **sampling})
        replies += tokenizer.batch_decode(made[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return replies
