"""What the gate did with the candidates."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ray_pipeline.stats.columns import Spread, chunk, numbers, refuse_repeats, response_chars, spread
from ray_pipeline.store.schemas import LABELS


@dataclass(frozen=True)
class LabelStats:
    """One label: its rows, their share of all rows, and how long their responses are."""

    count: int
    share: float | None
    chars: Spread
    tokens: Spread


@dataclass(frozen=True)
class GateStats:
    """One gate run. acceptance = (desirable + undesirable) / rows; gap is between the two means of final_score."""

    rows: int
    acceptance: float | None
    labels: dict[str, LabelStats]
    desirable: Spread
    undesirable: Spread
    gap: float | None
    score_variance: Spread

    @property
    def counts(self) -> dict[str, int]:
        """Rows by label."""
        return {label: stats.count for label, stats in self.labels.items()}


@dataclass(frozen=True)
class GeneratorStats:
    """Candidates of one generator, by its name in column `model`. `score` is of the judges' means."""

    name: str
    candidates: int
    desirable: int
    undesirable: int
    score: Spread


@dataclass(frozen=True)
class SourceAgreement:
    """Prompts whose source prefers some of its answers, by whether the judges' mean scores do too."""

    agree: int
    equal: int
    disagree: int
    unread: int


def gate_stats(decisions: pa.Table, candidates: pa.Table) -> GateStats:
    """Label distribution, final scores of the two kept labels, and response lengths per label.

    Columns read: decisions candidate_id, label, final_score, score_variance; candidates candidate_id,
    completion_tokens and response (or response_chars). Joined by candidate_id, never by position.
    Raises ValueError for a repeated id, an unknown label, and a decision whose candidate is missing.
    """
    place = _rows_of_candidates(decisions, candidates)
    chars, tokens = response_chars(candidates)[place], numbers(candidates.column("completion_tokens"))[place]
    labels = np.asarray(decisions.column("label").to_pylist(), dtype=object)
    if strangers := set(labels.tolist()) - set(LABELS):
        raise ValueError(f"decisions: labels outside {list(LABELS)}: {sorted(map(str, strangers))}")
    final = numbers(decisions.column("final_score"))
    rows = len(decisions)
    desirable, undesirable = (spread(final[labels == label]) for label in ("desirable", "undesirable"))
    counts = {label: int((labels == label).sum()) for label in LABELS}
    return GateStats(
        rows=rows,
        acceptance=(counts["desirable"] + counts["undesirable"]) / rows if rows else None,
        labels={
            label: LabelStats(
                count=counts[label],
                share=counts[label] / rows if rows else None,
                chars=spread(chars[labels == label]),
                tokens=spread(tokens[labels == label]),
            )
            for label in LABELS
        },
        desirable=desirable,
        undesirable=undesirable,
        gap=_gap(desirable, undesirable),
        score_variance=spread(numbers(decisions.column("score_variance"))),
    )


def generator_stats(decisions: pa.Table, candidates: pa.Table) -> list[GeneratorStats]:
    """One entry for each generator, by name; [] unless there are several.

    Columns read: decisions candidate_id, label, mean_score; candidates candidate_id, model.
    """
    if "model" not in candidates.column_names or "mean_score" not in decisions.column_names:
        return []
    place = pa.array(_rows_of_candidates(decisions, candidates))
    models = np.asarray(
        pc.fill_null(chunk(candidates.column("model")), "unknown").take(place).to_pylist(), dtype=object
    )
    labels = np.asarray(decisions.column("label").to_pylist(), dtype=object)
    scores = numbers(decisions.column("mean_score"))
    names = sorted(set(models.tolist()))
    return [
        GeneratorStats(
            name=name,
            candidates=int(own.sum()),
            desirable=int((labels[own] == "desirable").sum()),
            undesirable=int((labels[own] == "undesirable").sum()),
            score=spread(scores[own]),
        )
        for name in (names if len(names) > 1 else [])
        for own in [models == name]
    ]


def source_agreement(decisions: pa.Table, candidates: pa.Table) -> SourceAgreement | None:
    """How often the judges rank a prompt's answers as its source does; None where no source says how.

    Columns read: decisions candidate_id, prompt_id, mean_score; candidates candidate_id, source_label.
    """
    if "source_label" not in candidates.column_names or "mean_score" not in decisions.column_names:
        return None
    place = pa.array(_rows_of_candidates(decisions, candidates))
    sides = chunk(candidates.column("source_label")).take(place).to_pylist()
    by_prompt: dict[str, dict[str, list[float]]] = {}
    for prompt, side, score in zip(
        decisions.column("prompt_id").to_pylist(), sides, numbers(decisions.column("mean_score")), strict=True
    ):
        if side is not None:
            by_prompt.setdefault(prompt, {}).setdefault(side, []).append(float(score))
    gaps = np.array([np.mean(own["chosen"]) - np.mean(own["rejected"]) for own in by_prompt.values() if len(own) == 2])
    if not len(gaps):
        return None
    return SourceAgreement(
        agree=int((gaps > 0).sum()),
        equal=int((gaps == 0).sum()),
        disagree=int((gaps < 0).sum()),
        unread=int(np.isnan(gaps).sum()),
    )


def _gap(desirable: Spread, undesirable: Spread) -> float | None:
    if desirable.mean is None or undesirable.mean is None:
        return None
    return desirable.mean - undesirable.mean


def _rows_of_candidates(decisions: pa.Table, candidates: pa.Table) -> NDArray[np.int64]:
    """Row number in `candidates` of each decision."""
    ids = chunk(decisions.column("candidate_id"))
    known = chunk(candidates.column("candidate_id"))
    refuse_repeats(ids, "decisions")
    refuse_repeats(known, "candidates")
    place = pc.index_in(ids, value_set=known)
    if place.null_count:
        lost = ids.filter(pc.is_null(place))[0].as_py()
        raise ValueError(f"decisions: {place.null_count} candidates are not in candidates, such as {lost}")
    return np.asarray(place, dtype=np.int64)
