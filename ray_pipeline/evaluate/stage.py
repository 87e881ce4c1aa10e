"""The report of a run: statistics of the data, the judges and the policy, if it has one, from the stored tables."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow.compute as pc
import yaml
from pydantic import Field

from ray_pipeline.config.blocks import CallsBlock
from ray_pipeline.config.settings import Settings
from ray_pipeline.data.checkers import CheckerKey
from ray_pipeline.data.decontamination import contamination_of
from ray_pipeline.data.early_exit import SliceBy, slice_of
from ray_pipeline.data.escalation import Levels
from ray_pipeline.data.gate import GateConfig
from ray_pipeline.data.reviewed import HumanLabelsKey
from ray_pipeline.engines.imports import heavy_imports
from ray_pipeline.engines.models import ModelSettings
from ray_pipeline.graph.results import Run, decision, of_final_round, of_role, table_of
from ray_pipeline.graph.stage import Stage, StageResult, WholeInput, WholeWork
from ray_pipeline.policy.comparisons import EvaluateSettings, win_rate_protocol
from ray_pipeline.policy.train import METRICS
from ray_pipeline.stats.protocol import Protocol
from ray_pipeline.store.errors import StoreError
from ray_pipeline.store.files import Folder
from ray_pipeline.store.local import written_here
from ray_pipeline.store.locations import join
from ray_pipeline.store.schemas import TRAIN_METRICS

if TYPE_CHECKING:  # Torch, transformers and scikit-learn take seconds to import, and a DAG is wired without them.
    from ray_pipeline.evaluate.data import ReportData, StageUse
    from ray_pipeline.evaluate.planned import PlannedUse
    from ray_pipeline.policy.perplexity import Perplexity


#: File of the last stage that holds the protocols of its win rates, by judge.
_PROTOCOLS = "protocols.json"


#: Names, what the stages say themselves, and a file whose digest counts.
_NOT_DECISIVE = {"run_name", "config_digest", "models", "stages", "human_labels", "no_error_rates", "items"}


class ReportSettings(Settings):
    """Content of a run's report beside its tables.

    Attributes:
        stages: those that the workflow should have, so that missing ones are named; default: those of DMAPO. Without
            `train` among them, the report is about the data alone.
        models: role → name of the model, for reading.
        cards: key of a judge's model → the judges of its card (`judge_card.cards`).
        audit_slice: calls were skipped (`judge.early_exit`, `judge.escalate`, `select.escalate`), so that agreement is
            that of the audit slice.
        slice_by: what the slice is drawn from.
        levels: judges by level (`judge.escalate`, `select.escalate`).
    """

    run_name: str
    workflow: str = "dmapo"
    stages: tuple[str, ...] | None = None
    config_digest: str = ""
    models: dict[str, str] = Field(default_factory=dict)
    curating: dict[str, str] = Field(default_factory=dict)
    evaluating: dict[str, str] = Field(default_factory=dict)
    candidate: str = ""
    gate: GateConfig = GateConfig()
    human_labels: HumanLabelsKey = None
    checker: CheckerKey = None
    #: Judges whose errors are not measured: programs, which may be the truth themselves, and judges without a score.
    no_error_rates: tuple[str, ...] = ()
    #: Judge → texts of the items of its checklist, where they are given.
    items: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    bootstrap_draws: int = 2000
    seed: int = 0
    audit_slice: bool = False
    slice_by: SliceBy = "candidate_id"
    levels: Levels = ()
    cards: dict[str, list[dict[str, Any]]] = Field(default_factory=dict)


class _Given(Settings):
    evaluate: EvaluateSettings
    report: ReportSettings
    base: ModelSettings | None
    max_length: int
    compared: dict[str, Protocol] = Field(default_factory=dict)


def evaluate(
    settings: EvaluateSettings,
    report: ReportSettings,
    base: ModelSettings | None,
    max_length: int,
    stages: Sequence[Stage],
) -> Stage:
    """The page, metrics.json and summary.csv of the given stages, in their order.

    Args:
        base: the model that the policy was trained from; None without a policy, where the stage is named `report`.
    """
    given = _Given(
        evaluate=settings, report=report, base=base, max_length=max_length, compared=win_rate_protocol(stages)
    )
    return Stage(
        name="report" if base is None else "evaluate",
        version=2,  # 2: win rates carry a protocol
        view="report",
        role="page",
        work=WholeWork(function=evaluate_run, settings=given),
        config={
            "evaluate": settings.decisive(),
            "report": report.decisive(exclude=_NOT_DECISIVE),
            "max_length": max_length,
        },
        inputs={stage.name: stage for stage in stages},
        external={
            **({} if base is None else base.weights()),
            **({} if report.human_labels is None else report.human_labels.digest()),
        },
    )


def evaluate_run(given: WholeInput) -> dict[str, Any]:
    """Measure the perplexities, then write the report."""
    from ray_pipeline.data.errors_page import effective_text
    from ray_pipeline.evaluate.build import build_report

    settings: _Given = given.settings
    measured: dict[str, Perplexity] = {}
    if settings.base is not None and settings.evaluate.perplexity and of_role(given.inputs, "policy"):
        measured = _perplexities(of_final_round(given.inputs), settings)
    given.folder.write_json("perplexity.json", {name: dataclasses.asdict(p) for name, p in measured.items()})
    store_protocols(given.folder, settings.compared)
    data = report_data(given.inputs, settings.report, measured, settings.compared)
    run_folder = given.folder.parent
    planned = planned_use(run_folder, given.inputs)
    config = stored_config(run_folder)
    data = dataclasses.replace(data, config=config, planned=planned, calls=_call_log(run_folder, config))
    with written_here(given.folder) as folder:
        build_report(data, folder)
    headline = given.folder.read_json("metrics.json")["headline"]
    given.log(headline["text"] if isinstance(headline, dict) and "text" in headline else str(headline))
    if data.judge_errors is not None and data.judge_errors.best is not None:
        panel = data.judge_errors.best
        basis = "against the truth" if panel.basis == "truth" else "an estimate without the truth"
        given.log(f"judges ({basis}): {effective_text(panel)}")
    return {"headline": headline}


def _perplexities(results: Mapping[str, StageResult], settings: _Given) -> dict[str, Perplexity]:
    """Of base and policy, on held-out desirable answers."""

    from ray_pipeline.policy.perplexity import perplexity

    (datasets,) = of_role(results, "datasets")
    folder = Folder(datasets.folder) / "kto/val"
    rows: list[tuple[str, Any, str]] = []
    for name in folder.names(".parquet"):
        table = folder.read_table(name, fingerprint=datasets.fingerprint)
        for row in table.filter(pc.field("label")).to_pylist():
            rows.append((row["candidate_id"], row["prompt"], row["completion"][-1]["content"]))
    rows = sorted(rows, key=lambda row: row[0])[: settings.evaluate.perplexity_rows]
    if not rows:
        return {}
    (trained,) = of_role(results, "policy")
    assert settings.base is not None
    base, adapter = settings.base.model, join(trained.folder, "adapter")
    adapted = {"adapter", "merged"} & set(Folder(trained.folder).folders()) == {"adapter"}
    policy = base if adapted else join(trained.folder, "merged")
    found = {}
    for name, path in (("base", base), ("policy", policy)):
        measure = functools.partial(
            perplexity,
            path,
            [(prompt, text) for _, prompt, text in rows],
            max_length=settings.max_length,
            trust_remote_code=settings.base.trust_remote_code,
            revision=settings.base.revision if path == base else None,
            adapter=adapter if adapted and name == "policy" else None,
            chat_template_kwargs=settings.base.chat_template_args,
        )
        found[name] = _where_a_gpu_is(measure)
    return found


def _where_a_gpu_is(measure: Callable[..., Perplexity]) -> Perplexity:
    """Call with device and dtype: as a task that holds a GPU of the cluster, if it has one, else here."""
    import ray

    on_gpu: dict[str, str] = {"device": "cuda", "dtype": "bfloat16"}
    if ray.is_initialized() and ray.cluster_resources().get("GPU"):
        task: Any = ray.remote(num_cpus=0, num_gpus=1)(lambda: measure(**on_gpu))
        found: Perplexity = ray.get(task.remote())
        return found
    with heavy_imports():
        import torch
    return measure(**on_gpu) if torch.cuda.is_available() else measure(device="cpu", dtype="float32")


def store_protocols(folder: Folder, compared: Mapping[str, Protocol]) -> None:
    """Store them beside the page, so that the page can be rewritten."""
    folder.write_json(_PROTOCOLS, {judge: dataclasses.asdict(protocol) for judge, protocol in compared.items()})


def stored_protocols(folder: Folder) -> dict[str, Protocol]:
    """Judge → protocol, as the last stage of a run left them; empty where it is not done, or was made without any."""
    try:
        return {judge: Protocol(**fields) for judge, fields in folder.read_json(_PROTOCOLS, set_aside=True).items()}
    except FileNotFoundError:
        return {}


def report_data(
    results: Mapping[str, StageResult],
    settings: ReportSettings,
    measured: Mapping[str, Perplexity],
    compared: Mapping[str, Protocol] | None = None,
) -> ReportData:
    """Everything a report shows, from the results of the stages that there are (by role or by name).

    Args:
        measured: model → perplexity.
        compared: judge of the comparisons → their protocol, as far as settings determine it.
    """
    from ray_pipeline.data.checklist_stats import checklist_stats
    from ray_pipeline.data.judge_votes import judge_errors
    from ray_pipeline.data.level_stats import escalation_of, picks_of
    from ray_pipeline.evaluate.data import DMAPO_STAGES, ReportData, RunIdentity
    from ray_pipeline.evaluate.rounds import responses_of, round_stats

    whole = {result.name: result for result in results.values()}
    by_name, decided = of_final_round(whole), decision(whole)
    prompts = table_of(by_name, "prompts")
    responses = responses_of(by_name, settings.checker)
    data, sourced, train, scored, gated = (
        _one(by_name, role) for role in ("datasets", "prompts", "policy", "scores", "decisions")
    )
    rows: Mapping[str, Any] = {} if data is None else data.facts
    candidates, verdicts = table_of(by_name, "candidates"), table_of(by_name, "verdicts")
    draws, seed, agreement_on = settings.bootstrap_draws, settings.seed, None
    if settings.audit_slice and candidates is not None:
        agreement_on = candidates.filter(slice_of(candidates, settings.slice_by))["candidate_id"].to_pylist()
    return ReportData(
        run=RunIdentity(
            name=settings.run_name,
            workflow=settings.workflow,
            config_digest=settings.config_digest,
            fingerprints={name: result.fingerprint for name, result in whole.items()},
            models=settings.models,
            stages=DMAPO_STAGES if settings.stages is None else settings.stages,
        ),
        prompt_counts=None if sourced is None else sourced.facts.get("counts"),
        contamination=contamination_of(result.facts for result in by_name.values()),
        prompts=prompts,
        candidates=candidates,
        verdicts=verdicts,
        judge_errors=judge_errors(
            by_name,
            settings.checker,
            settings.no_error_rates,
            desirable_from=settings.gate.desirable_at,
            undesirable_to=settings.gate.undesirable_at,
            only=None if agreement_on is None else set(agreement_on).__contains__,
        ),
        checklists=[]
        if verdicts is None
        else checklist_stats(verdicts, settings.items, table_of(by_name, "checklists")),
        critiques=table_of(by_name, "critiques"),
        decisions=table_of(by_name, "decisions"),
        agreement_on=agreement_on,
        escalation=picks_of(by_name, settings.levels, draws, seed)
        if settings.slice_by == "prompt_id"
        else escalation_of(by_name, settings.gate, settings.levels, draws, seed),
        dataset_counts=rows.get("rows"),
        dataset_guards=rows.get("dropped"),
        kto_weights=rows.get("kto_weights"),
        lengths=rows.get("lengths"),
        train_settings=None if train is None else train.facts.get("effective"),
        train_metrics=None
        if train is None
        else Folder(train.folder).read_table(METRICS, fingerprint=train.fingerprint, schema=TRAIN_METRICS),
        comparisons=table_of(by_name, "comparisons"),
        responses=responses,
        response_verdicts=table_of(by_name, "response verdicts"),
        perplexity=dict(measured) or None,
        curating_models=settings.curating,
        evaluating_models=settings.evaluating if of_role(by_name, "comparisons") else {},
        candidate_model=settings.candidate,
        compared=compared or {},
        stage_use=[stage_use(result) for result in whole.values()],
        rounds=round_stats(whole, settings.checker, draws=settings.bootstrap_draws, seed=settings.seed),
        decided=None if decided is None else decided.facts,
        benchmarks=_benchmark_scores(scored),
        people=None if settings.human_labels is None else settings.human_labels.read(),
        gate=settings.gate,
        certified=None if gated is None else gated.facts.get("certified"),
        posterior=None if gated is None else gated.facts.get("posterior"),
        cards=settings.cards,
        desirable_from=settings.gate.desirable_at,
        undesirable_to=settings.gate.undesirable_at,
        bootstrap_draws=settings.bootstrap_draws,
        bootstrap_seed=settings.seed,
    )


def planned_use(run_folder: Folder, results: Mapping[str, StageResult]) -> list[PlannedUse]:
    """The stages that `quorum plan` planned for this run folder, beside what they took; none without a plan."""
    from ray_pipeline.evaluate.planned import compare_with_plan

    try:
        plan = run_folder.read_json("plan.json")
    except (FileNotFoundError, StoreError):
        return []
    return compare_with_plan(plan, {result.name: result.usage.plain() for result in results.values()})


def _one(results: Mapping[str, StageResult], role: str) -> StageResult | None:
    """The only result of a role, or None where that stage is not done."""
    return next(iter(of_role(results, role)), None)


def _benchmark_scores(result: StageResult | None) -> list[dict[str, Any]]:
    """Scores of public benchmarks that the run has; none where it ran none."""
    if result is None or not Folder(result.folder).exists("benchmarks.json"):
        return []
    scores: list[dict[str, Any]] = Folder(result.folder).read_json("benchmarks.json", set_aside=True)["scores"]
    return scores


def stored_config(run_folder: Folder) -> dict[str, Any] | None:
    """The configuration as the run keeps it beside its stages, for the page; None for a stage folder by itself."""
    try:
        return yaml.safe_load(run_folder.read_bytes("config.yaml"))  # type: ignore[no-any-return]
    except FileNotFoundError:
        return None


def _call_log(run_folder: Folder, config: Mapping[str, Any] | None) -> str:
    """Where the configuration of a run has its call log; "" for a stage folder by itself."""
    calls = (config or {}).get("calls")
    return CallsBlock.model_validate(calls).folder(run_folder.location) if isinstance(calls, Mapping) else ""


def stage_use(result: StageResult) -> StageUse:
    """What one stage used, for a report."""
    from ray_pipeline.evaluate.data import StageUse

    usage = result.usage.plain()

    def whole(name: str) -> int | None:
        return int(usage[name]) if name in usage else None

    return StageUse(
        stage=result.name,
        rows=sum(result.rows.values()) if result.rows else None,
        calls=whole("calls_engine"),
        log_hits=whole("calls_log"),
        prompt_tokens=whole("prompt_tokens"),
        completion_tokens=whole("completion_tokens"),
        cached_tokens=whole("cached_tokens"),
        seconds=usage.get("wall_seconds"),
        errors=None,
        cost=usage.get("cost"),
        cut_prompts=whole("cut_prompts"),
    )


def write_report(run: Run) -> Folder:
    """The report of a run as far as it got, from its stored tables; returns its folder."""
    from ray_pipeline.evaluate.build import build_report
    from ray_pipeline.policy.perplexity import Perplexity

    settings = ReportSettings.model_validate(run.page)
    page = next(stage.name for stage in run.stages.values() if stage.role == "page")
    measured, compared, name = {}, {}, run.page_folder(page)
    if page in run.results:
        done = run.folder / name
        measured = {
            name: Perplexity(**values) for name, values in done.read_json("perplexity.json", set_aside=True).items()
        }
        compared = stored_protocols(done)
    data = report_data(run.results, settings, measured, compared)
    planned = planned_use(run.folder, run.results)
    calls = _call_log(run.folder, run.config)
    data = dataclasses.replace(data, config=run.config or None, planned=planned, calls=calls)
    with written_here(run.folder / name) as folder:
        build_report(data, folder)
    return run.show("report", name)
