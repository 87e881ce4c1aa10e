"""A whole small run as ReportData, made from a seed."""

import numpy as np
import pyarrow as pa

from ray_pipeline.evaluate.data import ReportData, RunIdentity, StageUse
from ray_pipeline.policy.perplexity import Perplexity

JUDGES = ("helpfulness", "factuality", "conciseness")
LABELS = ("desirable", "undesirable", "discard", "abstain", "incomplete")


def whole_run(prompts: int = 60, /, **changes: object) -> ReportData:
    """Every part is there; `changes` replace parts."""
    rng = np.random.default_rng(3)
    ids = [f"p{i:03d}" for i in range(prompts)]
    cands = [f"c{i:04d}" for i in range(4 * prompts)]
    quality = rng.normal(5.5, 2.4, len(cands))
    parts: dict = {
        "run": RunIdentity(
            name="pocket",
            config_digest="9f2c11d0",
            fingerprints={"prompts": "aa11", "gate": "bb22"},
            models={"policy": "pocket/policy@1", "judge": "pocket/judge@1"},
        ),
        "prompt_counts": {"read": prompts + 12, "kept": prompts, "dropped": {"duplicate": 9, "too long": 3}},
        "prompts": pa.table({"prompt_id": ids, "messages": [[{"role": "user", "content": f"say {i}"}] for i in ids]}),
        "candidates": pa.table(
            {
                "candidate_id": cands,
                "prompt_id": [ids[i // 4] for i in range(len(cands))],
                "response": ["word " * int(n) for n in rng.integers(3, 40, len(cands))],
                "completion_tokens": rng.integers(3, 60, len(cands)).astype("int32"),
            }
        ),
        "verdicts": _verdicts(rng, cands, quality),
        "critiques": pa.table(
            {
                "flawed": [bool(q < 4) if i % 17 else None for i, q in enumerate(quality)],
                "failure_type": ["unsupported" if q < 4 else "none" for q in quality],
                "parse_status": ["ok" if i % 17 else "unparsed" for i in range(len(cands))],
            }
        ),
        "decisions": _decisions(cands, quality),
        "dataset_counts": {"kto": {"train": 120, "val": 6}, "dpo": {"train": 31, "val": 2}},
        "dataset_guards": {"equal after truncation": 2, "prompt too long": 1},
        "kto_weights": {"desirable_weight": 1.0, "undesirable_weight": 1.2},
        "train_settings": {"method": "kto", "beta": 0.1, "lora_dropout": 0.05},
        "train_metrics": _train_metrics(rng),
        "comparisons": comparisons(rng.choice(["A", "B", "C"], prompts, p=[0.55, 0.3, 0.15]), ids),
        "responses": _responses(rng, ids),
        "response_verdicts": _response_verdicts(rng, ids),
        "perplexity": {"base": Perplexity(3.21, 1.166, 900, 60), "policy": Perplexity(2.9, 1.065, 900, 60)},
        "curating_models": dict.fromkeys(JUDGES, "pocket/judge@1"),
        "evaluating_models": {"pairwise": "pocket/judge@1"},
        "stage_use": [
            StageUse("candidates", 240, 240, 0, 9000, 6000, 0, 12.5, 0),
            StageUse("judge", 720, 700, 20, 90000, 9000, 0, 40.25, 0),
        ],
        "bootstrap_draws": 200,
    }
    return ReportData(**(parts | changes))


def comparisons(in_order_ab: object, prompts: list[str]) -> pa.Table:
    """Choices in order "ab" with the answering choice in "ba" (every fifth pair flips)."""
    rows = []
    for i, (choice, prompt) in enumerate(zip(in_order_ab, prompts, strict=True)):
        swapped = {"A": "B", "B": "A", "C": "C"}[choice]
        second = choice if i % 5 == 0 else swapped
        for order, value in (("ab", choice), ("ba", second)):
            rows.append(
                {
                    "pair_id": f"x{i}",
                    "prompt_id": prompt,
                    "judge": "pairwise",
                    "order": order,
                    "choice": str(value),
                    "parse_status": "ok",
                }
            )
    return pa.Table.from_pylist(rows)


def _verdicts(rng: np.random.Generator, cands: list[str], quality: np.ndarray) -> pa.Table:
    rows = []
    for judge in JUDGES:
        for i, candidate in enumerate(cands):
            score = float(np.clip(np.round(quality[i] + rng.normal(0, 1.2)), 1, 10))
            unread = judge == "factuality" and i % 20 == 0
            rows.append(
                {
                    "candidate_id": candidate,
                    "judge": judge,
                    "score": None if unread else score,
                    "parse_status": "truncated" if unread else "ok",
                    "raw": f"<b>{judge}</b> gives {score:g}" + ("" if unread else "."),
                }
            )
    return pa.Table.from_pylist(rows)


def _decisions(cands: list[str], quality: np.ndarray) -> pa.Table:
    labels = ["desirable" if q >= 7 else "undesirable" if q <= 4 else "discard" for q in quality]
    labels = ["incomplete" if i % 20 == 0 else "abstain" if i % 9 == 0 else x for i, x in enumerate(labels)]
    return pa.table(
        {
            "candidate_id": cands,
            "label": labels,
            "final_score": [None if x == "incomplete" else float(q) for x, q in zip(labels, quality, strict=True)],
            "score_variance": [None if x == "incomplete" else 1.25 for x in labels],
            "why": ["final score and thresholds" for _ in cands],
        }
    )


def _train_metrics(rng: np.random.Generator) -> pa.Table:
    steps = np.arange(1, 61)
    train = [
        {
            "step": int(s),
            "split": "train",
            "loss": 0.5 * np.exp(-s / 25) + 0.2 + rng.normal(0, 0.01),
            "rewards_margins": 0.02 * s + rng.normal(0, 0.05),
            "kl": 0.01 * s,
        }
        for s in steps
    ]
    val = [
        {"step": s, "split": "eval", "loss": 0.5 * np.exp(-s / 25) + 0.22, "rewards_margins": None, "kl": None}
        for s in (20, 40, 60)
    ]
    return pa.Table.from_pylist(train + val)


def _responses(rng: np.random.Generator, ids: list[str]) -> pa.Table:
    rows = []
    for mode in ("greedy", "sampled"):
        for model, right in (("base", 0.45), ("policy", 0.8)):
            for prompt in ids:
                rows.append(
                    {
                        "prompt_id": prompt,
                        "model": model,
                        "mode": mode,
                        "response": "a b c",
                        "finish_reason": "stop",
                        "completion_tokens": 3,
                        "correct": bool(rng.random() < right),
                    }
                )
    return pa.Table.from_pylist(rows)


def _response_verdicts(rng: np.random.Generator, ids: list[str]) -> pa.Table:
    rows = []
    for judge in JUDGES:
        for model, mean in (("base", 5.5), ("policy", 7.0)):
            for prompt in ids:
                score = float(np.clip(round(rng.normal(mean, 2)), 1, 10))
                rows.append({"prompt_id": prompt, "model": model, "mode": "greedy", "judge": judge, "score": score})
    return pa.Table.from_pylist(rows)
