"""What people would say of all judged items, from their labels of some and a panel's votes on all (PPI++)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ray_pipeline.agents.jury import MISSING, VOTES
from ray_pipeline.agreement.panel import Evaluator, Panel
from ray_pipeline.agreement.pools import unsupervised
from ray_pipeline.report.page import Section, Text
from ray_pipeline.report.powered import powered_table
from ray_pipeline.stats.bootstrap import Floats
from ray_pipeline.stats.prediction_powered import Powered, powered_mean

#: The part of a win that each of `VOTES` is for answer B.
_WIN = np.linspace(0, 1, len(VOTES))


@dataclasses.dataclass(frozen=True)
class PoweredLine:
    """One mean over all items that the judges of a strategy voted on."""

    strategy: str
    quantity: str
    found: Powered


def powered_lines(
    strategy: str, judges: Sequence[Evaluator], panel: Panel, confidence: float = 0.95
) -> list[PoweredLine]:
    """The win rate of answer B with people, ties as half, and how often people agree with the panel's vote.

    Predictions are the one-coin model's: its expected win, and the probability of its vote. None where every judged
    item has a label, or none has.
    """
    pool = unsupervised(judges)["one-coin"]
    assert pool.probabilities is not None
    judged = pool.votes != MISSING
    labelled, rest = judged & (panel.labels != MISSING), judged & (panel.labels == MISSING)
    if not labelled.any() or not rest.any():
        return []
    questions = np.asarray(panel.questions)
    right = (pool.votes == panel.labels).astype(np.float64)

    def line(quantity: str, values: Floats, predictions: Floats) -> PoweredLine:
        found = powered_mean(
            values[labelled], predictions[labelled], predictions[rest], questions[labelled], questions[rest], confidence
        )
        assert found is not None
        return PoweredLine(strategy, quantity, found)

    return [
        line("win rate of answer B", _WIN[panel.labels], pool.probabilities @ _WIN),
        line("agreement with the panel", right, pool.probabilities.max(axis=1)),
    ]


def powered_section(document: Mapping[str, Any]) -> Section | None:
    rows = [(f"{line['quantity']}, {line['strategy']}", line["found"]) for line in document["powered"]]
    if not rows:
        return None
    text = (
        "Estimates for all judged items from the labels of some (PPI++, arXiv:2311.01453). The predictions are the "
        "one-coin model's; they may be wrong, and their weight is near 0 where they are useless. The labelled items "
        "must be a random sample of all. Worth: as many labels would give an interval as narrow without predictions."
    )
    return Section("powered", "People on all items, from labels on some", [powered_table(rows, "mean"), Text(text)])
