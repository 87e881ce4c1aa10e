"""The page of a run: from its prompts to what the policy answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ray_pipeline.bench.page import benchmark_blocks
from ray_pipeline.data.certified_gate import certified_section
from ray_pipeline.data.errors_page import errors_section
from ray_pipeline.data.level_stats import levels_section
from ray_pipeline.data.page import (
    LABEL_COLOURS,
    checklists_section,
    contamination_section,
    critic_section,
    datasets_section,
    generators_section,
    judges_section,
    labels_section,
)
from ray_pipeline.data.posterior_gate import posterior_section
from ray_pipeline.evaluate.data import ReportData
from ray_pipeline.evaluate.examples import collect_examples
from ray_pipeline.evaluate.excerpts import pick_excerpts
from ray_pipeline.evaluate.first_screen import first_screen
from ray_pipeline.evaluate.headline import ROWS, Headline
from ray_pipeline.evaluate.metrics import RunMetrics, Step, dataset_rows
from ray_pipeline.evaluate.people import people_section
from ray_pipeline.evaluate.rounds import rounds_section
from ray_pipeline.evaluate.use_page import identity_section, plan_section, usage_of, use_section
from ray_pipeline.judge_card.section import cards_section
from ray_pipeline.policy.page import evaluation_section, training_section
from ray_pipeline.report.figures import number, percent, signed
from ray_pipeline.report.page import Browser, Funnel, FunnelStep, Page, Section, Text

_TONES = {"better": "good", "worse": "bad"}


def run_page(data: ReportData, metrics: RunMetrics, first_line: Headline, warnings: Sequence[str]) -> Page:
    """The page; a part that the run does not have is left out."""
    labels = None
    if metrics.gate is not None and data.decisions is not None and data.candidates is not None:
        labels = labels_section(metrics.gate, data.decisions, data.candidates)
    thresholds = (data.desirable_from, data.undesirable_to)
    slice_only = data.agreement_on is not None
    judging, critic, evaluation = metrics.judging, metrics.critic, metrics.evaluation
    sections = [
        rounds_section(data.rounds, data.decided),
        _funnel(metrics.funnel),
        contamination_section(data.contamination),
        labels,
        generators_section(metrics.generators, metrics.source_agreement),
        levels_section(data.escalation),
        judges_section(judging, metrics.kappa_intervals, thresholds, audit_slice=slice_only) if judging else None,
        checklists_section(metrics.checklists),
        errors_section(metrics.judge_errors, thresholds, audit_slice=slice_only),
        posterior_section(data.posterior, data.gate),
        cards_section(data.cards),
        critic_section(critic) if critic else None,
        people_section(metrics.people),
        None if metrics.gate is None else certified_section(data.certified, metrics.gate.counts),
        datasets_section(data.dataset_counts or {}, data.dataset_guards or {}, data.kto_weights or {}, data.lengths),
        training_section(metrics.training, data.train_metrics, data.train_settings),
        evaluation_section(evaluation) if evaluation else None,
        Section("benchmarks", "Benchmarks", benchmark_blocks(data.benchmarks)) if data.benchmarks else None,
        use_section(data.stage_use or ()),
        plan_section(data.planned),
        _examples(data),
        identity_section(data.run.fingerprints, data.config, models=data.run.models, digest=data.run.config_digest),
    ]
    digest = f", configuration {data.run.config_digest[:12]}" if data.run.config_digest else ""
    return Page(
        title=f"Run {data.run.name}",
        subtitle=f"Quorum, workflow {data.run.workflow}{digest}",
        headline=first_line.text,
        tone=_TONES.get(first_line.verdict, "unsure"),
        about=_about(data, metrics),
        tiles=_tiles(data, metrics, len(warnings)),
        warnings=warnings,
        sections=[section for section in sections if section is not None],
    )


def _about(data: ReportData, metrics: RunMetrics) -> list[tuple[str, str]]:
    method = (data.train_settings or {}).get("method")
    return first_screen(
        f"workflow {data.run.workflow}{f', training with {method}' if method else ''}",
        models=dict(sorted(data.run.models.items())),
        judges={"of the data": data.curating_models, "of the policy": data.evaluating_models},
        amounts=_amounts(data, metrics),
        usage=usage_of(data.stage_use or ()),
    )


def _amounts(data: ReportData, metrics: RunMetrics) -> Iterator[tuple[int | None, str]]:
    if data.prompt_counts is not None:
        yield data.prompt_counts.get("kept", 0), "prompts"
    for table, unit in ((data.candidates, "candidates"), (data.verdicts, "verdicts")):
        yield None if table is None else len(table), unit
    if metrics.gate is not None:
        yield sum(metrics.gate.labels[label].count for label in ("desirable", "undesirable")), "candidates kept"
    for kind, unit in ROWS.items():
        if kind in (data.dataset_counts or {}):
            yield dataset_rows((data.dataset_counts or {})[kind]), unit


def _tiles(data: ReportData, metrics: RunMetrics, warnings: int) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    if metrics.gate is not None:
        found.append((percent(metrics.gate.acceptance), "kept by the gate"))
    if metrics.judging is not None and metrics.judging.alpha is not None:
        found.append((number(metrics.judging.alpha), "Krippendorff's alpha"))
    panel = metrics.judge_errors and metrics.judge_errors.truth
    if panel and panel.effective.mean is not None:
        found.append((f"{number(panel.effective.mean, 1)} of {len(panel.judges)}", "effective judges"))
    if metrics.evaluation is not None:
        for rate in metrics.evaluation.win_rates[:1]:
            found.append((percent(rate.score.mean), f"score against base, judge {rate.judge}"))
        for mode, gain in metrics.evaluation.accuracy_gains.items():
            found.append((f"{signed(100 * (gain.mean or 0), 1)} pts", f"true accuracy, {mode}"))
    return [*found, *([] if warnings else [("0", "warnings")])]


def _funnel(steps: Sequence[Step]) -> Section:
    if not steps:
        return Section("funnel", "Funnel", [Text("No stage has left anything yet.")])
    units: dict[str, list[Step]] = {}
    for step in steps:
        units.setdefault(step.unit, []).append(step)
    return Section("funnel", "Funnel", [_bars(unit, of_unit) for unit, of_unit in units.items()])


def _bars(unit: str, steps: Sequence[Step]) -> Funnel:
    most = max(step.rows for step in steps) or 1
    return Funnel(unit, [FunnelStep(s.name, s.note, number(s.rows), s.rows / most, _colour(s)) for s in steps])


def _colour(step: Step) -> str:
    if step.name == "labelled":
        return LABEL_COLOURS.get(step.note, "grey")
    return "grey" if "dropped" in step.name else "green" if step.unit not in ("prompts", "candidates") else "blue"


def _examples(data: ReportData) -> Section | None:
    packed = collect_examples(data)
    if packed is None or not packed.rows:
        return None
    return Section("examples", "Examples", [Browser(packed, pick_excerpts(data))])
