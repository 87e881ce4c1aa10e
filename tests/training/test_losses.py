"""TRL's losses, as this room sets them up, against the formulas of the papers on log-probabilities of our own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F

from ray_pipeline.training.methods import NOISE_AWARE

from .conftest import ROWS, MakeSpec, write_rows

pytestmark = pytest.mark.e2e

BATCH = 6
Chat = list[dict[str, str]]


class Oracle:
    """Log-probabilities of the tokens of chats under the perturbed policy and under the base, from full logits."""

    def __init__(self, policy: Any, base: str) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(base)
        self.policy = policy.eval()
        self.base = AutoModelForCausalLM.from_pretrained(base).eval()

    def answer(self, prompt: Chat, completion: Chat, model: Any = None) -> torch.Tensor:
        """log π(token | what is before it) of each token of the answer, its end token included."""
        render = self.tokenizer.apply_chat_template
        start = len(render(prompt, add_generation_prompt=True)["input_ids"])
        return self.whole(prompt + completion, model)[start - 1 :]

    @torch.no_grad()
    def whole(self, chat: Chat, model: Any = None) -> torch.Tensor:
        """The same of every token of a chat but the first."""
        ids = torch.tensor([self.tokenizer.apply_chat_template(chat)["input_ids"]])
        log_probs = (model or self.policy)(ids).logits[0, :-1].log_softmax(-1)
        return log_probs.gather(1, ids[0, 1:, None]).squeeze(1)

    def log_ratio(self, prompt: Chat, completion: Chat) -> torch.Tensor:
        """log π(y|x) − log π_ref(y|x); the reference is the base."""
        return self.answer(prompt, completion).sum() - self.answer(prompt, completion, self.base).sum()


Perturbed = Callable[..., tuple[Any, Oracle, list[dict[str, Any]]]]


@pytest.fixture
def perturbed(make_spec: MakeSpec, tmp_path: Path) -> Perturbed:
    """`perturbed(method, **changes)`: a trainer whose policy moved far from the base, the oracle for it, and the rows
    of its first batch."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from ray_pipeline.training.trainer import build_trainer

    torch.set_num_threads(1)  # matrices this small only wait for each other

    def make(method: str, **changes: Any) -> tuple[Any, Oracle, list[dict[str, Any]]]:
        spec = make_spec(method, num_workers=1, batch_size=BATCH, disable_dropout=True, **changes)
        trainer = build_trainer(spec, str(tmp_path / "scratch"))
        move(trainer)
        trainer.model.save_pretrained(tmp_path / "moved")
        if spec.settings.lora is None:
            policy = AutoModelForCausalLM.from_pretrained(tmp_path / "moved")
        else:
            base = AutoModelForCausalLM.from_pretrained(spec.model)
            policy = PeftModel.from_pretrained(base, str(tmp_path / "moved"))
        rows = pq.read_table(spec.train_files.replace("*", "00000")).slice(0, BATCH).to_pylist()
        oracle = Oracle(policy, spec.model)
        columns = [name for name in ("completion", "chosen", "rejected") if name in rows[0]]
        ratios = [oracle.log_ratio(row["prompt"], row[name]) for row in rows for name in columns]
        assert torch.stack(ratios).abs().mean() > 0.5, "the policy is still the base: the formula would not be tested"
        return trainer, oracle, rows

    return make


def move(trainer: Any, steps: int = 15) -> None:
    """Make the batch likelier, by plain maximum likelihood: a random step would lower every log-probability of a
    random model, and KTO's KL term would be clamped to 0."""
    batch = next(iter(trainer.get_train_dataloader()))
    ids = batch.get("input_ids", batch.get("chosen_input_ids"))
    mask = batch.get("attention_mask", batch.get("chosen_attention_mask"))
    optimizer = torch.optim.Adam([p for p in trainer.model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        logits = trainer.model(input_ids=ids, attention_mask=mask).logits
        targets = ids.masked_fill(mask == 0, -100)
        F.cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()


def trl_loss(trainer: Any) -> float:
    trainer.model.train()
    return trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader()))).item()


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_kto_is_the_papers(perturbed: Perturbed, beta: float) -> None:
    """Ethayarajh et al. 2024, eq. 7–8, with z0 from the completions of the same batch moved on by one prompt."""
    trainer, oracle, rows = perturbed("kto", beta=beta, desirable_weight=1.2, undesirable_weight=0.9)
    ratios = torch.stack([oracle.log_ratio(row["prompt"], row["completion"]) for row in rows])
    moved = torch.stack([oracle.log_ratio(row["prompt"], rows[i - 1]["completion"]) for i, row in enumerate(rows)])
    z0 = moved.mean().clamp(min=0)
    assert z0 > 0, "choose another seed: with a clamped KL term half of the formula is not tested"
    losses = [
        1.2 * (1 - torch.sigmoid(beta * (r - z0))) if row["label"] else 0.9 * (1 - torch.sigmoid(beta * (z0 - r)))
        for r, row in zip(ratios, rows, strict=True)
    ]
    assert trl_loss(trainer) == pytest.approx(torch.stack(losses).mean().item(), abs=1e-4)


