"""Agreement with humans and win rates as stages: items and recorded judgements in, a report out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
from pydantic import Field, model_validator

from ray_pipeline.agents.strategies import Conflict
from ray_pipeline.evaluation.agreement_document import MeasureSettings
from ray_pipeline.graph.stage import BadInput, Stage, StageResult, StageStop, WholeInput, WholeWork, stage_table
from ray_pipeline.stages.human_labels import HUMAN_DATA, read_human_labels, where_to_find
from ray_pipeline.stages.recorded import Recorded, Replay, read_recorded
from ray_pipeline.stages.sources import HuggingFaceSource, InputError, JsonlSource, content_digests
from ray_pipeline.store.keys import check_num_shards, shard_of, unit_hash
from ray_pipeline.store.schemas import BALLOTS, ITEMS, to_table
from ray_pipeline.store.settings import Settings


class AgreementData(Settings):
    """The `data` block: items with human labels, and what was recorded of judges.

    Attributes:
        path: of a recorded file (`type: recorded`), or of a local copy of a human data set; default: its place on the
            hub.
        replay: text reads recorded replies again; stored takes what the original run made of them.
        recordings: false leaves recorded judgements out and keeps the items.
        limit: so many items, those of the smallest hash.
    """

    type: Literal["recorded", "alpaca_eval", "fair_eval", "pandalm", "mt_bench"] = "recorded"
    path: str | None = None
    revision: str | None = None
    replay: Replay = "text"
    recordings: bool = True
    limit: int | None = Field(None, ge=1)
    seed: int = 0
    num_shards: int = 8

    @model_validator(mode="after")
    def _consistent(self) -> AgreementData:
        if self.type == "recorded" and self.path is None:
            raise ValueError("data.path is missing: name a file of recorded judgements (data.path=FILE.jsonl.gz)")
        if self.type == "recorded" and self.revision is not None:
            raise ValueError("data.revision is of a data set on the hub; data.type recorded reads a file")
        check_num_shards(self.num_shards)
        return self

    @property
    def label(self) -> str:
        """How reports call the data."""
        return Path(self.path).name if self.path else HUMAN_DATA[self.type].hub_name or self.type


def data_digests(settings: AgreementData) -> dict[str, str]:
    """Content digests of the data. Raises InputError when it cannot be found."""
    if settings.type == "recorded" or (settings.path is not None and not Path(settings.path).is_dir()):
        assert settings.path is not None
        return content_digests(JsonlSource(path=settings.path, column="item_id"))
    name = settings.path or HUMAN_DATA[settings.type].hub_name
    if name is None:
        raise InputError(where_to_find(settings.type))
    return content_digests(HuggingFaceSource(name=name, column="item_id", revision=settings.revision))


def read_data(settings: AgreementData, commit: str | None = None) -> Recorded:
    """Items and recorded ballots.

    Args:
        commit: of the hub to read instead of the newest of `settings.revision`.

    Raises:
        InputError: naming file and place.
    """
    if settings.type == "recorded":
        assert settings.path is not None
        found = read_recorded(settings.path, settings.replay)
    else:
        found = Recorded(read_human_labels(settings.type, settings.path, commit or settings.revision), [])
    items = sorted(found.items, key=lambda item: (unit_hash("items", settings.seed, item["item_id"]), item["item_id"]))
    items = items[: settings.limit]
    kept = {item["item_id"] for item in items}
    ballots = [b for b in found.ballots if b["item_id"] in kept] if settings.recordings else []
    return Recorded(items, ballots)


class _ItemsGiven(Settings):
    data: AgreementData
    commit: str | None


def items_stage(settings: AgreementData) -> Stage:
    """The tables `items` and `ballots` of the data, sharded by question. Raises InputError when it is not there."""
    digests = data_digests(settings)
    commit = next(iter(digests.values())) if settings.path is None else None
    return Stage(
        name="items",
        work=WholeWork(
            function=make_items, settings=_ItemsGiven(data=settings, commit=commit), tables=("items", "ballots")
        ),
        config=settings.model_dump(mode="json", exclude={"path"}),
        external=digests,
    )


def make_items(given: WholeInput) -> dict[str, Any]:
    settings: _ItemsGiven = given.settings
    try:
        found = read_data(settings.data, settings.commit)
    except InputError as error:
        raise BadInput(str(error)) from error
    for kind, rows, schema, key in (
        ("items", found.items, ITEMS, _item_key),
        ("ballots", found.ballots, BALLOTS, _ballot_key),
    ):
        table = stage_table(given.folder.location, ("items", "ballots"), kind, given.num_shards, given.fingerprint)
        shards: list[list[dict[str, Any]]] = [[] for _ in range(given.num_shards)]
        for row in sorted(rows, key=key):
            shards[shard_of(row["prompt_id"], given.num_shards)].append(row)
        for shard, part in enumerate(shards):
            table.write(shard, to_table(part, schema))
    judges = sorted({b["judge"] for b in found.ballots})
    strategies = sorted({b["strategy"] for b in found.ballots})
    given.log(
        f"{len(found.items)} items, {len(found.ballots)} recorded verdicts"
        + (f" of {', '.join(judges)} ({', '.join(strategies)})" if judges else "")
    )
    return {"counts": {"items": len(found.items), "ballots": len(found.ballots)}, "judges": judges}


def _item_key(row: Mapping[str, Any]) -> tuple[str, ...]:
    return (row["item_id"],)


def _ballot_key(row: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(row[f] for f in ("item_id", "strategy", "judge", "voice", "order"))


# --- reports ----------------------------------------------------------------------------------------------------------


class _ReportGiven(Settings):
    measure: MeasureSettings
    data: str
    replay: str


class WinrateMeasure(Settings):
    """The `measure` block of a win-rate run."""

    conflict: Conflict = Field("tie", description="what two orders that differ mean: tie, mean (of scores) or given")
    draws: int = Field(2000, ge=100, description="bootstrap samples of the items")
    seed: int = 0


class _WinrateGiven(Settings):
    measure: WinrateMeasure
    data: str
    replay: str


def agreement_stage(settings: MeasureSettings, data: AgreementData, items: Stage, asked: Sequence[Stage]) -> Stage:
    """agreement.json and report.md over the recorded and the asked verdicts."""
    given = _ReportGiven(measure=settings, data=data.label, replay=_replay(data, asked))
    return _report_stage("agreement", write_agreement_report, given, items, asked)


def winrate_stage(settings: WinrateMeasure, data: AgreementData, items: Stage, asked: Sequence[Stage] = ()) -> Stage:
    """winrate.json and report.md over ballots of strategy `versus`."""
    given = _WinrateGiven(measure=settings, data=data.label, replay=_replay(data, asked))
    return _report_stage("winrate", write_winrate_report, given, items, asked)


def _replay(data: AgreementData, asked: Sequence[Stage]) -> str:
    replayed = "as the original run stored them" if data.replay == "stored" else "read again from the recorded texts"
    if not asked:
        return replayed
    return f"{replayed}, and asked in this run" if data.recordings and data.type == "recorded" else "asked in this run"


def _report_stage(
    name: str, function: Callable[[WholeInput], dict[str, Any]], given: Settings, items: Stage, asked: Sequence[Stage]
) -> Stage:
    return Stage(
        name=name,
        view="report",
        work=WholeWork(function=function, settings=given),
        config=given.model_dump(mode="json"),
        inputs={"items": items, **{f"asked/{stage.name}": stage for stage in asked}},
    )


def write_agreement_report(given: WholeInput) -> dict[str, Any]:
    from ray_pipeline.evaluation.agreement_document import as_document, measure
    from ray_pipeline.report.agreement import write_agreement

    settings: _ReportGiven = given.settings
    try:
        found = measure(_all(given, "items"), _ballots(given), settings.measure)
    except ValueError as error:
        raise BadInput(str(error)) from error
    document = as_document(found, settings.measure, {"data": settings.data, "replay": settings.replay})
    page = write_agreement(document, _local(given))
    best = max(
        (j for j in [*found.judges, *(d.judged for d in found.debates)] if j.agreement.kappa is not None),
        key=lambda j: j.agreement.kappa or -2.0,
        default=None,
    )
    headline = (
        f"{found.items} items, {len(found.judges)} judges, {len(found.juries)} juries, {len(found.debates)} debates"
    )
    if best is not None:
        headline += f"; highest kappa {best.agreement.kappa:.3f} ({best.strategy}: {best.judge})"
    given.log(headline)
    return {"headline": headline, "report": page.name}


def write_winrate_report(given: WholeInput) -> dict[str, Any]:
    from ray_pipeline.evaluation.recorded_winrate import versus_rates
    from ray_pipeline.report.agreement import write_winrate

    settings: _WinrateGiven = given.settings
    rules = settings.measure
    rates = versus_rates(
        _all(given, "items"), _ballots(given), conflict=rules.conflict, draws=rules.draws, seed=rules.seed
    )
    if not rates:
        raise BadInput(f"{settings.data} holds no pairwise verdicts: its items have no `versus` block")
    page = write_winrate(rates, {"data": settings.data, "replay": settings.replay, **rules.model_dump()}, _local(given))
    given.log(f"{len(rates)} runs over {max(r.n for r in rates)} items")
    return {"runs": len(rates), "report": page.name}


def _all(given: WholeInput, kind: str) -> pa.Table:
    return given.inputs["items"].table(kind).read_all()


def _ballots(given: WholeInput) -> pa.Table:
    asked: list[StageResult] = [result for role, result in given.inputs.items() if role.startswith("asked/")]
    return pa.concat_tables([_all(given, "ballots"), *(result.table("ballots").read_all() for result in asked)])


def _local(given: WholeInput) -> Path:
    if not given.folder.is_local:
        raise StageStop(f"a report writes plots to a local folder; {given.folder.location} is none")
    return Path(given.folder.path())
