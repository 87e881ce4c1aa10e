"""Perplexity of completions under a model: how likely the texts are to it, not which model is better."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_pipeline.engines.chat_template import folding
from ray_pipeline.engines.imports import heavy_imports
from ray_pipeline.store.local import local_copy

if TYPE_CHECKING:  # A report reads stored perplexities, and would wait seconds for torch and transformers.
    import torch

Message = Mapping[str, str]
# Rows of logits turned to float32 at once: 1,024 × a vocabulary of 150,000 × 4 bytes is 0.6 GB.
_LOGIT_ROWS = 1024


@dataclass(frozen=True)
class Perplexity:
    """ppl = exp(nll_per_token), nats, over the `tokens` completion tokens of `rows` rows; None without tokens.
    `skipped_too_long` rows did not fit max_length; they are left out, never cut.
    """

    ppl: float | None
    nll_per_token: float | None
    tokens: int
    rows: int
    skipped_too_long: int = 0


@dataclass(frozen=True)
class EncodedRow:
    """Token ids of prompt and completion; positions from `start` on are the completion's."""

    ids: list[int]
    start: int


def perplexity(
    model_path: str | Path,
    rows: Sequence[tuple[Sequence[Message], str]],
    device: str = "cpu",
    batch_size: int = 8,
    dtype: str | torch.dtype = "float32",
    max_length: int = 1024,
    trust_remote_code: bool = False,
    revision: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    adapter: str | None = None,
) -> Perplexity:
    """Perplexity of the completion tokens of `rows`, each (prompt messages, completion text), given their prompts.

    Uses the model's own tokenizer and chat template (with `chat_template_kwargs`, such as enable_thinking).
    `max_length` is in tokens of prompt and completion together, `model_path` a folder, a hub name or the URI of a
    folder. Loads the model, with the LoRA adapter in the folder `adapter` if there is one, and frees it with the
    function.
    """
    with heavy_imports():
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

    model_path = local_copy(str(model_path))
    tokenizer = AutoTokenizer.from_pretrained(model_path, revision=revision, trust_remote_code=trust_remote_code)
    encoded = [encode_row(tokenizer, prompt, text, chat_template_kwargs) for prompt, text in rows]
    fitting = [row for row in encoded if len(row.ids) <= max_length and len(row.ids) > row.start > 0]
    too_long = sum(len(row.ids) > max_length for row in encoded)
    if not fitting:
        return Perplexity(None, None, 0, 0, too_long)
    model: Any = AutoModelForCausalLM.from_pretrained(
        model_path, revision=revision, dtype=dtype, trust_remote_code=trust_remote_code
    )
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, local_copy(adapter))
    model.to(device).eval()
    nll = 0.0
    with torch.inference_mode():
        for batch in _batches(fitting, batch_size):
            nll += _batch_nll(model, batch, device)
    tokens = sum(len(row.ids) - row.start for row in fitting)
    return Perplexity(math.exp(nll / tokens), nll / tokens, tokens, len(fitting), too_long)


def encode_row(
    tokenizer: Any, prompt: Sequence[Message], completion: str, chat_template_kwargs: Mapping[str, Any] | None = None
) -> EncodedRow:
    """Ids of the whole conversation and the exact place where the completion starts.

    The prompt's ids (with generation prompt) are a prefix of the conversation's for most templates. Where they are not
    (a template that rewrites earlier turns, or a merge across the boundary) the ids are those of the prompt, of
    the completion alone, and the end-of-sequence token: what an engine would have read and written.
    """
    extra = dict(chat_template_kwargs or {})
    messages = [dict(m) for m in prompt]
    if any(m["role"] == "system" for m in messages) and (fold := folding(tokenizer, extra)) is not None:
        messages = fold(messages)
    before = _template_ids(tokenizer, messages, add_generation_prompt=True, **extra)
    answered = [*messages, {"role": "assistant", "content": completion}]
    whole = _template_ids(tokenizer, answered, add_generation_prompt=False, **extra)
    eos = tokenizer.eos_token_id
    if whole[: len(before)] == before:
        return EncodedRow(_without_space_after(whole, eos, tokenizer), len(before))
    written = tokenizer(completion, add_special_tokens=False)["input_ids"]
    return EncodedRow([*before, *written, *([] if eos is None else [eos])], len(before))


def _template_ids(tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> list[int]:
    return list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **options))


def _without_space_after(ids: list[int], eos: int | None, tokenizer: Any) -> list[int]:
    """Drop what a template writes after the last end-of-turn token (a newline, mostly): the model never predicts it."""
    if eos is None or eos not in ids:
        return ids
    end = len(ids) - ids[::-1].index(eos)
    return ids if tokenizer.decode(ids[end:]).strip() else ids[:end]


def _batches(rows: Sequence[EncodedRow], batch_size: int) -> Iterator[list[EncodedRow]]:
    """Rows of like length together: less padding, and the longest batch comes first, so that too little memory
    shows at once.
    """
    ordered = sorted(rows, key=lambda row: len(row.ids), reverse=True)
    for start in range(0, len(ordered), batch_size):
        yield ordered[start : start + batch_size]


def _batch_nll(model: Any, batch: Sequence[EncodedRow], device: str) -> float:
    """Summed negative log-likelihood (nats) of the completion tokens of one right-padded batch."""
    import torch

    width = max(len(row.ids) for row in batch)
    ids = torch.zeros((len(batch), width), dtype=torch.long)
    attention = torch.zeros_like(ids)
    is_target = torch.zeros_like(ids, dtype=torch.bool)
    for i, row in enumerate(batch):
        ids[i, : len(row.ids)] = torch.tensor(row.ids)
        attention[i, : len(row.ids)] = 1
        is_target[i, row.start : len(row.ids)] = True
    ids, attention, is_target = ids.to(device), attention.to(device), is_target.to(device)
    logits = model(input_ids=ids, attention_mask=attention, use_cache=False).logits
    # The logits at position t predict token t + 1; only the rows that predict a completion token become float32.
    predicting = logits[:, :-1][is_target[:, 1:]]
    targets = ids[:, 1:][is_target[:, 1:]]
    total = 0.0
    for part, wanted in zip(_in_blocks(predicting), _in_blocks(targets), strict=True):
        total += float(torch.nn.functional.cross_entropy(part.float(), wanted, reduction="sum"))
    return total


def _in_blocks(rows: torch.Tensor) -> list[torch.Tensor]:
    return [rows[start : start + _LOGIT_ROWS] for start in range(0, len(rows), _LOGIT_ROWS)]
