"""What a gate of three judges gains over one judge, by their accuracy and by how far they share their errors.

    python perf/panel_curve.py docs/panel_curve.svg [--prompts 2000]

A simulation: no model is called. Its decisions are made by the gate of a run (`gate.decide`, the published thresholds,
without a critic), those of the raw data by `ungated.best_and_worst` on the first judge alone. Of a decided prompt the
pair is that of the DPO rows (`best_pair`); it is truly ordered where the chosen response is right and the rejected one
wrong.

The model: four responses to a prompt, each right with probability 1/2. A judge is right about one with probability a,
scores 8, 9 or 10 if it takes it for right and 1, 2 or 3 otherwise. With probability c all judges make one draw of
their errors, else each its own: c is the correlation of two judges' errors. What it leaves out: responses that are
partly right, judges of different accuracy or leniency, errors that depend on the response's length or on the prompt,
and the critic.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ray_pipeline.data.dataset_rows import best_pair
from ray_pipeline.data.gate import GateConfig, decide
from ray_pipeline.data.ungated import best_and_worst
from ray_pipeline.report.charts import Chart, Series, lines, standalone
from ray_pipeline.report.figures import number, percent
from ray_pipeline.report.markdown import markdown_table
from ray_pipeline.stats.judge_errors import effective_number

ACCURACIES = (0.6, 0.7, 0.8, 0.9)
CORRELATIONS = (0.0, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0)
JUDGES = ("first", "second", "third")
RESPONSES = 4
_COLOURS = ("grey", "orange", "blue", "green")


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Pairs that were made, and the share of them that are truly ordered, with its standard error."""

    made: int
    ordered: float
    error: float


@dataclasses.dataclass(frozen=True)
class Outcome:
    accuracy: float
    correlation: float
    raw: Pairs
    gated: Pairs

    @property
    def gain(self) -> float:
        return self.gated.ordered - self.raw.ordered


def simulate(accuracy: float, correlation: float, prompts: int, seed: int = 0) -> Outcome:
    """One panel over `prompts` prompts; equal arguments give equal outcomes."""
    rng = np.random.default_rng([seed, round(1000 * accuracy), round(1000 * correlation)])
    rows = prompts * RESPONSES
    right = rng.random(rows) < 0.5
    shared = rng.random((rows, 1)) < correlation
    wrong = np.where(shared, rng.random((rows, 1)), rng.random((rows, len(JUDGES)))) < 1 - accuracy
    scores = np.where(right[:, None] ^ wrong, 8.0, 1.0) + rng.integers(0, 3, wrong.shape)
    ids = [f"{row:08d}" for row in range(rows)]
    candidates = pa.table({"candidate_id": ids, "prompt_id": [ids[row // RESPONSES] for row in range(rows)]})
    verdicts = pa.table(
        {
            "candidate_id": ids * len(JUDGES),
            "judge": np.repeat(JUDGES, rows),
            "score": scores.T.reshape(-1),
            "parse_status": pa.array(["ok"] * (rows * len(JUDGES))),
        }
    )
    gated = decide(candidates, verdicts, None, JUDGES, GateConfig(use_critic=False))
    raw = best_and_worst(candidates, verdicts, JUDGES[:1])
    return Outcome(accuracy, correlation, _pairs(raw, right), _pairs(gated, right))


def _pairs(decisions: pa.Table, right: Any) -> Pairs:
    """`decisions` are in the order of `right`."""
    sides: dict[str, dict[str, list[dict[str, Any]]]] = collections.defaultdict(lambda: collections.defaultdict(list))
    for row in decisions.select(["candidate_id", "prompt_id", "label", "final_score"]).to_pylist():
        sides[row["prompt_id"]][row["label"]].append(row)
    ordered = []
    for labels in sides.values():
        if labels["desirable"] and labels["undesirable"]:
            chosen, rejected = best_pair(labels["desirable"], labels["undesirable"])
            ordered.append(bool(right[int(chosen["candidate_id"])] and not right[int(rejected["candidate_id"])]))
    share = float(np.mean(ordered)) if ordered else float("nan")
    return Pairs(len(ordered), share, float(np.sqrt(share * (1 - share) / max(1, len(ordered)))))


def chart(outcomes: Sequence[Outcome], prompts: int) -> Chart:
    """Gain by correlation, a line for each accuracy."""
    series = []
    for colour, accuracy in zip(_COLOURS, dict.fromkeys(o.accuracy for o in outcomes), strict=False):
        own = [o for o in outcomes if o.accuracy == accuracy]
        gains = [100 * o.gain for o in own]
        series.append(Series(f"judges right on {percent(accuracy, 0)}", colour, [o.correlation for o in own], gains))
    found = lines(
        "More truly ordered pairs by the gate of three judges than by one judge, in points",
        series,
        "correlation of the judges' errors",
        note=f"Simulation, {prompts:,} prompts a point; its model is in docs/evidence.md.",
    )
    assert found is not None
    return found


def table(outcomes: Sequence[Outcome]) -> str:
    """All outcomes as Markdown."""
    columns = ["judges right", "correlation", "effective judges", "raw, ordered", "gated, ordered", "± SE"]
    columns += ["gain, points", "raw pairs", "gated pairs"]
    rows = [
        [
            percent(o.accuracy, 0),
            number(o.correlation),
            number(effective_number(len(JUDGES), o.correlation)),
            percent(o.raw.ordered),
            percent(o.gated.ordered),
            f"{100 * o.gated.error:.1f}",
            f"{100 * o.gain:+.1f}",
            number(o.raw.made),
            number(o.gated.made),
        ]
        for o in outcomes
    ]
    return markdown_table(columns, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="SVG file to write")
    parser.add_argument("--prompts", type=int, default=2000, help="prompts of each point")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    outcomes = [simulate(a, c, given.prompts, given.seed) for a in ACCURACIES for c in CORRELATIONS]
    given.file.write_text(standalone(chart(outcomes, given.prompts)), encoding="utf-8")
    print(table(outcomes))


if __name__ == "__main__":
    main()
