"""The last stage of a comparison: one table over all policies, from the stored answers, comparisons and scores."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from ray_pipeline.config.settings import Settings
from ray_pipeline.data.checkers import CHECKED_SOURCES, CheckerKey, checker_of, with_truth
from ray_pipeline.data.row_truth import RowTruth, row_truth
from ray_pipeline.evaluate.stage import (
    stage_use,
    store_protocols,
    stored_config,
    stored_protocols,
)
from ray_pipeline.graph.results import Run, of_role, table_of
from ray_pipeline.graph.stage import Stage, StageResult, WholeInput, WholeWork
from ray_pipeline.policy.comparisons import win_rate_protocol
from ray_pipeline.stats.protocol import Protocol, fixed_fields, measured_by
from ray_pipeline.stats.winrate import completed_protocol
from ray_pipeline.store.errors import StoreError
from ray_pipeline.store.files import Folder
from ray_pipeline.store.local import written_here
from ray_pipeline.training.methods import MethodName

Reading = Literal["epochs", "steps", "rows"]
"""What is equal for the policies of all datasets: passes over the data, optimiser steps, or rows and with them both."""


class PolicyName(Settings):
    """A policy of the comparison: `label` names it in the tables; its training stage is `train-<label>`."""

    label: str
    method: MethodName
    data: str
    seed: int
    reading: Reading = "epochs"


class TableSettings(Settings):
    """Content of the page beside the tables.

    Attributes:
        over: the dataset with which the others are compared.
        data: name of each dataset → how it was made.
        facts: further lines of the page.
        curating, evaluating: judge → model, for the warning that a judge also made the data.
    """

    run_name: str
    policies: tuple[PolicyName, ...]
    mode: str
    over: str
    data: dict[str, str]
    facts: dict[str, str]
    curating: dict[str, str]
    evaluating: dict[str, str]
    checker: CheckerKey = None
    bootstrap_draws: int = 2000
    seed: int = 0


class _Given(Settings):
    table: TableSettings
    compared: dict[str, Protocol] = Field(default_factory=dict)


def method_table(settings: TableSettings, stages: Sequence[Stage]) -> Stage:
    """The page, methods.csv, differences.csv, policies.csv and metrics.json.

    Args:
        stages: prompts, the rows of every dataset, the training stages, all responses, the comparisons, the scores
            of the responses, and the public benchmarks, if there are any.
    """
    return Stage(
        name="evaluate",
        version=2,  # 2: win rates carry a protocol
        view="report",
        role="page",
        work=WholeWork(function=write_page, settings=_Given(table=settings, compared=win_rate_protocol(stages))),
        config=settings.decisive(exclude={"run_name"}),
        inputs={stage.name: stage for stage in stages},
    )


def write_page(given: WholeInput) -> dict[str, Any]:
    settings: TableSettings = given.settings.table
    compared = given.settings.compared
    store_protocols(given.folder, compared)
    with written_here(given.folder) as folder:
        _build(given.inputs, settings, folder, stored_config(given.folder.parent), compared)
    metrics = given.folder.read_json("metrics.json")
    for method in metrics["methods"]:
        won, right = method["win_rate"], method["accuracy"]
        shares = {"wins": won, **{f"right {mode}": share for mode, share in right.items()}}
        figures = ", ".join(f"{name} {share['mean']:.1%}" for name, share in shares.items() if share)
        equal = "" if method["reading"] == "epochs" else f", equal {method['reading']}"
        given.log(f"{method['method']} on {method['data']}{equal}: {figures}")
    return {"methods": len(metrics["methods"]), "policies": len(settings.policies)}


def rewrite_page(run: Run) -> Folder:
    """Rewrite the page from the finished policies; returns its folder.

    Raises:
        StoreError: nothing was compared yet.
    """
    settings = TableSettings.model_validate(run.page)
    if not of_role(run.results, "comparisons"):
        raise StoreError(f"{run.folder.location} has compared no policy yet; run the same command again first")
    last = run.stages["evaluate"]
    name, inputs = last.path, set(last.inputs.values())
    compared = stored_protocols(run.folder / name)
    results = {stage: result for stage, result in run.results.items() if stage in inputs}  # as the stage itself reads
    with written_here(run.folder / name) as folder:
        _build(results, settings, folder, run.config, compared)
    return run.show("report", name)


def _build(
    results: Mapping[str, StageResult],
    settings: TableSettings,
    folder: Path,
    config: Mapping[str, Any] | None,
    compared: Mapping[str, Protocol],
) -> None:
    from ray_pipeline.evaluate.comparison import Comparison
    from ray_pipeline.evaluate.method_stats import differences, method_stats, policy_stats
    from ray_pipeline.evaluate.methods import build_comparison

    by_name = {result.name: result for result in results.values()}
    responses, comparisons, verdicts = _tables(by_name, settings.checker)
    options: Any = {"draws": settings.bootstrap_draws, "seed": settings.seed}
    runs = [_policy_run(by_name, policy) for policy in settings.policies]
    benchmarks = _benchmarks(by_name)
    policies = policy_stats(runs, responses, comparisons, verdicts, settings.mode, benchmarks=benchmarks, **options)
    page = Comparison(
        name=settings.run_name,
        policies=policies,
        methods=method_stats(policies, comparisons, **options),
        differences=differences(policies, settings.over, responses, comparisons, verdicts, settings.mode, **options),
        data={name: "; ".join([how, *_acceptance(by_name, name)]) for name, how in settings.data.items()},
        truth={name: found for name in settings.data if (found := _truth(by_name, name, settings.checker)) is not None},
        facts={
            **settings.facts,
            "held-out prompts": str(len(responses.column("prompt_id").unique())),
            **_protocol_facts(compared, comparisons, responses),
        },
        warnings=list(_warnings(settings)),
        stage_use=[stage_use(result) for result in by_name.values()],
        fingerprints={name: result.fingerprint for name, result in by_name.items()},
        config=config,
    )
    build_comparison(page, folder)


def _acceptance(by_name: Mapping[str, StageResult], data: str) -> Iterator[str]:
    """How many candidates of a dataset were kept, if its rows are made from candidates."""
    rows = by_name.get(f"rows-{data}")
    counts = {} if rows is None else rows.facts.get("counts", {})
    labels = [name for name in ("kto.candidates", "kto.kept") if name in counts]
    if len(labels) == 2 and counts["kto.candidates"]:
        kept, of = counts["kto.kept"], counts["kto.candidates"]
        yield f"acceptance {kept / of:.1%} ({kept:,} of {of:,} candidates, before any cut)"


def _benchmarks(by_name: Mapping[str, StageResult]) -> dict[str, dict[str, float | None]]:
    """Scores of the public benchmarks, model by model."""
    found: dict[str, dict[str, float | None]] = {}
    for result in of_role(by_name, "scores"):
        for key, value in result.facts["scores"].items():
            model, _, score = key.partition(": ")
            found.setdefault(model, {})[score] = value
    return found


def _protocol_facts(compared: Mapping[str, Protocol], comparisons: pa.Table, responses: pa.Table) -> dict[str, str]:
    """Lines of the page on how the win rates, raw and at equal length, were measured."""
    found = {}
    for judge, protocol in compared.items():
        for controlled in (False, True):
            measured = measured_by(completed_protocol(protocol, comparisons, judge, responses, controlled=controlled))
            fixed = "; ".join(f"{field} {value}" for field, value in fixed_fields(measured.protocol).items())
            found[f"protocol {measured.fingerprint}"] = f"{measured.name}: {fixed}"
    return found


def _tables(by_name: Mapping[str, StageResult], checker: str | None) -> tuple[pa.Table, pa.Table, pa.Table]:
    responses, prompts = table_of(by_name, "responses"), table_of(by_name, "prompts")
    comparisons, verdicts = table_of(by_name, "comparisons"), table_of(by_name, "response verdicts")
    assert responses is not None and prompts is not None and comparisons is not None and verdicts is not None
    return with_truth(responses, prompts, checker), comparisons, verdicts


def _policy_run(by_name: Mapping[str, StageResult], policy: PolicyName) -> Any:
    from ray_pipeline.evaluate.method_stats import PolicyRun

    facts = by_name[f"train-{policy.label}"].facts
    return PolicyRun(
        **policy.model_dump(),
        rows=facts["data"]["rows"],
        steps=facts["steps"],
        train_seconds=facts["train_seconds"],
        learnt_from=facts.get("learnt_from", ""),
    )


def _truth(by_name: Mapping[str, StageResult], data: str, checker: str | None) -> RowTruth | None:
    rows, prompts = by_name.get(f"rows-{data}"), table_of(by_name, "prompts")
    if rows is None or prompts is None:
        return None
    # Rows of another source than the run's prompts are not checked; without a chosen checker only those are whose
    # source has one.
    own = prompts if checker is not None else prompts.filter(pc.is_in(prompts["source"], pa.array(CHECKED_SOURCES)))
    found = checker_of(checker, own["source"].to_pylist())
    if found is None:
        return None
    tables = {kind: rows.table(kind).read_all() for kind in rows.tables}
    meta = dict(zip(own["prompt_id"].to_pylist(), own["meta"].to_pylist(), strict=True))
    return row_truth(tables, meta, found)


def _warnings(settings: TableSettings) -> list[str]:
    seeds = {policy.seed for policy in settings.policies}
    shared = sorted(set(settings.curating.values()) & set(settings.evaluating.values()))
    found = []
    if shared:
        found.append(
            f"The judge of the win rates ({', '.join(shared)}) also made the data: it may prefer its own taste. "
            "Compare with another judge (evaluate.judge), or read the win rates with that in mind."
        )
    if len(seeds) < 3:
        found.append(f"Only {len(seeds)} seed(s): the differences may be chance. Use three or more.")
    return found
