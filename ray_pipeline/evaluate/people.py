"""How far the gate and the judges agree with people who labelled some candidates (`quorum review`)."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ray_pipeline.data.gate import GateConfig, cases_of, cut_text, labels_of
from ray_pipeline.data.reviewed import Reviewed, replaced_reason
from ray_pipeline.data.rows import one_array
from ray_pipeline.evaluate.data import ReportData
from ray_pipeline.report.figures import number, percent, percent_interval
from ray_pipeline.report.page import Block, Section, Table, Text
from ray_pipeline.report.powered import powered_table
from ray_pipeline.stats.bootstrap import Floats, Interval, bootstrap_mean
from ray_pipeline.stats.kappa import cohen_kappa
from ray_pipeline.stats.prediction_powered import Powered, powered_mean
from ray_pipeline.store.schemas import LABELS, READ_STATUSES

_SIDES = ("desirable", "undesirable")


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Of the gate with people, over the candidates that the gate called desirable or undesirable.

    Attributes:
        share: of equal labels; its interval resamples prompts, as candidates of one prompt are not independent.
        kappa: Cohen's; None where it is undefined.
    """

    candidates: int
    equal: int
    share: Interval
    kappa: float | None


@dataclasses.dataclass(frozen=True)
class GateAndPeople:
    """Labels of the gate beside those of people.

    Attributes:
        labelled: candidates of this run that people labelled; `unknown` are of no candidate of this run.
        unsure, contested: candidates left open, and labelled differently by several people: left out.
        counts: gate's label → people's label → candidates.
        chosen: agreement over all labelled candidates; `drawn` over those drawn evenly, which stand for the run.
        powered: share of all candidates with a final score that people would call desirable, and share of the gate's
            kept labels that they would agree with, from the labels drawn with known probabilities; by name.
        scores: judge → mean score of the candidates that people call desirable, and undesirable; None without one.
    """

    labelled: int
    unknown: int
    unsure: int
    contested: int
    counts: Mapping[str, Mapping[str, int]]
    chosen: Agreement
    drawn: Agreement
    powered: Mapping[str, Powered]
    scores: Mapping[str, tuple[float | None, float | None]]


def gate_and_people(data: ReportData) -> GateAndPeople | None:
    """None without labels by people, or without decisions."""
    people, decisions = data.people, data.decisions
    if people is None or decisions is None:
        return None
    columns = ["candidate_id", "prompt_id", "score_variance", "final_score", "label", "why"]
    rows = [row for row in decisions.select(columns).to_pylist() if row["candidate_id"] in people.labels]
    by_gate = {row["candidate_id"]: gate_label(row, data.gate) for row in rows}
    counts: dict[str, collections.Counter[str]] = {label: collections.Counter() for label in LABELS}
    for name, label in by_gate.items():
        counts[label][people.labels[name]] += 1
    prompts = {row["candidate_id"]: row["prompt_id"] for row in rows}
    both = {name: (label, people.labels[name], prompts[name]) for name, label in by_gate.items() if label in _SIDES}
    return GateAndPeople(
        labelled=len(rows),
        unknown=len(people.labels) - len(rows),
        unsure=people.unsure,
        contested=people.contested,
        counts={label: dict(found) for label, found in counts.items() if found},
        chosen=_agreement(list(both.values())),
        drawn=_agreement([row for name, row in both.items() if name in people.drawn]),
        powered=powered_shares(decisions, people, data.gate, data.agreement_on),
        scores=_scores(data, {name: people.labels[name] for name in by_gate}),
    )


def gate_label(decision: Mapping[str, Any], gate: GateConfig) -> str:
    """The gate's own label of a decision: the stored one, or where a person replaced it, what its numbers give."""
    if (gates_reason := replaced_reason(decision["why"])) is None:
        label: str = decision["label"]
        return label
    variance, final = (np.array([decision[name]], dtype=np.float64) for name in ("score_variance", "final_score"))
    cut = np.array([gates_reason.startswith(cut_text(""))])
    found: str = labels_of(cases_of(variance, final, cut, gate))[0].as_py()
    return found


def _agreement(labelled: Sequence[tuple[str, str, str]]) -> Agreement:
    """Of the gate's label, people's label and the prompt of each candidate."""
    if not labelled:
        return Agreement(0, 0, Interval(None, None, None), None)
    gate, people, prompts = zip(*labelled, strict=True)
    equal = [float(one == other) for one, other in zip(gate, people, strict=True)]
    share = bootstrap_mean(equal, prompts, bounds=(0, 1))
    return Agreement(len(labelled), int(sum(equal)), share, cohen_kappa(gate, people, _SIDES).value)


def predicted_desirable(decisions: pa.Table, gate: GateConfig) -> Floats:
    """How probably people call each candidate desirable, as far as the gate's numbers tell, shape (candidates,).

    1/2 + (d − 1/2) / (1 + variance), where d of the final score is 0 up to `undesirable_at`, 1 from `desirable_at` on,
    and in proportion between. Every candidate needs a final score.
    """
    final, variance = (one_array(decisions[name]).to_numpy() for name in ("final_score", "score_variance"))
    scale = np.clip((final - gate.undesirable_at) / (gate.desirable_at - gate.undesirable_at), 0, 1)
    found: Floats = 0.5 + (scale - 0.5) / (1 + variance)
    return found


