"""The last lines of a run: what came of it, what to look at before spending more, what it took, and where its page is.

They are made from the roles of the finished stages, so that they are the same for every workflow.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ray_pipeline.data.early_exit import SKIPPED
from ray_pipeline.data.escalation import rule_of
from ray_pipeline.engines.usage import Usage
from ray_pipeline.graph.results import decision, of_role
from ray_pipeline.graph.stage import Dag, StageResult
from ray_pipeline.operate.status import bad_rows
from ray_pipeline.report.figures import percent
from ray_pipeline.store.errors import StoreError
from ray_pipeline.store.files import Folder

#: Share of a stage's rows without a value from which there is a warning.
MAX_BAD = 0.05
#: Datasets that are listed; a comparison of methods has dozens.
_MOST_DATASETS = 6


def warnings(results: Mapping[str, StageResult]) -> Iterator[str]:
    """What a user should see before spending more: rows without a value, datasets without rows."""
    for name, result in results.items():
        bad, rows = bad_rows(result.facts.get("counts", {})), sum(result.rows.values())
        if sum(bad.values()) > MAX_BAD * rows:
            yield f"{name}: {sum(bad.values()) / rows:.0%} of {rows:,} rows have no value ({_kinds(bad)})"
        yield from (f"{name}: {warning}" for warning in result.facts.get("warnings", ()))


def last_lines(dag: Dag, results: Mapping[str, StageResult], folder: str, currency: str) -> Iterator[str]:
    """One fact a line.

    Args:
        results: of the stages that are done, by name.
        folder: location of the run.
        currency: of the endpoints' prices.
    """
    pages = [results[s.name] for s in dag.stages if s.view == "report" and s.name in results]
    for page in pages:
        headline = page.facts.get("headline") or ""
        text = headline.get("text", "") if isinstance(headline, Mapping) else headline
        yield from (f"result: {line}" for line in text.splitlines())
    if decided := decision(results):
        yield f"rounds: {decided.facts['text']}"
    yield from _kept(results)
    yield from _datasets(results)
    usage = sum((result.usage for result in results.values()), Usage())
    if usage.calls:
        unread = [
            f"{sum(bad.values()):,} of {sum(result.rows.values()):,} rows of {name} ({_kinds(bad)})"
            for name, result in results.items()
            if (bad := bad_rows(result.facts.get("counts", {})))
        ]
        yield f"unread: {'; '.join(unread) or 'nothing'}"
        yield from _skipped(dag, results)
        yield f"used: {use_line(usage, currency)}"
    for page in pages:
        yield from _page(Folder(page.folder), Folder(folder))
    yield f"run folder: {folder}"


def _skipped(dag: Dag, results: Mapping[str, StageResult]) -> Iterator[str]:
    """Verdicts without a call, where `judge.early_exit` or `judge.escalate` left some out."""
    found, why = [], ""
    for stage in dag.stages:
        name, rule = stage.name, rule_of(stage)
        if rule is None or name not in results:
            continue
        counts = results[name].facts.get("counts", {})
        skipped = sum(n for kind, n in counts.items() if kind.rsplit(".", 1)[-1] == SKIPPED and isinstance(n, int))
        if skipped:
            found.append(f"{skipped:,} of {sum(results[name].rows.values()):,} rows of {name}")
            why = f"{rule.key}: {rule.why}"
    if found:
        yield f"skipped: {'; '.join(found)} ({why})"


def use_line(usage: Usage, currency: str) -> str:
    """Calls, tokens and cost in words."""
    cost = f", cost {usage.cost:.4g} {currency}" if usage.cost else ""
    log = f" ({usage.calls_engine:,.0f} made, others from the call log)" if usage.calls_log else ""
    return f"{usage.calls:,.0f} calls{log}, {usage.tokens:,.0f} tokens{cost}"


def _kept(results: Mapping[str, StageResult]) -> Iterator[str]:
    decided = of_role(results, "decisions")
    for result in decided:
        counts, rows = result.facts.get("counts", {}), sum(result.rows.values())
        desirable, undesirable = (counts.get(label, 0) for label in ("desirable", "undesirable"))
        kept = desirable + undesirable
        yield (
            f"kept{f' by {result.name}' if len(decided) > 1 else ''}: {kept:,} of {rows:,} candidates "
            f"({percent(kept / rows if rows else None)}), {desirable:,} desirable and {undesirable:,} undesirable"
        )


def _datasets(results: Mapping[str, StageResult]) -> Iterator[str]:
    written = [result for result in of_role(results, "datasets", "branch datasets") if result.facts.get("rows")]
    for result in written[:_MOST_DATASETS]:
        sizes = ", ".join(
            f"{rows['train']:,} {kind} {'pairs' if kind == 'dpo' else 'rows'} to train on"
            + (f" and {rows['val']:,} for validation" if rows.get("val") else "")
            for kind, rows in result.facts["rows"].items()
        )
        yield f"{result.name}: {sizes}"
    if len(written) > _MOST_DATASETS:
        yield f"datasets: {len(written) - _MOST_DATASETS} more"


def _page(page: Folder, run: Folder) -> Iterator[str]:
    try:
        found: Any = page.read_json("metrics.json").get("warnings")
    except (FileNotFoundError, StoreError, AttributeError):
        found = None
    if found:
        yield f"warnings: {len(found)} on the page, the first: {found[0]}"
    if page.exists("report.html"):
        yield f"report: {(run / 'report' if page.is_local else page).uri('report.html')}"


def _kinds(bad: Mapping[str, int]) -> str:
    return ", ".join(f"{kind.removeprefix('rows.')} {count:,}" for kind, count in bad.items())
