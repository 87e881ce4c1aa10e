"""What each level of judges took, and how far its labels of candidates (`judge.escalate`) or picks among responses
(`select.escalate`) are those of all judges; statistics and page."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ray_pipeline.data.early_exit import SKIPPED, slice_of
from ray_pipeline.data.escalation import Escalation, Levels, first_settled
from ray_pipeline.data.gate import GateConfig, cut_reasons, decide, read_scores
from ray_pipeline.data.judge_votes import vote_classes
from ray_pipeline.data.posterior_gate import decided, stored_posterior
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
        settled: candidates (prompts) of the audit slice whose label (pick) this level settles, or leaves open as the
            last.
        same: share of them to which all judges together give the same label (pick).
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
    """All levels, and the share of the audit slice to which escalation gives the label (pick) of all judges."""

    candidates: int
    levels: list[LevelStats]
    same: Interval
    outcome: Literal["label", "pick"] = "label"


def escalation_stats(
    rule: Escalation,
    candidates: pa.Table,
    verdicts: pa.Table,
    critiques: pa.Table | None,
    usage: Mapping[str, Usage],
    *,
    draws: int,
    seed: int,
    opened: pa.Table | None = None,
    model: Mapping[str, Any] | None = None,
) -> EscalationStats:
    """Statistics by level. On the audit slice, which all judges judged, labels by levels are compared with theirs.

    Args:
        candidates, verdicts, critiques: of the whole run, as of `gate.decide`.
        usage: judge → usage of its stage.
        draws: of bootstraps over prompts.
        opened: which labels are open after each level, schema LEVELS; None where the published gate says that.
        model: by which the gate gives posteriors; None without a pool.
    """
    assert (opened is not None) == rule.over_all
    asked = verdicts.filter(pc.field("parse_status") != SKIPPED)
    by_judge = {row["values"]: row["counts"] for row in pc.value_counts(one_array(asked["judge"])).to_pylist()}
    sliced = candidates.filter(slice_of(candidates))
    ids = one_array(sliced["candidate_id"])
    of_slice = [
        None if table is None else table.filter(pc.is_in(table["candidate_id"], value_set=ids))
        for table in (verdicts, critiques)
    ]
    assert of_slice[0] is not None
    scores, _ = read_scores(of_slice[0], ids, rule.judges)
    if opened is None:
        depth = rule.depths(scores, cut_reasons(sliced) != "")
    else:
        going = opened.filter(opened["open"])
        after = [going.filter(pc.field("level") == level)["candidate_id"] for level in range(1, len(rule.levels))]
        depth = first_settled([np.asarray(pc.is_in(ids, value_set=one_array(names))) for names in after])
    tables = [decide(sliced, of_slice[0], of_slice[1], rule.judges[:width], rule.gate.numbers) for width in rule.widths]
    if model is not None:
        votes = vote_classes(scores, (rule.gate.undesirable_at, rule.gate.desirable_at))
        tables = [
            decided(table, stored_posterior(model, rule.judges[:width], votes[:, :width]), rule.gate)
            for table, width in zip(tables, rule.widths, strict=True)
        ]
    labels = np.array([table["label"].to_pylist() for table in tables], dtype=np.str_)
    same = (labels[depth - 1, np.arange(len(ids))] == labels[-1]).astype(float)
    prompts = np.asarray(sliced["prompt_id"].to_pylist(), dtype=np.str_)
    levels: list[LevelStats] = []
    for level, (judges, width) in enumerate(zip(rule.levels, rule.widths, strict=True), start=1):
        here = depth == level
        alike = bootstrap_mean(same[here], prompts[here], draws, seed, bounds=(0, 1))
        alpha = krippendorff_alpha(scores[:, :width].T) if width > 1 else None
        levels.append(_level(judges, by_judge, usage, alike, alpha))
    return EscalationStats(candidates.num_rows, levels, bootstrap_mean(same, prompts, draws, seed, bounds=(0, 1)))


def _level(
    judges: Sequence[str], asked: Mapping[str, int], usage: Mapping[str, Usage], same: Interval, alpha: float | None
) -> LevelStats:
    used = sum({id(usage[judge]): usage[judge] for judge in judges if judge in usage}.values(), Usage())
    most = max(asked.get(judge, 0) for judge in judges)
    return LevelStats(list(judges), most, used.calls, used.tokens, used.cost, same.rows, same, alpha)


def picks_of(results: Mapping[str, StageResult], levels: Levels, draws: int, seed: int) -> EscalationStats | None:
    """Statistics of picks by level, from the counts of the stages; None without levels, and before the pick.

    Args:
        results: stages that are done; read are those of the roles verdicts and decisions.
    """
    decided = of_role(results, "decisions")
    if not levels or not decided:
        return None
    asked: collections.Counter[str] = collections.Counter()
    for name, rows in (item for made in of_role(results, "verdicts") for item in made.facts["counts"].items()):
        judge, _, status = name.rpartition(".")
        asked[judge] += rows if status != SKIPPED else 0
    counts, usage = decided[0].facts["counts"], usage_by_judge(results)

    def share(*of: int) -> Interval:
        same, other = (sum(counts.get(f"slice_level_{level}_{what}", 0) for level in of) for what in ("same", "other"))
        values = [1.0] * same + [0.0] * other  # each of a prompt of its own
        return bootstrap_mean(values, range(len(values)), draws, seed, bounds=(0, 1))

    numbers = range(1, len(levels) + 1)
    found = [_level(judges, asked, usage, share(level), None) for level, judges in zip(numbers, levels, strict=True)]
    return EscalationStats(sum(decided[0].rows.values()), found, share(*numbers), "pick")


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
    return escalation_stats(
        Escalation(gate=gate, levels=levels),
        candidates,
        verdicts,
        table_of(results, "critiques"),
        usage_by_judge(results),
        draws=draws,
        seed=seed,
        opened=table_of(results, "levels"),
        model=of_role(results, "decisions")[0].facts.get("posterior"),
    )


def usage_by_judge(results: Mapping[str, StageResult]) -> dict[str, Usage]:
    """Judge → usage of its stage."""
    return {
        count.rsplit(".", 1)[0]: result.usage  # of JUDGE.STATUS
        for result in of_role(results, "verdicts")
        for count in result.facts.get("counts", {})
    }


def levels_section(found: EscalationStats | None, gate: GateConfig) -> Section | None:
    """None for a run without levels."""
    if found is None:
        return None
    published = "they disagreed, or their mean was between the thresholds"
    where = f"none was probable at {gate.posterior_at:g}" if gate.kind == "posterior" else published
    items, key = "candidates", "judge.escalate"
    if found.outcome == "pick":
        where, items, key = "they did not agree on one best response", "prompts", "select.escalate"
    text = (
        f"Judges of a level were asked about the {items} whose {found.outcome} the levels before left open ({where}), "
        f"and about the audit slice ({key}). On the slice, escalation "
        f"gives {_share(found.same)} of {number(found.same.rows)} {items} the {found.outcome} of all judges."
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
        f"with the {found.outcome} of all",
        "alpha so far (slice)",
    ]
    return Section("levels", "Levels of judges", [Text(text), Table(columns, rows, text_columns=2)])


def _share(share: Interval) -> str:
    return percent(share.mean) + (f" ({percent_interval(share)})" if share.low is not None else "")
