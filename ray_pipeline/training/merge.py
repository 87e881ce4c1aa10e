"""Merging a LoRA adapter into its base, with a check that the merged model computes the same logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ray_pipeline.training.folders import clear, partial_folder, publish
from ray_pipeline.training.methods import Task, model_args, model_class
from ray_pipeline.training.tokenizer import complete_generation_config

if TYPE_CHECKING:  # importing torch takes seconds
    import torch

_PROMPTS = ("The largest of three numbers is", "Once upon a time", "Q: What is 2 + 3?\nA:")
_CHECK_TOKENS = 64
#: In float32 the two differ by rounding only: 1e-7 on tiny models, 1e-5 on large ones.
_TOLERANCE = 1e-3


class MergeError(RuntimeError):
    """The merged model and base + adapter compute different logits."""


@dataclass(frozen=True)
class MergeReport:
    """Figures of the check of a merge, in float32 before the cast.

    Attributes:
        max_logit_diff: largest |Δ logit| between base + adapter and the merged model.
        adapter_effect: largest |Δ logit| between base and base + adapter; 0 means that the adapter has no effect.
    """

    max_logit_diff: float
    adapter_effect: float


def merge_adapter(
    base: str,
    adapter: str,
    out: str,
    dtype: str,
    *,
    task: Task = "CAUSAL_LM",
    revision: str | None = None,
    trust_remote_code: bool = False,
    prompts: Sequence[str] = _PROMPTS,
    end_token: int | None = None,
    readme: str | None = None,
) -> MergeReport:
    """Write base + adapter as one model: safetensors, tokenizer with chat template, generation config.

    The merge is done in float32 on the CPU (in bfloat16 rounding alone moves logits by 4e-3) and cast to `dtype` after
    the check. Needs memory for the base in float32: 4 bytes per parameter.

    Args:
        base: local folder or Hub name of the base model, at `revision`.
        adapter: folder with `adapter_model.safetensors`, `adapter_config.json` and the tokenizer.
        out: final folder; written atomically, replacing an older one.
        dtype: "float32" or "bfloat16", for the written weights.
        task: of the method that trained the adapter.
        prompts: texts to compare logits on; the first 64 tokens of each are used.
        end_token: id of the token behind a reply; generation with the merged model stops at it.
        readme: text of README.md.

    Raises:
        MergeError: merged and base + adapter differ by more than rounding.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(adapter, trust_remote_code=trust_remote_code)
    encoded = [tokenizer(text, add_special_tokens=False)["input_ids"][:_CHECK_TOKENS] for text in prompts]
    samples = [torch.tensor([ids]) for ids in encoded if ids]
    torch.manual_seed(0)  # a reward model gets a new head, which the adapter replaces
    model = model_class(task).from_pretrained(
        base,
        revision=revision,
        trust_remote_code=trust_remote_code,
        dtype=torch.float32,
        device_map=None,
        **model_args(task),
    )
    model.eval()
    of_base = _logits(model, samples)
    with_adapter = PeftModel.from_pretrained(model, adapter, torch_device="cpu").eval()
    of_adapter = _logits(with_adapter, samples)
    merged = with_adapter.merge_and_unload()
    report = MergeReport(
        max_logit_diff=_largest_difference(of_adapter, _logits(merged, samples)),
        adapter_effect=_largest_difference(of_base, of_adapter),
    )
    scale = max([1.0, *(float(logits.abs().max()) for logits in of_adapter)])
    if not report.max_logit_diff <= _TOLERANCE * scale:  # NaN fails too
        raise MergeError(
            f"merging {adapter} into {base} moves logits by up to {report.max_logit_diff:.3g} "
            f"(they reach {scale:.3g}); check that the adapter was trained on this base"
        )

    final = Path(out)
    partial = partial_folder(final)
    clear(partial)
    if task == "CAUSAL_LM":
        complete_generation_config(merged.generation_config, tokenizer, end_token)
    else:
        merged.config.get_text_config().pad_token_id = tokenizer.pad_token_id  # scores are read at the token before it
    merged.to(getattr(torch, dtype)).save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    if readme is not None:
        (partial / "README.md").write_text(readme)
    publish(final)
    return report


def _logits(model: torch.nn.Module, samples: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    import torch

    with torch.no_grad():
        return [model(input_ids=ids).logits.float() for ids in samples]


def _largest_difference(left: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> float:
    return max((float((a - b).abs().max()) for a, b in zip(left, right, strict=True)), default=0.0)