@pytest.mark.parametrize(("beta", "changes"), [(0.1, {}), (0.5, {}), (0.5, {"lora": None})])
def test_dpo_is_the_papers(perturbed: Perturbed, beta: float, changes: dict[str, Any]) -> None:
    """Rafailov et al. 2023, eq. 7; without LoRA the reference is a frozen copy that TRL makes."""
    trainer, oracle, rows = perturbed("dpo", beta=beta, **changes)
    assert (trainer.ref_model is None) == ("lora" not in changes)
    chosen = torch.stack([oracle.log_ratio(row["prompt"], row["chosen"]) for row in rows])
    rejected = torch.stack([oracle.log_ratio(row["prompt"], row["rejected"]) for row in rows])
    assert trl_loss(trainer) == pytest.approx(-F.logsigmoid(beta * (chosen - rejected)).mean().item(), abs=1e-4)


@pytest.mark.parametrize(("method", "epsilon"), [("cdpo", None), ("cdpo", 0.3), ("rdpo", None), ("rdpo", 0.3)])
def test_smoothed_labels(perturbed: Perturbed, method: str, epsilon: float | None) -> None:
    """cDPO (Mitchell 2023) and robust DPO (Chowdhury et al. 2024), with ε 0.1 unless set."""
    changes = {} if epsilon is None else {"trainer_args": {"label_smoothing": epsilon}}
    trainer, oracle, rows = perturbed(method, beta=0.5, **changes)
    share = 0.1 if epsilon is None else epsilon
    margin = 0.5 * torch.stack(
        [oracle.log_ratio(r["prompt"], r["chosen"]) - oracle.log_ratio(r["prompt"], r["rejected"]) for r in rows]
    )
    as_labelled, flipped = -F.logsigmoid(margin), -F.logsigmoid(-margin)
    losses = (
        (1 - share) * as_labelled + share * flipped
        if method == "cdpo"
        else ((1 - share) * as_labelled - share * flipped) / (1 - 2 * share)
    )
    assert trl_loss(trainer) == pytest.approx(losses.mean().item(), abs=1e-4)


def times_their_weight(losses: list[torch.Tensor], rows: list[dict[str, Any]]) -> float:
    """The loss of a batch of as many rows, from which those of weight 0 are gone and where those of 2 are twice."""
    assert {row["weight"] for row in rows} == {0.0, 1.0, 2.0}
    return sum(loss.item() for loss, row in zip(losses, rows, strict=True) for _ in range(int(row["weight"]))) / BATCH


@pytest.mark.parametrize(
    "changes", [{}, {"lora": None}, {"trainer_args": {"loss_type": ["robust"], "label_smoothing": 0.2}}]
)
def test_weighted_dpo_counts_a_pair_as_often_as_its_weight(perturbed: Perturbed, changes: dict[str, Any]) -> None:
    trainer, oracle, rows = perturbed("dpo_weighted", beta=0.5, **changes)
    margins = [
        0.5 * (oracle.log_ratio(r["prompt"], r["chosen"]) - oracle.log_ratio(r["prompt"], r["rejected"])) for r in rows
    ]
    losses = [-F.logsigmoid(margin) for margin in margins]
    if "trainer_args" in changes:
        losses = [(0.8 * loss + 0.2 * F.logsigmoid(-m)) / 0.6 for loss, m in zip(losses, margins, strict=True)]
    assert trl_loss(trainer) == pytest.approx(times_their_weight(losses, rows), abs=1e-4)


