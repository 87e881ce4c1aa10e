"""TRL's losses, as this room sets them up, against the formulas of the papers on log-probabilities of our own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F

from .conftest import MakeSpec

pytestmark = pytest.mark.e2e

BATCH = 6


class Oracle:
    """Log-probabilities of completions under the perturbed policy and its reference, from full logits."""

    def __init__(self, base: str, adapter: Path) -> None:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(base)
        self.policy = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter)).eval()
        self.reference = AutoModelForCausalLM.from_pretrained(base).eval()

    def log_ratio(self, prompt: list[dict[str, str]], completion: list[dict[str, str]]) -> torch.Tensor:
        """log π(y|x) − log π_ref(y|x)."""
        return self._log_prob(self.policy, prompt, completion) - self._log_prob(self.reference, prompt, completion)

    @torch.no_grad()
    def _log_prob(self, model: Any, prompt: list[dict[str, str]], completion: list[dict[str, str]]) -> torch.Tensor:
        render = self.tokenizer.apply_chat_template
        start = len(render(prompt, add_generation_prompt=True)["input_ids"])
        ids = torch.tensor([render(prompt + completion)["input_ids"]])
        log_probs = model(ids).logits.log_softmax(-1)
        return sum(log_probs[0, t - 1, ids[0, t]] for t in range(start, ids.shape[1]))


def perturbed(make_spec: MakeSpec, method: str, tmp_path: Path, **changes: Any) -> tuple[Any, Oracle, list[dict]]:
    """A trainer whose adapter moved far from the reference, the oracle for it, and the rows of its first batch."""
    from ray_pipeline.training.trainer import build_trainer

    spec = make_spec(method, num_workers=1, batch_size=BATCH, disable_dropout=True, **changes)
    trainer = build_trainer(spec, str(tmp_path / "scratch"))
    move_adapter(trainer)
    trainer.model.save_pretrained(tmp_path / "adapter")
    first_file = Path(spec.train_files.replace("*", "00000"))
    return trainer, Oracle(spec.model, tmp_path / "adapter"), pq.read_table(first_file).slice(0, BATCH).to_pylist()


def move_adapter(trainer: Any, steps: int = 15) -> None:
    """Make the batch likelier, by plain maximum likelihood: a random step would lower every log-probability of a
    random model, and KTO's KL term would be clamped to 0."""
    batch = next(iter(trainer.get_train_dataloader()))
    adapter = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(adapter, lr=1e-2)
    for _ in range(steps):
        logits = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        targets = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        F.cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()


def trl_loss(trainer: Any) -> torch.Tensor:
    trainer.model.train()
    return trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader()))).detach().cpu()


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_kto_is_the_papers(make_spec: MakeSpec, tmp_path: Path, beta: float) -> None:
    """Ethayarajh et al. 2024, eq. 7–8, with z0 from the completions of the same batch moved on by one prompt."""
    trainer, oracle, rows = perturbed(
        make_spec, "kto", tmp_path, beta=beta, desirable_weight=1.2, undesirable_weight=0.9
    )
    ratios = torch.stack([oracle.log_ratio(row["prompt"], row["completion"]) for row in rows])
    moved = torch.stack([oracle.log_ratio(row["prompt"], rows[i - 1]["completion"]) for i, row in enumerate(rows)])
    assert ratios.abs().mean() > 0.5
    z0 = moved.mean().clamp(min=0)
    assert z0 > 0, "choose another seed: with a clamped KL term half of the formula is not tested"
    losses = [
        1.2 * (1 - torch.sigmoid(beta * (r - z0))) if row["label"] else 0.9 * (1 - torch.sigmoid(beta * (z0 - r)))
        for r, row in zip(ratios, rows, strict=True)
    ]
    assert trl_loss(trainer) == pytest.approx(torch.stack(losses).mean().item(), abs=1e-4)


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_dpo_is_the_papers(make_spec: MakeSpec, tmp_path: Path, beta: float) -> None:
    """Rafailov et al. 2023, eq. 7."""
    trainer, oracle, rows = perturbed(make_spec, "dpo", tmp_path, beta=beta)
    chosen = torch.stack([oracle.log_ratio(row["prompt"], row["chosen"]) for row in rows])
    rejected = torch.stack([oracle.log_ratio(row["prompt"], row["rejected"]) for row in rows])
    assert torch.cat([chosen, rejected]).abs().mean() > 0.5
    expected = -F.logsigmoid(beta * (chosen - rejected)).mean().item()
    assert trl_loss(trainer) == pytest.approx(expected, abs=1e-4)
