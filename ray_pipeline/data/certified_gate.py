"""The certified gate: labels only where people agree often enough, with a guarantee from labels by people.

It decides after the published gate has computed the numbers of every candidate. With f the final score, v the variance
(0 with `use_variance: false`) and h the middle between `desirable_at` and `undesirable_at`:

    side    desirable where f ≥ h, else undesirable
    c       |f − h| / √(1 + v), the confidence: far from the middle, with judges who agree

A candidate with c ≥ t has its side as label, one below t abstains; what is incomplete stays so. t comes from candidates
that were drawn by chance from this run and labelled by people (`stats.certified`). Whatever the judges, the label of at
least `agree_with_humans` of the candidates from t on is the one that people give, with a probability of at least
`confidence` over the draw of the labelled candidates. Another formula for c would keep the guarantee and change only
how much is kept.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ray_pipeline.config.settings import Settings
from ray_pipeline.data.gate import Floats, GateConfig, label_counts
from ray_pipeline.data.reviewed import HumanLabels
from ray_pipeline.data.rows import one_array
from ray_pipeline.graph.stage import Stage, StageRef, WholeInput, WholeWork
from ray_pipeline.report.figures import number, percent
from ray_pipeline.report.page import Rows, Section, Table, Text
from ray_pipeline.stats.certified import certify

#: Confidences are compared to so many digits, so that the audit's arithmetic gives the same labels.
DIGITS = 9


class _CertifyGiven(Settings):
    gate: GateConfig
    humans: HumanLabels


def certified_stage(gate: GateConfig, numbers: Stage, *, name: str) -> Stage:
    """The decisions of a certified gate.

    Args:
        numbers: decisions of the published gate with the same thresholds.

    Raises:
        InputError: the labels cannot be read.
    """
    assert gate.labels is not None
    humans = HumanLabels(path=gate.labels)
    return Stage(
        name=name,
        group="gate",
        work=WholeWork(function=certify_run, settings=_CertifyGiven(gate=gate, humans=humans), tables=("decisions",)),
        config=gate.decisive(),
        inputs={"numbers": numbers},
        external=humans.digest(),
    )


def certify_run(given: WholeInput) -> dict[str, Any]:
    """Find the threshold over all shards, then write them; confidences and one shard are in memory at a time."""
    settings: _CertifyGiven = given.settings
    gate, people = settings.gate, settings.humans.read()
    numbers = given.inputs["numbers"].table()
    drawn = pa.array(sorted(people.drawn), pa.string())
    sure, labelled, right = [], [], []
    for shard in numbers.scan():
        own, desirable = confidence(shard, gate)
        sure.append(own)
        at = np.flatnonzero(pc.is_in(one_array(shard["candidate_id"]), value_set=drawn))
        labels = [people.labels[name] for name in shard["candidate_id"].take(pa.array(at)).to_pylist()]
        labelled += own[at].tolist()
        right += [(label == "desirable") == side for label, side in zip(labels, desirable[at], strict=True)]
    found = certify(
        np.concatenate(sure) if sure else np.zeros(0),
        np.array(labelled, dtype=np.float64),
        np.array(right, dtype=bool),
        gate.agree_with_humans,
        gate.confidence,
    )
    ref = StageRef("gate", given.fingerprint, given.folder.location, given.num_shards, ("decisions",))
    counts: dict[str, int] = {}
    for shard_number in range(given.num_shards):
        table = relabel(numbers.read(shard_number), gate, found.threshold)
        ref.table().write(shard_number, table)
        counts = {label: counts.get(label, 0) + count for label, count in label_counts(table).items()}
        given.tick(shard_number + 1, given.num_shards, "shards")
    facts = dataclasses.asdict(found) | {
        "threshold": found.threshold if math.isfinite(found.threshold) else None,
        "not_drawn": len(people.labels) - len(people.drawn),
        "unknown": len(people.drawn) - len(labelled),
    }
    given.log(statement(facts, counts))
    return {"counts": counts, "certified": facts}


def confidence(decisions: pa.Table, gate: GateConfig) -> tuple[Floats, np.ndarray]:
    """Confidence of each candidate, NaN where it is incomplete, and whether its side is desirable."""
    final, variance = (
        np.array(one_array(decisions[name]).to_numpy(zero_copy_only=False), dtype=np.float64)
        for name in ("final_score", "score_variance")
    )
    away = final - (gate.desirable_at + gate.undesirable_at) / 2
    sure = (np.abs(away) / np.sqrt(1 + (variance if gate.use_variance else 0 * variance))).round(DIGITS)
    sure[np.asarray(pc.equal(one_array(decisions["label"]), "incomplete"))] = np.nan
    return sure, away >= 0


def relabel(decisions: pa.Table, gate: GateConfig, threshold: float) -> pa.Table:
    """Decisions of the published gate with the labels of the certified one.

    Args:
        threshold: lowest confidence that is kept; infinite where nothing is certified.
    """
    sure, desirable = confidence(decisions, gate)
    known = ~np.isnan(sure)
    kept = known & (np.nan_to_num(sure) >= threshold)
    side = np.where(desirable, "desirable", "undesirable")
    beyond = f"≥ {threshold:.4g}" if math.isfinite(threshold) else ""
    below = f"< {threshold:.4g}" if math.isfinite(threshold) else ", and nothing is certified"
    why = [
        f"confidence {value:.4f} {beyond}" if keep else f"confidence {value:.4f} {below}"
        for value, keep in zip(sure.tolist(), kept.tolist(), strict=True)
    ]
    columns = {
        "label": pc.if_else(
            pa.array(known), pa.array(np.where(kept, side, "abstain"), pa.string()), decisions["label"]
        ),
        "why": pc.if_else(pa.array(known), pa.array(why, pa.string()), decisions["why"]),
    }
    for name, column in columns.items():
        place = decisions.column_names.index(name)
        decisions = decisions.set_column(place, decisions.schema.field(place), column)
    return decisions


def statement(facts: Mapping[str, Any], counts: Mapping[str, int]) -> str:
    """What holds, as a sentence with its condition."""
    level, sure = percent(facts["level"], 0), percent(facts["confidence"], 0)
    reached = next((one for one in reversed(facts["tested"]) if one["threshold"] == facts["threshold"]), None)
    if reached is None:
        failed = facts["tested"][-1] if facts["tested"] else None
        seen = "" if failed is None else f" ({failed['agreeing']} of {failed['labelled']} in the first test)"
        return (
            f"Nothing is certified: the {facts['labels']:,} labelled candidates do not show that people agree with "
            f"{level} of the surest labels{seen}, so every candidate abstains. At least {facts['needed']} labels are "
            f"needed, all of which agree; label more (`quorum review RUN --chance -n 300`), or lower agree_with_humans."
        )
    kept = counts.get("desirable", 0) + counts.get("undesirable", 0)
    return (
        f"With a probability of at least {sure} over the draw of the {facts['labels']:,} labelled candidates, people "
        f"agree with at least {level} of the {kept:,} labels given ({percent(reached['coverage'])} of the candidates). "
        f"Of the {reached['labelled']:,} labelled ones among them people agree with {reached['agreeing']:,}; the lower "
        f"bound of their agreement is {percent(reached['least_agreement'])}."
    )


def certified_section(facts: Mapping[str, Any] | None, counts: Mapping[str, int]) -> Section | None:
    """None for the published gate."""
    if facts is None:
        return None
    rows: Rows = [
        [
            number(one["threshold"], 3),
            percent(one["coverage"]),
            number(one["labelled"]),
            number(one["agreeing"]),
            percent(one["least_agreement"]),
        ]
        for one in facts["tested"]
    ]
    left_out = [
        f"{count:,} {what}"
        for count, what in (
            (facts["not_drawn"], "not drawn by chance"),
            (facts["unknown"], "of candidates that this run does not have"),
        )
        if count
    ]
    text = (
        "It holds if the labelled candidates were drawn by chance from those of this run, for candidates on which "
        "people have an opinion. Thresholds are tested from the highest on, and the first that fails ends the sequence "
        "(Trust or Escalate, arXiv:2407.18370); the lower bound is exact (Clopper–Pearson)."
    )
    if left_out:
        text += f" Labels left out: {', '.join(left_out)}."
    columns = ["confidence from", "coverage", "labelled", "people agree", "lower bound of agreement"]
    table = Table(columns, rows, 0, title="Tests, in order", folded=True)
    return Section("certified", "The certified gate", [Text(statement(facts, counts)), Text(text), table])