def test_weighted_kto_counts_a_row_as_often_as_its_weight(perturbed: Perturbed) -> None:
    """With z0 from all rows, as in KTO."""
    trainer, oracle, rows = perturbed("kto_weighted", beta=0.5, desirable_weight=1.2, undesirable_weight=0.9)
    ratios = [oracle.log_ratio(row["prompt"], row["completion"]) for row in rows]
    moved = [oracle.log_ratio(row["prompt"], rows[i - 1]["completion"]) for i, row in enumerate(rows)]
    z0 = torch.stack(moved).mean().clamp(min=0)
    losses = [
        1.2 * (1 - torch.sigmoid(0.5 * (r - z0))) if row["label"] else 0.9 * (1 - torch.sigmoid(0.5 * (z0 - r)))
        for r, row in zip(ratios, rows, strict=True)
    ]
    assert trl_loss(trainer) == pytest.approx(times_their_weight(losses, rows), abs=1e-4)
    assert (trainer.desirable_weight, trainer.undesirable_weight) == (1.2, 0.9)


@pytest.mark.parametrize(("method", "changes"), [("dpo_weighted", {}), ("kto_weighted", {"desirable_weight": 1.2})])
def test_rows_without_weight_teach_nothing(
    make_spec: MakeSpec, tmp_path: Path, method: str, changes: dict[str, Any]
) -> None:
    from ray_pipeline.training.trainer import build_trainer

    make, schema = ROWS[NOISE_AWARE[method].data]
    trained = {}
    for weight in (0.0, 1.0):
        rows = [{**row, "weight": weight} for row in make(2 * BATCH)]
        files = write_rows(tmp_path / f"{weight}.parquet", rows, schema)
        spec = make_spec(
            method, num_workers=1, batch_size=BATCH, epochs=1, train_files=files, val_files=files, **changes
        )
        trainer = build_trainer(spec, str(tmp_path / "scratch"))
        before = [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad]
        trainer.train()
        after = [p.detach() for p in trainer.model.parameters() if p.requires_grad]
        trained[weight] = all(torch.equal(*pair) for pair in zip(before, after, strict=True)), trainer.state.global_step
        assert (trainer.evaluate()["eval_loss"] == pytest.approx(0, abs=1e-12)) == (weight == 0)
    assert trained == {0.0: (True, 2), 1.0: (False, 2)}


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_orpo_is_the_papers_but_for_its_likelihood_term(perturbed: Perturbed, beta: float) -> None:
    """Hong et al. 2024, eq. 6–7. The paper's first term is the mean −log π per token of the chosen answer; TRL takes
    prompt and answer, and the mean over all tokens of the batch."""
    trainer, oracle, rows = perturbed("orpo", beta=beta)
    likelihood = torch.cat([oracle.whole(row["prompt"] + row["chosen"]) for row in rows]).mean()
    papers = torch.stack([oracle.answer(row["prompt"], row["chosen"]).mean() for row in rows]).mean()
    assert abs(likelihood - papers) > 1e-2  # the two readings can be told apart here

    def log_odds(name: str) -> torch.Tensor:
        log_p = torch.stack([oracle.answer(row["prompt"], row[name]).mean() for row in rows])
        return log_p - torch.log1p(-log_p.exp())

    odds_ratio = -F.logsigmoid(log_odds("chosen") - log_odds("rejected")).mean()
    assert trl_loss(trainer) == pytest.approx((-likelihood + beta * odds_ratio).item(), abs=1e-4)


@pytest.mark.parametrize(("beta", "gamma"), [(2.0, None), (0.7, 0.4)])
def test_simpo_is_the_papers(perturbed: Perturbed, beta: float, gamma: float | None) -> None:
    """Meng et al. 2024, eq. 6: no reference, log-probabilities per token, a margin γ (1.0 unless set)."""
    given = {} if gamma is None else {"trainer_args": {"simpo_gamma": gamma}}
    trainer, oracle, rows = perturbed("simpo", beta=beta, **given)
    chosen, rejected = (
        torch.stack([oracle.answer(row["prompt"], row[name]).mean() for row in rows]) for name in ("chosen", "rejected")
    )
    margin = beta * (chosen - rejected) - (1.0 if gamma is None else gamma)
    assert trl_loss(trainer) == pytest.approx(-F.logsigmoid(margin).mean().item(), abs=1e-4)


def test_sft_is_the_likelihood_of_the_answers(perturbed: Perturbed) -> None:
    """Per token, over the answers of the batch together; prompts do not count."""
    trainer, oracle, rows = perturbed("sft")
    answers = torch.cat([oracle.answer(row["prompt"], row["completion"]) for row in rows])
    prompts_too = torch.cat([oracle.whole(row["prompt"] + row["completion"]) for row in rows])
    assert abs(answers.mean() - prompts_too.mean()) > 1e-2
    assert trl_loss(trainer) == pytest.approx(-answers.mean().item(), abs=1e-4)