def powered_shares(
    decisions: pa.Table, people: Reviewed, gate: GateConfig, only: Sequence[str] | None = None
) -> dict[str, Powered]:
    """Means over the run from the labels drawn with known probabilities; predictions are from the gate's numbers.

    Labels without a probability, of an older review, count with equal ones where they were drawn by chance, and if no
    label has one.

    Args:
        only: candidates that reviews draw from; default: all with a final score.
    """
    probability = people.probabilities or dict.fromkeys(people.drawn, 1.0)
    columns = ["candidate_id", "prompt_id", "score_variance", "final_score", "label", "why"]
    final = decisions.select(columns).filter(pc.is_valid(decisions["final_score"]))
    if only is not None:
        final = final.filter(pc.is_in(final["candidate_id"], value_set=pa.array(only, pa.string())))
    drawn = np.array(pc.is_in(final["candidate_id"], value_set=pa.array(sorted(probability), pa.string())), dtype=bool)
    rows = final.filter(pa.array(drawn)).to_pylist()
    prompts = np.asarray(final["prompt_id"].to_pylist(), dtype=object)
    desirable = predicted_desirable(final, gate)
    kept = np.array(pc.is_in(final["label"], value_set=pa.array(_SIDES)), dtype=bool)
    kept[drawn] = [gate_label(row, gate) in _SIDES for row in rows]
    said, right, weighed = (np.full(len(final), np.nan) for _ in range(3))
    said[drawn] = [people.labels[row["candidate_id"]] == "desirable" for row in rows]
    right[drawn] = [people.labels[row["candidate_id"]] == gate_label(row, gate) for row in rows]
    weighed[drawn] = [probability[row["candidate_id"]] for row in rows]
    means = {
        "candidates that people call desirable": (said, desirable, np.ones(len(final), dtype=bool)),
        "kept labels that people agree with": (right, np.maximum(desirable, 1 - desirable), kept),
    }
    found = {}
    for name, (y, f, on) in means.items():
        own, rest = drawn & on, ~drawn & on
        found[name] = powered_mean(y[own], f[own], f[rest], prompts[own], prompts[rest], probabilities=weighed[own])
    return {name: one for name, one in found.items() if one is not None}


def _scores(data: ReportData, labels: Mapping[str, str]) -> dict[str, tuple[float | None, float | None]]:
    if data.verdicts is None:
        return {}
    mine = pc.is_in(data.verdicts["candidate_id"], value_set=pa.array(list(labels), pa.string()))
    found: dict[str, dict[str, list[float]]] = collections.defaultdict(lambda: {side: [] for side in _SIDES})
    columns = ["candidate_id", "judge", "score", "parse_status"]
    for row in data.verdicts.filter(mine).select(columns).to_pylist():
        if row["score"] is not None and row["parse_status"] in READ_STATUSES:
            found[row["judge"]][labels[row["candidate_id"]]].append(row["score"])

    def mean(values: Sequence[float]) -> float | None:
        return sum(values) / len(values) if values else None

    return {judge: (mean(sides["desirable"]), mean(sides["undesirable"])) for judge, sides in sorted(found.items())}


def people_section(found: GateAndPeople | None) -> Section | None:
    """None without labels by people."""
    if found is None:
        return None
    left_out = [
        f"{number(count)} {what}"
        for count, what in (
            (found.contested, "labelled differently by different people"),
            (found.unsure, "left open"),
            (found.unknown, "of another run"),
        )
        if count
    ]
    text = f"People labelled {number(found.labelled)} candidates of this run."
    if left_out:
        text += f" Not counted: {', '.join(left_out)}."
    rows = [[label, *(number(counts.get(side, 0)) for side in _SIDES)] for label, counts in found.counts.items()]
    shares = [
        [name, number(one.candidates), f"{percent(one.share.mean)} ({percent_interval(one.share)})", number(one.kappa)]
        for name, one in (("all labelled", found.chosen), ("of them drawn evenly", found.drawn))
    ]
    scores = [[judge, *(number(value) for value in means)] for judge, means in found.scores.items()]
    return Section(
        "people",
        "Agreement with people",
        [
            Text(text),
            Table(["gate", "people: desirable", "people: undesirable"], rows, title="Labels"),
            Table(["candidates that the gate kept", "labelled", "equal labels", "kappa"], shares, title="Agreement"),
            Text(
                "A review prefers rows whose label is in doubt, so agreement over all of them is lower than over the "
                "run. The rows drawn evenly stand for the run. Intervals are 95 % bootstrap intervals over prompts, "
                "exact (Clopper-Pearson) where all labels agree or none does."
            ),
            *_powered_blocks(found.powered),
            Table(["judge", "mean score, desirable", "mean score, undesirable"], scores, title="Judges' scores"),
        ],
    )


def _powered_blocks(found: Mapping[str, Powered]) -> list[Block]:
    if not found:
        return []
    text = (
        "Shares over the whole run, from the labels that were drawn with known probabilities, each weighed by the "
        "inverse of its own, with the gate's numbers of all candidates as predictions (PPI++, arXiv:2311.01453). "
        "Predictions may be wrong; their weight is near 0 where they are useless. Worth: as many labels, drawn evenly, "
        "would give an interval as narrow without predictions."
    )
    rows = [(name, dataclasses.asdict(one)) for name, one in found.items()]
    return [powered_table(rows, "share of the run"), Text(text)]
