"""Sections that the pages of runs and of comparisons share: what the stages used, and what they were."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ray_pipeline.engines.usage import Usage
from ray_pipeline.evaluate.data import StageUse
from ray_pipeline.evaluate.metrics import prefix_hit_rate, total_use
from ray_pipeline.evaluate.planned import PlannedUse
from ray_pipeline.report.figures import number, percent
from ray_pipeline.report.page import Block, Cell, Rows, Section, Table, Text, facts, folded


def use_section(stages: Sequence[StageUse]) -> Section | None:
    """What each stage used, its seconds as bars, and the sum. There is a column of costs where anything cost."""
    if not stages:
        return None
    total = total_use(stages)
    slowest = max((use.seconds or 0.0 for use in stages), default=0.0)
    columns = ["stage", "rows", "calls", "log hits", "prompt tokens", "new tokens", "prefix hits", "seconds", "errors"]
    priced = bool(total.cost)
    rows: Rows = []
    for use in [*stages, total]:
        share = (use.seconds or 0.0) / slowest if slowest and use is not total else None
        row: list[str | Cell] = [
            use.stage,
            "" if use is total else number(use.rows),
            number(use.calls),
            number(use.log_hits),
            number(use.prompt_tokens),
            number(use.completion_tokens),
            percent(prefix_hit_rate(use)),
            Cell(number(use.seconds, 1), bar=share),
            number(use.errors),
        ]
        rows.append([*row, *([number(use.cost, 4)] if priced else [])])
    text = "Log hits are calls answered from the call log. Prefix hits are the share of prompt tokens in the cache."
    return Section("use", "What it took", [Table([*columns, *(["cost"] if priced else [])], rows), Text(text)])


def usage_of(stages: Sequence[StageUse]) -> Usage:
    """The sum over stages, for the first screen."""
    use = total_use(stages)
    return Usage(
        calls_engine=use.calls or 0,
        calls_log=use.log_hits or 0,
        prompt_tokens=use.prompt_tokens or 0,
        completion_tokens=use.completion_tokens or 0,
        cost=use.cost or 0.0,
        wall_seconds=use.seconds or 0.0,
    )


def plan_section(planned: Sequence[PlannedUse]) -> Section | None:
    """The figures of `quorum plan` beside those of the run."""
    if not planned:
        return None
    rows: Rows = [
        [
            use.stage,
            number(use.planned_calls),
            number(use.calls),
            number(use.log_hits),
            number(use.planned_tokens, 0),
            number(use.tokens, 0),
            number(use.planned_hours, 4),
            number(use.hours, 4),
        ]
        for use in planned
    ]
    columns = ["stage", "calls planned", "engine", "log", "tokens planned", "actual", "device hours planned", "actual"]
    text = "Actual figures are of engine calls; calls answered from the call log used no tokens and no time."
    return Section("plan", "Plan and actual", [Text(text), Table(columns, rows)])


def identity_section(
    fingerprints: Mapping[str, str],
    config: Mapping[str, Any] | None,
    *,
    models: Mapping[str, str] | None = None,
    digest: str | None = None,
) -> Section | None:
    """Models by role, fingerprints by stage, and the resolved configuration with its digest; None without any."""
    blocks: list[Block] = [
        *facts(dict(sorted((models or {}).items())), ("role", "model")),
        *facts(fingerprints, ("stage", "fingerprint")),
    ]
    if digest is not None:
        blocks.append(Text(f"Configuration digest: {digest or 'unknown'}."))
    blocks += folded("Configuration, as resolved", config)
    return Section("identity", "Configuration and fingerprints", blocks) if blocks else None
