"""The training curve in a few numbers."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ray_pipeline.stats.columns import numbers

MEASURES = (
    "loss",
    "rewards_margins",
    "kl",
    "rewards_chosen",
    "rewards_rejected",
    "rewards_accuracies",
    "grad_norm",
)


@dataclass(frozen=True)
class Trend:
    """A measure at the start and at the end: means over the first and the last tenth of its logged train steps
    (at least one), and its last value on the validation split.
    """

    first: float | None
    last: float | None
    validation: float | None


@dataclass(frozen=True)
class TrainingSummary:
    """`steps` is the last optimiser step; `not_finite` counts logged losses that are NaN or infinite."""

    steps: int
    not_finite: int
    trends: dict[str, Trend]


def summarise_training(train_metrics: pa.Table) -> TrainingSummary:
    """Trend of every measure of MEASURES that the table has values of."""
    steps = pc.max(train_metrics.column("step")).as_py() if len(train_metrics) else 0
    trends = {}
    for measure in MEASURES:
        _, train = curve(train_metrics, measure, train=True)
        _, validation = curve(train_metrics, measure, train=False)
        if len(train) or len(validation):
            tenth = max(1, len(train) // 10)
            trends[measure] = Trend(
                first=float(train[:tenth].mean()) if len(train) else None,
                last=float(train[-tenth:].mean()) if len(train) else None,
                validation=float(validation[-1]) if len(validation) else None,
            )
    return TrainingSummary(steps=steps or 0, not_finite=_not_finite_losses(train_metrics), trends=trends)


def curve(train_metrics: pa.Table, measure: str, *, train: bool) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(steps, values) of one measure in the order of steps, on the train split or on all others; finite values only.

    A table without the column `split` is all train.
    """
    if measure not in train_metrics.column_names:
        return np.empty(0), np.empty(0)
    rows = train_metrics
    if "split" in rows.column_names:
        is_train = pc.equal(rows.column("split"), "train")
        rows = rows.filter(is_train if train else pc.invert(is_train))
    elif not train:
        return np.empty(0), np.empty(0)
    steps, values = numbers(rows.column("step")), numbers(rows.column(measure))
    order = np.argsort(steps, kind="stable")
    finite = np.isfinite(values[order])
    return steps[order][finite], values[order][finite]


def _not_finite_losses(train_metrics: pa.Table) -> int:
    if "loss" not in train_metrics.column_names:
        return 0
    losses = train_metrics.column("loss").drop_null()
    return int((~np.isfinite(numbers(losses))).sum())
