"""Checks of judges and gate before a run: criteria, and thresholds on the judges' scale."""

from __future__ import annotations

from collections.abc import Iterator

from ray_pipeline.agents.templates import RoleTemplate, render
from ray_pipeline.data.gate import GateConfig
from ray_pipeline.graph.stage import ShardWork, Stage
from ray_pipeline.operate.pending import Finding, Pending


def rubrics(pending: Pending) -> Iterator[Finding]:
    """Every judge has a criterion, unless its prompt template shows none, and no two greedy judges have the same."""
    missing: dict[str, None] = {}
    same: dict[tuple[str, str], list[str]] = {}
    seen: dict[str, None] = {}
    for stage in pending.todo:
        settings = stage.work.settings
        template = getattr(settings, "template", None)
        if not isinstance(template, RoleTemplate) or not hasattr(settings, "rubrics"):
            continue
        for rubric in settings.rubrics:
            seen[rubric.name] = None
            if rubric.is_checklist:
                continue
            if not rubric.text.strip() and _shows_rubric(template):
                missing[rubric.name] = None
            elif hasattr(settings, "sampling") and not (rubric.sampling or settings.sampling).temperature:
                text = " ".join(rubric.text.split()) if _shows_rubric(template) else rubric.name
                names = same.setdefault((stage.name, text), [])
                names += [rubric.name] if rubric.name not in names else []
    for name in missing:
        yield Finding(
            f"rubric {name}", "problem", "it has no text, so the judge would score without a criterion; set its `text`"
        )
    repeated = dict.fromkeys(tuple(names) for names in same.values() if len(names) > 1)
    for alike in repeated:
        yield Finding(
            f"rubrics {' and '.join(alike)}",
            "problem",
            "they have the same text, model and sampling, so one opinion would count several times; write different "
            "texts, choose another model, or remove all but one",
        )
    if seen and not missing and not repeated:
        yield Finding(f"rubrics {', '.join(seen)}", "ok")


def _shows_rubric(template: RoleTemplate) -> bool:
    common = {"instruction": "x", "response": "x", "name": "x", "low": 1, "high": 10, "fence": "0"}
    return render(template, "shared_first", rubric="", **common) != render(
        template, "shared_first", rubric="x", **common
    )


def thresholds(pending: Pending) -> Iterator[Finding]:
    """The thresholds of a gate, and the gap of a pair, can be reached on the scale of its judges."""
    for stage in pending.todo:
        gate = getattr(stage.work.settings, "gate", None)
        if isinstance(gate, GateConfig) and isinstance(stage.work, ShardWork) and (scale := _scale(stage)):
            yield _reachable(stage.name, gate, *scale)
        decided = stage.inputs.get("decisions")
        datasets = getattr(stage.work.settings, "datasets", None)
        gate = getattr(decided.work.settings, "gate", None) if decided is not None else None
        if decided is None or datasets is None or gate is None or "dpo" not in datasets.row_kinds:
            continue
        if scale := _scale(decided):
            low, high = _finals(gate, *scale)
            if datasets.min_gap > high - low:
                yield Finding(
                    f"gap of {stage.name}",
                    "problem",
                    f"min_gap is {datasets.min_gap:g}, but final scores range from {low:g} to {high:g}, so no pair "
                    f"can be made; set it to at most {high - low:g}",
                )


def _scale(stage: Stage) -> tuple[int, int] | None:
    """Lowest and highest score of the judges that a gate counts; None where no stage with rubrics is read."""
    stage = stage.inputs.get("numbers", stage)  # of a gate that decides over all candidates
    judges = stage.work.settings.judges
    of = [r for parent in stage.inputs.values() for r in getattr(parent.work.settings, "rubrics", ())]
    counted = [rubric for rubric in of if rubric.name in judges]
    return (counted[0].low, counted[0].high) if counted else None


def _finals(gate: GateConfig, low: int, high: int) -> tuple[float, float]:
    """Smallest and largest final score of a gate."""
    ends = [end * factor for end in (low, high) for factor in (1.0, 1.0 - gate.alpha if gate.use_critic else 1.0)]
    return min(ends), max(ends)


def _reachable(name: str, gate: GateConfig, low: int, high: int) -> Finding:
    least, most = _finals(gate, low, high)
    scale = f"judges score from {low} to {high}, so final scores range from {least:g} to {most:g}"
    problems = []
    if gate.desirable_at > most:
        problems.append(
            f"desirable_at is {gate.desirable_at:g}, which no candidate can reach; set it to at most {most:g}"
        )
    if gate.undesirable_at < least:
        problems.append(
            f"undesirable_at is {gate.undesirable_at:g}, which none can fall to; set it to at least {least:g}"
        )
    return Finding(f"thresholds of {name}", "problem" if problems else "ok", "; ".join([scale, *problems]))
