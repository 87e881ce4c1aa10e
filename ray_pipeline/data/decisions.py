"""Decisions as a stage: by the gate, or best and worst of k where there is none.

No LLM is called here, so a new threshold is applied to what is stored.
"""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

from ray_pipeline.config.settings import Settings
from ray_pipeline.data.early_exit import Scale, settle
from ray_pipeline.data.escalation import Escalation, decide_by_level
from ray_pipeline.data.gate import Cut, GateConfig, label_counts
from ray_pipeline.data.judging import by_role
from ray_pipeline.data.reviewed import HumanLabels, overrule
from ray_pipeline.data.rows import one_array
from ray_pipeline.data.ungated import Rejected, best_and_worst
from ray_pipeline.data.variants import Fault, decide_with_fault, labels_flipped
from ray_pipeline.graph.asking import ShardTables
from ray_pipeline.graph.stage import ShardInput, ShardOutput, ShardWork, Stage


class _GateGiven(Settings):
    gate: GateConfig | None
    judges: tuple[str, ...]
    first: int | None
    cut: Cut = "exclude"
    humans: HumanLabels | None = None
    fault: Fault | None = None
    fault_share: float = 1.0
    rejected: Rejected = "worst"
    scale: Scale | None = None
    escalation: Escalation | None = None


def gate(
    settings: GateConfig | None,
    judges: Sequence[str],
    candidates: Stage,
    verdicts: Sequence[Stage],
    critiques: Stage | None,
    *,
    name: str = "gate",
    first: int | None = None,
    cut: Cut = "exclude",
    humans: HumanLabels | None = None,
    fault: Fault | None = None,
    fault_share: float = 1.0,
    rejected: Rejected = "worst",
    scale: Scale | None = None,
    escalation: Escalation | None = None,
    role: str = "",
) -> Stage:
    """One decision per candidate.

    Args:
        settings: None for best and worst of k instead of a gate.
        first: use only this number of candidates per prompt.
        cut: rule for candidates whose text is not whole, where there is no gate; a gate has its own.
        humans: labels by people that replace the gate's.
        fault: what is broken in the gate on purpose, in this share of the prompts.
        rejected: which candidate is undesirable where there is no gate.
        scale: of the judges' scores, where verdicts may be skipped (`judge.early_exit`).
        escalation: by which judges were asked (`judge.escalate`); None: all were.
        role: of its table, where another stage makes the decisions from it.
    """
    inputs = {"candidates": candidates, **by_role(verdicts)}
    if critiques is not None and settings is not None and settings.use_critic:
        inputs["critiques"] = critiques
    given = _GateGiven(
        gate=settings,
        judges=tuple(judges),
        first=first,
        cut=cut if settings is None else "exclude",
        humans=humans,
        fault=fault,
        fault_share=fault_share,
        rejected=rejected,
        scale=scale,
        escalation=escalation,
    )
    return Stage(
        name=name,
        version=2,  # 2: candidates that were cut off are left out
        group="gate",
        role=role,
        work=ShardWork(function=decide_shard, tables=("decisions",), settings=given),
        config=given.decisive(exclude={"humans"}),
        inputs=inputs,
        external={} if humans is None else humans.digest(),
    )


def decide_shard(given: ShardInput) -> ShardOutput:
    settings: _GateGiven = given.settings
    shard = ShardTables(given.tables, given.facts)
    candidates = given.tables["candidates"]
    others = [pa.concat_tables(shard.under("verdicts/")), given.tables.get("critiques")]
    if settings.first is not None:
        candidates = candidates.filter(pc.field("k") < settings.first)
        of_them = pc.is_in(pc.field("candidate_id"), value_set=one_array(candidates["candidate_id"]))
        others = [None if table is None else table.filter(of_them) for table in others]
    verdicts, critiques = others
    assert verdicts is not None
    changed: dict[str, int] = {}
    if settings.escalation is not None:
        table, open_labels = decide_by_level(candidates, verdicts, critiques, settings.escalation)
        changed |= {"depends_on_skipped": open_labels} if open_labels else {}
    elif settings.gate is None:
        table = best_and_worst(candidates, verdicts, settings.judges, settings.cut, settings.rejected)
        table = labels_flipped(table, settings.fault_share) if settings.fault == "labels_flipped" else table
    else:
        arguments = (candidates, verdicts, critiques, settings.judges, settings.gate)
        table = decide_with_fault(settings.fault, *arguments, share=settings.fault_share)
    if settings.gate is not None and settings.scale is not None:
        table, open_labels = settle(
            table, candidates, verdicts, critiques, settings.judges, settings.gate, settings.scale
        )
        changed |= {"depends_on_skipped": open_labels} if open_labels else {}
    if settings.humans is not None:
        table, changed["changed_by_people"] = overrule(table, settings.humans.read().labels)
    given.tick(table.num_rows)
    return ShardOutput({"decisions": table}, label_counts(table) | changed)
