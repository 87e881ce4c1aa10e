"""Agreement with humans and win rates as stages: items and recorded judgements in, a report out."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
from pydantic import Field, model_validator

from ray_pipeline.agents.strategies import Conflict
from ray_pipeline.agents.verdict_styles import Format
from ray_pipeline.agents.verdicts import unread_reasons
from ray_pipeline.agreement.human_labels import HUMAN_DATA, read_human_labels, where_to_find
from ray_pipeline.agreement.measure_settings import MeasureSettings
from ray_pipeline.agreement.recorded import Recorded, Replay, read_item, read_recorded
from ray_pipeline.config.settings import Settings
from ray_pipeline.data.sources import HuggingFaceSource, InputError, JsonlSource
from ray_pipeline.data.sources.records import AnswerTable
from ray_pipeline.engines.thoughts import answer_of
from ray_pipeline.engines.usage import Usage
from ray_pipeline.graph.results import Run
from ray_pipeline.graph.stage import BadInput, Stage, StageRef, StageResult, WholeInput, WholeWork
from ray_pipeline.stats.protocol import Protocol
from ray_pipeline.store.errors import StoreError
from ray_pipeline.store.files import Folder
from ray_pipeline.store.keys import check_num_shards, digest, unit_hash
from ray_pipeline.store.local import written_here


class AgreementData(AnswerTable):
    """The `data` block: items with human labels, and what was recorded of judges."""

    type: Literal["recorded", "alpaca_eval", "fair_eval", "pandalm", "mt_bench", "pocket"] = Field(
        "recorded", description="where the rows are: the name of the source"
    )
    path: str | None = Field(
        None,
        description="of a recorded file (`type: recorded`), or of a local copy of a human dataset; default: "
        "its place on the hub",
    )
    revision: str | None = Field(None, description="branch, tag or commit; default: the newest commit of main")
    replay: Replay = Field(
        "text", description="text reads recorded replies again; stored takes what the original run made of them"
    )
    format: Format = Field("auto", description="house style in which recorded replies are read; auto: any of them")
    recordings: bool = Field(True, description="false leaves recorded judgements out and keeps the items")
    limit: int | None = Field(
        None,
        ge=1,
        description="maximum number of items (smallest hashes kept); for `type: pocket`, their number",
    )
    seed: int = Field(0, description="seed of all sampling in this block")
    num_shards: int = Field(8, description="shards of every table; divides 1,024")

    @model_validator(mode="after")
    def _consistent(self) -> AgreementData:
        if self.type == "recorded" and self.path is None:
            raise ValueError("data.path is missing: name a file of recorded judgements (data.path=FILE.jsonl.gz)")
        if self.type == "recorded" and self.revision is not None:
            raise ValueError("data.revision applies to datasets on the Hub; data.type recorded reads a file")
        if self.type == "pocket" and (self.limit is None or self.path is not None):
            raise ValueError("data.type pocket makes its items; set their number with data.limit and remove path")
        check_num_shards(self.num_shards)
        return self

    @property
    def label(self) -> str:
        """How reports call the data."""
        if self.type == "pocket":
            return f"{self.limit} pairs of the pocket world"
        return Path(self.path).name if self.path else HUMAN_DATA[self.type].hub_name or self.type

    def told(self, asked: bool) -> str:
        """Source of the verdicts, as text for a report."""
        recorded = "as the original run stored them" if self.replay == "stored" else "read from the recorded texts"
        if not asked:
            return recorded
        return (
            f"{recorded}, and asked in this run" if self.recordings and self.type == "recorded" else "asked in this run"
        )


def data_digests(settings: AgreementData) -> dict[str, str]:
    """Content digests of the data. Raises InputError when it cannot be found."""
    if settings.type == "pocket":
        return {"pocket": digest(_pocket_pairs(settings))}
    if settings.type == "recorded" or (settings.path is not None and not Path(settings.path).is_dir()):
        assert settings.path is not None
        return JsonlSource(path=settings.path, column="item_id").digest()
    name = settings.path or HUMAN_DATA[settings.type].hub_name
    if name is None:
        raise InputError(where_to_find(settings.type))
    return HuggingFaceSource(name=name, column="item_id", revision=settings.revision).digest()


def read_data(settings: AgreementData, commit: str | None = None) -> Recorded:
    """Items and recorded ballots.

    Args:
        commit: of the hub to read instead of the newest of `settings.revision`.

    Raises:
        InputError: naming file and place.
    """
    if settings.type == "recorded":
        assert settings.path is not None
        found = read_recorded(settings.path, settings.replay, settings.format)
    elif settings.type == "pocket":
        found = Recorded([read_item(row["item_id"], row) for row in _pocket_pairs(settings)], [])
    else:
        found = Recorded(read_human_labels(settings.type, settings.path, commit or settings.revision), [])
    if settings.thoughts == "split":
        for item in found.items:
            item.update({field: answer_of(item[field]) for field in ("response_a", "response_b")})
    items = sorted(found.items, key=lambda item: (unit_hash("items", settings.seed, item["item_id"]), item["item_id"]))
    items = items[: settings.limit]
    kept = {item["item_id"] for item in items}
    ballots = [b for b in found.ballots if b["item_id"] in kept] if settings.recordings else []
    return Recorded(items, ballots)


def _pocket_pairs(settings: AgreementData) -> list[dict[str, Any]]:
    from ray_pipeline.pocket.pairs import make_pairs

    assert settings.limit is not None
    try:
        return make_pairs(settings.limit, settings.seed)
    except ValueError as error:
        raise InputError(f"data.type pocket: {error}") from error


class _ItemsGiven(Settings):
    data: AgreementData
    commit: str | None


def items_stage(settings: AgreementData) -> Stage:
    """The tables `items` and `ballots` of the data, sharded by question. Raises InputError if it is missing."""
    digests = data_digests(settings)
    commit = next(iter(digests.values())) if settings.path is None and settings.type != "pocket" else None
    return Stage(
        name="items",
        work=WholeWork(
            function=make_items, settings=_ItemsGiven(data=settings, commit=commit), tables=("items", "ballots")
        ),
        config=settings.decisive(exclude={"path"}),
        external=digests,
    )


def make_items(given: WholeInput) -> dict[str, Any]:
    settings: _ItemsGiven = given.settings
    try:
        found = read_data(settings.data, settings.commit)
    except InputError as error:
        raise BadInput(str(error)) from error
    ref = StageRef("items", given.fingerprint, given.folder.location, given.num_shards, ("items", "ballots"))
    ref.table("items").write_rows(sorted(found.items, key=operator.itemgetter("item_id")))
    of_an_item = operator.itemgetter("item_id", "strategy", "judge", "voice", "order")
    ref.table("ballots").write_rows(sorted(found.ballots, key=of_an_item))
    judges = sorted({b["judge"] for b in found.ballots})
    strategies = sorted({b["strategy"] for b in found.ballots})
    given.log(
        f"{len(found.items)} items, {len(found.ballots)} recorded verdicts"
        + (f" of {', '.join(judges)} ({', '.join(strategies)})" if judges else "")
    )
    unread = unread_reasons(b["reason"] for b in found.ballots if b["parse_status"] == "unparsed")
    if unread:
        given.log("unread: " + ", ".join(f"{count} {why}" for why, count in unread.items()))
    return {"counts": {"items": len(found.items), "ballots": len(found.ballots)}, "judges": judges, "unread": unread}


# --- reports ----------------------------------------------------------------------------------------------------------


class WinrateMeasure(Settings):
    """The `measure` block of a win-rate run."""

    conflict: Conflict = Field("tie", description="what two orders that differ mean: tie, mean (of scores) or given")
    draws: int = Field(2000, ge=100, description="bootstrap samples of the questions")
    seed: int = Field(0, description="seed of all sampling in this block")


class AgreementPage(Settings):
    """Content of a report, and how it is computed; stored in the manifest, so that it can be rewritten.

    Attributes:
        judge_models: judge or debater → name of its model, for those asked in this run.
        asked: protocol of the verdicts of a win rate, if this run asked for them.
        models: role → name of a model that responded in this run.
    """

    workflow: Literal["agreement", "winrate"]
    data: str
    replay: str
    measure: MeasureSettings = MeasureSettings()
    winrate: WinrateMeasure = WinrateMeasure()
    judge_models: dict[str, str] = Field(default_factory=dict)
    asked: Protocol | None = None
    models: dict[str, str] = Field(default_factory=dict)


def report_stage(page: AgreementPage, items: Stage, asked: Sequence[Stage] = (), behind: Sequence[Stage] = ()) -> Stage:
    """agreement.json or winrate.json, and report.md, over the recorded and the asked verdicts.

    Args:
        behind: stages before them, for what the run took.
    """
    return Stage(
        name=page.workflow,
        version=3 if page.workflow == "agreement" else 1,  # 3: calibrated pools and cascades
        view="report",
        role="page",
        work=WholeWork(function=write_report_stage, settings=page),
        config=page.decisive(exclude={"asked", "models"}),  # these are in the fingerprints of the stages that asked
        inputs={
            "items": items,
            **{f"asked/{stage.name}": stage for stage in asked},
            **{f"behind/{stage.name}": stage for stage in behind},
        },
    )


def write_report_stage(given: WholeInput) -> dict[str, Any]:
    try:
        with written_here(given.folder) as folder:
            headline = write_page(given.settings, list(given.inputs.values()), folder)
    except ValueError as error:
        raise BadInput(str(error)) from error
    for line in headline.splitlines():
        given.log(line)
    return {"headline": headline}


def rewrite_page(run: Run) -> Folder:
    """Rewrite the report of a run from its tables, as far as they exist; returns its folder.

    Raises:
        StoreError: its items do not exist yet.
    """
    results = [result for name, result in run.results.items() if run.stages[name].role != "page"]
    if not any("items" in result.tables for result in results):
        raise StoreError(f"{run.folder.location} has no items yet; `quorum run` makes them")
    page = AgreementPage.model_validate(run.page)
    name = run.page_folder(page.workflow)
    try:
        with written_here(run.folder / name) as folder:
            write_page(page, results, folder)
    except ValueError as error:
        raise StoreError(str(error)) from error
    return run.show("report", name)


def write_page(page: AgreementPage, results: Sequence[StageResult], folder: Path) -> str:
    """Compute and write a report from the stages that have ballots; returns its first line.

    Raises:
        ValueError: the tables do not fit together or hold nothing to report.
    """
    from ray_pipeline.agreement.document import as_document, measure
    from ray_pipeline.agreement.files import write_agreement, write_winrate
    from ray_pipeline.agreement.gate_curves import gate_curves
    from ray_pipeline.agreement.panel import make_panel
    from ray_pipeline.agreement.recorded_winrate import RECORDED, versus_rates
    from ray_pipeline.agreement.versus import cut_responses
    from ray_pipeline.evaluate.first_screen import first_screen

    items = pa.concat_tables([r.table("items").read_all() for r in results if "items" in r.tables])
    ballots = pa.concat_tables([r.table("ballots").read_all() for r in results if "ballots" in r.tables])
    about = {"data": page.data, "replay": page.replay}
    if page.workflow == "winrate":
        asked = page.winrate
        how = page.asked or dataclasses.replace(RECORDED, reading=page.replay)
        rates = versus_rates(items, ballots, conflict=asked.conflict, draws=asked.draws, seed=asked.seed, asked=how)
        if not rates:
            raise ValueError(f"{page.data} holds no pairwise verdicts: none of its items has a `versus` block")
        models = page.models or {name: "" for r in rates for name in (r.configuration, r.baseline) if name}
        answers = first_screen(
            f"win rates on {page.data}",
            models=models,
            judges={"": ", ".join(sorted(set(ballots["judge"].to_pylist())))},
            amounts=[
                (len(rates), "runs"),
                (len(items), "items"),
                (len(ballots), "verdicts"),
                (cut_responses(results), "responses cut off"),
            ],
            usage=sum((r.usage for r in results), Usage()),
        )
        write_winrate(rates, {**about, **asked.model_dump()}, folder, answers)
        lines = [f"{len(rates)} runs over {max(r.n for r in rates)} items; win rates in per cent, ties are not wins:"]
        for name in dict.fromkeys(r.configuration for r in rates):
            cells = [
                f"{r.win_rate.value:.1f} against {r.baseline or r.run}"
                for r in rates
                if r.configuration == name and r.n
            ]
            lines.append(f"{name}: {', '.join(cells)}")
        return "\n".join(lines)
    found = measure(items, ballots, page.measure, page.judge_models)
    rules = page.measure
    panel = make_panel(items, ballots, rules.conflict, rules.debate, rules.families)
    curves = gate_curves(panel, rules.gate_thresholds, draws=rules.draws, seed=rules.seed, confidence=rules.confidence)
    gate = {
        "gate_curves": [row for curve in curves for row in curve.summary],
        "gate_points": [line for curve in curves for line in curve.points],
    }
    models = {judge.judge: judge.model or "" for judge in found.bias} | page.judge_models
    debaters = {debate.debater: page.judge_models.get(debate.debater, "") for debate in found.debates}
    answers = first_screen(
        f"agreement of judges on {page.data}",
        judges={
            "": {judge.judge: models.get(judge.judge) or judge.judge for judge in found.judges},
            "debates": {name: model or name for name, model in debaters.items()},
        },
        amounts=[
            (found.items, "items"),
            (found.labelled, "with a human label"),
            (len(ballots), "verdicts"),
            (len(found.juries), "juries"),
        ],
        usage=sum((r.usage for r in results), Usage()),
    )
    write_agreement({**as_document(found, rules, about), **gate}, folder, curves, answers, found.posteriors)
    judged = [*found.judges, *(d.judged for d in found.debates)]
    headline = (
        f"{found.items} items, {len(found.judges)} judges, {len(found.juries)} juries, {len(found.debates)} debates"
    )
    known = [j for j in judged if j.agreement.kappa is not None]
    if known:
        best = max(known, key=lambda j: j.agreement.kappa or 0.0)
        headline += f"; highest kappa of one judge {best.agreement.kappa:.3f} ({best.strategy}: {best.judge})"
    return headline
