"""What each level of an escalation took, and how far its labels are those of all judges; statistics and page."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ray_pipeline.data.early_exit import SKIPPED, in_audit_slice
from ray_pipeline.data.escalation import Escalation, Levels
from ray_pipeline.data.gate import GateConfig, cut_reasons, decide, read_scores
from ray_pipeline.data.rows import one_array
from ray_pipeline.engines.usage import Usage
from ray_pipeline.graph.results import of_role, table_of
from ray_pipeline.graph.stage import StageResult
from ray_pipeline.report.figures import number, percent, percent_interval
from ray_pipeline.report.page import Rows, Section, Table, Text
from ray_pipeline.stats.alpha import krippendorff_alpha
from ray_pipeline.stats.bootstrap import Interval, bootstrap_mean


@dataclasses.dataclass(frozen=True)
class LevelStats:
    """One level.

    Attributes:
        asked: candidates that its judges were asked about, those of the audit slice included.
        calls: made or answered from the call log.
        cost: in the unit of the prices.
        settled: candidates of the audit slice whose label this level settles, or leaves open as the last.
        same: share of them that all judges together give the same label.
        alpha: Krippendorff's alpha (interval) of the judges up to this level on the audit slice.
    """

    judges: list[str]
    asked: int
    calls: float
    tokens: float
    cost: float
    settled: int
    same: Interval
    alpha: float | None


@dataclasses.dataclass(frozen=True)
class EscalationStats:
    """All levels, and the share of the audit slice to which escalation gives the label of all judges."""

    candidates: int
    levels: list[LevelStats]
    same: Interval


def escalation_stats(
    rule: Escalation,
    candidates: pa.Table,
    verdicts: pa.Table,
    critiques: pa.Table | None,
    usage: Mapping[str, Usage],
    *,
    draws: int,
    seed: int,
) -> EscalationStats:
    """Statistics by level. On the audit slice, which all judges judged, labels by levels are compared with theirs.

    Args:
        candidates, verdicts, critiques: of the whole run, as of `gate.decide`.
        usage: judge → usage of its stage.
        draws: of bootstraps over prompts.
    """
    asked = verdicts.filter(pc.field("parse_status") != SKIPPED)
    by_judge = {row["values"]: row["counts"] for row in pc.value_counts(one_array(asked["judge"])).to_pylist()}
    inside = pa.array([in_audit_slice(name) for name in candidates["candidate_id"].to_pylist()], pa.bool_())
    sliced = candidates.filter(inside)
    ids = one_array(sliced["candidate_id"])
    of_slice = [
        None if table is None else table.filter(pc.is_in(table["candidate_id"], value_set=ids))
        for table in (verdicts, critiques)
    ]
    assert of_slice[0] is not None
    scores, _ = read_scores(of_slice[0], ids, rule.judges)
    depth = rule.depths(scores, cut_reasons(sliced) != "")
    tables = [decide(sliced, of_slice[0], of_slice[1], rule.judges[:width], rule.gate) for width in rule.widths]
    labels = np.array([table["label"].to_pylist() for table in tables], dtype=np.str_)
    same = (labels[depth - 1, np.arange(len(ids))] == labels[-1]).astype(float)
    prompts = np.asarray(sliced["prompt_id"].to_pylist(), dtype=np.str_)
    levels: list[LevelStats] = []
    for level, (judges, width) in enumerate(zip(rule.levels, rule.widths, strict=True), start=1):
        here = depth == level
        used = sum({id(usage[judge]): usage[judge] for judge in judges if judge in usage}.values(), Usage())
        levels.append(
            LevelStats(
                judges=list(judges),
                asked=max(by_judge.get(judge, 0) for judge in judges),
                calls=used.calls,
                tokens=used.tokens,
                cost=used.cost,
                settled=int(here.sum()),
                same=bootstrap_mean(same[here], prompts[here], draws, seed, bounds=(0, 1)),
                alpha=krippendorff_alpha(scores[:, :width].T) if width > 1 else None,
            )
        )
    return EscalationStats(candidates.num_rows, levels, bootstrap_mean(same, prompts, draws, seed, bounds=(0, 1)))


def escalation_of(
    results: Mapping[str, StageResult], gate: GateConfig, levels: Levels, draws: int, seed: int
) -> EscalationStats | None:
    """Statistics of a run by level; None without levels, and before the gate.

    Args:
        results: stages that are done; read are tables of the roles candidates, verdicts and critiques.
    """
    candidates, verdicts = table_of(results, "candidates"), table_of(results, "verdicts")
    if not levels or candidates is None or verdicts is None or not of_role(results, "decisions"):
        return None
    usage = {
        count.rsplit(".", 1)[0]: result.usage  # of JUDGE.STATUS
        for result in of_role(results, "verdicts")
        for count in result.facts.get("counts", {})
    }
    rule, critiques = Escalation(gate=gate, levels=levels), table_of(results, "critiques")
    return escalation_stats(rule, candidates, verdicts, critiques, usage, draws=draws, seed=seed)


def levels_section(found: EscalationStats | None) -> Section | None:
    """None for a run without levels."""
    if found is None:
        return None
    text = (
        "Judges of a level were asked about the candidates whose label the levels before left open (they disagreed, or "
        "their mean was between the thresholds), and about the audit slice (judge.escalate). On the slice, escalation "
        f"gives {_share(found.same)} of {number(found.same.rows)} candidates the label of all judges."
    )
    rows: Rows = [
        [
            str(place),
            ", ".join(level.judges),
            number(level.asked),
            percent(level.asked / found.candidates if found.candidates else None),
            number(round(level.calls)),
            number(round(level.tokens)),
            f"{level.cost:.4g}",
            number(level.settled),
            _share(level.same),
            number(level.alpha),
        ]
        for place, level in enumerate(found.levels, start=1)
    ]
    columns = [
        "level",
        "judges",
        "candidates",
        "share",
        "calls",
        "tokens",
        "cost",
        "of the slice, settled here",
        "with the label of all",
        "alpha so far (slice)",
    ]
    return Section("levels", "Levels of judges", [Text(text), Table(columns, rows, text_columns=2)])


def _share(share: Interval) -> str:
    return percent(share.mean) + (f" ({percent_interval(share)})" if share.low is not None else "")
