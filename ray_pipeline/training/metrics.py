"""The `train_metrics` table, made from the log in every checkpoint, so that a resume leaves no gap."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa

from ray_pipeline.store.schemas import TRAIN_METRICS

#: Column of the table -> TRL's name in the log; the names of its reward trainer are in `_REWARD_NAMES`.
LOG_NAMES: dict[str, str] = {
    "loss": "loss",
    "learning_rate": "learning_rate",
    "grad_norm": "grad_norm",
    "kl": "kl",
    "rewards_chosen": "rewards/chosen",
    "rewards_rejected": "rewards/rejected",
    "rewards_margins": "rewards/margins",
    "rewards_accuracies": "rewards/accuracies",
    "logps_chosen": "logps/chosen",
    "logps_rejected": "logps/rejected",
}

_REWARD_NAMES = {"rewards_margins": "margin", "rewards_accuracies": "accuracy"}


def train_metrics(log_history: Iterable[Mapping[str, Any]]) -> pa.Table:
    """One row per logged optimiser step (`split` train) and per evaluation (`split` eval), by step, train first.

    Values that a method does not log (accuracies in KTO), or that a step lacks (no row of a class), are null. For a
    step of several micro-batches TRL logs the plain mean over those with the class.
    """
    rows: dict[tuple[int, str], dict[str, Any]] = {}
    for entry in log_history:
        for split, prefix in (("train", ""), ("eval", "eval_")):
            if f"{prefix}loss" not in entry:  # the summary at the end has only "train_loss"
                continue
            names = LOG_NAMES | {c: n for c, n in _REWARD_NAMES.items() if f"{prefix}{n}" in entry}
            values = {column: _number(entry.get(f"{prefix}{name}")) for column, name in names.items()}
            rows[(entry["step"], split)] = {
                "step": entry["step"], "split": split, "epoch": _number(entry.get("epoch")), **values
            }  # fmt: skip
    ordered = sorted(rows.items(), key=lambda item: (item[0][0], item[0][1] == "eval"))
    return pa.Table.from_pylist([row for _, row in ordered], schema=TRAIN_METRICS)


def mean_train_loss(table: pa.Table) -> float:
    """Mean of the logged training losses; NaN when there is none."""
    losses = [row["loss"] for row in table.to_pylist() if row["split"] == "train" and row["loss"] is not None]
    return sum(losses) / len(losses) if losses else float("nan")


def _number(value: Any) -> float | None:
    return None if value is None else float(value)
