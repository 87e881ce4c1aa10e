"""Planned usage of a run beside its actual usage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PlannedUse:
    """One stage: figures of the plan and of the run, None where unknown. Device hours are of GPUs, or of engines where
    there are no GPUs. `log_hits` counts calls answered from the call log: they used no tokens and no time in this run.
    """

    stage: str
    planned_calls: int | None
    calls: int | None
    log_hits: int | None
    planned_tokens: float | None
    tokens: float | None
    planned_hours: float | None
    hours: float | None


def compare_with_plan(plan: Mapping[str, Any], usage: Mapping[str, Mapping[str, float]]) -> list[PlannedUse]:
    """The stages of `plan.json` that ran, in its order.

    Args:
        plan: what `quorum plan` wrote.
        usage: stage → its usage.
    """
    found = []
    for planned in plan.get("stages", ()):
        used = usage.get(planned["stage"])
        if used is None:
            continue
        asks = "calls_engine" in used
        seconds = planned["device_seconds"]
        found.append(
            PlannedUse(
                stage=planned["stage"],
                planned_calls=planned["calls"] or None,
                calls=int(used["calls_engine"]) if asks else None,
                log_hits=int(used.get("calls_log", 0)) if asks else None,
                planned_tokens=planned["prompt_tokens"] + planned["completion_tokens"],
                tokens=used["prompt_tokens"] + used["completion_tokens"] if asks else None,
                planned_hours=None if seconds is None else seconds / 3600,
                hours=_hours(used, planned["devices"]),
            )
        )
    return found


def _hours(used: Mapping[str, float], devices: float) -> float | None:
    if used.get("device_seconds"):
        return used["device_seconds"] / 3600
    if "calls_engine" in used or not used.get("wall_seconds"):
        return None
    return used["wall_seconds"] * devices / 3600  # training holds its workers all the time
